"""Two trained models side by side: their training losses and held-out perplexities.

    python examples/quickstart/compare.py quickstart/checkpoints quickstart/gpt --output plot.png

Reads what `pretrain_retro` (metrics.jsonl) and `evaluate_perplexity` (perplexity.json) wrote.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

_COLUMNS, _LINES, _BAR = 60, 12, 40
_COLORS = ("tab:blue", "tab:orange")


@dataclass(frozen=True)
class Model:
    """A trained and evaluated model.

    Attributes:
        name: Its name in plots.
        losses: Training loss by number of samples.
        perplexities: Held-out perplexity by kind of neighbors.
    """

    name: str
    losses: list[tuple[int, float]]
    perplexities: dict[str, float]

    @classmethod
    def read(cls, name: str, folder: Path) -> Model:
        """Read the results in a checkpoint directory."""
        lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        records = [json.loads(line) for line in lines]
        measured = json.loads((folder / "perplexity.json").read_text(encoding="utf-8"))
        losses = {r["consumed_samples"]: r["loss"] for r in records if r["kind"] == "train"}
        perplexities = {row["neighbors"]: row["perplexity"] for row in measured}
        return cls(name, sorted(losses.items()), perplexities)

    def rows(self) -> list[tuple[str, float]]:
        """Names and values of the perplexities."""
        if list(self.perplexities) == ["none"]:
            return [(self.name, self.perplexities["none"])]
        named = {"none": "no neighbors", "real": "its neighbors", "shuffled": "shuffled neighbors"}
        return [
            (f"{self.name}, {named.get(kind, kind)}", value)
            for kind, value in self.perplexities.items()
        ]


def perplexities_as_text(models: Sequence[Model]) -> str:
    """Bars of the perplexities, and how far the first model is below the others."""
    rows = [row for model in models for row in model.rows()]
    most, width = max(value for _, value in rows), max(len(name) for name, _ in rows)
    lines = ["held-out perplexity, lower is better"]
    for name, value in rows:
        lines.append(f"  {name:{width}} {value:8.2f} {'█' * round(_BAR * value / most)}")
    (first, real), *others = rows
    for name, value in others:
        lines.append(f"{first}: {real / value - 1:+.1%} against {name}")
    return "\n".join(lines)


def curves_as_text(models: Sequence[Model]) -> str:
    """Training losses in characters, a letter per model."""
    points = [point for model in models for point in model.losses]
    if not points:
        return ""
    last = max(number for number, _ in points)
    low, high = min(loss for _, loss in points), max(loss for _, loss in points)
    grid = [[" "] * (_COLUMNS + 1) for _ in range(_LINES)]
    for model in models:
        for number, loss in model.losses:
            height = (high - loss) / (high - low) if high > low else 0.0
            grid[round(height * (_LINES - 1))][round(_COLUMNS * number / last)] = model.name[0]
    names = ", ".join(f"{model.name[0]} = {model.name}" for model in models)
    lines = [f"training loss ({names})"]
    for row, cells in enumerate(grid):
        value = high - (high - low) * row / (_LINES - 1)
        lines.append(f"{value:6.2f} |{''.join(cells)}".rstrip())
    lines.append(f"       0{last:>{_COLUMNS}} samples")
    return "\n".join(lines)


def draw(models: Sequence[Model], output: Path) -> None:
    """Draw both into a PNG file."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    for model, color in zip(models, _COLORS, strict=False):
        left.plot(*zip(*model.losses, strict=True), color=color, label=model.name)
    left.set(xlabel="samples", ylabel="training loss", title="Training on the same samples")
    left.legend()
    rows = [
        (*row, color) for model, color in zip(models, _COLORS, strict=False) for row in model.rows()
    ]
    names, values, colors = zip(*rows[::-1], strict=True)
    bars = right.barh(names, values, color=colors)
    right.bar_label(bars, fmt="%.2f", padding=3)
    right.margins(x=0.12)
    right.set(xlabel="perplexity (lower is better)", title="Held-out documents")
    figure.savefig(output, dpi=130)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("retro", type=Path, help="checkpoints of the Retro model")
    parser.add_argument("gpt", type=Path, help="checkpoints of the GPT")
    parser.add_argument("--output", type=Path, required=True, help="the PNG file to write")
    options = parser.parse_args()
    models = [Model.read("Retro", options.retro), Model.read("GPT", options.gpt)]
    print(curves_as_text(models))
    print(perplexities_as_text(models))
    draw(models, options.output)


if __name__ == "__main__":
    main()
