"""`query_neighbors`: the neighbors of every training, validation and test chunk."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass

from retro_mcore.cli.command import run_command
from retro_mcore.cli.output import print_summary
from retro_mcore.cli.project_options import ProjectOptions
from retro_mcore.cli.tables.embedding import embedding_losses
from retro_mcore.retrieval.copies import FIRST, NEAR_RUN
from retro_mcore.retrieval.query_chunks import QueryCounts
from retro_mcore.stages.query_neighbors import (
    STAGE,
    QueryNeighborsConfig,
    QueryNeighborsReport,
    run,
)


@dataclass
class QueryNeighborsOptions(QueryNeighborsConfig, ProjectOptions):
    """Search the neighbors of every chunk of every sample, and save them."""

    project_dir: str
    """Project directory, after build_index."""


def query_neighbors(options: QueryNeighborsOptions) -> QueryNeighborsReport:
    """Run the stage and print its summary; see `retro_mcore.stages.query_neighbors.run`."""
    report = run(options.project_dir, options)
    print_report(report)
    return report


def print_report(report: QueryNeighborsReport) -> None:
    """Print the summary of a run."""
    num_saved = report.config.num_neighbors_save
    rows: dict[str, object] = {
        split: f"{report.num_chunks[split]} chunks in files {files}"
        for split, files in report.reports.items()
    }
    order = ", in the order of BM25" if report.config.rerank else ""
    order = f", by the stored vectors{order}" if report.config.rescore else order
    rows["neighbors"] = f"{num_saved} saved of {report.num_candidates} searched{order}"
    if report.num_searched is not None:
        rows["searched"] = f"{report.num_searched} new chunks; neighbors among the old were known"
    if report.num_again is not None:
        rows["searched again"] = f"{report.num_again} chunks, whose neighbors were removed"
    for split, counts in report.counts.items():
        for name, loss in _losses(counts, num_saved, report.max_tokens).items():
            rows[f"{split}, {name}"] = loss
    print_summary(STAGE, rows)


def _losses(counts: QueryCounts, num_saved: int, max_tokens: int | None) -> dict[str, object]:
    """Rows for a split: where vectors came from, copies and missing neighbors, cut chunks."""
    losses = embedding_losses(counts, max_tokens)
    if counts.vectors_stored:
        embedded = counts.chunks - counts.vectors_stored
        losses["vectors"] = f"{counts.vectors_stored} stored by build_index, {embedded} embedded"
    if counts.copy_found:
        share = counts.copy_found / max(counts.chunks, 1)
        losses["exact copies"] = (
            f"{counts.copy_found} of {counts.chunks} chunks ({share:.1%}) retrieve a chunk of the "
            f"same tokens, {counts.nearest_is_copy} of them as their nearest neighbor"
        )
    if counts.near_copy_found:
        share = counts.near_copy_found / max(counts.chunks, 1)
        losses["near copies"] = (
            f"{counts.near_copy_found} of {counts.chunks} chunks ({share:.1%}) share {NEAR_RUN} "
            f"tokens in a row, or all, with one of their first {FIRST} neighbors"
        )
    if counts.chunks_short:
        without = f", {counts.chunks_without} of them without any" if counts.chunks_without else ""
        losses[f"fewer than {num_saved} neighbors"] = (
            f"{counts.chunks_short} of {counts.chunks} chunks{without}: the database has none "
            "left of other documents, or the index found none (build_index --nprobe, --ef-search)"
        )
    return losses


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    return run_command(QueryNeighborsOptions, query_neighbors, argv)


if __name__ == "__main__":
    sys.exit(main())
