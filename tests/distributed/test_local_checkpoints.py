"""Checkpoints on the nodes' own disks: a killed run goes on from them bit for bit, and from the one
in --save where a node lost its own."""

from __future__ import annotations

import errno
import os
import shutil
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from retro_mcore.errors import CheckpointError, ConfigurationError
from tests.distributed.test_checkpoints import digest, random_states
from tests.processes import run_ranks
from tests.unit.training.small import BATCH, TRAIN_SAMPLES, small_trainer

pytestmark = [
    pytest.mark.distributed,
    pytest.mark.skipif(
        find_spec("nvidia_resiliency_ext") is None,
        reason="nvidia-resiliency-ext, an optional package, is not installed (make test-local)",
    ),
]

ITERATIONS = TRAIN_SAMPLES // BATCH
SAVE_INTERVAL, KILLED = 3, 5
# All with dropout, of the decoder and of the encoder.
LAYOUTS = {
    "distributed optimizer": {"use_distributed_optimizer": True},
    "tensor parallel, atomic": {
        "tensor_model_parallel_size": 2,
        "non_persistent_local_ckpt_algo": "atomic",
    },
    "pipeline in bf16": {"pipeline_model_parallel_size": 2, "bf16": True},
}
FOUR = {
    "tensor_model_parallel_size": 2,
    "use_distributed_optimizer": True,
    "replication": True,
    "replication_jump": 2,
}


class Killed(Exception):
    """Stands for the end of all processes."""


