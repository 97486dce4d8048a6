"""Metrics of a run: one JSON line per report, and a plot of the loss curve."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from retro_mcore.errors import MissingDependencyError
from retro_mcore.json_text import JsonError, json_lines, parse_json
from retro_mcore.project.atomic import atomic_write

METRICS_FILE = "metrics.jsonl"
LOSS_CURVE_FILE = "loss_curve.png"

Record = dict[str, Any]


class MetricsFile:
    """`metrics.jsonl`: records with `kind`, `iteration` and usually `loss`.

    Kinds are "train", "valid", "spike", "straggler" and "data" (notes on the samples). The loss is
    missing if fp16 skipped every iteration of a report.

    Args:
        path: The file.
        iteration: Starting iteration. Later records of an interrupted run are dropped.
    """

    def __init__(self, path: Path, iteration: int) -> None:
        self.path = path
        kept = [record for record in read_metrics(path) if record["iteration"] <= iteration]
        with atomic_write(path) as temporary:
            temporary.write_text("".join(map(_line, kept)), encoding="utf-8")

    def write(self, record: Record) -> None:
        """Append a record atomically: all of it or nothing.

        Raises:
            OSError: the disk is full, or the file cannot be written.
        """
        with self.path.open("ab", buffering=0) as file:
            end, line = file.tell(), _line(record).encode()
            try:
                while line:  # a full disk may accept part of the line
                    line = line[file.write(line) :]
            except OSError:
                file.truncate(end)
                raise


def _line(record: Record) -> str:
    return json.dumps(record) + "\n"


def read_metrics(path: Path) -> list[Record]:
    """Read the records of a metrics file. A line truncated by a crash is skipped."""
    records: list[Record] = []
    if not path.is_file():
        return records
    for _, line in json_lines(path.read_bytes()):
        try:
            record = parse_json(line, allow_nan=True)  # a loss may be NaN
        except JsonError:
            continue
        is_record = isinstance(record, dict) and isinstance(record.get("iteration"), int)
        if is_record and "kind" in record:
            records.append(record)
    return records


def losses(records: Iterable[Record], kind: str) -> list[tuple[int, float]]:
    """(iteration, loss) of all records of this kind with a loss."""
    return [
        (record["iteration"], record["loss"])
        for record in records
        if record["kind"] == kind and "loss" in record
    ]


def draw_loss_curve(records: Iterable[Record], path: Path) -> Path:
    """Plot training and validation loss over iterations as a PNG, and return its path.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingDependencyError(
            "matplotlib", "not installed", "pip install matplotlib, for the loss curve"
        ) from error
    records = list(records)
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for kind, style in (("train", "-"), ("valid", "o-")):
        points = losses(records, kind)
        if points:
            axes.plot(*zip(*points, strict=True), style, label=kind, markersize=4)
    axes.set(xlabel="iteration", ylabel="loss (nats per token)")
    axes.grid(alpha=0.3)
    if axes.lines:
        axes.legend()
    figure.savefig(path, dpi=120)
    return path
