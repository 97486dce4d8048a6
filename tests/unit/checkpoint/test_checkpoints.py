"""What is saved, kept, loaded and refused; nothing is lost by a crash, nothing runs on loading."""

from __future__ import annotations

import functools
import io
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from retro_mcore.checkpoint.contents import read_metadata
from retro_mcore.cli.flags import parse_options
from retro_mcore.cli.pretrain_retro import PretrainRetroOptions
from retro_mcore.errors import CheckpointError, ConfigurationError
from tests.unit.training.small import small_trainer, train

pytestmark = pytest.mark.usefixtures("megatron")

TRACKER = "latest_checkpointed_iteration.txt"


@pytest.fixture(scope="module")
def saved(tmp_path_factory, megatron):
    """A run's result, and its directory with checkpoints of iterations 2, 4 and 6."""
    directory = tmp_path_factory.mktemp("saved")
    return train(save=str(directory), save_interval=2), directory


@pytest.fixture
def copy(saved, tmp_path):
    """The directory again, to be damaged."""
    return shutil.copytree(saved[1], tmp_path / "copy")


def checkpoints(directory):
    return sorted(path.name for path in directory.glob("iter_*"))


def test_async_saving_gives_the_same_run_and_the_same_checkpoints(saved, tmp_path):
    result, directory = saved
    again = train(save=str(tmp_path), save_interval=2, async_save=True)
    assert again.train_losses == result.train_losses
    assert checkpoints(tmp_path) == checkpoints(directory)
    assert again.checkpoint == tmp_path / "iter_0000006"
    assert (tmp_path / TRACKER).read_text() == "6"
    for step in (2, 4):
        resumed = train(load=str(tmp_path), ckpt_step=step)
        assert resumed.train_losses == result.train_losses[step:]


def test_training_goes_on_while_a_checkpoint_is_written(tmp_path, monkeypatch):
    """The writer of step 2 waits for a file that training makes after step 3."""
    from retro_mcore.training.loop.trainer import Trainer

    go = tmp_path / "go"
    fsync = os.fsync

    def waiting_fsync(handle):
        while os.getpid() != parent and not go.exists():
            time.sleep(0.01)
        fsync(handle)

    parent = os.getpid()
    monkeypatch.setattr(os, "fsync", waiting_fsync)
    seen = []
    step = Trainer._train_step

    def watching_step(self, *args):
        step(self, *args)
        seen.append((tmp_path / "run" / TRACKER).exists())
        if len(seen) == 3:
            go.touch()

    monkeypatch.setattr(Trainer, "_train_step", watching_step)
    train(save=str(tmp_path / "run"), save_interval=2, exit_interval=3, async_save=True)
    assert seen == [False] * 3
    assert (tmp_path / "run" / TRACKER).read_text() == "3"


def test_an_async_save_that_fails_is_told_and_the_one_before_stays(tmp_path, monkeypatch):
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    write = filesystem_async._write_item

    @functools.wraps(write)
    def failing(*args, **kwargs):
        if (tmp_path / "iter_0000004.tmp").exists():
            raise OSError(28, "No space left on device")
        return write(*args, **kwargs)

    monkeypatch.setattr(filesystem_async, "_write_item", failing)
    with pytest.raises(
        CheckpointError, match=r"iter_0000004\.tmp: could not be written .*(OSError|No space)"
    ):
        train(save=str(tmp_path), save_interval=2, async_save=True)
    assert (tmp_path / TRACKER).read_text() == "2"
    assert not (tmp_path / "iter_0000004").exists()


CRASHING_RUN = """
import os, sys, time
from pathlib import Path
from tests.processes import join_megatron

directory, asynchronous = Path(sys.argv[1]), sys.argv[2] == "async"
fsync = os.fsync


def endless_fsync(handle):
    if (directory / "iter_0000004.tmp").exists():
        time.sleep(600)
    fsync(handle)


if __name__ == "__main__":
    os.fsync = endless_fsync
    join_megatron()
    from tests.unit.training.small import train
    train(save=str(directory), save_interval=2, async_save=asynchronous)
"""


@pytest.mark.parametrize("mode", [pytest.param("sync", marks=pytest.mark.slow), "async"])
def test_a_run_killed_in_the_middle_of_a_save_resumes_from_the_one_before(saved, tmp_path, mode):
    script = tmp_path / "run.py"
    script.write_text(CRASHING_RUN)
    run = tmp_path / "run"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path.cwd()), *sys.path])}
    process = subprocess.Popen(
        [sys.executable, str(script), str(run), mode], start_new_session=True, env=environment
    )
    try:
        wait_until(lambda: any(run.glob("iter_0000004.tmp/*.distcp")), process)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait(60)
    assert checkpoints(run) == ["iter_0000002", "iter_0000004.tmp"]
    assert (run / TRACKER).read_text() == "2"
    resumed = train(load=str(run), save=str(run))
    assert resumed.train_losses == saved[0].train_losses[2:]
    assert checkpoints(run) == ["iter_0000002", "iter_0000006"]


