"""`build_index`: embed the chunk database and index it."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated

import tyro

from retro_mcore.cli.command import run_command
from retro_mcore.cli.output import print_summary
from retro_mcore.cli.project_options import ProjectOptions
from retro_mcore.cli.tables.embedding import embedding_losses
from retro_mcore.retrieval.index import AUTO, Recall
from retro_mcore.stages.build_index import STAGE, BuildIndexConfig, BuildIndexReport, run


@dataclass
class BuildIndexOptions(BuildIndexConfig, ProjectOptions):
    """Embed the chunk database and build the index that neighbors are searched in."""

    project_dir: str
    """Project directory, after build_db."""
    index: Annotated[str, tyro.conf.arg(aliases=("--index-str",))] = field(
        default=AUTO, kw_only=True
    )


def build_index(options: BuildIndexOptions) -> BuildIndexReport:
    """Run the stage and print its summary; see `retro_mcore.stages.build_index.run`."""
    report = run(options.project_dir, options)
    print_report(report)
    return report


def print_report(report: BuildIndexReport) -> None:
    """Print the summary of a run."""
    config, choice, recall = report.config, report.choice, report.recall
    rows: dict[str, object] = {"embedder": config.embedder}
    if report.embedded is not None:
        embedded = report.embedded
        rows["embeddings"] = f"{embedded.num_chunks} chunks in files {embedded.files}"
        made_as = embedded.embedded_as
        rows["precision"] = f"{made_as.precision}, stored in {made_as.dtype}"
        rows |= embedding_losses(embedded.counts, embedded.max_tokens)
    if choice is not None:
        rows["index"] = f"{choice.string}: {choice.reason}{' (reused)' if report.reused else ''}"
    if report.parts is not None:
        rows["parts"] = f"{report.parts}"
    if recall is not None:
        where = " on the disk" if choice is not None and choice.on_disk else ""
        rows["search"] = _breadth(recall) + (" in parts" if config.split_index else where)
        rows["recall against exact search"] = _recall(recall, config.index_recall)
    title = STAGE if config.stage is None else f"{STAGE} --stage {config.stage}"
    print_summary(title + (f" --shard {config.shard}" if config.shard is not None else ""), rows)


def _breadth(recall: Recall) -> str:
    named = (("nprobe", recall.nprobe), ("efSearch", recall.ef_search))
    limits = ", ".join(f"{name} {value}" for name, value in named if value is not None)
    return limits or "exhaustive"


def _recall(recall: Recall, wanted: float) -> str:
    shares = ", ".join(f"@{k} {value:.3f}" for k, value in recall.at.items())
    missed = "" if recall.decisive >= wanted else f", below the {wanted} wanted"
    queries = f"{recall.num_queries} queries, {recall.num_held_out} of held-out documents"
    error = f"; standard error {recall.error:.3f}" if recall.error else ""
    order = recall.in_list_order
    in_order = f"; @2 {order:.3f} in list order" if order not in (None, recall.decisive) else ""
    return f"{shares} ({queries}{error}){in_order}{missed}"


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    return run_command(BuildIndexOptions, build_index, argv)


if __name__ == "__main__":
    sys.exit(main())
