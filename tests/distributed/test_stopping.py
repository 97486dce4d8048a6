"""SIGTERM to real processes: they save, exit with 0, and resume as if nothing had been."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.distributed.stoppable_run import StoppableRunOptions, run
from tests.processes import run_ranks
from tests.rendezvous import host_store
from tests.unit.training.small import BATCH, TRAIN_SAMPLES, train

ROOT = Path(__file__).parents[2]
ITERATIONS = TRAIN_SAMPLES // BATCH


def start(
    directory: Path, *flags: str, world_size: int = 1, address: dict[str, str] | None = None
) -> list[subprocess.Popen]:
    """One process per rank, each with a process group of its own."""
    directory.mkdir(exist_ok=True)
    command = [sys.executable, "-m", "tests.distributed.stoppable_run"]
    command += ["--directory", str(directory), *flags]
    processes = []
    for rank in range(world_size):
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        if address:
            environment |= {"RANK": str(rank), "WORLD_SIZE": str(world_size), **address}
        processes.append(
            subprocess.Popen(
                command,
                cwd=ROOT,
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                start_new_session=True,
            )
        )
    return processes


def interrupt(directory: Path, processes: list[subprocess.Popen], rank: int) -> None:
    """Wait until the run is half way, and send SIGTERM to one rank and to its sample readers."""
    while not (directory / "waiting").exists():
        assert processes[rank].poll() is None, processes[rank].communicate()[0]
        time.sleep(0.05)
    os.killpg(processes[rank].pid, signal.SIGTERM)
    (directory / "signalled").touch()


def finish(directory: Path, processes: list[subprocess.Popen]) -> dict:
    """The last rank's losses."""
    outputs = [process.communicate(timeout=240)[0] for process in processes]
    for process, output in zip(processes, outputs, strict=True):
        assert process.returncode == 0, output
    report = directory / f"rank_{len(processes) - 1}.json"
    return json.loads(report.read_text(encoding="utf-8"))


def test_sigterm_saves_exits_with_0_and_resumes_exactly(tmp_path, megatron):
    processes = start(tmp_path)
    interrupt(tmp_path, processes, rank=0)
    first = finish(tmp_path, processes)
    check_stopped(tmp_path, first)
    save = str(tmp_path / "checkpoints")
    resumed = train(save=save, load=save)
    assert first["losses"] + resumed.train_losses == train().train_losses


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize(
    "layout",
    [{"use_distributed_optimizer": True}, {"tensor_model_parallel_size": 2}],
    ids=["data parallel", "tensor parallel"],
)
def test_a_signal_to_one_rank_stops_all_together(tmp_path, layout):
    whole = tmp_path / "whole"
    whole.mkdir()
    (whole / "signalled").touch()
    expected = run_ranks(2, run, StoppableRunOptions(directory=str(whole), **layout))[-1]
    assert expected["stopped_by"] is None
    assert len(expected["losses"]) == ITERATIONS

    parts = tmp_path / "parts"
    options = StoppableRunOptions(directory=str(parts), **layout)
    _store, address = host_store()
    processes = start(parts, *flags(options), world_size=2, address=address)
    interrupt(parts, processes, rank=1)
    first = finish(parts, processes)
    check_stopped(parts, first)
    second = run_ranks(2, run, options)[-1]
    assert first["losses"] + second["losses"] == expected["losses"]


def flags(options: StoppableRunOptions) -> list[str]:
    """What the command is given for `options`."""
    if options.use_distributed_optimizer:
        return ["--use-distributed-optimizer"]
    return ["--tensor-model-parallel-size", str(options.tensor_model_parallel_size)]


def check_stopped(directory: Path, report: dict) -> None:
    """It stopped for the signal, after an iteration, which its checkpoint has."""
    assert report["stopped_by"] == "SIGTERM"
    done = len(report["losses"])
    assert 0 < done < ITERATIONS
    tracker = directory / "checkpoints" / "latest_checkpointed_iteration.txt"
    assert tracker.read_text(encoding="utf-8") == str(done)
