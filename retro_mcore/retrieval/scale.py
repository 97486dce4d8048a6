"""Estimate the disk space, memory and time of a retrieval database, without reading data.

Estimates are only as good as the rates per core, GPU or node. The defaults are published or
measured; see docs/scaling.md.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

from retro_mcore.chunking import SampleLayout
from retro_mcore.errors import ConfigurationError
from retro_mcore.retrieval.index.choice import automatic_string, largest_code, num_lists_for
from retro_mcore.retrieval.stored_types import StoredType, bytes_of

#: Maximum number of vectors, and lists, by Faiss's guidelines; the last as used for Retro.
_LISTS = ((100_000_000, 262_144), (1_000_000_000, 1_048_576))
_MOST_LISTS = 4_194_304
#: Up to this many vectors, the plan is for what `--index auto` builds in the memory.
LARGEST_UNCOMPRESSED = 20_000_000
#: Bytes of a product quantizer's code, and the dimension to which vectors are reduced before.
_CODE_BYTES, _REDUCED = 64, 128
#: Training vectors per list: 600M for 2^22 lists (InstructRetro), and Faiss's own limit.
_TRAINING_PER_LIST, _MOST_TRAINING_PER_LIST = 143, 256
_ID_BYTES = 8
_SUFFIXES = {"K": 1e3, "M": 1e6, "B": 1e9, "T": 1e12}


@dataclass(frozen=True)
class Workload:
    """The database to build, and the samples to search neighbors for.

    Attributes:
        tokens: Tokens of the documents in the database.
        training_tokens: Tokens of the samples whose neighbors are searched.
        chunk_length: M.
        document_tokens: Mean length of a document; its last chunk is half full on average.
        token_bytes: 2 for vocabularies below 65,500, else 4.
        dimension: Dimension of the embeddings.
        neighbors_saved: Neighbors saved per chunk.
        samples: "packed": the chunks of samples are embedded and searched. "aligned": the chunks of
            the database are searched, once, with the vectors of the index; `training_tokens` has
            no part in it.
    """

    tokens: float
    training_tokens: float
    chunk_length: int = 64
    document_tokens: float = 1150.0
    token_bytes: int = 2
    dimension: int = 1024
    neighbors_saved: int = 20
    samples: SampleLayout = "packed"
    stored_as: StoredType | None = None

    @property
    def stored_bytes(self) -> int:
        """Bytes per number of a stored vector."""
        return bytes_of(self.stored_as or ("fp16" if self.samples == "aligned" else "fp32"))


@dataclass(frozen=True)
class Rates:
    """Amounts of work per second.

    Attributes:
        tokenized: Tokens per core.
        chunked: Chunks per core: build_db.
        embedded: Chunks per GPU (or core): build_index and query_neighbors.
        trained: Vectors per node: training the index. Published for the largest index: under 4
            hours for 600M vectors.
        added: Vectors per core: adding to the index.
        queried: Chunks per node: searching the index.
    """

    tokenized: float = 500_000.0
    chunked: float = 16_000.0
    embedded: float = 1_728.0
    trained: float = 600e6 / (4 * 3600)
    added: float = 27_500.0
    queried: float = 250.0


@dataclass(frozen=True)
class Node:
    """A machine.

    Attributes:
        gpus: GPUs; 0: cores embed.
        cores: Processor cores.
        memory: Bytes.
    """

    gpus: int = 8
    cores: int = 128
    memory: float = 2e12


@dataclass(frozen=True)
class StagePlan:
    """The plan of one stage.

    Attributes:
        name: Command and step.
        worker: Unit of the hours: core, GPU or node.
        hours: Hours of one worker.
        nodes: Nodes needed to finish in time.
        ranks: Processes to start, in total over all nodes.
        disk: Bytes that remain on disk.
        memory: Bytes that one process needs for its data.
    """

    name: str
    worker: str
    hours: float
    nodes: int
    ranks: int
    disk: float
    memory: float


@dataclass(frozen=True)
class ScalePlan:
    """The plan of a whole database.

    Attributes:
        chunks: Chunks of the database.
        query_chunks: Chunks whose neighbors are searched.
        index: Faiss factory string.
        training_vectors: Vectors that the index is trained on.
        index_bytes: Size of the index, in memory or on disk.
        index_shares: Number of nodes over which the index is split if it does not fit on one.
        stages: Stages in order.
    """

    chunks: int
    query_chunks: int
    index: str
    training_vectors: int
    index_bytes: float
    index_shares: int
    stages: list[StagePlan]

    @property
    def disk(self) -> float:
        """Bytes on disk after all stages."""
        return sum(stage.disk for stage in self.stages)


def parse_count(flag: str, text: str) -> float:
    """Read a number that may end in K, M, B or T.

    Raises:
        ConfigurationError: it is not a number, or not above 0.
    """
    unit = _SUFFIXES.get(text[-1:].upper(), 1.0)
    try:
        value = float(text[:-1] if unit > 1 else text) * unit
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise ConfigurationError(flag, repr(text), "Give a number such as 1B, 100B or 1.2T")
    return value


def count_chunks(work: Workload) -> int:
    """Count the chunks of the database; a document's last chunk is half full on average."""
    return round(work.tokens / work.chunk_length + work.tokens / work.document_tokens / 2)


