"""An index whose parts are spread over ranks, searched by all of them together."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from retro_mcore.distributed import get_rank, get_world_size
from retro_mcore.retrieval.index.faiss_search import nearest, search

#: Queries whose results are gathered from all ranks at a time; bounds the memory.
_GATHERED = 4096


class SharedIndex:
    """An index in which each rank holds some of the vectors; all ranks of `group` search together.

    Args:
        local: This rank's part.
        ntotal: Vectors on all ranks.
        dimension: Length of a vector.
        group: The ranks; None: the world.
    """

    def __init__(
        self, local: Any, ntotal: int, dimension: int, group: dist.ProcessGroup | None = None
    ) -> None:
        self.local, self.ntotal, self.d, self.group = local, ntotal, dimension, group

    def search_together(self, vectors: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Search this rank's queries on all ranks; a rank may have any number of queries, even
        none.

        Each rank searches the queries of all ranks in its part and sends back the results.

        Args:
            vectors: f32 [n, dimension].
            k: Number of neighbors for this rank's queries.
        """
        world, rank = get_world_size(self.group), get_rank(self.group)
        asked: list[tuple[int, int]] = [(0, 0)] * world
        dist.all_gather_object(asked, (len(vectors), k), group=self.group)
        result = np.empty((0, k), np.float32), np.empty((0, k), np.int64)
        for owner, (count, wanted) in enumerate(asked):
            if not count:
                continue
            queries = (
                torch.from_numpy(vectors.copy()) if owner == rank else torch.empty(count, self.d)
            )
            source = owner if self.group is None else dist.get_global_rank(self.group, owner)
            dist.broadcast(queries, source, group=self.group)
            found = search(self.local, queries.numpy(), wanted)
            merged = self._merge(found, wanted, source)
            if owner == rank:
                result = merged
        return result

    def _merge(
        self, found: tuple[np.ndarray, np.ndarray], k: int, destination: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Keep the k nearest of every rank's results on world rank `destination`."""
        merged = []
        for start in range(0, len(found[0]), _GATHERED):
            parts = (torch.from_numpy(part[start : start + _GATHERED]) for part in found)
            distances, ids = (self._gather(part, destination) for part in parts)
            merged.append(nearest(distances, ids, k))
        distances, ids = (np.concatenate(parts) for parts in zip(*merged, strict=True))
        return distances, ids

    def _gather(self, part: torch.Tensor, destination: int) -> np.ndarray:
        """Gather the columns of every rank, side by side, on world rank `destination`."""
        parts = None
        if dist.get_rank() == destination:
            parts = [torch.empty_like(part) for _ in range(get_world_size(self.group))]
        dist.gather(part.contiguous(), parts, dst=destination, group=self.group)
        return np.hstack([each.numpy() for each in parts or [part]])
