"""Chunks embedded and searched for several samplings of a corpus: aligned once, packed each time.

    python -m benchmarks.samplings

A sampling is a seed and a length of the samples, over one pass of the training documents. Packed
samples need a project and a search for each. Aligned ones are changed by `set_samples`, and a
search that still had to be done would be counted, too. The text is Python's documentation.
"""

from __future__ import annotations

import json
import sys
import tempfile
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

from benchmarks.aligned_against_packed import FIRST_SEED, query_cost
from retro_mcore.chunking import SampleLayout
from retro_mcore.cli import commands as retro
from retro_mcore.cli.command import run_command
from retro_mcore.project.paths import ProjectPaths
from retro_mcore.project.records import stage_report
from retro_mcore.samples.retro_dataset import build_retro_datasets

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples" / "quickstart"))
from make_corpus import python_documentation, write_jsonl

_CHUNK, _BATCH = 16, 8


@dataclass
class Options:
    """Count the chunks that are embedded and searched for several samplings."""

    seeds: int = 3
    """Number of seeds."""
    lengths: list[int] = field(default_factory=lambda: [128, 256])
    """Lengths of the samples."""
    documents: int | None = None
    """Documents of the corpus, from the first (default: all)."""
    json: Path | None = None
    """Write the results here."""


def make_project(
    folder: Path, corpus: Path, samples: SampleLayout, seed: int, length: int
) -> dict[str, int]:
    """A project in `folder` with all its neighbors; what it is searched for."""
    project = str(folder)
    retro.preprocess_corpus(
        project_dir=project,
        input=[str(corpus)],
        samples=samples,
        vocab_size=512,
        split="90,10,0",
        seed=seed,
        seq_length=length,
        retro_chunk_length=_CHUNK,
        train_epochs=1.0,
        global_batch_size=_BATCH,
        eval_iters=4,
    )
    retro.build_db(project_dir=project)
    retro.build_index(project_dir=project, embedder="lexical")
    retro.query_neighbors(project_dir=project)
    return cost_of(folder)


def cost_of(project: Path) -> dict[str, int]:
    """Chunks searched, embedded (for the search or the database), and of the database."""
    cost = query_cost(project)
    database = stage_report(ProjectPaths(project), "build_index")["chunks"]
    return {**cost, "embedded": cost["embedded"] + database, "database": database}


def packed(folder: Path, corpus: Path, samplings: list[tuple[int, int]]) -> dict[str, int]:
    """A search for each sampling; the database is embedded once, as `update_db` could share it."""
    costs = [
        make_project(folder / f"packed_{seed}_{length}", corpus, "packed", seed, length)
        for seed, length in samplings
    ]
    spared = sum(cost["database"] for cost in costs[1:])
    return {
        "searched": sum(cost["searched"] for cost in costs),
        "embedded": sum(cost["embedded"] for cost in costs) - spared,
    }


def aligned(folder: Path, corpus: Path, samplings: list[tuple[int, int]]) -> dict[str, int]:
    """One search; every sampling is then read."""
    project, ((seed, length), *_) = folder / "aligned", samplings
    cost = make_project(project, corpus, "aligned", seed, length)
    for seed, length in samplings:
        retro.set_samples(project_dir=str(project), seed=seed, seq_length=length, train_epochs=1.0)
        for dataset in build_retro_datasets(str(project)).values():
            if dataset is not None:
                dataset[len(dataset) - 1]  # raises if its chunks have no neighbors
    assert cost_of(project) == cost
    return cost


def run(options: Options) -> dict[str, Any]:
    """Count both, and print the ratio."""
    seeds = [FIRST_SEED + number for number in range(options.seeds)]
    samplings = list(product(seeds, options.lengths))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        corpus = folder / "documentation.jsonl"
        write_jsonl(python_documentation()[: options.documents], corpus)
        result: dict[str, Any] = {
            "samplings": len(samplings),
            "aligned": aligned(folder, corpus, samplings),
            "packed": packed(folder, corpus, samplings),
        }
    for name in ("searched", "embedded"):
        result[f"{name}, packed ÷ aligned"] = result["packed"][name] / result["aligned"][name]
    print(json.dumps(result, indent=1, ensure_ascii=False))
    if options.json:
        options.json.write_text(json.dumps(result) + "\n", encoding="utf-8")
    return result


if __name__ == "__main__":
    sys.exit(run_command(Options, run))
