"""Aligned against packed samples: perplexity at equal counted tokens, padding, cost of retrieval.

    python -m benchmarks.aligned_against_packed                     # hours on two cores
    python -m benchmarks.aligned_against_packed --train-iters 10 --seeds 1   # tries it, in minutes

The same real text, model and number of counted predictions. Packed: a project, with its search, per
seed. Aligned: one project, whose samples `set_samples` changes for each seed. Perplexity is that of
the held-out documents, which is over the same tokens for both (`evaluate_perplexity --protocol
documents`).
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

from benchmarks.retro_against_gpt import train
from benchmarks.training_data import BATCH, MODEL_FLAGS, make_project
from retro_mcore.chunking import SampleLayout

FIRST_SEED = 1234
KINDS = ["real", "none"]
CORPUS = "documentation.jsonl"


def project_in(place: Path, train_iters: int, samples: SampleLayout, seed: int) -> Path:
    """A project in `place`; all places beside it share one corpus."""
    shared, own = place.parent / CORPUS, place / CORPUS
    place.mkdir(parents=True, exist_ok=True)
    if shared.is_file() and not own.is_file():
        own.hardlink_to(shared)
    project = make_project(place, train_iters, samples, seed)
    if not shared.is_file():
        shared.hardlink_to(own)
    return project


def counted_share(project: Path, limit: int = 512) -> float:
    """Share of a training sample's predictions that count in the loss."""
    from retro_mcore.samples.retro_dataset import build_retro_datasets

    train_samples = build_retro_datasets(project)["train"]
    assert train_samples is not None
    number = min(limit, len(train_samples))
    items = [train_samples.text_item(index) for index in range(number)]
    masks = [item["loss_mask"].mean() for item in items if "loss_mask" in item]
    return float(sum(masks) / number) if masks else 1.0


def query_cost(project: Path) -> dict[str, int]:
    """Chunks that query_neighbors searched, and how many of them it embedded."""
    from retro_mcore.project.paths import ProjectPaths
    from retro_mcore.project.records import stage_report

    splits = stage_report(ProjectPaths(project), "query_neighbors").values()
    searched = sum(counts["chunks"] for counts in splits)
    stored = sum(counts.get("vectors_stored", 0) for counts in splits)
    return {"searched": searched, "embedded": searched - stored}


def padding_share(project: Path) -> float:
    """Share of padding in the tokens of the project."""
    from retro_mcore.project.paths import ProjectPaths
    from retro_mcore.project.records import stage_report

    report = stage_report(ProjectPaths(project), "preprocess_corpus")
    return float(report.get("padding_tokens", 0) / report["tokens"])


def measure(project: Path, folder: Path, seed: int) -> dict[str, Any]:
    """Train a model on a project as it is, and measure it on the held-out documents."""
    from retro_mcore.cli.commands import evaluate_perplexity

    train(project, folder, MODEL_FLAGS)
    result = evaluate_perplexity(
        project_dir=str(project), load=str(folder), protocol="documents", retro_eval_neighbors=KINDS
    )
    rows = {row.neighbors: row for row in result.bits_per_byte}
    return {
        "seed": seed,
        "counted": counted_share(project),
        **{kind: rows[kind].perplexity for kind in KINDS},
        **{f"{kind}_bits_per_byte": rows[kind].bits_per_byte for kind in KINDS},
        "tokens": rows["real"].num_tokens,
    }


def run_packed(folder: Path, train_iters: int, seeds: list[int]) -> dict[str, Any]:
    """A project and a search per seed."""
    rows, cost = [], {"searched": 0, "embedded": 0}
    for seed in seeds:
        place = folder / f"packed_{seed}"
        project = project_in(place, train_iters, "packed", seed)
        rows.append(measure(project, place / "model", seed))
        cost = {name: cost[name] + number for name, number in query_cost(project).items()}
    return {"layout": "packed", "rows": rows, "padding": padding_share(project), **cost}


def run_aligned(folder: Path, train_iters: int, seeds: list[int]) -> dict[str, Any]:
    """One project, whose samples change with the seed; as many predictions count as packed."""
    from retro_mcore.cli.commands import set_samples

    place = folder / "aligned"
    project = project_in(place, train_iters, "aligned", FIRST_SEED)
    rows = []
    for seed in seeds:
        set_samples(project_dir=str(project), seed=seed)
        iters = round(train_iters / counted_share(project))
        set_samples(
            project_dir=str(project), train_samples=iters * BATCH, eval_interval=iters, seed=seed
        )
        rows.append(measure(project, place / f"model_{seed}", seed))
    padding = padding_share(project)
    return {"layout": "aligned", "rows": rows, "padding": padding, **query_cost(project)}


def show(results: list[dict[str, Any]]) -> None:
    """A row per layout: perplexities (mean, spread over seeds), padding and cost."""
    print(
        f"\n{'layout':8} {'real':>16} {'none':>16} {'padding':>8} {'searched':>9} {'embedded':>9}"
    )
    for result in results:
        cells = []
        for kind in KINDS:
            values = [row[kind] for row in result["rows"]]
            spread = statistics.stdev(values) if len(values) > 1 else 0.0
            cells.append(f"{statistics.mean(values):9.3f} ±{spread:5.3f}")
        print(
            f"{result['layout']:8} {' '.join(cells)} {result['padding']:8.1%} "
            f"{result['searched']:9} {result['embedded']:9}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=Path("aligned_against_packed"))
    parser.add_argument("--train-iters", type=int, default=1500, help="steps on packed samples")
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds")
    parser.add_argument("--json", type=Path, help="write the results here")
    options = parser.parse_args()
    seeds = [FIRST_SEED + number for number in range(options.seeds)]
    runs = (run_packed, run_aligned)
    results = [run(options.folder, options.train_iters, seeds) for run in runs]
    show(results)
    if options.json:
        options.json.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