class PlannedIndex(NamedTuple):
    """An index that is not built yet.

    Attributes:
        string: Faiss factory string.
        lists: Its lists; 0: none.
        vector_bytes: Bytes per vector.
        code: Last part of the string.
    """

    string: str
    lists: int
    vector_bytes: int
    code: str


def index_for(vectors: int, dimension: int, memory: float = math.inf) -> PlannedIndex:
    """Choose an index.

    Up to `LARGEST_UNCOMPRESSED` vectors it is the largest that fits the memory, as `--index auto`
    chooses if its recall is enough.

    Args:
        vectors: Number of vectors.
        dimension: Their dimension.
        memory: Bytes that the index may take.
    """
    if vectors <= LARGEST_UNCOMPRESSED:
        lists = num_lists_for(vectors)
        code, code_bytes, rotation = largest_code(vectors, dimension, memory)
        size = code_bytes + (_ID_BYTES if lists else 0)
        return PlannedIndex(automatic_string(code, lists, rotation), lists, size, code)
    lists = next((lists for most, lists in _LISTS if vectors <= most), _MOST_LISTS)
    reduce, code = f"OPQ{_CODE_BYTES}_{_REDUCED}", f"PQ{_CODE_BYTES}"
    return PlannedIndex(f"{reduce},IVF{lists}_HNSW32,{code}", lists, _CODE_BYTES + _ID_BYTES, code)


def plan_scale(
    work: Workload,
    rates: Rates | None = None,
    node: Node | None = None,
    hours: float = 24.0,
    index_memory: float = math.inf,
) -> ScalePlan:
    """Plan the disk, memory and time of every stage.

    Args:
        work: The work to plan.
        rates: Speed of the machines.
        node: One machine.
        hours: Maximum hours per stage, which determines the numbers of nodes and ranks.
        index_memory: Bytes that the index may take on a node; a larger one is split.
    """
    rates, node = rates or Rates(), node or Node()
    chunks = count_chunks(work)
    aligned = work.samples == "aligned"
    queries = chunks if aligned else round(work.training_tokens / work.chunk_length)
    stored = chunks * work.chunk_length if aligned else work.tokens  # with padding
    documents = work.tokens / work.document_tokens
    index, lists, vector_bytes, _ = index_for(chunks, work.dimension, index_memory)
    largest = chunks > LARGEST_UNCOMPRESSED
    training = min(chunks, (_TRAINING_PER_LIST if largest else _MOST_TRAINING_PER_LIST) * lists)
    index_bytes = float(vector_bytes) * chunks
    shares = math.ceil(index_bytes / min(0.8 * node.memory, index_memory))
    # The parts stay beside the index that is merged from them; a split index has its parts alone.
    on_disk = index_bytes * (2 if shares == 1 else 1)
    embedders = node.gpus or node.cores
    worker = "GPU" if node.gpus else "core"

    def stage(
        name: str, kind: str, amount: float, rate: float, disk: float, memory: float
    ) -> StagePlan:
        per_node = {"core": node.cores, "GPU": embedders, "node": 1}[kind]
        taken = amount / rate / 3600
        nodes = max(1, math.ceil(taken / per_node / hours))
        ranks = min(nodes * per_node, max(1, math.ceil(taken / hours)))
        return StagePlan(
            name=name, worker=kind, hours=taken, nodes=nodes, ranks=ranks, disk=disk, memory=memory
        )

    embedding = []
    if not aligned:
        embedding = [stage("query_neighbors: embed", worker, queries, rates.embedded, 0, 2**31)]
    vector, saved = 4.0 * work.dimension, float(work.stored_bytes) * work.dimension
    stages = [
        stage(
            "preprocess_corpus", "core", work.tokens, rates.tokenized,
            stored * work.token_bytes + 20 * documents, 2**30,
        ),
        stage(
            "build_db", "core", chunks, rates.chunked,
            chunks * (16 + 20) + 20 * training + documents * (16 + 24), 2**30,
        ),
        stage("build_index: embed", worker, chunks, rates.embedded, saved * chunks, 2**31),
        stage("build_index: train", "node", training, rates.trained, 0, vector * training),
        stage("build_index: add, merge", "core", chunks, rates.added, on_disk, 2**31),
        *embedding,
        stage(
            "query_neighbors: search", "node", queries, rates.queried,
            queries * work.neighbors_saved * (8 + 4), index_bytes,
        ),
    ]  # fmt: skip
    return ScalePlan(
        chunks=chunks,
        query_chunks=queries,
        index=index,
        training_vectors=training,
        index_bytes=index_bytes,
        index_shares=shares,
        stages=stages,
    )