def node(folder):
    """The disk of this rank's node. Nodes have as many ranks as copies are apart, else one."""
    ranks = FOUR["replication_jump"] if torch.distributed.get_world_size() == 4 else 1
    return folder / "nodes" / str(torch.distributed.get_rank() // ranks)


def saving(folder, **options):
    """Options of a run that saves there, locally after every iteration."""
    return {
        "save": str(folder / "checkpoints"),
        "load": str(folder / "checkpoints"),
        "save_interval": SAVE_INTERVAL,
        "non_persistent_ckpt_type": "local",
        "non_persistent_save_interval": 1,
        "non_persistent_local_ckpt_dir": str(node(folder)),
        "deterministic_mode": True,
        **options,
    }


def run(killed=None, **options):
    """A run's start, what it told of local checkpoints, its losses and what it ends with.

    Args:
        killed: Ends it after the local checkpoint of this iteration.
    """
    trainer = small_trainer(**options)
    start, notes = trainer._progress.iteration, trainer._local.notes if trainer._local else []
    save = trainer._save_locally

    def save_and_end(reporter):
        save(reporter)
        if trainer._progress.iteration == killed:
            raise Killed

    trainer._save_locally = save_and_end
    try:
        trainer.train()
    except Killed:
        assert killed is not None
    torch.distributed.barrier()  # others may still remove files
    chained = trainer._parts.optimizer.chained_optimizers  # experts have one of their own
    adam = [state for part in chained for state in part.optimizer.state.values()]
    return {
        "start": start,
        "notes": notes,
        "losses": trainer._result.train_losses,
        "state": (
            digest(*trainer._parts.stages[0].parameters()),
            digest(*(state[name] for state in adam for name in sorted(state))),
            digest(*random_states()),
            trainer._parts.scheduler.num_steps,
        ),
    }


def files_of(folder):
    """This rank's local checkpoints, of which there are those of one start only."""
    (run_folder,) = node(folder).iterdir()
    return sorted((run_folder / str(torch.distributed.get_rank())).iterdir())


def names(paths):
    return [path.name for path in paths]


def copy_of(folder, name):
    """On each rank the same copy of a killed run's directories, to change."""
    target = folder.with_name(f"{folder.name}, {name}")
    if torch.distributed.get_rank() == 0:
        shutil.copytree(folder, target)
    torch.distributed.barrier()
    return target


def change(function, *args):
    """Let rank 0 change files while no rank reads them."""
    torch.distributed.barrier()
    if torch.distributed.get_rank() == 0:
        function(*args)
    torch.distributed.barrier()


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    return run_ranks(2, on_one_of_two, tmp_path_factory.mktemp("two_processes"))


def on_one_of_two(root: Path):
    results = {}
    for name, layout in LAYOUTS.items():
        folder = root / name
        model = {key: value for key, value in layout.items() if "ckpt" not in key}
        whole = run(**model, deterministic_mode=True)
        options = saving(folder, **layout)
        killed = run(killed=KILLED, **options)
        files = names(files_of(folder))
        lost = copy_of(folder, "lost")
        results[name] = {
            "whole": whole,
            "killed": killed,
            "files": files,
            "resumed": run(**options),
            "left": [*node(folder).iterdir()],
            "lost": lose_and_resume(lost, layout),
        }
    return results


def lose_and_resume(folder, layout):
    change(shutil.rmtree, folder / "nodes" / "1")
    return run(**saving(folder, **layout))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_killed_run_goes_on_from_the_local_checkpoint_exactly(two, layout):
    for rank, results in enumerate(two):
        found = results[layout]
        whole, resumed = found["whole"], found["resumed"]
        assert len(whole["losses"]) == ITERATIONS
        assert found["killed"]["losses"] == whole["losses"][:KILLED]
        assert found["files"] == [f"iter_{KILLED:07d}_{rank}_local.pt"]  # those before are removed
        assert (resumed["start"], resumed["notes"]) == (KILLED, [])
        assert resumed["losses"] == whole["losses"][KILLED:]
        assert resumed["state"] == whole["state"]
        assert found["left"] == []  # the run has ended


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_lost_node_costs_no_more_than_the_save_interval(two, layout):
    for results in two:
        whole, lost = results[layout]["whole"], results[layout]["lost"]
        assert lost["start"] == SAVE_INTERVAL
        assert lost["notes"] == [
            f"the local checkpoint of iteration {KILLED} is not used: there is none of rank 1"
        ]
        assert lost["losses"] == whole["losses"][SAVE_INTERVAL:]
        assert lost["state"] == whole["state"]


@pytest.fixture(scope="module")
def troubles(tmp_path_factory):
    return run_ranks(2, in_trouble, tmp_path_factory.mktemp("troubles"))


def in_trouble(root: Path):
    layout = LAYOUTS["distributed optimizer"]
    folder = root / "run"
    killed = run(killed=KILLED, **saving(folder, **layout))
    damaged, step = copy_of(folder, "damaged"), copy_of(folder, "step")
    if torch.distributed.get_rank() == 0:
        damage(files_of(damaged)[0])
    branch = saving(step, **layout)
    return {
        "killed": killed,
        "damaged": start_of(**saving(damaged, **layout)),
        "another layout": start_of(**saving(folder, **layout, tensor_model_parallel_size=2)),
        "weights alone": start_of(**saving(folder, **layout), finetune=True, other_save=root / "x"),
        "earlier": run(killed=SAVE_INTERVAL + 1, ckpt_step=SAVE_INTERVAL, **branch),
        "files of the branch": names(files_of(step)),
        "after the branch": start_of(**branch),
        "after saving elsewhere": [
            branch_in_save(copy_of(folder, f"{with_local}"), layout, with_local)
            for with_local in (True, False)
        ],
        "after saving locally": branch_in_save_then_locally(copy_of(folder, "both"), layout),
        "returned": lose_and_return(copy_of(folder, "returned"), layout),
        "full disk": on_a_full_disk(root / "full", layout),
    }


def start_of(other_save=None, **options):
    """Where a run would start, and what it tells of local checkpoints."""
    if other_save is not None:
        options["save"] = str(other_save)
    trainer = small_trainer(**options)
    return trainer._progress.iteration, trainer._local.notes


def branch_in_save_then_locally(folder, layout):
    """A branch from an earlier iteration that saves in --save before it saves locally."""
    options = saving(folder, **layout)
    run(killed=KILLED, **{**options, "save_interval": 4, "ckpt_step": SAVE_INTERVAL})
    return len(files_of(folder)), start_of(**options)


def branch_in_save(folder, layout, with_local):
    """Where a run starts after a branch from an earlier iteration that saved in --save alone."""
    options = saving(folder, **layout)
    branch = {**options, "save_interval": 4, "ckpt_step": SAVE_INTERVAL, "exit_interval": 4}
    local = [name for name in branch if "non_persistent" in name]
    small_trainer(**(branch if with_local else without(branch, local))).train()
    return start_of(**options)


def without(options, names):
    return {name: value for name, value in options.items() if name not in names}


def lose_and_return(folder, layout):
    """Where a run starts if a node comes back with what it saved before others went on."""
    nodes = folder / "nodes"
    change(shutil.move, nodes / "1", folder / "away")
    lost = run(killed=KILLED, **saving(folder, **layout))
    change(shutil.rmtree, nodes / "1")
    change(shutil.move, folder / "away", nodes / "1")
    return lost["start"], start_of(**saving(folder, **layout))


def damage(path: Path):
    content = bytearray(path.read_bytes())
    for index in range(len(content) // 2, len(content) // 2 + 200):  # beyond what is padding
        content[index] ^= 1
    path.write_bytes(content)


def on_a_full_disk(folder, layout):
    """Rank 1 cannot write the last local checkpoint; the next run can."""
    write = torch.save

    def fail(value, file, *args, **kwargs):
        write(value, file, *args, **kwargs)
        if f"iter_{KILLED:07d}_1_local" in str(getattr(file, "name", file)):
            try:
                raise OSError(errno.ENOSPC, "No space left on device")
            finally:
                raise RuntimeError("unexpected pos")  # as torch does then

    torch.save = fail
    try:
        with pytest.raises(CheckpointError) as caught:
            run(**saving(folder, **layout))
    finally:
        torch.save = write
    files = names(files_of(folder))
    return str(caught.value), files, run(killed=KILLED, **saving(folder, **layout))


def test_a_damaged_file_is_not_used(troubles):
    for results in troubles:
        start, notes = results["damaged"]
        assert start == SAVE_INTERVAL
        assert notes[0].startswith("a local checkpoint is damaged: ")
        assert notes[1].endswith("is not used: there is none of rank 0")


def test_another_layout_goes_on_from_the_other_checkpoint(troubles):
    for results in troubles:
        start, notes = results["another layout"]
        assert start == SAVE_INTERVAL
        assert "another layout (tensor_model_parallel_size 1, now 2; expert" in notes[0]


def test_an_earlier_start_is_a_branch_of_its_own(troubles):
    for results in troubles:
        assert results["earlier"]["start"] == SAVE_INTERVAL
        assert results["earlier"]["losses"] == results["killed"]["losses"][SAVE_INTERVAL:-1]
        # That of the other branch, although newer, is gone.
        (name,) = results["files of the branch"]
        assert name.startswith(f"iter_{SAVE_INTERVAL + 1:07d}_")
        assert results["after the branch"] == (SAVE_INTERVAL + 1, [])
        assert results["weights alone"] == (0, [])


def test_nothing_of_an_abandoned_branch_is_resumed(troubles):
    for results in troubles:
        assert results["after saving elsewhere"] == [(4, []), (4, [])]
        assert results["after saving locally"] == (1, (KILLED, []))


def test_a_node_that_comes_back_has_no_part_in_a_later_start(troubles):
    for results in troubles:
        lost, (start, notes) = results["returned"]
        assert (lost, start) == (SAVE_INTERVAL, SAVE_INTERVAL)
        assert notes == [
            f"the local checkpoint of iteration {KILLED} is not used: there is none of rank 1"
        ]


def test_a_crash_while_saving_leaves_the_one_before(troubles):
    for rank, results in enumerate(troubles):
        message, files, resumed = results["full disk"]
        assert "nodes" in message
        assert "No space left" in message
        assert "earlier checkpoints are intact" in message
        assert files == [f"iter_{KILLED - 1:07d}_{rank}_local.pt"]
        assert (resumed["start"], resumed["notes"]) == (KILLED - 1, [])
        assert resumed["losses"] == results["killed"]["losses"][KILLED - 1 :]
        assert resumed["state"] == results["killed"]["state"]


def without_memory_on_the_second(folder):
    """What each rank tells if rank 1 cannot take its second local checkpoint."""
    from megatron.core.dist_checkpointing.tensor_aware_state_dict import MCoreTensorAwareStateDict

    take, taken = MCoreTensorAwareStateDict.from_state_dict, []

    def fail(*args, **kwargs):
        taken.append(args)
        if len(taken) == 2 and torch.distributed.get_rank() == 1:
            raise MemoryError("no room for a copy")
        return take(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MCoreTensorAwareStateDict, "from_state_dict", fail)
        with pytest.raises(CheckpointError) as caught:
            run(**saving(folder, **LAYOUTS["distributed optimizer"]))
    return str(caught.value), names(files_of(folder))


def test_a_rank_that_fails_before_it_writes_is_told_on_all(tmp_path):
    for rank, (message, files) in enumerate(run_ranks(2, without_memory_on_the_second, tmp_path)):
        assert "no room for a copy" in message
        assert files == [f"iter_0000001_{rank}_local.pt"]


def test_nothing_is_written_before_it_has_come_from_the_gpu(tmp_path, monkeypatch):
    from retro_mcore.platform.local_files import LocalFiles

    done = []
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: done.append("waited"))
    monkeypatch.setattr(torch, "save", lambda value, file: done.append("written"))
    LocalFiles(tmp_path, "run", torch.load)._save_fn({(5, 0, "run"): {}})
    assert done == ["waited", "written"]


def test_the_one_before_stays_until_the_new_one_is_on_the_disk(tmp_path, monkeypatch):
    """The file, and the folders that lead to it; a loss of power then leaves one of both."""
    from retro_mcore.platform.local_files import LocalFiles

    files, synced, sync = LocalFiles(tmp_path, "run", torch.load), [], os.fsync
    folder = files.folder

    def record(descriptor: int) -> None:
        sync(descriptor)
        path = Path(f"/proc/self/fd/{descriptor}").readlink()
        synced.append((path, path == folder / name(2) and (folder / name(1)).exists()))

    def name(iteration: int) -> str:
        return f"iter_000000{iteration}_0_local.pt"

    files._save_fn({(1, 0, "run"): {"of": 1}})
    monkeypatch.setattr(os, "fsync", record)
    files._save_fn({(2, 0, "run"): {"of": 2}})
    assert synced == [
        (folder / name(2), True),
        (folder, False),
        (folder.parent, False),
        (tmp_path, False),
    ]
    files._cleanup(2)
    assert names(folder.iterdir()) == [name(2)]


@pytest.fixture(scope="module")
def four(tmp_path_factory):
    return run_ranks(4, on_one_of_four, tmp_path_factory.mktemp("four_processes"))


def on_one_of_four(root: Path):
    folder = root / "run"
    model = {key: value for key, value in FOUR.items() if "replication" not in key}
    whole = run(**model, deterministic_mode=True)
    options = saving(folder, **FOUR)
    run(killed=KILLED, **options)
    files = names(files_of(folder))
    swapped = copy_of(folder, "swapped")
    nodes = swapped / "nodes"
    for source, target in (("0", "x"), ("1", "0"), ("x", "1")):
        change(shutil.move, nodes / source, nodes / target)
    change(shutil.rmtree, folder / "nodes" / "1")
    with pytest.raises(ConfigurationError, match="--replication-jump: 3, with --replication-f"):
        small_trainer(**{**options, "replication_jump": 3})
    return {
        "whole": whole,
        "files": files,
        "lost": run(**options),
        "swapped": run(**saving(swapped, **without(FOUR, ("replication", "replication_jump")))),
    }


@pytest.mark.parametrize("case", ["lost", "swapped"])
def test_ranks_take_their_files_from_wherever_they_are(four, case):
    """Ranks 0 and 1 are on one node, 2 and 3 on another, which is lost, or changes places."""
    for rank, results in enumerate(four):
        whole, resumed = results["whole"], results[case]
        kept = sorted({rank, (rank + 2) % 4})
        assert results["files"] == [f"iter_{KILLED:07d}_{each}_local.pt" for each in kept]
        assert (resumed["start"], resumed["notes"]) == (KILLED, [])
        assert resumed["losses"] == whole["losses"][KILLED:]
        assert resumed["state"] == whole["state"]
