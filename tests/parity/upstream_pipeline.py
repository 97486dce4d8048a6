"""The retired data pipeline: `python tests/parity/upstream_pipeline.py build|read PROJECT [OUT]`.

Runs where megatron-core 0.15.3 shadows ours (environment.py). `build` makes db/, index/ and query/
of a project that has tokens, a tokenizer and config.json, all with the release's own functions;
`read` saves what its own `get_retro_datasets` gives. Tokenizers and embedder are not part of
megatron-core, and are ours on both sides.
"""

from __future__ import annotations

import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import faiss
import h5py
import numpy as np
import torch

from retro_mcore.data.tokenizers.loading import Tokenizer, load_project_tokenizer
from retro_mcore.project import SPLITS, ProjectConfig, ProjectPaths
from retro_mcore.retrieval.bert_tokens import BertTokenCounter
from retro_mcore.retrieval.embedders.lexical import LexicalEmbedder, count_texts, weights_of

#: The release trains no index without lists, and none whose lists are found without a graph.
INDEX_STRING = "IVF4_HNSW4,Flat"
NUM_SAVED = 5


class BertTokens:
    """As many tokens as WordPiece gives: the database keeps their number alone."""

    def __init__(self, vocab_file: Path) -> None:
        self._counter = BertTokenCounter(vocab_file)

    def tokenize(self, text: str) -> list[int]:
        return [0] * int(self._counter.count([text])[0])


class MemoryEmbedder:
    """`retro_bert_embedders.mem`: a text dataset to vectors."""

    def __init__(self) -> None:
        self._embedder = LexicalEmbedder(weights_of(count_texts([])))

    def embed_text_dataset(self, texts: Any) -> np.ndarray:
        return self._embedder.embed([texts[i]["text"] for i in range(len(texts))])


class DiskEmbedder(MemoryEmbedder):
    """`retro_bert_embedders.disk`: the same into a block file."""

    def embed_text_dataset(self, name: str, directory: str, texts: Any) -> None:  # type: ignore
        Path(directory).mkdir(parents=True, exist_ok=True)
        with h5py.File(Path(directory) / f"0000-{len(texts):04d}.hdf5", "w") as file:
            file["data"] = super().embed_text_dataset(texts)


def gpt_datasets(
    config: ProjectConfig, paths: ProjectPaths, tokenizer: Tokenizer, document_ids: bool
) -> dict[str, tuple[Any, int]]:
    """Each split's blended dataset of the release, and its number of samples."""
    from megatron.core.datasets.blended_megatron_dataset_builder import (
        BlendedMegatronDatasetBuilder,
    )
    from megatron.core.datasets.retro.query.multi_split_gpt_dataset import (
        MultiSplitGPTDataset,
        MultiSplitGPTDatasetConfig,
    )

    weights, prefixes = config.blend
    data_config = MultiSplitGPTDatasetConfig(
        random_seed=config.retro_gpt_seed,
        sequence_length=config.retro_gpt_seq_length,
        blend=([str(paths.data / prefix) for prefix in prefixes], weights),
        split=config.retro_gpt_split,
        split_preprocessing=config.retro_gpt_split,
        path_to_cache=None,
        return_document_ids=document_ids,
        tokenizer=tokenizer,
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
    )
    sizes = [config.num_samples(split) for split in SPLITS]
    built = BlendedMegatronDatasetBuilder(
        MultiSplitGPTDataset, sizes, lambda: True, data_config
    ).build()
    return {split: (built[i], sizes[i]) for i, split in enumerate(SPLITS)}