def wait_until(condition, process):
    for _ in range(60_000):
        if condition():
            return
        assert process.poll() is None, "the run ended before it was killed"
        time.sleep(0.01)
    raise AssertionError("nothing was written within ten minutes")


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ({"keep_last_n": 2}, [2, 3]),
        ({"save_retain_interval": 2}, [2, 3]),
        ({"keep_last_n": 2, "save_retain_interval": 3}, [3, 4, 5]),
    ],
)
def test_superseded_checkpoints_are_removed(tmp_path, options, kept):
    train(save=str(tmp_path), save_interval=1, exit_interval=kept[-1], **options)
    assert checkpoints(tmp_path) == [f"iter_{iteration:07d}" for iteration in kept]


def test_a_named_step_is_loaded_and_a_missing_one_refused(saved):
    result, directory = saved
    assert train(load=str(directory), ckpt_step=4).train_losses == result.train_losses[4:]
    with pytest.raises(CheckpointError, match=r"--ckpt-step 3: .* Complete iterations: 2, 4, 6"):
        train(load=str(directory), ckpt_step=3)


def test_finetune_takes_the_weights_alone(saved):
    directory = str(saved[1])
    original = small_trainer(load=directory, ckpt_step=4)
    tuned = small_trainer(load=directory, ckpt_step=4, finetune=True, lr=1e-3, train_iters=3)
    assert (tuned._progress.iteration, tuned._progress.consumed_samples) == (0, 0)
    assert parameters(tuned) == parameters(original)
    assert not adam_state(tuned)
    assert len(tuned.train().train_losses) == 3


def test_no_load_optim_goes_on_with_a_new_optimizer(saved):
    trainer = small_trainer(load=str(saved[1]), ckpt_step=4, no_load_optim=True, lr=1e-3)
    assert trainer._progress.iteration == 4
    assert not adam_state(trainer)
    assert trainer._parts.scheduler.num_steps == 0


def test_the_schedule_is_the_flags_or_the_checkpoints(saved):
    from retro_mcore.training.loop.optimizer import learning_rate

    other = {"lr": 1e-3, "lr_warmup_iters": 1, "weight_decay": 0.5}
    run = {"load": str(saved[1]), "ckpt_step": 4}
    with pytest.raises(CheckpointError, match=r"with lr 0\.01, and now it is 0\.001"):
        small_trainer(**run, **other)

    def resumed(**flags):
        optimizer = (trainer := small_trainer(**run, **flags))._parts.optimizer
        assert adam_state(trainer)
        return learning_rate(optimizer), max(g["weight_decay"] for g in optimizer.param_groups)

    assert resumed(use_checkpoint_opt_param_scheduler=True, **other) == resumed()
    # Of 24 samples 16 are read; 4 of them were the warmup.
    assert resumed(override_opt_param_scheduler=True, **other) == pytest.approx((4e-4, 0.5))


def test_no_load_rng_draws_other_dropout(saved):
    result, directory = saved
    losses = train(load=str(directory), ckpt_step=4, no_load_rng=True).train_losses
    assert losses != result.train_losses[4:]
    assert losses == pytest.approx(result.train_losses[4:], rel=0.05)


def test_half_precision_main_weights_follow_the_loaded_ones(tmp_path):
    train(save=str(tmp_path), exit_interval=2, bf16=True)
    trainer = small_trainer(load=str(tmp_path), finetune=True, bf16=True)
    (part,) = trainer._parts.optimizer.chained_optimizers
    for models, mains in zip(part.float16_groups, part.fp32_from_float16_groups, strict=True):
        for model, main in zip(models, mains, strict=True):
            assert torch.equal(model.float(), main)


def parameters(trainer):
    return [value.tolist() for value in trainer._parts.stages[0].parameters()]


def adam_state(trainer):
    return trainer._parts.optimizer.chained_optimizers[0].optimizer.state


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"async_save": True}, "--async-save: given without --save"),
        ({"keep_last_n": 2}, "--keep-last-n: given without --save"),
        ({"ckpt_step": 2}, "--ckpt-step: given without --load"),
        ({"finetune": True}, "--finetune: given without --load"),
        ({"no_load_rng": True}, "--no-load-rng: given without --load"),
    ],
)
def test_flags_without_effect_are_refused(options, message):
    with pytest.raises(ConfigurationError, match=message):
        train(**options)


def test_what_needs_a_checkpoint_does_not_start_without_one(tmp_path):
    with pytest.raises(CheckpointError, match="holds no checkpoint, and --finetune was given"):
        train(load=str(tmp_path), finetune=True)


def test_finetuning_does_not_overwrite_what_it_began(saved, copy):
    with pytest.raises(ConfigurationError, match="holds a checkpoint of iteration 6"):
        train(load=str(saved[1]), save=str(copy), finetune=True)


FLAGS = ["--project-dir", "p", "--micro-batch-size", "2", "--lr", "1e-2", "--use-checkpoint-args"]


