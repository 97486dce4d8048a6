"""Retro against GPT on the same real text and steps: perplexities on held-out documents.

    python -m benchmarks.retro_against_gpt                      # an hour on two cores
    python -m benchmarks.retro_against_gpt --train-iters 10     # tries the path, in two minutes

Three models with the same flags, trained on the same samples in the same order by pretrain_retro:
Retro, its decoder alone (a GPT of the same layers), and a GPT with as many parameters as Retro (its
MLPs are wider). Perplexity is Megatron's, over all samples of the valid split.
"""

from __future__ import annotations

import argparse
import itertools
import json
from pathlib import Path
from typing import Any

from benchmarks.training_data import MODEL_FLAGS, TRAIN_ITERS, make_project


def train(project: Path, folder: Path, flags: list[str]) -> Any:
    """A model, trained; one that is finished in `folder` is taken as it is."""
    from retro_mcore.cli.flags import parse_options
    from retro_mcore.cli.pretrain_retro import PretrainRetroOptions, pretrain_retro

    where = ["--project-dir", str(project), "--save", str(folder), "--load", str(folder)]
    return pretrain_retro(parse_options(PretrainRetroOptions, [*where, *flags]))


def perplexities(project: Path, folder: Path, kinds: list[str]) -> dict[str, float]:
    """Perplexity by kind of neighbors."""
    from retro_mcore.cli.commands import evaluate_perplexity

    result = evaluate_perplexity(
        project_dir=str(project), load=str(folder), retro_eval_neighbors=kinds
    )
    return {kind: result.perplexity(kind) for kind in kinds}


def parameters(folder: Path) -> int:
    """Of the whole model in `folder`."""
    from retro_mcore.training.setup.load_model import load_model_from_checkpoint

    model, _ = load_model_from_checkpoint(folder)
    return sum(parameter.numel() for parameter in model.parameters())


def wider_mlp(flags: list[str], missing: int) -> list[str]:
    """The flags with MLPs that add `missing` parameters to a GPT, as near as whole columns come."""
    values = dict(itertools.pairwise(flags))
    hidden, layers = int(values["--hidden-size"]), int(values["--num-layers"])
    bias = 0 if "--disable-bias-linear" in flags else 1
    width = 4 * hidden + round(missing / (layers * (2 * hidden + bias)))
    return [*flags, "--ffn-hidden-size", str(width)]


def measure(project: Path, folder: Path, flags: list[str]) -> list[dict[str, Any]]:
    """A row per model: its parameters and its perplexities by kind of neighbors."""
    rows: list[dict[str, Any]] = []

    def add(name: str, model_flags: list[str], kinds: list[str]) -> None:
        train(project, folder / name, model_flags)
        found = perplexities(project, folder / name, kinds)
        rows.append({"model": name, "parameters": parameters(folder / name), **found})

    add("retro", flags, ["real", "shuffled", "none"])
    add("gpt", [*flags, "--no-retrieval"], ["none"])
    missing = rows[0]["parameters"] - rows[1]["parameters"]
    add("gpt-as-large", [*wider_mlp(flags, missing), "--no-retrieval"], ["none"])
    return rows


def show(rows: list[dict[str, Any]]) -> None:
    """The table, and whether Retro with real neighbors is the best."""
    print(f"\n{'model':14} {'parameters':>12} {'real':>9} {'shuffled':>9} {'none':>9}")
    for row in rows:
        cells = (f"{row[k]:9.3f}" if k in row else " " * 9 for k in ("real", "shuffled", "none"))
        print(f"{row['model']:14} {row['parameters']:12,} {' '.join(cells)}")
    retro = rows[0]
    others = [retro["shuffled"], retro["none"], *(row["none"] for row in rows[1:])]
    print(f"\nreal / best of the others: {retro['real'] / min(others):.4f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=Path("retro_against_gpt"))
    parser.add_argument("--train-iters", type=int, default=TRAIN_ITERS, help="steps of each model")
    parser.add_argument("--json", type=Path, help="write the rows here")
    options = parser.parse_args()
    project = make_project(options.folder, options.train_iters)
    rows = measure(project, options.folder, MODEL_FLAGS)
    show(rows)
    if options.json:
        options.json.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
