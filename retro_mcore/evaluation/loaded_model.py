"""A trained model with its tokenizer and what it can retrieve from: what generating needs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from megatron.core.models.gpt import GPTModel

from retro_mcore.data.tokenizers import Tokenizer, load_project_tokenizer
from retro_mcore.distributed import raise_together
from retro_mcore.evaluation.perplexity import check_shape, check_tokenizer
from retro_mcore.inference.retriever import Retriever
from retro_mcore.project.config import ProjectConfig
from retro_mcore.project.paths import ProjectPaths
from retro_mcore.training.checkpointing import load_model_from_checkpoint
from retro_mcore.training.options import ParallelOptions
from retro_mcore.training.provider import ModelArguments


@dataclass(frozen=True)
class LoadedModel:
    """A model in evaluation mode, on its device.

    Attributes:
        model: This rank's part of it.
        arguments: What its checkpoint says of it.
        tokenizer: The project's.
        retriever: The project's live search; None unless it was asked for.
    """

    model: GPTModel
    arguments: ModelArguments
    tokenizer: Tokenizer
    retriever: Retriever | None

    @property
    def window(self) -> int:
        """Tokens that the model reads at once."""
        return int(self.model.max_sequence_length)

    @property
    def retrieved_length(self) -> int:
        """R."""
        return self.arguments.retro_num_retrieved_chunks * self.arguments.retro_chunk_length

    def open_attention_gate(self) -> None:
        """Let a model that was tuned with the gate at 0 read neighbors again, as in pretraining."""
        config = self.model.config
        config.retro_attention_gate = config.retro_attention_gate or 1.0

    @classmethod
    def load(
        cls,
        project_dir: Path | str,
        checkpoints: Path | str,
        retrieval: bool,
        tensor_model_parallel_size: int = 1,
        pipeline_model_parallel_size: int = 1,
        device: Literal["auto", "cpu", "cuda"] = "auto",
    ) -> LoadedModel:
        """The latest checkpoint of a directory; all ranks call it, after `setup_device`.

        Args:
            project_dir: Its project: tokenizer, database and index.
            checkpoints: The directory.
            retrieval: Open the project's database and index for live retrieval.
            tensor_model_parallel_size: Ranks that share one layer.
            pipeline_model_parallel_size: Ranks that share out the layers.
            device: Where it runs.

        Raises:
            RetroError: project and checkpoint do not fit together, or one is damaged.
        """
        with raise_together():
            project = ProjectConfig.load(project_dir)
            tokenizer = load_project_tokenizer(project, ProjectPaths(project_dir))
        layout = ParallelOptions(
            device=device,
            tensor_model_parallel_size=tensor_model_parallel_size,
            pipeline_model_parallel_size=pipeline_model_parallel_size,
        )
        model, arguments = load_model_from_checkpoint(checkpoints, layout)
        with raise_together():
            check_tokenizer(arguments, project, str(project_dir))
            retriever = None
            if retrieval:
                check_shape(arguments, project, str(project_dir))
                retriever = Retriever(
                    project_dir,
                    arguments.retro_num_neighbors,
                    arguments.retro_num_retrieved_chunks,
                    next(model.parameters()).device.type,
                )
        return cls(model, arguments, tokenizer, retriever)
