"""A loaded model ready to generate: prompts to tokens, and where neighbors come from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from retro_mcore.distributed import raise_together
from retro_mcore.retrieval.background import BackgroundRetrieval
from retro_mcore.retrieval.neighbors import SameNeighbors, neighbors_from_texts, num_longer
from retro_mcore.session.loading import LoadedModel, load_model, require_reading
from retro_mcore.training.options.pretrain import ParallelOptions


@dataclass(frozen=True)
class GenerationModel(LoadedModel):
    """A loaded model, and how its prompts begin and its neighbors are searched.

    Attributes:
        search: The retriever in its background thread; None without live retrieval.
        add_bos: Begin every prompt with BOS, even if the project's documents do not.
        two_chunks: The prompt is the first chunk and the answer the second, whatever their lengths,
            as instruction-tuned models are used.
    """

    search: BackgroundRetrieval | None = None
    add_bos: bool = False
    two_chunks: bool = False

    def tokenize(self, prompts: Sequence[str]) -> list[list[int]]:
        """Tokens of prompts, after BOS where documents have it or `add_bos` asks for it."""
        tokens = self.tokenizer.tokenize_batch(prompts)
        if not self.add_bos:
            return [self.tokenizer.with_bos(ids) for ids in tokens]
        bos = self.tokenizer.bos
        return [[self.tokenizer.eod if bos is None else bos, *ids] for ids in tokens]

    def given(self, texts: Sequence[str]) -> SameNeighbors:
        """The user's own neighbors, for every chunk.

        Raises:
            ConfigurationError: more texts than the model reads, or the model reads none.
        """
        require_reading(self.arguments, "neighbors", "Leave them out")
        sizes = (self.arguments.retro_num_neighbors, self.retrieved_length)
        neighbors = neighbors_from_texts(texts, self.tokenizer, *sizes)
        return SameNeighbors(neighbors, num_longer(texts, self.tokenizer, self.retrieved_length))


def load_generation_model(
    project_dir: Path | str,
    checkpoints: Path | str,
    *,
    retrieval: bool = True,
    layout: ParallelOptions | None = None,
    retro_attention_gate: float | None = None,
    retrieval_interval: int = 1,
    retrieval_lead: int = 0,
    add_bos: bool = False,
    two_chunks: bool = False,
) -> GenerationModel:
    """Load a model to generate with. All ranks call it, after `setup_device`.

    Args:
        project_dir: See `load_model`, as for the next four.
        checkpoints: The --save directory of a run.
        retrieval: Retrieve the neighbors of each chunk from the project's index.
        layout: How the model is divided over ranks.
        retro_attention_gate: Factor on what the model reads in its neighbors.
        retrieval_interval: Search for every n-th chunk; those between keep the last neighbors.
        retrieval_lead: Tokens before a chunk's end at which its search starts.
        add_bos: Begin every prompt with BOS, even if the project's documents do not.
        two_chunks: The prompt is the first chunk and the answer the second, whatever their lengths.

    Raises:
        RetroError: as `load_model` does, or the interval or lead is out of range.
    """
    loaded = load_model(
        project_dir,
        checkpoints,
        retrieval=retrieval,
        layout=layout,
        retro_attention_gate=retro_attention_gate,
    )
    search = None
    with raise_together():
        if loaded.retriever is not None:
            search = BackgroundRetrieval(loaded.retriever, retrieval_interval, retrieval_lead)
    return GenerationModel(**vars(loaded), search=search, add_bos=add_bos, two_chunks=two_chunks)
