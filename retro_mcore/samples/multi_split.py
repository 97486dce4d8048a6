"""Megatron's GPT dataset with the class name and attributes of the retired Retro.

Both are hashed into the names of the neighbor directories. Importing this module imports megatron.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig

from retro_mcore.platform.compatibility import tokens_and_document_ids
from retro_mcore.project.markers import fingerprint_of
from retro_mcore.samples.index_cache import IndexCache

_PARTS = ("document_index", "sample_index", "shuffle_index")


@dataclass
class MultiSplitGPTDatasetConfig(GPTDatasetConfig):
    """GPTDatasetConfig that also holds the split used in preprocessing.

    Attributes:
        split_preprocessing: The split used in preprocessing.
        index_cache: Cache of sample indexes; megatron's own caching is disabled.
    """

    split_preprocessing: str | None = None
    index_cache: IndexCache | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        # None would create a directory beside the tokens, named after their path.
        self.path_to_cache = ""


class MultiSplitGPTDataset(GPTDataset):
    """GPTDataset whose items are tokens i64 [S+1] and document ids i64 [n]."""

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        text, document_ids = tokens_and_document_ids(self, index)
        return {"text": text, "document_ids": document_ids}

    @staticmethod
    def _key_config_attributes() -> list[str]:
        return [*GPTDataset._key_config_attributes(), "split_preprocessing"]

    def _build_document_sample_shuffle_indices(
        self,
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        cache, build = self.config.index_cache, super()._build_document_sample_shuffle_indices
        if cache is None:
            return build()
        return cache.arrays(self._cache_name(cache), _PARTS, build)

    def _cache_name(self, cache: IndexCache) -> str:
        """Cache name of everything the indexes depend on, excluding the project's location."""
        described = dict(self.unique_identifiers)
        del described["tokenizer"]  # it names its files
        described["dataset_path"] = cache.digests[self.dataset_path]
        name = f"{Path(self.dataset_path).name}-{self.index_split.name}"
        return f"{name}-{fingerprint_of(described)}"