def test_the_model_comes_from_the_checkpoint(saved):
    flags = [*FLAGS, "--load", str(saved[1]), "--ckpt-step=4"]
    options = parse_options(PretrainRetroOptions, flags)
    assert (options.num_layers, options.hidden_size, options.retro_decoder_layers) == (2, 32, [2])
    assert options.position_embedding_type == "rope"
    assert (
        train(**{name: getattr(options, name) for name in USED}).train_losses
        == (saved[0].train_losses[4:])
    )


USED = (
    "num_layers",
    "hidden_size",
    "num_attention_heads",
    "retro_decoder_layers",
    "position_embedding_type",
    "make_vocab_size_divisible_by",
    "load",
    "ckpt_step",
    "use_checkpoint_args",
)


def test_a_flag_that_contradicts_the_checkpoint_is_refused(saved):
    flags = [*FLAGS, "--load", str(saved[1]), "--hidden-size", "64"]
    options = parse_options(PretrainRetroOptions, flags)
    with pytest.raises(CheckpointError, match="hidden_size 32, and now it is 64"):
        train(**{name: getattr(options, name) for name in USED})


def test_the_model_of_no_checkpoint_is_refused(tmp_path):
    with pytest.raises(ConfigurationError, match="--use-checkpoint-args: given without --load"):
        parse_options(PretrainRetroOptions, FLAGS)
    with pytest.raises(CheckpointError, match="holds no checkpoint"):
        parse_options(PretrainRetroOptions, [*FLAGS, "--load", str(tmp_path)])


def test_a_file_cut_short_is_named(copy):
    path = next(copy.glob("iter_0000006/__0_0.distcp"))
    os.truncate(path, path.stat().st_size // 2)
    with pytest.raises(CheckpointError, match=r"__0_0\.distcp: has \d+ bytes, not \d+"):
        train(load=str(copy))


def test_a_missing_file_is_named(copy):
    (copy / "iter_0000006" / "__0_0.distcp").unlink()
    with pytest.raises(CheckpointError, match=r"__0_0\.distcp: is missing"):
        train(load=str(copy))


def test_a_checkpoint_of_another_program_is_refused(tmp_path):
    foreign = tmp_path / "iter_0000002"
    foreign.mkdir()
    torch.save({"weight": torch.ones(1)}, foreign / "model.pt")
    (tmp_path / TRACKER).write_text("2")
    with pytest.raises(CheckpointError, match="not a complete checkpoint"):
        train(load=str(tmp_path))
    (tmp_path / TRACKER).write_text("release")
    with pytest.raises(CheckpointError, match="names 'release', not an iteration"):
        train(load=str(tmp_path))


def test_a_checkpoint_of_another_optimizer_is_refused(saved):
    from retro_mcore.checkpoint.loading import load_checkpoint

    trainer = small_trainer(use_distributed_optimizer=True)
    with pytest.raises(CheckpointError, match="belongs to another model or optimizer: optimizer"):
        load_checkpoint(saved[1] / "iter_0000004", trainer._parts)


class Bomb:
    """Unpickled unguarded, it makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_metadata_that_would_run_code_is_refused(copy, tmp_path):
    bomb = tmp_path / "exploded"
    (copy / "iter_0000006" / ".metadata").write_bytes(pickle.dumps(Bomb(bomb)))
    with pytest.raises(CheckpointError, match=r"\.metadata: cannot be read safely .*mkdir"):
        train(load=str(copy))
    assert not bomb.exists()


def test_an_object_that_would_run_code_is_refused(saved, copy, tmp_path):
    """In the place of the random states, which PyTorch's reader would unpickle unguarded."""
    bomb = tmp_path / "exploded"
    checkpoint = copy / "iter_0000006"
    metadata = read_metadata(checkpoint)
    (index,) = (key for key in metadata.storage_data if key.fqn.startswith("rng_state"))
    entry = metadata.storage_data[index]
    content = io.BytesIO()
    torch.save([Bomb(bomb)], content)
    data = content.getvalue()
    assert len(data) <= entry.length
    with (checkpoint / entry.relative_path).open("r+b") as file:
        file.seek(entry.offset)
        file.write(data)
    metadata.storage_data[index] = type(entry)(entry.relative_path, entry.offset, len(data))
    (checkpoint / ".metadata").write_bytes(pickle.dumps(metadata))
    (checkpoint / "checksums.json").unlink()  # whoever plants a bomb leaves none that betrays it
    with pytest.raises(CheckpointError, match=r"cannot be loaded .*Weights only"):
        small_trainer(load=str(copy))
    assert not bomb.exists()
    torch.load(io.BytesIO(data), weights_only=False)
    assert bomb.exists()  # unguarded it would have run


@pytest.mark.parametrize("text", [b"\xff\xfe", b"", "²".encode(), b"9" * 6000, b"-1", b"release"])
def test_a_tracker_file_that_names_no_iteration_is_told(tmp_path, text):
    (tmp_path / TRACKER).write_bytes(text)
    with pytest.raises(CheckpointError, match="not an iteration"):
        train(load=str(tmp_path))
