"""One stage of the retired data pipeline in a process of its own: `STAGE PROJECT`; JSON on stdout.

Runs where megatron-core 0.15.3 shadows ours. Its functions are its own; the GPT tokenizer, which is
no part of it, is ours. Its BERT tokenizer was Megatron-LM's, pure Python, and no part of it either:
WordPiece of the same kind from transformers stands for it, and the fast one in `build_fast`.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import faiss
import numpy as np
import torch

from benchmarks.pipeline_worker import (
    CANDIDATES,
    NEIGHBORS,
    SAVED,
    Clock,
    GivenIndex,
    Stopwatch,
    quiet,
)
from retro_mcore.data.tokenizers.loading import load_project_tokenizer
from retro_mcore.project import ProjectConfig, ProjectPaths
from retro_mcore.retrieval.embedders.lexical import LexicalEmbedder, count_texts, weights_of
from tests.parity.upstream_pipeline import BertTokens, DiskEmbedder, MemoryEmbedder, gpt_datasets
from tests.processes import join_megatron

PROCESSES = 2


class SlowBertTokens:
    """Pure-Python WordPiece: basic tokenization, then pieces, then their ids."""

    def __init__(self, vocab_file: Path) -> None:
        from transformers.models.bert import tokenization_bert_legacy as legacy

        self._vocab = legacy.load_vocab(str(vocab_file))
        self._basic = legacy.BasicTokenizer(do_lower_case=True)
        self._pieces = legacy.WordpieceTokenizer(self._vocab, "[UNK]")

    def tokenize(self, text: str) -> list[int]:
        return [
            self._vocab[piece]
            for word in self._basic.tokenize(text)
            for piece in self._pieces.tokenize(word)
        ]


class Forked:
    """A tokenizer that forked processes have already, so that it costs nothing to hand over."""

    _known: ClassVar[dict[str, Any]] = {}

    def __init__(self, name: str, tokenizer: Any = None) -> None:
        self._name = name
        self._known.setdefault(name, tokenizer)
        self.eod = getattr(self._known[name], "eod", None)

    def __reduce__(self) -> tuple:
        return type(self), (self._name,)

    def detokenize(self, ids: list[int]) -> str:
        return self._known[self._name].detokenize(ids)

    def tokenize(self, text: str) -> list[int]:
        return self._known[self._name].tokenize(text)


class NoEmbedder:
    """`retro_bert_embedders.mem` that fetches the texts, and takes no time of its own."""

    def __init__(self) -> None:
        self.watch = Stopwatch()

    def embed_text_dataset(self, texts: Any) -> np.ndarray:
        self.watch.around(lambda: [texts[i] for i in range(len(texts))])()
        return np.zeros((len(texts), 1), np.float32)


class Retired:
    """The release, set up for a project that has tokens and config.json."""

    def __init__(self, project: Path, bert: Any = None, **options: Any) -> None:
        from megatron.core.datasets.retro.config import RetroPreprocessingConfig
        from megatron.core.datasets.retro.config.bert_embedders import RetroBertEmbedders
        from megatron.core.datasets.retro.config.gpt_chunk_datasets import RetroGPTChunkDatasets
        from megatron.core.datasets.retro.config.tokenizers import RetroTokenizers
        from megatron.core.datasets.retro.db import build as db
        from megatron.core.datasets.retro.query.gpt_chunk_dataset import (
            build_gpt_chunk_datasets_from_gpt_datasets,
        )

        # Without a GPU: it counts blocks in CUDA tensors, and clusters on all GPUs.
        torch.cuda.LongTensor = torch.LongTensor  # type: ignore[attr-defined,misc]
        faiss.index_cpu_to_all_gpus = lambda index: index  # type: ignore[assignment,misc]
        # It would start up to 128 processes, which takes longer than their work here.
        db.ProcessPoolExecutor = lambda max_workers: ProcessPoolExecutor(PROCESSES)
        self.project = project
        self.paths, self.file = ProjectPaths(project), ProjectConfig.load(project)
        self.tokenizer = load_project_tokenizer(self.file, self.paths)
        self.bert_vocab = self.paths.root / str(self.file.retro_bert_vocab_file)
        self.gpt = gpt_datasets(self.file, self.paths, self.tokenizer, document_ids=True)
        self.chunk_datasets = build_gpt_chunk_datasets_from_gpt_datasets(
            str(project),
            {split: pair for split, pair in self.gpt.items() if pair[0] is not None and pair[1]},
            self.file.retro_gpt_seq_length,
            self.file.retro_gpt_chunk_length,
        )
        known = {key: value for key, value in vars(self.file).items() if key.startswith("retro_")}
        for key in ("retro_neighbor_dirs", "retro_database"):
            known.pop(key, None)
        self.config = RetroPreprocessingConfig(
            **known,
            num_layers=1,
            num_attention_heads=1,
            hidden_size=LexicalEmbedder.dimension,
            retro_project_dir=str(project),
            retro_doc_block_size=max(len(self._token_file()) // 9, 1),
            retro_query_num_neighbors_query=CANDIDATES,
            retro_query_num_neighbors_save=SAVED,
            retro_bert_embedders=RetroBertEmbedders(
                disk=options.pop("disk", None), mem=options.pop("mem", None) or NoEmbedder()
            ),
            retro_gpt_chunk_datasets=RetroGPTChunkDatasets(
                **{"train": None, "valid": None, "test": None, **self.chunk_datasets}
            ),
            retro_tokenizers=RetroTokenizers(
                gpt=Forked("gpt", self.tokenizer),
                # Its own kind travels to every process, as it did; ours would cost more to pickle.
                bert=SlowBertTokens(self.bert_vocab)
                if bert is SlowBertTokens
                else Forked("bert", BertTokens(self.bert_vocab)),
            ),
            **{
                "retro_index_str": "unused",
                "retro_index_ntrain": 1,
                "retro_query_nprobe": 1,
                "retro_query_ef_search": 1,
                **options,
            },
        )

    def _token_file(self) -> Any:
        from retro_mcore.data.tokens.token_file import open_token_files

        return open_token_files(self.file, self.paths)[0]


def build(project: Path, bert: Any = SlowBertTokens) -> dict[str, Any]:
    """db-build, with two processes."""
    from megatron.core.datasets.retro.db.build import build_db

    retired = Retired(project, bert)
    clock = Clock()
    build_db(retired.config)
    taken = clock.read()
    infos = json.loads(retired.paths.dataset_infos.read_text())
    return {**taken, "chunks": sum(i["n_chunks"] + i["n_chunks_invalid"] for i in infos)}


def build_fast(project: Path) -> dict[str, Any]:
    """db-build with our BERT tokenizer, one text a call, as it asks for them."""
    return build(project, BertTokens)


def fill(project: Path) -> dict[str, Any]:
    """Neighbors of the training samples without embedding and search: text, filter, saving."""
    from megatron.core.datasets.retro.db.utils import get_merged_train_dataset
    from megatron.core.datasets.retro.query.query import query_dataset_neighbors

    embedder = NoEmbedder()
    retired = Retired(project, mem=embedder)
    database = get_merged_train_dataset(
        str(project), retired.file.retro_gpt_chunk_length, retired.tokenizer.eod
    )
    database.load_doc_tuples()
    info = retired.chunk_datasets["train"]
    given = np.load(project / "candidates.npy")
    directory = retired.paths.query / "train_filled"
    clock = Clock()
    query_dataset_neighbors(
        retired.config, database, info["dataset"], info["num_active_chunks"], "train",
        str(directory), GivenIndex(given, len(database)),
    )  # fmt: skip
    taken, texts = clock.read(), embedder.watch.seconds
    rest = taken["cpu_seconds"] - texts
    chunks = info["num_active_chunks"]
    return {**taken, "chunks": chunks, "text_seconds": texts, "rest_seconds": rest}


def dataset(project: Path) -> dict[str, Any]:
    """Random samples with their neighbors."""
    from megatron.core.datasets.retro.query.retro_dataset import get_retro_datasets

    retired = Retired(project)
    asked = SimpleNamespace(
        retro_project_dir=str(project),
        retro_chunk_length=retired.file.retro_gpt_chunk_length,
        retro_neighbor_dirs={"train": "train_filled"},
        retro_block_size=retired.file.retro_block_size,
        retro_verify_neighbor_count=True,
        retro_num_neighbors=NEIGHBORS,
        retro_num_retrieved_chunks=2,
    )
    length, eod = retired.file.retro_gpt_seq_length, retired.tokenizer.eod
    datasets = {"train": retired.gpt["train"], "valid": (None, 0), "test": (None, 0)}
    found = get_retro_datasets(asked, datasets, length, eod)[0]
    order = np.random.default_rng(0).integers(0, retired.gpt["train"][1], 200).tolist()
    for i in order[:10]:
        found[i]
    clock = Clock()
    for i in order:
        found[i]
    return {"retro": len(order) / clock.read()["cpu_seconds"]}


def embed(project: Path) -> dict[str, Any]:
    """MiniLM as its Hugging Face embedder ran a model: in order, 128 texts a batch, row by row."""
    from retro_mcore.retrieval.embedders.pooled import PooledEncoder

    texts = json.loads((project / "embedded_texts.json").read_text())
    source = PooledEncoder("minilm", "mean", device="cpu")
    tokenizer, model = source._tokenizer, source._model

    def run(texts: list[str]) -> list[np.ndarray]:
        vectors = []
        for start in range(0, len(texts), 128):
            batch = tokenizer(
                texts[start : start + 128], padding=True, truncation=True, max_length=256,
                return_tensors="pt",
            )  # fmt: skip
            with torch.inference_mode():
                hidden = model(**batch)[0]
            ends = batch["attention_mask"].sum(1)
            rows = zip(hidden, ends, strict=True)
            # Without [CLS] and [SEP].
            vectors += [row[1 : end - 1].mean(0).numpy() for row, end in rows]
        return vectors

    run(texts[:32])
    clock = Clock()
    run(texts)
    return {**clock.read(), "chunks": len(texts)}


def whole(project: Path) -> dict[str, Any]:
    """Everything, with the lexical embedder, and how many texts were embedded."""
    from megatron.core.datasets.retro.db.build import build_db
    from megatron.core.datasets.retro.index.build import add_to_index, train_index
    from megatron.core.datasets.retro.query.query import query_neighbors

    counted, run = [0], LexicalEmbedder.embed

    def embed_and_count(self: LexicalEmbedder, texts: list[str]) -> np.ndarray:
        counted[0] += len(texts)
        return run(self, texts)

    LexicalEmbedder.embed = embed_and_count  # type: ignore[method-assign, assignment]
    settings = json.loads((project / "searched_by_us.json").read_text())
    memory = MemoryEmbedder()
    memory._embedder = LexicalEmbedder(weights_of(count_texts([])))
    retired = Retired(
        project, SlowBertTokens, disk=DiskEmbedder(), mem=memory,
        retro_index_str=settings["index"], retro_index_ntrain=settings["sampled"],
        retro_index_delete_training_embeddings=False, retro_index_delete_added_codes=False,
        retro_query_nprobe=settings["nprobe"], retro_query_ef_search=settings["ef_search"],
    )  # fmt: skip
    clock, stages = Clock(), dict[str, float]()
    for stage in (build_db, train_index, add_to_index, query_neighbors):
        if stage is query_neighbors:
            stages["embedded_for_index"] = counted[0]
        own = Clock()
        stage(retired.config)
        stages[stage.__name__] = own.read()["seconds"]
    return {**clock.read(), **stages}


STAGES: dict[str, Callable[[Path], dict[str, Any]]] = {
    function.__name__: function for function in (build, build_fast, fill, dataset, embed, whole)
}


def main(stage: str, project: str) -> None:
    """Join a process group of one, run a stage, and print what it took."""
    with quiet():
        join_megatron()
        result = STAGES[stage](Path(project))
    print(json.dumps(result))


if __name__ == "__main__":
    main(*sys.argv[1:])
