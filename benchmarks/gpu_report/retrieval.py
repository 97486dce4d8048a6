"""Faiss, embedders and the query stage: equal results, and rates."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.gpu_report.findings import Findings, Skipped
from benchmarks.gpu_report.options import Setting

#: Rounding of fp32 sums of a thousand products of about 1, ordered differently.
DISTANCE_BOUND = 1e-3
#: Nearer distances are a tie, which rounding may swap: of unit vectors, it is about 1e-6.
TIE = 2e-4
#: Clustering starts from the same vectors everywhere; rounding then leads it elsewhere.
CLUSTERING_BOUND = 1.02
#: Published rate of BERT-large on one A100 (Wang et al. 2023, InstructRetro).
PUBLISHED_EMBEDDING_RATE = 1728.0


def faiss(setting: Setting, findings: Findings) -> None:
    """The same index filled and searched in different ways finds the same neighbors.

    `index.search` on the CPU is compared with search in list order, and with Faiss on a GPU, which
    also clusters as well as the CPU.
    """
    from benchmarks.all_knn import make_vectors
    from retro_mcore.retrieval.index import search, set_search_breadth
    from retro_mcore.retrieval.index.list_order import ListOrderSearch

    count, dimension = setting.pick((400_000, 768), (3000, 32))
    lists, queries, k = setting.pick((2048, 8192, 20), (16, 100, 5))
    vectors = make_vectors(count, dimension)
    findings.figure("index", f"IVF{lists},Flat over {count} x {dimension}, nprobe 32, k {k}")
    sample = vectors[: 40 * lists]
    seconds, index = _timed(lambda: _trained(sample, lists))
    findings.figure("training on the CPU, vectors/s", len(sample) / seconds)
    empty = _copy_of(index)
    seconds, _ = _timed(lambda: index.add_with_ids(vectors, np.arange(count)))
    findings.figure("filling on the CPU, vectors/s", count / seconds)
    set_search_breadth(index, 32, None)
    asked = vectors[:: count // queries][:queries]
    # One more than is compared, which tells whether the last one is tied.
    seconds, expected = _timed(lambda: search(index, asked, k + 1))
    findings.figure("index.search on the CPU, queries/s", queries / seconds)
    seconds, found = _timed(lambda: ListOrderSearch(index).search(asked, k + 1))
    findings.figure("list order on the CPU, queries/s", queries / seconds)
    _same_neighbors(findings, "list order", found, expected)
    with findings.part("GPU"):
        _require_gpu_build(setting)
        _clustered_on_gpu(findings, index, sample)
        _on_gpu(findings, index, empty, vectors, asked, expected)


def _clustered_on_gpu(findings: Findings, index: Any, sample: np.ndarray) -> None:
    """Train such an index with the clustering on the GPU, as `build_index` does."""
    seconds, other = _timed(lambda: _trained(sample, index.nlist, gpu=True))
    findings.figure("training on the GPU, vectors/s", len(sample) / seconds)
    ratio = _distance_to_centroids(other, sample) / _distance_to_centroids(index, sample)
    name = "trained on the GPU, distance to the centroids ÷ the CPU's"
    findings.at_most(name, ratio, CLUSTERING_BOUND)


def _on_gpu(
    findings: Findings,
    index: Any,
    empty: Any,
    vectors: np.ndarray,
    asked: np.ndarray,
    expected: tuple[np.ndarray, np.ndarray],
) -> None:
    from retro_mcore.retrieval.index import search
    from retro_mcore.retrieval.index.gpu import GpuIndex, to_gpu, to_gpu_for_search

    k = expected[1].shape[1]
    copy = to_gpu(empty, "filling")
    findings.true("filling runs on the GPU", copy is not None, type(copy).__name__)
    if copy is not None:
        seconds, _ = _timed(lambda: copy.add_with_ids(vectors, np.arange(len(vectors))))
        findings.figure("filling on the GPU, vectors/s", len(vectors) / seconds)
        copy.nprobe = 32
        found = search(GpuIndex(copy, index, 2048), asked, k)
        _same_neighbors(findings, "filled on the GPU", found, expected)
        del copy
    on_gpu = to_gpu_for_search(index, k, 32)
    findings.true("search runs on the GPU", isinstance(on_gpu, GpuIndex), type(on_gpu).__name__)
    search(on_gpu, asked[:32], k)
    seconds, found = _timed(lambda: search(on_gpu, asked, k))
    findings.figure("search on the GPU, queries/s", len(asked) / seconds)
    _same_neighbors(findings, "search on the GPU", found, expected)


def _trained(sample: np.ndarray, lists: int, gpu: bool = False) -> Any:
    from retro_mcore.retrieval.index.training import make_index, train

    index = make_index(f"IVF{lists},Flat", sample.shape[1])
    index.cp.niter = 4
    train(index, sample, gpu)
    return index


def _distance_to_centroids(index: Any, vectors: np.ndarray) -> float:
    """Mean over the vectors to the nearest centroid, squared, on the CPU."""
    return float(index.quantizer.search(vectors, 1)[0].mean())


def _copy_of(index: Any) -> Any:
    from retro_mcore.retrieval.index.library import faiss_library

    return faiss_library().clone_index(index)


def _same_neighbors(
    findings: Findings,
    name: str,
    found: tuple[np.ndarray, np.ndarray],
    expected: tuple[np.ndarray, np.ndarray],
) -> None:
    """Check distances and ids [n, k + 1], the ids of the first k.

    Queries near a border may visit another list, so one in a thousand may differ in distances. Ids
    are compared where distances are the same, except of ties.
    """
    apart = np.abs(found[0] - expected[0]).max(axis=1)
    beyond = float((apart > DISTANCE_BOUND).mean())
    findings.at_most(f"{name}, queries with other distances", beyond, 1e-3)
    untied = np.diff(expected[0], axis=1) > TIE
    untied[:, 1:] &= untied[:, :-1].copy()
    untied &= (apart <= TIE / 2)[:, None]
    findings.true(f"{name}, ids are compared", bool(untied.any()), float(untied.mean()))
    others = found[1][:, :-1][untied] != expected[1][:, :-1][untied]
    findings.equal(f"{name}, other ids where distances are not tied", int(others.sum()), 0)


def _require_gpu_build(setting: Setting) -> None:
    from retro_mcore.retrieval.index.gpu import num_gpus

    if setting.device == "cpu":
        raise Skipped("--device cpu")
    if num_gpus() == 0:
        raise Skipped("Faiss is its CPU build: install faiss-gpu or faiss-gpu-cuvs")


def embedding(setting: Setting, findings: Findings) -> None:
    """Chunks of 64 words embedded per second, and how far lower precisions are from fp32."""
    count = setting.pick(16_384, 48)
    texts = make_texts(count, 64)
    with setting.folder() as folder:
        for name, path in _embedders(setting, folder).items():
            expected = None
            for precision in ("fp32", "bf16", "fp16"):
                with findings.part(f"{name}, {precision}"):
                    vectors = _embed(
                        setting, findings, f"{name}, {precision}", path, texts, precision
                    )
                    if expected is not None:
                        _near(findings, f"{name}, {precision}", vectors, expected)
                    expected = vectors if expected is None else expected


def _embed(
    setting: Setting, findings: Findings, name: str, path: str, texts: list[str], precision: Any
) -> np.ndarray:
    from retro_mcore.errors import ConfigurationError
    from retro_mcore.retrieval.embedders import build_embedder
    from retro_mcore.retrieval.embedders.base import CPU_BATCH_TOKENS, GPU_BATCH_TOKENS

    try:
        embedder = build_embedder(
            path,
            device=setting.device,
            pooling="mean",  # needs no sentence-transformers
            precision=precision,
            batch_tokens=setting.pick(GPU_BATCH_TOKENS, CPU_BATCH_TOKENS),
        )
    except ConfigurationError as error:  # this machine lacks the precision
        raise Skipped(str(error)) from error
    embedder.embed(texts[: len(texts) // 8])
    seconds, vectors = _timed(lambda: embedder.embed(texts))
    rate = len(texts) / seconds
    findings.figure(f"{name}, chunks/s", rate)
    if name.startswith("BERT-large") and precision != "fp32" and not setting.small:
        findings.aim(f"{name}, chunks/s (published: A100)", rate, at_least=PUBLISHED_EMBEDDING_RATE)
    return vectors


def _near(findings: Findings, name: str, found: np.ndarray, expected: np.ndarray) -> None:
    lengths = np.linalg.norm(found, axis=1) * np.linalg.norm(expected, axis=1)
    cosine = float(((found * expected).sum(1) / lengths).min())
    findings.at_most(f"{name}, 1 - smallest cosine with fp32", 1 - cosine, 0.01)


def _embedders(setting: Setting, folder: Path) -> dict[str, str]:
    """Folders of encoders with random weights, of the sizes that are used. Rates do not depend on
    the weights."""
    sizes = setting.pick(
        {"MiniLM's sizes": (6, 384, 12), "BERT-large's sizes": (24, 1024, 16)},
        {"tiny": (2, 32, 2)},
    )
    return {
        name: random_encoder(folder / f"encoder_{n}", *shape)
        for n, (name, shape) in enumerate(sizes.items())
    }


def random_encoder(folder: Path, layers: int, hidden: int, heads: int) -> str:
    """Write an encoder with random weights; returns its folder.

    Raises:
        Skipped: transformers does not import.
    """
    try:
        from transformers import BertConfig, BertModel, BertTokenizerFast
    except ImportError as error:
        raise Skipped(f"transformers does not import: {error}") from error
    folder.mkdir()
    words = _write_vocabulary(folder / "vocab.txt")
    tokenizer = BertTokenizerFast.from_pretrained(str(folder), model_max_length=512)
    tokenizer.save_pretrained(folder)
    config = BertConfig(
        vocab_size=len(words),
        num_hidden_layers=layers,
        hidden_size=hidden,
        num_attention_heads=heads,
        intermediate_size=4 * hidden,
    )
    BertModel(config, add_pooling_layer=False).save_pretrained(folder)
    return str(folder)


def queries(setting: Setting, findings: Findings) -> None:
    """Chunks per second of each stage on synthetic text, with the lexical embedder.

    query_neighbors searches with the vectors that build_index stored, filters and saves.
    """
    from retro_mcore.cli import commands as retro
    from retro_mcore.retrieval.index.gpu import num_gpus

    documents, length = setting.pick((20_000, 500), (40, 120))
    with setting.folder() as folder:
        where = {"project_dir": str(folder / "project")}
        texts = folder / "texts.jsonl"
        _write_documents(texts, documents, length)
        _write_vocabulary(folder / "vocab.txt")
        retro.preprocess_corpus(
            **where,
            input=[str(texts)],
            vocab_size=500,
            split="98,2,0",
            seq_length=setting.pick(2048, 128),
            retro_chunk_length=setting.pick(64, 16),
            global_batch_size=2,
            eval_iters=1,
            train_samples=4,
            bert_vocab_file=str(folder / "vocab.txt"),  # else it is a package's
        )
        retro.build_db(**where)
        seconds, built = _timed(
            lambda: retro.build_index(**where, embedder="lexical", device=setting.device)
        )
        chunks = built.embedded.num_chunks
        findings.figure("chunks in the database", chunks)
        findings.figure("build_index, chunks/s", chunks / seconds)
        seconds, found = _timed(lambda: retro.query_neighbors(**where, device=setting.device))
    queried = sum(found.num_chunks.values())
    findings.figure("query_neighbors, chunks/s", queried / seconds)
    findings.figure("index", built.choice.string)
    findings.figure("Faiss", f"{num_gpus() if setting.device == 'cuda' else 0} GPUs")
    findings.true("every chunk was queried", queried >= chunks, queried)


def make_texts(count: int, length: int) -> list[str]:
    """Texts of random words, the frequent ones more often."""
    words, random = np.array(_words()), np.random.default_rng(3)
    ranks = np.minimum(random.zipf(1.3, (count, length)) - 1, len(words) - 1)
    return [" ".join(row) for row in words[ranks]]


def _words() -> list[str]:
    """A thousand pronounceable words."""
    starts, ends = "bcdfghklmnprstvz", ("a", "e", "i", "o", "u", "an", "er", "is", "on", "ut")
    syllables = [start + end for start in starts for end in ends]
    return [first + second for first in syllables[::8] for second in syllables[::3]][:1000]


def _write_vocabulary(path: Path) -> list[str]:
    """Write BERT's special tokens and the words; returns them."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *_words()]
    path.write_text("\n".join(words) + "\n", encoding="utf-8")
    return words


def _write_documents(path: Path, count: int, length: int) -> None:
    import json

    with path.open("w", encoding="utf-8") as file:
        for text in make_texts(count, length):
            file.write(json.dumps({"text": text}) + "\n")


def _timed(run: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    result = run()
    return time.perf_counter() - start, result
