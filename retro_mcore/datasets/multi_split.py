"""Megatron's GPT dataset under the name and with the attributes that the retired Retro used.

Class names and attributes are hashed into the names of the neighbor directories and of the cached
sample indexes. Importing this module imports megatron.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig


@dataclass
class MultiSplitGPTDatasetConfig(GPTDatasetConfig):
    """GPTDatasetConfig with the split that the project was preprocessed with."""

    split_preprocessing: str | None = None


class MultiSplitGPTDataset(GPTDataset):
    """GPTDataset whose items are tokens i64 [S+1] and document ids i64 [n]."""

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        # Later releases return the documents' lengths as a third item.
        text, document_ids = self._query_document_sample_shuffle_indices(index)[:2]
        return {"text": text, "document_ids": document_ids}

    @staticmethod
    def _key_config_attributes() -> list[str]:
        return [*GPTDataset._key_config_attributes(), "split_preprocessing"]
