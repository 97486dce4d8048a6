"""A training run that waits in the middle until a test has sent its signal.

    python -m tests.distributed.stoppable_run --directory DIR [--tensor-model-parallel-size 2]

Half way it writes DIR/waiting and goes on when there is DIR/signalled; at the end each rank writes
its losses.
"""

from __future__ import annotations

import json
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from retro_mcore.cli.command import run_command
from tests.unit.training.small import BATCH, TRAIN_SAMPLES, RandomSamples, small_trainer

HALF_WAY = TRAIN_SAMPLES // 2


@dataclass(kw_only=True)
class StoppableRunOptions:
    """Train, wait, and stop."""

    directory: str
    """Where everything is written."""
    tensor_model_parallel_size: int = 1
    """As in training."""
    use_distributed_optimizer: bool = False
    """As in training."""


class WaitingSamples(RandomSamples):
    """Random samples; one of the middle waits for the test."""

    def __init__(self, directory: str) -> None:
        super().__init__(TRAIN_SAMPLES)
        self.directory = Path(directory)

    def __getitem__(self, index: int) -> dict:
        if index // BATCH == HALF_WAY // BATCH:
            (self.directory / "waiting").touch()
            while not (self.directory / "signalled").exists():
                time.sleep(0.01)
        return super().__getitem__(index)


def run(options: StoppableRunOptions) -> dict:
    """Train; return this rank's losses and what stopped the run."""
    save = str(Path(options.directory) / "checkpoints")
    trainer = small_trainer(
        save=save,
        load=save,
        num_workers=1,
        log_interval=1,
        tensor_model_parallel_size=options.tensor_model_parallel_size,
        use_distributed_optimizer=options.use_distributed_optimizer,
    )
    trainer._train_samples = WaitingSamples(options.directory)
    result = trainer.train()
    return {"losses": result.train_losses, "stopped_by": result.stopped_by}


def run_and_report(options: StoppableRunOptions) -> None:
    report = run(options)
    path = Path(options.directory) / f"rank_{os.environ.get('RANK', '0')}.json"
    path.write_text(json.dumps(report), encoding="utf-8")


if __name__ == "__main__":
    sys.exit(run_command(StoppableRunOptions, run_and_report))
