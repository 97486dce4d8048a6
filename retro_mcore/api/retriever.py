"""A project's retriever as a function, for `RetroForCausalLM`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from retro_mcore.errors import ConfigurationError, raise_problems
from retro_mcore.project.config import ProjectConfig
from retro_mcore.retrieval.retriever import Retriever
from retro_mcore.training.loop.sample_reader import tokenizer_fingerprint


def project_retriever(
    project_dir: str | Path, config: Any, device: str | None = None
) -> Callable[[Any], Any]:
    """The project's search as `RetroForCausalLM` calls it.

        model.generate(input_ids, retriever=project_retriever("project", model.config))

    Args:
        project_dir: A project directory, after build_index.
        config: The model's configuration: its chunk length, neighbors per chunk and tokenizer.
        device: Where the embedder runs ("cpu", "cuda"); None: CUDA if available.

    Returns:
        A function of the tokens `[N, M]` of chunks to those of their neighbors, int64
        `[N, K, R]`; -1 is padding or a missing neighbor.

    Raises:
        ProjectError: a stage has not run, or the index belongs to another database.
        ConfigurationError: the model has another chunk length or tokenizer, or no retrieval.
    """
    _check_fits(project_dir, config)
    sizes = (config.retro_num_neighbors, config.retro_num_retrieved_chunks)
    retriever = Retriever(project_dir, *sizes, device)

    def neighbors(chunks: Any) -> Any:
        import torch

        found = retriever.search_tokens(chunks.tolist())
        tokens, mask = torch.from_numpy(found.tokens), torch.from_numpy(found.mask)
        return tokens.long().masked_fill(mask, -1)

    return neighbors


def _check_fits(project_dir: str | Path, config: Any) -> None:
    project = ProjectConfig.load(project_dir)
    problems: list[Any] = []
    if config.no_retrieval:
        problems.append(
            ConfigurationError("model", "it has no retrieval", "Generate without a retriever")
        )
    if project.retro_gpt_chunk_length != config.retro_chunk_length:
        problems.append(
            ConfigurationError(
                f"project {project_dir}",
                f"has chunks of {project.retro_gpt_chunk_length} tokens, and the model's have "
                f"{config.retro_chunk_length}",
                "Use the model's own project",
            )
        )
    fingerprint = config.tokenizer_fingerprint
    if fingerprint and fingerprint != tokenizer_fingerprint(project, str(project_dir)):
        problems.append(
            ConfigurationError(
                f"tokenizer of {project_dir}",
                "is not the one that the model was trained with",
                "Use the model's own project",
            )
        )
    raise_problems(problems)
