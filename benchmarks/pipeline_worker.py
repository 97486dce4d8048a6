"""One stage of our data pipeline in a process of its own: `STAGE PROJECT`; JSON on stdout.

Under torchrun, rank 0 speaks, and the seconds are those of its wall clock.
"""

from __future__ import annotations

import contextlib
import json
import resource
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from retro_mcore.cli.build_db import BuildDbOptions, build_db
from retro_mcore.cli.build_index import BuildIndexOptions, build_index
from retro_mcore.cli.query_neighbors import QueryNeighborsOptions, query_neighbors
from retro_mcore.data.tokenizers.loading import load_project_tokenizer
from retro_mcore.distributed import get_rank, initialize
from retro_mcore.platform import setup_device
from retro_mcore.project import ProjectConfig, ProjectPaths, ProjectSettings
from retro_mcore.retrieval.bert_tokens import BertTokenCounter
from retro_mcore.retrieval.chunk_text import chunk_texts
from retro_mcore.retrieval.database import ChunkDatabase
from retro_mcore.retrieval.embedders import build_embedder
from retro_mcore.retrieval.embedders.base import Embedder
from retro_mcore.retrieval.index.library import faiss_library
from retro_mcore.retrieval.neighbor_tables import SavedNeighbors
from retro_mcore.samples.project_samples import build_all_gpt_samples
from retro_mcore.samples.retro_dataset import RetroDataset
from retro_mcore.stages.build_index import STEPS, Step

CANDIDATES, SAVED, NEIGHBORS = 200, 20, 2
_BATCH = 4096


class Clock:
    """Wall and CPU seconds, children included, since it was made."""

    def __init__(self) -> None:
        self._start = self._now()

    def read(self) -> dict[str, float]:
        wall, cpu = (now - then for now, then in zip(self._now(), self._start, strict=True))
        return {"seconds": wall, "cpu_seconds": cpu, "peak_mib": _peak_mib()}

    @staticmethod
    def _now() -> tuple[float, float]:
        used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
        return time.perf_counter(), sum(use.ru_utime + use.ru_stime for use in used)


class Stopwatch:
    """CPU seconds that this process spends in some functions."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def around(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, timed."""

        def timed(*arguments: Any) -> Any:
            start = time.process_time()
            result = function(*arguments)
            self.seconds += time.process_time() - start
            return result

        return timed


def _peak_mib() -> float:
    """Most memory that was resident. Linux counts the launcher's into getrusage's ru_maxrss."""
    lines = Path("/proc/self/status").read_text().splitlines()
    (peak,) = (line.split()[1] for line in lines if line.startswith("VmHWM:"))
    return int(peak) / 1024


class NoEmbedder(Embedder):
    """Takes no time, so that what is around it can be measured."""

    name, dimension = "none", 1

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        return np.zeros((len(texts), 1), np.float32)


