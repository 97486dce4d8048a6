"""A page of generated texts: each chunk beside the neighbors that the model read for it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from html import escape
from pathlib import Path

import numpy as np

from retro_mcore.data.tokenizers.base import Tokenizer
from retro_mcore.project.atomic import atomic_write
from retro_mcore.retrieval.marked_text import Piece, split_text
from retro_mcore.retrieval.page import facts_table, html_page, neighbor_html
from retro_mcore.session.continuation import Continuation
from retro_mcore.session.generation import GenerationModel
from retro_mcore.session.written_chunks import (
    SHORTEST_COPY,
    ReadNeighbor,
    WrittenChunk,
    written_chunks,
)

_STYLE = """
.row { display: grid; grid-template-columns: minmax(0, 1fr) minmax(0, 1fr); gap: 1.5rem; }
@media (max-width: 50rem) { .row { grid-template-columns: minmax(0, 1fr); } }
.row .neighbor { margin: 0 0 .8rem; } .prompt { opacity: .6; }
"""
#: Degrees between the hues of two neighbors, so that many stay apart.
_HUE_STEP = 137
#: Gain in nats that is underlined in full color.
_FULL_GAIN = 2.0


def write_page(path: Path, results: Sequence[Continuation], loaded: GenerationModel) -> None:
    """Write a self-contained HTML page of all texts, atomically; call it on one rank."""
    with atomic_write(path) as file:
        file.write_text(render_page(results, loaded), encoding="utf-8")


def render_page(results: Sequence[Continuation], loaded: GenerationModel) -> str:
    """Render the page as HTML."""
    facts = {
        "checkpoint": str(loaded.checkpoint),
        "chunk": f"{loaded.arguments.retro_chunk_length} tokens; beside it the neighbors of the "
        "chunk before, with which it was written",
        "marked": f"runs of at least {SHORTEST_COPY} generated tokens that stand in a neighbor, in "
        "its color",
        "underlined": "tokens whose loss a neighbor lowered (the loss without it minus the loss "
        f"with it), in the color of the best; full color from {_FULL_GAIN:.0f} nats. Point at a "
        "token to see the gain by each neighbor",
    }
    texts = [
        f"<h2>Text {number}</h2>\n{_text(result, loaded)}"
        for number, result in enumerate(results, 1)
    ]
    most = max((len(found.mask[0]) for r in results for found in r.generated.neighbors), default=0)
    return html_page(
        "Generated text and its neighbors",
        "\n".join([facts_table(facts), *texts]),
        _STYLE + _colors(most),
    )


def _colors(num_neighbors: int) -> str:
    return "".join(
        f"mark.n{rank} {{ background: hsl({_hue(rank)} 90% 55% / .45); }}\n"
        for rank in range(1, num_neighbors + 1)
    )


def _hue(rank: int) -> int:
    return (48 + (rank - 1) * _HUE_STEP) % 360


def _text(result: Continuation, loaded: GenerationModel) -> str:
    chunk_length = loaded.arguments.retro_chunk_length
    chunks = written_chunks(result.generated, chunk_length, loaded.retriever)
    return "\n".join(_chunk(chunk, loaded.tokenizer) for chunk in chunks)


def _chunk(chunk: WrittenChunk, tokenizer: Tokenizer) -> str:
    about = chunk.title
    if chunk.num_generated:
        about += f"; {chunk.copied_share}"
    neighbors = "\n".join(_neighbor(one, tokenizer) for one in chunk.neighbors)
    neighbors = neighbors or '<div class="about">no neighbors</div>'
    return (
        f'<section class="row">\n<div>\n<div class="about">{escape(about)}</div>\n'
        f'<div class="text">{"".join(_tokens(chunk, tokenizer))}</div>\n</div>\n'
        f"<div>\n{neighbors}\n</div>\n</section>"
    )


def _tokens(chunk: WrittenChunk, tokenizer: Tokenizer) -> Iterator[str]:
    """Each token in an element of its own."""
    for text, place in split_text(tokenizer, chunk.tokens, np.arange(len(chunk.tokens))):
        rank, attributes = int(chunk.copied_from[place]), ""
        if place < chunk.num_prompt:
            yield f'<span class="prompt">{escape(text)}</span>'
            continue
        if chunk.neighbors and chunk.credit is not None:
            attributes = _credit_attributes(chunk.credit[place])
        if rank:
            yield f'<mark class="n{rank}"{attributes}>{escape(text)}</mark>'
        else:
            yield f"<span{attributes}>{escape(text)}</span>"


def _credit_attributes(gains_K: np.ndarray) -> str:
    """A tooltip with all gains, and an underline in the color of the best neighbor."""
    lines = [f"neighbor {rank}: {gain:+.2f} nats" for rank, gain in enumerate(gains_K, 1)]
    best = int(gains_K.argmax())
    depth = min(max(float(gains_K[best]), 0.0) / _FULL_GAIN, 1.0)
    line = f"inset 0 -.25em hsl({_hue(best + 1)} 90% 45% / {depth:.2f})"
    style = f' style="box-shadow: {line}"' if depth >= 0.01 else ""
    return f' title="{"&#10;".join(lines)}"{style}'


def _neighbor(neighbor: ReadNeighbor, tokenizer: Tokenizer) -> str:
    parts: list[list[Piece] | None] = [*neighbor.pieces(tokenizer)]
    if len(parts) == 1 and neighbor.has_continuation:
        parts.append(None)
    return neighbor_html(neighbor.title, parts, f"n{neighbor.rank}")
