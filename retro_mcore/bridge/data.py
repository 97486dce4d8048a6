"""A project's samples and their neighbors for Megatron-Bridge."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from megatron.bridge.data.base import DatasetBuildContext, DatasetProvider

from retro_mcore.samples.neighbor_noise import NeighborNoise
from retro_mcore.samples.retro_dataset import build_retro_datasets
from retro_mcore.training.providers import check_number_of_samples


@dataclass
class RetroDatasetProvider(DatasetProvider):
    """The samples of a project. Every rank reads its own.

    Attributes:
        project_dir: The project, after query_neighbors.
        seq_length: S, tokens per sample.
        num_neighbors: K, neighbors per chunk.
        num_retrieved_chunks: Chunks per neighbor.
        drop_chunks, drop_neighbors, replace_neighbors, replace_tokens: Noise in the neighbors of
            training samples; see `retro_mcore.training.options.noise`.
        seed: Seed of the noise.
    """

    project_dir: str = ""
    seq_length: int = 0
    num_neighbors: int = 2
    num_retrieved_chunks: int = 2
    drop_chunks: float = 0.0
    drop_neighbors: float = 0.0
    replace_neighbors: float = 0.0
    replace_tokens: float = 0.0
    seed: int = 1234

    def build_datasets(self, context: DatasetBuildContext) -> tuple[Any, Any, Any]:
        """Build the datasets for training, validation and test; None for an empty split.

        Raises:
            ConfigurationError: more samples are requested than the project has.
            ProjectError: a stage of the project is missing.
        """
        names = ("seed", "drop_chunks", "drop_neighbors", "replace_neighbors", "replace_tokens")
        noise = NeighborNoise(**{name: getattr(self, name) for name in names})
        datasets = build_retro_datasets(
            self.project_dir, self.num_neighbors, self.num_retrieved_chunks, noise
        )
        wanted = (context.train_samples, context.valid_samples, context.test_samples)
        settings = ("train.train_iters", "validation.eval_iters", "validation.eval_iters")
        return check_number_of_samples(datasets, wanted, settings)
