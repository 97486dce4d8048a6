"""Held-out perplexity by size of the database, from one search; two sizes are really rebuilt.

    python -m benchmarks.database_size                       # half an hour on two cores
    python -m benchmarks.database_size --train-iters 10      # tries the path, in minutes

A small Retro is trained once with the whole database. Smaller databases hold some of its documents:
`evaluate_perplexity --database-fraction` leaves the others out of the 200 saved neighbors. For
`--rebuilt`, the same documents are preprocessed, embedded, indexed and searched on their own
(`update_db --exchange`), with weights of words of their own.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.retro_against_gpt import train
from benchmarks.training_data import BATCH, MODEL_FLAGS, make_project
from retro_mcore.cli import commands as retro
from retro_mcore.data.tokens.splits import num_retrieved_documents
from retro_mcore.evaluation.database_fraction import documents_kept
from retro_mcore.project.config import ProjectConfig

SEED = 1234
FRACTIONS = [1.0, 1 / 2, 1 / 4, 1 / 8, 1 / 16]
SAVED = 200


def perplexity(project: Path, model: Path, kind: str, fraction: float = 1.0) -> float:
    """Perplexity of the valid samples with neighbors from a share of the database."""
    result = retro.evaluate_perplexity(
        project_dir=str(project),
        load=str(model),
        retro_eval_neighbors=[kind],
        database_fraction=fraction,
        seed=SEED,
        output=str(project.parent / "perplexity.json"),
        device="cpu",
    )
    return result.perplexity(kind)


def rebuilt(place: Path, project: Path, corpus: Path, fraction: float) -> Path:
    """A copy of the project whose database really holds a share of the documents only."""
    config = ProjectConfig.load(project)
    lines = corpus.read_text(encoding="utf-8").splitlines()
    numbers = np.stack([np.zeros(len(lines), int), np.arange(len(lines))], axis=-1)
    kept = documents_kept(numbers, fraction, SEED)
    num_train = num_retrieved_documents(config.retro_gpt_split, len(lines))
    place.mkdir(parents=True, exist_ok=True)
    part = [line for line, keep in zip(lines[:num_train], kept[:num_train], strict=True) if keep]
    (place / "part.jsonl").write_text("\n".join(part) + "\n", encoding="utf-8")
    database, copy = place / "database", place / "project"
    where = {"project_dir": str(database)}
    retro.preprocess_corpus(
        **where,
        input=[str(place / "part.jsonl")],
        tokenizer_type=config.retro_gpt_tokenizer_type,
        tokenizer_model=str(project / str(config.retro_gpt_tokenizer_model)),
        seq_length=config.retro_gpt_seq_length,
        retro_chunk_length=config.retro_gpt_chunk_length,
        split="100,0,0",
        train_samples=BATCH,
        global_batch_size=BATCH,
    )
    retro.build_db(**where)
    retro.build_index(**where, embedder="lexical", device="cpu")
    if not copy.is_dir():
        shutil.copytree(project, copy)
    retro.update_db(project_dir=str(copy), exchange=str(database), device="cpu")
    return copy


def draw(rows: list[dict[str, Any]], none: float, path: Path) -> None:
    """Plot perplexity by size."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    axes.plot([r["fraction"] for r in rows], [r["perplexity"] for r in rows], "o-", label="Retro")
    again = [row for row in rows if "rebuilt" in row]
    axes.plot([r["fraction"] for r in again], [r["rebuilt"] for r in again], "x", label="rebuilt")
    axes.axhline(none, linestyle=":", label="no neighbors")
    axes.set_xscale("log", base=2)
    axes.set(xlabel="share of the database", ylabel="held-out perplexity")
    axes.legend()
    figure.savefig(path, dpi=120)


def show(rows: list[dict[str, Any]], none: float) -> None:
    """The table, and the gain per doubling."""
    print(f"\n{'share':>8} {'perplexity':>11} {'rebuilt':>9} {'difference':>11}")
    for row in rows:
        cells = ""
        if "rebuilt" in row:
            cells = f" {row['rebuilt']:9.3f} {row['perplexity'] / row['rebuilt'] - 1:11.2%}"
        print(f"{row['fraction']:8.4f} {row['perplexity']:11.3f}{cells}")
    print(f"    none {none:11.3f}")
    sizes = np.log2([row["fraction"] for row in rows])
    slope = np.polyfit(sizes, [math.log(row["perplexity"]) for row in rows], 1)[0]
    print(f"perplexity changes by {math.exp(slope) - 1:.2%} per doubling of the database")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=Path("database_size"))
    parser.add_argument("--train-iters", type=int, default=800, help="training steps")
    parser.add_argument("--rebuilt", type=float, nargs="*", default=[1 / 2, 1 / 8])
    parser.add_argument("--json", type=Path, help="write the rows here")
    options = parser.parse_args()
    folder = options.folder
    project = make_project(folder, options.train_iters, "aligned", SEED, num_neighbors_save=SAVED)
    train(project, folder / "model", MODEL_FLAGS)
    none = perplexity(project, folder / "model", "none")
    rows: list[dict[str, Any]] = []
    for fraction in FRACTIONS:
        found = perplexity(project, folder / "model", "real", fraction)
        rows.append({"fraction": fraction, "perplexity": found})
        if fraction in options.rebuilt:
            place = folder / f"rebuilt_{fraction:g}"
            copy = rebuilt(place, project, folder / "documentation.jsonl", fraction)
            rows[-1]["rebuilt"] = perplexity(copy, folder / "model", "real")
    show(rows, none)
    draw(rows, none, folder / "database_size.png")
    if options.json:
        text = json.dumps({"none": none, "rows": rows}, indent=2)
        options.json.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
