"""Time and memory of a training step: ours, the retired Retro, and the same GPT, side by side.

    python -m benchmarks.model_step
    python -m benchmarks.model_step --device cuda --dtype bfloat16 --hidden-size 1024 \\
        --num-layers 24 --seq-length 2048 --batch 8

Each side is a process of its own; all have the same weights and batch, and step in turn, so that
what else the machine does hits all alike.
"""

from __future__ import annotations

import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Literal

from rich.console import Console
from rich.table import Table

from retro_mcore.cli.command import run_command
from retro_mcore.errors import ConfigurationError
from tests.parity import environment

WORKER = "benchmarks.model_worker"
SIDES = ("retired", "ours", "gpt")
EARLIER = "earlier"


@dataclass
class Options:
    """Measure a training step of ours, the retired Retro 0.15.3, and the same GPT."""

    hidden_size: list[int] = field(default_factory=lambda: [256, 512])
    """One measurement for each."""

    num_layers: int = 12
    """Decoder layers."""

    head_channels: int = 64
    """Channels per attention head."""

    seq_length: int = 512
    """S, in tokens."""

    chunk_length: int = 64
    """M, in tokens."""

    neighbors: int = 2
    """K, neighbors per chunk."""

    retrieved: int = 128
    """R, tokens per neighbor: a multiple of the chunk length."""

    batch: int = 2
    """Samples."""

    vocab_size: int = 1024
    """Entries of the embedding. Small, so that the output layer does not hide the rest."""

    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of weights and activations."""

    device: Literal["cpu", "cuda"] = "cpu"
    """Where to run."""

    rounds: int = 5
    """Timed steps of each side, of which the median counts; two more go before them."""

    threads: int = 1
    """Threads of each process, on CPU."""

    retired: Path | None = None
    """Folder with megatron-core 0.15.3. Default: installed from the package index, once."""

    earlier: Path | None = None
    """A checkout of an earlier commit: its model is measured too, on the same processor."""

    json: Path | None = None
    """Write the measurements here too."""


@dataclass
class Measurement:
    """One side at one size."""

    hidden_size: int
    side: str
    loss: float
    seconds: float
    """Median of the steps: CPU seconds on the CPU, seconds on CUDA."""
    all_seconds: list[float]
    peak_bytes: int
    saved_bytes: int
    flops: int


class Worker:
    """A process that holds one side; see model_worker.py."""

    def __init__(self, side: str, hidden: int, options: Options, weights: Path, log: IO) -> None:
        old = side == "retired"
        variables = environment.variables(options.retired) if old else {**os.environ}
        folder, code = environment.ROOT, side
        if side == EARLIER:
            assert options.earlier is not None
            folder, code = options.earlier.resolve(), "ours"
            variables["PYTHONPATH"] = str(folder)
        paths = {"json": None, "retired": None, "earlier": None}
        fields = {**dataclasses.asdict(options), "hidden": hidden, **paths}
        self._log = log
        self._process = subprocess.Popen(
            [sys.executable, "-m", WORKER, code, json.dumps(fields), str(weights)],
            cwd=folder,
            env={**variables, "OMP_NUM_THREADS": str(options.threads)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
        )
        self._answer()

    def ask(self, command: str) -> Any:
        """What the worker answers to a command."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(command) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def close(self) -> None:
        """Let the process end."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self._process.wait()
            self._log.seek(0)
            raise RuntimeError(f"a side failed:\n{self._log.read()[-4000:]}")
        return json.loads(line)


def measure(options: Options) -> list[Measurement]:
    """Every side at every size; prints a table, and writes the JSON file if one is named.

    Raises:
        ConfigurationError: sizes that do not divide.
        MissingDependencyError: the retired release cannot be installed.
    """
    _validate(options)
    sides = SIDES if options.earlier is None else (*SIDES, EARLIER)
    measurements = [
        one for hidden in options.hidden_size for one in measure_size(hidden, options, sides)
    ]
    _print(measurements, options)
    if options.json is not None:
        content = {
            "options": dataclasses.asdict(options),
            "sides": list(map(dataclasses.asdict, measurements)),
        }
        options.json.write_text(json.dumps(content, indent=2, default=str) + "\n")
    return measurements


def _validate(options: Options) -> None:
    for name, unit in {"seq_length": "chunk_length", "retrieved": "chunk_length"}.items():
        if getattr(options, name) % getattr(options, unit):
            raise ConfigurationError(
                f"--{name.replace('_', '-')}",
                f"{getattr(options, name)}",
                f"Give a multiple of --{unit.replace('_', '-')} {getattr(options, unit)}",
            )
    for hidden in options.hidden_size:
        if hidden % options.head_channels:
            raise ConfigurationError(
                "--hidden-size", f"{hidden}", f"Give a multiple of {options.head_channels} channels"
            )


def measure_size(
    hidden: int, options: Options, sides: Sequence[str] = SIDES, counted: bool = True
) -> list[Measurement]:
    """Measure some sides at one size, the retired one first.

    Args:
        hidden: Hidden size.
        options: All other sizes.
        sides: Sides of `SIDES`, "retired" among them, for its weights; and `EARLIER`.
        counted: Count saved bytes and operations too (else 0); plain attention then holds all
            scores of a layer.

    Raises:
        RuntimeError: a side failed; the message ends with what it wrote.
    """
    with tempfile.TemporaryDirectory() as folder:
        weights, workers = Path(folder) / "weights.pt", {}
        try:
            # The retired side first: the others load its weights.
            for side in sides:
                log = (Path(folder) / f"{side}.log").open("w+")
                workers[side] = Worker(side, hidden, options, weights, log)
            found: dict[str, dict[str, Any]] = {side: {} for side in workers}
            for side, worker in workers.items():
                found[side]["loss"] = worker.ask("loss")
                found[side]["peak_bytes"] = worker.ask("peak")
            rounds: dict[str, list[float]] = {side: [] for side in workers}
            for _ in range(options.rounds):
                for side, worker in workers.items():
                    rounds[side].append(worker.ask("time"))
            for side, worker in workers.items():
                found[side]["saved_bytes"] = worker.ask("saved") if counted else 0
                found[side]["flops"] = worker.ask("flops") if counted else 0
        finally:
            for worker in workers.values():
                worker.close()
    return [
        Measurement(
            hidden_size=hidden,
            side=side,
            seconds=statistics.median(rounds[side]),
            all_seconds=rounds[side],
            **found[side],
        )
        for side in sides
    ]


def _print(measurements: list[Measurement], options: Options) -> None:
    seconds = "CPU s" if options.device == "cpu" else "s"
    table = Table(title=f"forward + backward, {options.num_layers} layers, {options.dtype}")
    for heading in ("hidden", "side", "loss", seconds, "peak MiB", "saved MiB", "GFLOP", "GFLOP/s"):
        table.add_column(heading, justify="left" if heading == "side" else "right")
    for hidden in options.hidden_size:
        sides = {m.side: m for m in measurements if m.hidden_size == hidden}
        for side in sides.values():
            table.add_row(
                f"{hidden}",
                side.side,
                f"{side.loss:.6f}",
                f"{side.seconds:.3f}",
                f"{side.peak_bytes / 2**20:.0f}",
                f"{side.saved_bytes / 2**20:.0f}",
                f"{side.flops / 1e9:.1f}",
                f"{side.flops / side.seconds / 1e9:.0f}",
            )
        for other in [side for side in sides if side != "ours"]:
            top, bottom = sides["ours"], sides[other]
            table.add_row(
                "",
                f"ours ÷ {other}",
                "",
                f"{time_ratio(top, bottom):.3f}",
                f"{top.peak_bytes / bottom.peak_bytes:.3f}",
                f"{top.saved_bytes / bottom.saved_bytes:.3f}",
                f"{top.flops / bottom.flops:.3f}",
                "",
                style="bold",
            )
        table.add_section()
    Console(width=100).print(table)


def time_ratio(top: Measurement, bottom: Measurement) -> float:
    """Median over the rounds: neighbors in time share what slowed the machine down."""
    pairs = zip(top.all_seconds, bottom.all_seconds, strict=True)
    return statistics.median(above / below for above, below in pairs)


def main() -> int:
    """The command line."""
    return run_command(Options, measure)


if __name__ == "__main__":
    sys.exit(main())
