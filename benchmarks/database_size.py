"""Held-out perplexity by size of the database, from one search; two sizes are really rebuilt.

    make quickstart                            # trains the model, once
    python -m benchmarks.database_size         # ten minutes on two cores

The model is the quickstart's, trained with the whole database. The database is built once more with
an exact enough index and 200 saved neighbors. Smaller databases hold some of its documents:
`evaluate_perplexity --database-fraction` leaves the others out of the 200 saved neighbors. For
`--rebuilt`, the same documents are preprocessed, embedded, indexed and searched on their own
(`update_db --exchange`), with weights of words of their own. Perplexity is that of the test
documents.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from retro_mcore.cli import commands as retro
from retro_mcore.data.tokens.splits import num_retrieved_documents
from retro_mcore.evaluation.database_fraction import documents_kept
from retro_mcore.project.config import ProjectConfig

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY / "examples" / "quickstart"))

from run import LAPTOP, SMOKE, Layout, Size, all_stages  # noqa: E402
from stages import run_stage  # noqa: E402

SEED = 1234
FRACTIONS = [1.0, 1 / 2, 1 / 4, 1 / 8, 1 / 16]
SAVED, SMOKE_SAVED = 200, 20


def search_once_more(size: Size, corpus: Path, folder: Path, saved: int) -> Path:
    """A project of the quickstart's text, with more neighbors and the index that is chosen for it.

    Raises:
        SystemExit: a stage failed; with its exit code.
    """
    layout = Layout(folder)
    *stages, query = all_stages(replace(size, index=""), corpus, layout, 1)[:4]
    query = replace(query, flags=[*query.flags, "--num-neighbors-save", str(saved)])
    for stage in (*stages, query):
        if code := run_stage(stage, 1):
            raise SystemExit(code)
    return layout.project


def perplexity(project: Path, model: Path, kind: str, fraction: float = 1.0) -> float:
    """Perplexity of the test samples with neighbors from a share of the database."""
    result = retro.evaluate_perplexity(
        project_dir=str(project),
        load=str(model),
        split="test",
        retro_eval_neighbors=[kind],
        database_fraction=fraction,
        seed=SEED,
        output=str(project.parent / "perplexity.json"),
        device="cpu",
    )
    return result.perplexity(kind, "test")


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
        train_samples=config.retro_gpt_global_batch_size,
        global_batch_size=config.retro_gpt_global_batch_size,
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
    parser.add_argument(
        "--quickstart",
        type=Path,
        default=Path("quickstart"),
        help="folder of a finished quickstart (make quickstart), which is not changed",
    )
    parser.add_argument("--folder", type=Path, default=Path("database_size"))
    parser.add_argument("--rebuilt", type=float, nargs="*", default=[1 / 2, 1 / 8])
    parser.add_argument("--smoke", action="store_true", help="for a quickstart of --smoke")
    parser.add_argument("--json", type=Path, help="file to write the rows to")
    options = parser.parse_args()
    folder, model = options.folder, options.quickstart / "checkpoints"
    size, saved = (SMOKE, SMOKE_SAVED) if options.smoke else (LAPTOP, SAVED)
    corpus = options.quickstart / "corpus.jsonl"
    project = search_once_more(size, corpus, folder, saved)
    none = perplexity(project, model, "none")
    rows: list[dict[str, Any]] = []
    for fraction in FRACTIONS:
        found = perplexity(project, model, "real", fraction)
        rows.append({"fraction": fraction, "perplexity": found})
        if fraction in options.rebuilt:
            place = folder / f"rebuilt_{fraction:g}"
            copy = rebuilt(place, project, corpus, fraction)
            rows[-1]["rebuilt"] = perplexity(copy, model, "real")
    show(rows, none)
    draw(rows, none, folder / "database_size.png")
    if options.json:
        text = json.dumps({"none": none, "rows": rows}, indent=2)
        options.json.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
