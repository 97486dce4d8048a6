"""Commands on ranks that torchrun's agent starts and ends, where one rank fails.

The agent is the real one; it forks the ranks from a server that has imported torch and megatron.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
import traceback
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

import torch
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, Std
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from retro_mcore import progress
from retro_mcore.cli.command import run_command
from tests.processes import START_METHOD
from tests.unit.training.small import NO_DROPOUT, RandomSamples, small_trainer

RANKS = 4
SAVE_INTERVAL = 2
#: Minutes until a silent rank counts as gone. Loaded machines answer late.
LIMIT = 1.0
#: Seconds after that within which the others have ended: half of it by the watch's own times
#: (decision 0032), the rest for a slow machine. Without the limit they wait 10 minutes and more.
MARGIN = 60.0
_AGENTS_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)


@dataclass(frozen=True)
class Fault:
    """What happens to a rank.

    Attributes:
        kind: "stop" (SIGSTOP), "kill" (SIGKILL), "raise" (an exception), "hang" (it lives, but
            does not go on), or "none".
        rank: The rank.
        place: Where: the beginning of what the rank's progress says.
    """

    kind: str
    rank: int = 1
    place: str = ""


@dataclass(kw_only=True)
class TrainOptions:
    """Train a small model, tensor parallel and data parallel, and write each rank's losses."""

    directory: str
    """Where everything is written."""
    distributed_timeout_minutes: float = 10.0
    """As in training."""
    log_straggler: bool = False
    """As in training."""
    slow_rank: int | None = None
    """Rank that reads samples slowly."""


class SlowSamples(RandomSamples):
    """Random samples that take their time."""

    def __getitem__(self, index: int) -> dict:
        time.sleep(0.5)
        return super().__getitem__(index)


def train(options: TrainOptions) -> list[float]:
    """Train; return the losses of this run's iterations."""
    save = str(Path(options.directory) / "checkpoints")
    trainer = small_trainer(
        **NO_DROPOUT,
        save=save,
        load=save,
        save_interval=SAVE_INTERVAL,
        log_interval=1,
        tensor_model_parallel_size=2,
        distributed_timeout_minutes=options.distributed_timeout_minutes,
        log_straggler=options.log_straggler,
    )
    if options.slow_rank == int(os.environ["RANK"]):
        trainer._train_samples = SlowSamples(len(trainer._train_samples))
    return trainer.train().train_losses


def train_and_report(options: TrainOptions) -> None:
    losses = train(options)
    path = Path(options.directory) / f"rank_{os.environ['RANK']}.json"
    path.write_text(json.dumps(losses), encoding="utf-8")


def start(
    folder: Path, fault: Fault, command: str, *flags: object, restarts: int = 0
) -> tuple[int, list[str]]:
    """Run a command on four ranks; the job's exit code, each rank's output, the launcher's report.

    The other ranks must have ended `MARGIN` after the limit, as counted from the fault.

    Args:
        folder: For the output.
        fault: What happens, and where, before the agent has started the ranks again.
        command: "train", or a command of retro-mcore.
        *flags: Its flags.
        restarts: How often the agent starts all ranks again after one has failed.
    """
    (folder / "logs").mkdir(parents=True)
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=RANKS,
        run_id=str(os.getpid()),
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        start_method=START_METHOD,
        max_restarts=restarts,
        monitor_interval=0.1,
        logs_specs=DefaultLogsSpecs(log_dir=str(folder / "logs"), redirects=Std.ALL),
    )
    handlers = {number: signal.getsignal(number) for number in _AGENTS_SIGNALS}
    flags = ("--distributed-timeout-minutes", LIMIT, *flags)
    code, report = 0, ""
    try:
        elastic_launch(config, rank_main)(folder / "fault", fault, command, *map(str, flags))
    except ChildFailedError as error:
        code, report = error.get_first_failure()[1].exitcode, str(error)
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    outputs = []
    for rank in range(RANKS):
        files = sorted((folder / "logs").glob(f"*/*/{rank}/std*.log"))
        outputs.append("".join(file.read_text(encoding="utf-8") for file in files))
    if fault.kind != "none":
        assert (folder / "fault").exists(), outputs  # else it ended before
        elapsed = seconds_until_others_ended(folder, fault)
        assert elapsed < 60 * LIMIT + MARGIN, (elapsed, outputs)
    return code, [*outputs, report]


def seconds_until_others_ended(folder: Path, fault: Fault) -> float:
    """Seconds from the fault until the last word of another rank of the same attempt.

    The job itself ends later: a launcher waits for a process that is stopped before it kills it.
    """
    words = [
        file.stat().st_mtime
        for rank in {*range(RANKS)} - {fault.rank}
        for file in (folder / "logs").glob(f"*/attempt_0/{rank}/std*.log")
    ]
    assert len(words) == 2 * (RANKS - 1)
    return max(words) - (folder / "fault").stat().st_mtime


def rank_main(marker: Path, fault: Fault, command: str, *flags: str) -> None:
    """Run the command on this rank, and let it fail as soon as its progress is there.

    Args:
        marker: Is written when the rank fails.
        fault: What happens to which rank, and where.
        command: As `start` takes it.
        *flags: Its flags.
    """
    torch.set_num_threads(1)
    update, done = progress.Progress.update, []

    def update_and_fail(self: progress.Progress, steps: int = 1) -> None:
        update(self, steps)
        here = int(os.environ["RANK"]) == fault.rank and str(self).startswith(fault.place)
        if here and not done and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
            done.append(fault)
            marker.touch()
            _fail(fault.kind)

    progress.Progress.update = update_and_fail  # type: ignore[method-assign]
    try:
        if command == "train":
            code = run_command(TrainOptions, train_and_report, flags)
        else:
            code = import_module(f"retro_mcore.cli.{command}").main(flags)
    except Exception:
        traceback.print_exc()  # as a program does; the agent keeps it from the output
        raise
    if code:
        sys.exit(code)


def _fail(kind: str) -> None:
    if kind == "raise":
        raise ValueError("something is broken")
    while kind == "hang":
        time.sleep(1)
    if kind in ("stop", "kill"):
        os.kill(os.getpid(), {"stop": signal.SIGSTOP, "kill": signal.SIGKILL}[kind])
