"""Search for neighbors in a background thread."""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor

from retro_mcore.errors import ConfigurationError
from retro_mcore.retrieval.neighbors import (
    CompletedChunk,
    NeighborSource,
    Prefetching,
    RetrievedNeighbors,
)


class BackgroundRetrieval(Prefetching):
    """Asks another source in its own thread, as soon as the query's tokens are known.

    The result depends only on the texts, never on how long a search takes.

    Args:
        source: The search; called from that thread only, one call at a time.
        interval: Search for every n-th chunk of a text; the chunks in between reuse the neighbors
            of the previous chunk.
        lead: Number of tokens at the end of a chunk that the search ignores, so that it can run
            while they are generated. 0: search with the whole chunk, as in training; generation
            then waits for the search at the end of each chunk.

    Attributes:
        waited_seconds: Time that generation has waited for searches.

    Raises:
        ConfigurationError: the interval is not positive, or the lead is negative.
    """

    def __init__(self, source: NeighborSource, interval: int = 1, lead: int = 0) -> None:
        if interval < 1:
            raise ConfigurationError("--retrieval-interval", str(interval), "Give at least 1")
        if lead < 0:
            raise ConfigurationError("--retrieval-lead", str(lead), "Give 0 or more")
        self._source, self._interval, self.lead = source, interval, lead
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="retrieval")
        # By prompt and chunk: the search that covers it, and its index among the search's chunks.
        self._searches: dict[int, dict[int, tuple[Future[RetrievedNeighbors], int]]] = {}
        self.waited_seconds = 0.0

    def expect(self, chunks: Sequence[CompletedChunk]) -> None:
        """Start searching for these chunks, unless already started."""
        new = [
            chunk
            for chunk in chunks
            if chunk.chunk % self._interval == 0
            and chunk.chunk not in self._searches.get(chunk.prompt, {})
        ]
        if new:
            search = self._executor.submit(self._source.neighbors_of, new)
            for place, chunk in enumerate(new):
                self._searches.setdefault(chunk.prompt, {})[chunk.chunk] = search, place

    def neighbors_of(self, chunks: Sequence[CompletedChunk]) -> RetrievedNeighbors:
        """Wait for the neighbors of N chunks (`NeighborSource`)."""
        self.expect(chunks)
        start = time.perf_counter()
        found = [self._result(chunk) for chunk in chunks]
        self.waited_seconds += time.perf_counter() - start
        return RetrievedNeighbors.join(found)

    def _result(self, chunk: CompletedChunk) -> RetrievedNeighbors:
        searched = chunk.chunk - chunk.chunk % self._interval
        search, place = self._searches[chunk.prompt][searched]
        return search.result().chunk(place)

    def forget(self, prompt: int) -> None:
        """Forget a prompt whose text has ended."""
        self._searches.pop(prompt, None)

    def close(self) -> None:
        """Stop the thread."""
        self._executor.shutdown(wait=True, cancel_futures=True)
