"""The tables that `evaluate_perplexity` prints."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from retro_mcore.evaluation.attribution import NeighborGain
    from retro_mcore.evaluation.bits_per_byte import BitsPerByte
    from retro_mcore.evaluation.leakage import LeakagePoint
    from retro_mcore.evaluation.perplexity import Perplexity


def print_tables(
    perplexities: Sequence[Perplexity],
    bits_per_byte: Sequence[BitsPerByte],
    leakage: Mapping[str, Sequence[LeakagePoint]],
    gains: Sequence[NeighborGain] = (),
) -> None:
    """A table of each measurement that was made."""
    if perplexities:
        _print_table(
            "samples: loss over the loss mask",
            ("split", "neighbors", "corpus", "loss", "perplexity", "tokens", "seconds"),
            [cells for row in perplexities for cells in _perplexity_cells(row)],
        )
        _print_notes(_repeats_note(row) for row in perplexities)
    if bits_per_byte:
        first = bits_per_byte[0]
        _print_table(
            f"documents: windows of {first.window} tokens, {first.stride} apart",
            ("split", "neighbors", "corpus", "bits per byte", "perplexity", "bytes", "seconds"),
            [cells for row in bits_per_byte for cells in _bits_cells(row)],
        )
        _print_intervals(bits_per_byte)
        _print_notes(_left_out_note(row) for row in bits_per_byte)
    if gains:
        _print_table(
            "gain: loss without these neighbors minus loss with them, in nats per token",
            ("split", "protocol", "rank", "gain", "helped", "hurt", "tokens", "seconds"),
            [_gain_cells(gain) for gain in gains],
        )
        print("helped and hurt: shares of the tokens with a gain of more than 0.1, less than -0.1")
    for split, points in leakage.items():
        kinds = list(points[0].bits_per_byte)
        _print_table(
            f"{split} documents: bits per byte of chunks that share at most this with a neighbor",
            ("overlap", "chunks", *kinds),
            [_leakage_cells(point) for point in points],
        )


def _print_intervals(rows: Sequence[BitsPerByte]) -> None:
    """Bootstrap intervals, and differences to the first kind of neighbors of each split."""
    cells: list[list[str]] = []
    first: dict[str, BitsPerByte] = {}
    for row in rows:
        if row.interval is None:
            continue
        base = first.setdefault(row.split, row)
        difference = (base.differences or {}).get(row.neighbors)
        shown = ""
        if difference is not None:
            shown = f"{difference.mean:+.4f} ({_range(difference.low, difference.high)})"
        cells.append([row.split, row.neighbors, _range(*row.interval), shown])
    if cells:
        base_kind = next(iter(first.values())).neighbors
        _print_table(
            "95% bootstrap intervals over documents",
            ("split", "neighbors", "bits per byte", f"{base_kind} minus these"),
            cells,
        )


def _range(low: float, high: float) -> str:
    return f"{low:.4f} to {high:.4f}"


def _perplexity_cells(row: Perplexity) -> list[list[str]]:
    parts: list[tuple[str, Any]] = [("all", row), *row.corpora.items()]
    return [
        [
            row.split,
            row.neighbors,
            corpus,
            f"{part.loss:.4f}",
            f"{part.perplexity:.3f}",
            f"{part.num_tokens:,}",
            f"{row.seconds:.1f}" if part is row else "",
        ]
        for corpus, part in parts
    ]


def _bits_cells(row: BitsPerByte) -> list[list[str]]:
    parts: list[tuple[str, Any]] = [("all", row), *row.corpora.items()]
    return [
        [
            row.split,
            row.neighbors,
            corpus,
            f"{part.bits_per_byte:.4f}",
            f"{part.perplexity:.3f}",
            f"{part.num_bytes:,}",
            f"{row.seconds:.1f}" if part is row else "",
        ]
        for corpus, part in parts
    ]


def _repeats_note(row: Perplexity) -> str:
    if row.num_distinct_tokens is None or row.num_distinct_tokens == row.num_tokens:
        return ""
    return (
        f"warning: the {row.num_samples} {row.split} samples repeat their text: "
        f"{row.num_documents} documents, each token read {row.repeats:.1f} times on average "
        f"({row.num_tokens:,} tokens, {row.num_distinct_tokens:,} of them different). "
        "--protocol documents reads each token once"
    )


def _left_out_note(row: BitsPerByte) -> str:
    note = (
        f"{row.split}: {row.num_tokens_not_predicted:,} first tokens of documents are not predicted"
    )
    if row.num_documents_too_short:
        note += f", {row.num_documents_too_short:,} documents of fewer than two tokens are left out"
    return note


def _print_notes(notes: Iterable[str]) -> None:
    """Each note once, in its order."""
    for note in dict.fromkeys(notes):
        if note:
            print(note)


def _gain_cells(gain: NeighborGain) -> list[str]:
    if not gain.num_tokens:
        shown = ["no tokens", "", ""]
    else:
        shown = [f"{gain.gain:+.4f}", f"{gain.helped:.1%}", f"{gain.hurt:.1%}"]
    rank = "all" if gain.rank is None else str(gain.rank)
    cells = [gain.split, gain.protocol, rank, *shown]
    return [*cells, f"{gain.num_tokens:,}", f"{gain.seconds:.1f}"]


def _leakage_cells(point: LeakagePoint) -> list[str]:
    values = [
        "no chunks" if value != value else f"{value:.4f}" for value in point.bits_per_byte.values()
    ]
    return [f"{point.alpha:.1%}", f"{point.num_chunks:,}", *values]


def _print_table(title: str, names: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    table = Table(title=title, title_justify="left", title_style="bold")
    for name in names:
        left = name in ("split", "neighbors", "corpus", "protocol")
        table.add_column(name, justify="left" if left else "right")
    for row in rows:
        table.add_row(*row)
    Console(markup=False, emoji=False).print(table)
