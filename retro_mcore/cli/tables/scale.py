"""The tables of `plan_scale`."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from retro_mcore.cli.output import print_summary
from retro_mcore.distributed import get_rank
from retro_mcore.retrieval.scale import Node, Rates, ScalePlan, StagePlan, Workload


def print_plan(plan: ScalePlan, work: Workload, rates: Rates, node: Node) -> None:
    """Print a plan, on rank 0: a summary, and a row per stage."""
    unit = "GPU" if node.gpus else "core"
    shares = f", split over {plan.index_shares} nodes" if plan.index_shares > 1 else ""
    rows = {
        "chunks": f"{plan.chunks:,} of {work.tokens:,.0f} tokens",
        "chunks to search for": f"{plan.query_chunks:,}",
        "index": f"{plan.index}, trained on {plan.training_vectors:,} vectors",
        "index, bytes": f"{_bytes(plan.index_bytes)}{shares}",
        "disk, all stages": _bytes(plan.disk),
        "rates": f"{rates.tokenized:,.0f} tokens and {rates.chunked:,.0f} chunks per core, "
        f"{rates.embedded:,.0f} chunks embedded per {unit}, {rates.added:,.0f} vectors added per "
        f"core, {rates.queried:,.0f} chunks searched per node, in a second",
    }
    print_summary("plan_scale", rows)
    if get_rank() == 0:
        _print_stages(plan.stages)


def _print_stages(stages: list[StagePlan]) -> None:
    table = Table()
    for heading in ("stage", "hours", "nodes", "ranks", "disk", "memory of a rank"):
        table.add_column(heading, justify="left" if heading == "stage" else "right")
    for stage in stages:
        hours = f"{stage.hours:,.1f} {stage.worker}-hours"
        disk = _bytes(stage.disk) if stage.disk else ""
        ranks = f"{stage.nodes:,}", f"{stage.ranks:,}"
        table.add_row(stage.name, hours, *ranks, disk, _bytes(stage.memory))
    Console(width=120, markup=False, emoji=False).print(table)


def _bytes(count: float) -> str:
    """A size in decimal units, as disks are sold."""
    for unit in ("B", "KB", "MB", "GB", "TB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} PB"
