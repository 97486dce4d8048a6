"""Leakage of evaluation text into retrieved chunks, and its effect on the loss.

As in Borgeaud et al. 2022, section 2.6, the overlap r of an evaluation chunk is the length of the
longest token substring it shares with a neighbor (including its continuation), divided by the
chunk length. Bits per byte over the chunks with r <= alpha, for a range of alpha, separate learning
from copying.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from retro_mcore.distributed import get_rank, get_world_size
from retro_mcore.evaluation.chunk_losses import ChunkLosses
from retro_mcore.evaluation.documents import HeldOutDocuments
from retro_mcore.evaluation.neighbor_sources import NeighborRows
from retro_mcore.evaluation.scoring import sum_over_world
from retro_mcore.project.atomic import atomic_write
from retro_mcore.retrieval.database import ChunkDatabase
from retro_mcore.retrieval.overlap import longest_common_runs

#: The paper's range, from 8 of 64 tokens to all.
DEFAULT_ALPHAS = (0.125, 0.25, 0.375, 0.5, 0.625, 0.75, 0.875, 1.0)
#: Chunks compared at once, which limits memory use.
_BATCH = 512


@dataclass(frozen=True)
class LeakagePoint:
    """A point of the curve.

    Attributes:
        alpha: Maximum overlap of the included chunks.
        num_chunks: Number of included chunks.
        num_bytes: Number of bytes of the included chunks.
        bits_per_byte: Bits per byte by kind of neighbors; NaN if no chunk is included.
    """

    alpha: float
    num_chunks: int
    num_bytes: int
    bits_per_byte: dict[str, float]

    def as_json(self) -> dict[str, Any]:
        """The point as JSON, with null in place of NaN."""
        values = {k: None if v != v else v for k, v in self.bits_per_byte.items()}
        return {**asdict(self), "bits_per_byte": values}


def chunk_overlaps(
    documents: HeldOutDocuments,
    neighbors: NeighborRows,
    database: ChunkDatabase,
    num_neighbors: int,
    num_retrieved_chunks: int,
) -> NDArray[np.float64]:
    """Compute the overlap r of every chunk of the documents, f64 [chunks] from 0 to 1.

    All ranks share the work.

    Args:
        documents: The documents.
        neighbors: Neighbors of their chunks.
        database: The retrieval database.
        num_neighbors: Number of neighbors to compare with.
        num_retrieved_chunks: Chunks per neighbor, including the neighbor itself.
    """
    overlaps = np.zeros(documents.num_chunks)
    step = _BATCH * get_world_size()
    for start in range(_BATCH * get_rank(), documents.num_chunks, step):
        stop = min(start + _BATCH, documents.num_chunks)
        tokens_CM = _chunk_tokens(documents, start, stop)
        retrieved, mask = database.retrieved_tokens(
            neighbors.rows(start, stop)[:, :num_neighbors],
            num_retrieved_chunks,
            documents.chunk_length,
            documents.eod,
        )
        retrieved_CKR = np.where(mask, -1, retrieved)
        num_neighbors_found, length = retrieved_CKR.shape[1:]
        runs_CK = longest_common_runs(
            np.repeat(tokens_CM, num_neighbors_found, axis=0), retrieved_CKR.reshape(-1, length)
        ).reshape(-1, num_neighbors_found)
        overlaps[start:stop] = runs_CK.max(1) / (tokens_CM >= 0).sum(1)
    return sum_over_world(overlaps)


def _chunk_tokens(documents: HeldOutDocuments, start: int, stop: int) -> np.ndarray:
    """Tokens i64 [stop - start, M] of chunks; short chunks are padded with -1."""
    chunk_length, first_rows = documents.chunk_length, documents.first_rows
    tokens = np.full((stop - start, chunk_length), -1, np.int64)
    row = start
    while row < stop:
        document = int(np.searchsorted(first_rows, row, side="right")) - 1
        end = min(int(first_rows[document + 1]), stop)
        first = (row - int(first_rows[document])) * chunk_length
        text = documents.tokens(document)[first : first + (end - row) * chunk_length]
        tokens[row - start : end - start].reshape(-1)[: len(text)] = text
        row = end
    return tokens


def leakage_curve(
    overlaps: NDArray[np.float64],
    losses: Mapping[str, ChunkLosses],
    alphas: Sequence[float] = DEFAULT_ALPHAS,
) -> list[LeakagePoint]:
    """Compute bits per byte over the chunks whose overlap is at most alpha.

    Args:
        overlaps: From `chunk_overlaps`.
        losses: Losses by kind of neighbors.
        alphas: Points of the curve.
    """
    num_bytes = next(iter(losses.values())).bytes
    points = []
    for alpha in alphas:
        chosen = overlaps <= alpha + 1e-12
        bits = {kind: chunks.bits_per_byte(chosen) for kind, chunks in losses.items()}
        points.append(LeakagePoint(alpha, int(chosen.sum()), int(num_bytes[chosen].sum()), bits))
    return points


def plot_leakage(curves: Mapping[str, Sequence[LeakagePoint]], path: Path) -> None:
    """Plot the curves as a PNG, with one line per split and kind of neighbors.

    Args:
        curves: Points by split.
        path: The PNG file.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for split, points in curves.items():
        for kind in points[0].bits_per_byte:
            label = kind if len(curves) == 1 else f"{split}, {kind}"
            values = [point.bits_per_byte[kind] for point in points]
            axes.plot([100 * point.alpha for point in points], values, "o-", label=label)
    axes.set_xlabel("largest overlap with a neighbor, % of the chunk")
    axes.set_ylabel("bits per byte")
    axes.legend(title="neighbors")
    axes.grid(alpha=0.3)
    with atomic_write(path) as temporary:
        figure.savefig(temporary, format="png", dpi=150)