def build(project: Path) -> None:
    """db-build, index-train, index-add, query-neighbors, then the directories into config.json."""
    from megatron.core.datasets.retro.config import RetroPreprocessingConfig
    from megatron.core.datasets.retro.config.bert_embedders import RetroBertEmbedders
    from megatron.core.datasets.retro.config.gpt_chunk_datasets import RetroGPTChunkDatasets
    from megatron.core.datasets.retro.config.tokenizers import RetroTokenizers
    from megatron.core.datasets.retro.db import build as db
    from megatron.core.datasets.retro.db.build import build_db
    from megatron.core.datasets.retro.index.build import add_to_index, train_index
    from megatron.core.datasets.retro.query import gpt_chunk_dataset
    from megatron.core.datasets.retro.query.query import query_neighbors

    paths, config = ProjectPaths(project), ProjectConfig.load(project)
    tokenizer = load_project_tokenizer(config, paths)
    # Without a GPU: it counts blocks in CUDA tensors, and clusters on all GPUs.
    torch.cuda.LongTensor = torch.LongTensor
    faiss.index_cpu_to_all_gpus = lambda index: index
    # It would start 128 processes for this corpus.
    db.ProcessPoolExecutor = lambda max_workers: ProcessPoolExecutor(1)
    chunk_datasets = gpt_chunk_dataset.build_gpt_chunk_datasets_from_gpt_datasets(
        project_dir=str(project),
        gpt_datasets=gpt_datasets(config, paths, tokenizer, document_ids=True),
        sample_length=config.retro_gpt_seq_length,
        chunk_length=config.retro_gpt_chunk_length,
    )
    known = {key: value for key, value in vars(config).items() if key.startswith("retro_")}
    del known["retro_neighbor_dirs"], known["retro_database"]
    embedder = MemoryEmbedder()
    preprocessing = RetroPreprocessingConfig(
        **known,
        num_layers=1,
        num_attention_heads=1,
        hidden_size=LexicalEmbedder.dimension,
        retro_project_dir=str(project),
        retro_doc_block_size=7,
        retro_index_str=INDEX_STRING,
        retro_index_ntrain=60,
        retro_index_delete_training_embeddings=False,
        retro_index_delete_added_codes=False,
        retro_query_nprobe=4,
        retro_query_ef_search=16,
        retro_query_num_neighbors_query=60,
        retro_query_num_neighbors_save=NUM_SAVED,
        retro_bert_embedders=RetroBertEmbedders(disk=DiskEmbedder(), mem=embedder),
        retro_gpt_chunk_datasets=RetroGPTChunkDatasets(**chunk_datasets),
        retro_tokenizers=RetroTokenizers(
            gpt=tokenizer, bert=BertTokens(paths.root / str(config.retro_bert_vocab_file))
        ),
    )
    build_db(preprocessing)
    train_index(preprocessing)
    add_to_index(preprocessing)
    query_neighbors(preprocessing)
    config.retro_neighbor_dirs = {
        split: Path(info["neighbor_dir"]).name for split, info in chunk_datasets.items()
    }
    config.save(project)


def read(project: Path, out: Path) -> None:
    """What the release's `get_retro_datasets` gives, every sample of every split."""
    from megatron.core.datasets.retro.query.retro_dataset import get_retro_datasets

    paths, config = ProjectPaths(project), ProjectConfig.load(project)
    tokenizer = load_project_tokenizer(config, paths)
    asked = SimpleNamespace(
        retro_project_dir=str(project),
        retro_chunk_length=config.retro_gpt_chunk_length,
        retro_neighbor_dirs=config.retro_neighbor_dirs,
        retro_block_size=config.retro_block_size,
        retro_verify_neighbor_count=True,
        retro_num_neighbors=NUM_SAVED - 2,
        retro_num_retrieved_chunks=2,
    )
    datasets = gpt_datasets(config, paths, tokenizer, document_ids=False)
    found = get_retro_datasets(asked, datasets, config.retro_gpt_seq_length, tokenizer.eod)
    arrays = {}
    for split, dataset in zip(SPLITS, found, strict=True):
        samples = [dataset[i] for i in range(config.num_samples(split))]
        for key in ("text", "neighbor_chunks", "neighbor_tokens"):
            arrays[f"{split}/{key}"] = np.stack([sample[key] for sample in samples])
        arrays[f"{split}/hash"] = np.array(datasets[split][0].unique_description_hash)
    np.savez(out, **arrays)


def main(command: str, *paths: str) -> None:
    """Join a process group of one, and do what is asked."""
    import megatron.core

    from tests.processes import join_megatron

    if megatron.core.__version__ != "0.15.3":
        raise RuntimeError(f"megatron-core {megatron.core.__version__} is not the retired release")
    join_megatron()
    {"build": build, "read": read}[command](*map(Path, paths))


if __name__ == "__main__":
    main(*sys.argv[1:])
