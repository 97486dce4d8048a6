"""The page of `inspect_neighbors`, one self-contained HTML file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape

import numpy as np

from retro_mcore.retrieval.marked_text import Piece
from retro_mcore.retrieval.page import facts_table, html_page, marked_html, neighbor_html

_CHARTS = """
.charts { display: flex; flex-wrap: wrap; gap: 2rem; } figure { margin: 0; }
svg { font: 11px system-ui, sans-serif; } svg rect { fill: #4a7fd0; }
svg text { fill: currentColor; } svg line { stroke: currentColor; }
"""
_WIDTH, _HEIGHT, _BINS = 420, 160, 25


@dataclass(frozen=True)
class NeighborView:
    """One neighbor of a chunk, ready to show.

    Attributes:
        about: Rank, chunk id, source document, distance and overlap.
        chunks: The neighbor and its continuations as pieces of text; None past its document's end.
    """

    about: str
    chunks: Sequence[Sequence[Piece] | None]


@dataclass(frozen=True)
class ChunkView:
    """One chunk of a sample with its neighbors."""

    number: int
    text: Sequence[Piece]
    neighbors: Sequence[NeighborView]


@dataclass(frozen=True)
class SampleView:
    """One sample: its number, the documents it is cut from, and its chunks."""

    number: int
    documents: str
    chunks: Sequence[ChunkView]


@dataclass(frozen=True)
class Histogram:
    """Values to count; `unit` labels the axis, and `bounds` are its ends if fixed."""

    title: str
    unit: str
    values: np.ndarray
    bounds: tuple[float, float] | None = None


@dataclass(frozen=True)
class Page:
    """Everything that the page shows."""

    title: str
    facts: dict[str, str]
    histograms: Sequence[Histogram]
    samples: Sequence[SampleView] = field(default_factory=list)


def render(page: Page) -> str:
    """Render the page as HTML; all text is escaped."""
    charts = "\n".join(map(_histogram, page.histograms))
    samples = "\n".join(map(_sample, page.samples))
    body = f'{facts_table(page.facts)}\n<div class="charts">\n{charts}\n</div>\n{samples}'
    return html_page(page.title, body, _CHARTS)


def _sample(sample: SampleView) -> str:
    chunks = "\n".join(map(_chunk, sample.chunks))
    about = f'<p class="about">from {escape(sample.documents)}</p>'
    return f'<h2 id="sample-{sample.number}">Sample {sample.number}</h2>\n{about}\n{chunks}'


def _chunk(chunk: ChunkView) -> str:
    neighbors = "\n".join(neighbor_html(one.about, one.chunks) for one in chunk.neighbors)
    if not chunk.neighbors:
        neighbors = '<div class="neighbor about">no neighbors</div>'
    return (
        f'<section>\n<div class="about">chunk {chunk.number}</div>\n'
        f'<div class="text">{marked_html(chunk.text)}</div>\n{neighbors}\n</section>'
    )


def _histogram(histogram: Histogram) -> str:
    values = histogram.values
    title = escape(histogram.title)
    if not len(values):
        return f"<figure><figcaption>{title}: none were saved</figcaption></figure>"
    low, high = histogram.bounds or (float(values.min()), float(values.max()))
    high = high if high > low else low + 1.0
    counts, _ = np.histogram(values, _BINS, (low, high))
    step, tallest = _WIDTH / _BINS, max(int(counts.max()), 1)
    bars = []
    for number, count in enumerate(counts):
        size = (_HEIGHT - 30) * int(count) / tallest
        start, end = (low + (high - low) * i / _BINS for i in (number, number + 1))
        bars.append(
            f'<rect x="{number * step:.1f}" y="{_HEIGHT - 20 - size:.1f}" width="{step - 1:.1f}" '
            f'height="{size:.1f}"><title>{start:.3g} to {end:.3g}: {count}</title></rect>'
        )
    floor = _HEIGHT - 20
    return (
        f"<figure>\n<figcaption>{title}: mean {values.mean():.3g}, "
        f"median {np.median(values):.3g}, {len(values)} values</figcaption>\n"
        f'<svg role="img" aria-label="{title}" width="{_WIDTH}" height="{_HEIGHT}">\n'
        + "\n".join(bars)
        + f'\n<line x1="0" y1="{floor}" x2="{_WIDTH}" y2="{floor}"/>'
        f'<text x="0" y="{_HEIGHT - 5}">{low:.3g}</text>'
        f'<text x="{_WIDTH / 2}" y="{_HEIGHT - 5}" text-anchor="middle">{escape(histogram.unit)}'
        f'</text><text x="{_WIDTH}" y="{_HEIGHT - 5}" text-anchor="end">{high:.3g}</text>\n'
        "</svg>\n</figure>"
    )