class GivenIndex:
    """Answers with candidates that were made before, in the order of the rows."""

    d = 1

    def __init__(self, candidates: np.ndarray, total: int) -> None:
        self._candidates, self.ntotal, self._row = candidates, total, 0

    def search(self, vectors: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
        """The next rows' candidates; distances that rise."""
        rows = self._candidates[self._row : self._row + len(vectors), :count]
        self._row += len(vectors)
        return np.broadcast_to(np.arange(count, dtype=np.float32), rows.shape), rows


def build(project: Path) -> dict[str, Any]:
    """build_db."""
    clock = Clock()
    report = build_db(BuildDbOptions(str(project)))
    chunks = sum(info.n_chunks + info.n_chunks_invalid for info in report.infos)
    return {**clock.read(), "chunks": chunks}


def bare(project: Path) -> dict[str, Any]:
    """The library calls that no chunk database can do without: text of its tokens, BERT tokens."""
    paths, config = ProjectPaths(project), ProjectConfig.load(project)
    tokenizer = load_project_tokenizer(config, paths)
    counter = BertTokenCounter(paths.root / str(config.retro_bert_vocab_file))
    database, seconds = ChunkDatabase.open(project), 0.0
    gpt, bert = tokenizer._tokenizer, counter._tokenizer  # type: ignore[attr-defined]
    for start in range(0, len(database), _BATCH):
        ids = range(start, min(start + _BATCH, len(database)))
        tokens = [chunk.tolist() for chunk in database.tokens(ids)]
        clock = Clock()
        texts = gpt.decode_batch(tokens, skip_special_tokens=False)
        counts = [len(row) for row in bert.encode_batch_fast(texts, add_special_tokens=False)]
        seconds += clock.read()["cpu_seconds"]
        assert counts == database.chunks[ids.start : ids.stop, 4].tolist()
    return {"cpu_seconds": seconds, "chunks": len(database)}


def embed(project: Path) -> dict[str, Any]:
    """MiniLM on chunks spread over the database; vectors go to the file that is named."""
    tokenizer = load_project_tokenizer(ProjectConfig.load(project), ProjectPaths(project))
    database = ChunkDatabase.open(project)
    ids = np.linspace(0, len(database) - 1, 512).astype(int)
    texts = chunk_texts(tokenizer, database.tokens(ids))
    embedder = build_embedder("minilm", device="cpu", pooling="mean")
    embedder.embed(texts[:32])
    clock = Clock()
    vectors = embedder.embed(texts)
    result = {**clock.read(), "chunks": len(texts)}
    np.save(project / "embedded_by_us.npy", vectors)
    (project / "embedded_texts.json").write_text(json.dumps(texts))
    return result


def index(project: Path) -> dict[str, Any]:
    """build_index with the lexical embedder and its own choice of an index."""
    return _index(project, "auto")


def index_lists(project: Path) -> dict[str, Any]:
    """The same with lists that the retired pipeline can search too: on top of a graph."""
    return _index(project, "IVF1024_HNSW32,Flat")


def index_step(step: Step, project: Path) -> dict[str, Any]:
    """One step of build_index with the lexical embedder and its own choice of an index."""
    clock = Clock()
    build_index(BuildIndexOptions(str(project), embedder="lexical", stage=step))
    return clock.read()


def _index(project: Path, string: str) -> dict[str, Any]:
    """Also how many texts were embedded, and the recall."""
    counted = _count_embedded()
    clock = Clock()
    built = build_index(BuildIndexOptions(str(project), embedder="lexical", index=string))
    result: dict[str, Any] = clock.read()
    chunks = len(ChunkDatabase.open(project))
    assert built.choice is not None
    assert built.recall is not None
    found = {"index": built.choice.string, "recall_at_2": built.recall.at[2]}
    settings = ProjectSettings.load(project)
    rows = len(ChunkDatabase.open(project, "sampled"))
    searched = {"index": settings.index_string, "sampled": rows}
    breadth = {"nprobe": settings.nprobe or 1, "ef_search": settings.ef_search or 16}
    (project / "searched_by_us.json").write_text(json.dumps({**searched, **breadth}))
    return {**result, **found, "chunks": chunks, "embedded": counted[0]}


def _count_embedded() -> list[int]:
    from retro_mcore.retrieval.embedders.lexical import LexicalEmbedder

    counted, run = [0], LexicalEmbedder.embed

    def embed_and_count(self: LexicalEmbedder, texts: Sequence[str]) -> np.ndarray:
        counted[0] += len(texts)
        return run(self, texts)

    LexicalEmbedder.embed = embed_and_count  # type: ignore[method-assign]
    return counted


def query(project: Path) -> dict[str, Any]:
    """query_neighbors with everything."""
    clock = Clock()
    result = query_neighbors(QueryNeighborsOptions(str(project), num_neighbors_save=SAVED))
    return {**clock.read(), "chunks": sum(result.num_chunks.values())}


def _samples(project: Path) -> tuple[Any, Any, int]:
    config, paths = ProjectConfig.load(project), ProjectPaths(project)
    tokenizer = load_project_tokenizer(config, paths)
    samples = build_all_gpt_samples(config, paths, tokenizer)["train"]
    return samples, tokenizer, config.retro_gpt_chunk_length


def fill(project: Path) -> dict[str, Any]:
    """Neighbors of the training samples without embedding and search: text, filter, saving."""
    from retro_mcore.project.shards import cut
    from retro_mcore.retrieval import neighbor_search, query_chunks

    samples, tokenizer, length = _samples(project)
    paths, config = ProjectPaths(project), ProjectConfig.load(project)
    database, given = ChunkDatabase.open(project), np.load(project / "candidates.npy")
    search = neighbor_search.NeighborSearch(database, num_query=CANDIDATES, num_save=SAVED)
    embedder = query_chunks.ChunkEmbedder(tokenizer, NoEmbedder())
    chunks = query_chunks.SampleChunks(samples, length, embedder)
    config.retro_neighbor_dirs = {"train": "train_filled", "valid": None, "test": None}
    shards = cut(paths.query / "train_filled", len(given), config.retro_block_size)
    faiss_library()  # the other side has imported it too
    watches = {name: Stopwatch() for name in ("read_chunks", "chunk_texts", "embed_unique")}
    for name, watch in watches.items():
        setattr(query_chunks, name, watch.around(getattr(query_chunks, name)))
    clock = Clock()
    neighbor_search.query_split(
        search, chunks, GivenIndex(given, len(database)), shards, "", "fill"
    )
    taken, embedding = clock.read(), watches.pop("embed_unique").seconds
    config.save(project)
    texts = sum(watch.seconds for watch in watches.values())
    rest = taken["cpu_seconds"] - texts - embedding
    return {**taken, "chunks": len(given), "text_seconds": texts, "rest_seconds": rest}


def candidates(project: Path) -> dict[str, Any]:
    """Candidates of every row for both sides, the first ones from the sample's own documents."""
    samples, _, length = _samples(project)
    database, random = ChunkDatabase.open(project), np.random.default_rng(0)
    documents = database.chunks[:, 1].astype(np.int64)
    rows = []
    for i in range(len(samples)):
        tokens, _, own = samples.read(i)
        count = (len(tokens) - 1) // length
        rows.append(random.integers(0, len(database), (count, CANDIDATES)))
        first = np.searchsorted(documents, own[0])
        rows[-1][:, :4] = np.minimum(first + np.arange(4), len(database) - 1)
    np.save(project / "candidates.npy", np.concatenate(rows))
    return {"chunks": len(samples) * count}


def dataset(project: Path) -> dict[str, Any]:
    """Random samples with their neighbors, and the GPT samples alone."""
    found = _train_dataset(project)
    order = np.random.default_rng(0).integers(0, len(found), 3000).tolist()
    rates = {}
    for name, read in (("gpt", found.samples.tokens), ("retro", found.__getitem__)):
        for i in order[:50]:
            read(i)
        clock = Clock()
        for i in order:
            read(i)
        rates[name] = len(order) / clock.read()["cpu_seconds"]
    return rates


def _train_dataset(project: Path) -> RetroDataset:
    """The training split alone: the other ones have no neighbors after `fill`."""
    samples, tokenizer, length = _samples(project)
    name = ProjectConfig.load(project).retro_neighbor_dirs["train"]
    saved = SavedNeighbors(ProjectPaths(project).query / str(name))
    database = ChunkDatabase.open(project)
    return RetroDataset(
        samples,
        saved,
        database,
        num_neighbors=NEIGHBORS,
        num_retrieved_chunks=2,
        chunk_length=length,
        eod=tokenizer.eod,
    )


STAGES: dict[str, Callable[[Path], dict[str, Any]]] = {
    function.__name__: function
    for function in (
        build,
        bare,
        embed,
        index,
        index_lists,
        query,
        fill,
        candidates,
        dataset,
    )
} | {f"index_{step}": partial(index_step, step) for step in STEPS}


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Nothing but the result on stdout."""
    with contextlib.redirect_stdout(sys.stderr):
        yield


def main(stage: str, project: str) -> None:
    """Run a stage and print what it took."""
    with quiet():
        initialize()
        setup_device()  # imports Megatron: not what is measured
        result = STAGES[stage](Path(project))
    if get_rank() == 0:
        print(json.dumps(result))


if __name__ == "__main__":
    main(*sys.argv[1:])
