"""Megatron's GPT dataset under the name and with the attributes that the retired Retro used.

Class names and attributes are hashed into the names of the neighbor directories. Importing this
module imports megatron.
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
    """GPTDatasetConfig with the split that the project was preprocessed with.

    Attributes:
        split_preprocessing: That split.
        index_cache: Where sample indexes are kept; megatron's own caching is off.
    """

    split_preprocessing: str | None = None
    index_cache: IndexCache | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        # None would be a directory beside the tokens, named after their path.
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
        """A name of all that the indexes depend on, which is not where the project lies."""
        described = dict(self.unique_identifiers)
        del described["tokenizer"]  # it names its files
        described["dataset_path"] = cache.digests[self.dataset_path]
        name = f"{Path(self.dataset_path).name}-{self.index_split.name}"
        return f"{name}-{fingerprint_of(described)}"
