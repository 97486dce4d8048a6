"""Logits of the next tokens of growing texts: with a cache, or by full recomputation.

Shapes: B texts, S new positions, N new chunks, K neighbors, R retrieved length, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region
from megatron.core.transformer.transformer_config import TransformerConfig

from retro_mcore.distributed import get_rank
from retro_mcore.errors import ConfigurationError
from retro_mcore.inference.texts import GeneratedText
from retro_mcore.model.cached_attention import check_cacheable
from retro_mcore.model.config import RetroConfig
from retro_mcore.model.inference_context import InferenceContext, NewChunk
from retro_mcore.model.pipeline import carries_neighbors, is_interleaved, stage_layer_numbers
from retro_mcore.retrieval.neighbors import RetrievedNeighbors
from retro_mcore.samples.batch import retrieved_inputs

if TYPE_CHECKING:
    from retro_mcore.model.model import RetroModel


class Decoder(Protocol):
    """Computes the logits of growing texts."""

    def next_logits(self, texts: Sequence[GeneratedText]) -> torch.Tensor | None:
        """Logits [B, V] of each text's next token; None except on the last pipeline stage."""
        ...

    def prompt_logits(self, text: GeneratedText) -> torch.Tensor | None:
        """Logits [S, V] at every token of a text; None except on the last pipeline stage."""
        ...


class CachedDecoder:
    """A `Decoder` that runs the model over new tokens only.

    The texts of each call determine the work. A new text is a prompt and runs in one pass. A known
    text has one more token. A missing text is removed. So texts may join and leave at any time.

    Under tensor and pipeline parallelism every rank of the model calls it with the same texts.

    Args:
        model: The model, or this rank's pipeline stage of it, in eval mode and on whole sequences
            (`platform.parallel.whole_sequences`). Without neighbors a DecoderModel will do.
        pad_id: Token that pads shorter prompts; it does not affect results.
        max_batch_size: Maximum number of texts at a time.
        max_length: Maximum tokens of a text; the model's window by default.

    Raises:
        ConfigurationError: the model has attention that the cache does not support, interleaved
            pipeline stages, or sequence parallelism.
    """

    def __init__(
        self, model: RetroModel, pad_id: int, max_batch_size: int, max_length: int | None = None
    ) -> None:
        _refuse_divided_texts(model.config)
        check_cacheable(model.config)
        if is_interleaved(model.config):
            raise ConfigurationError(
                "--num-virtual-stages-per-pipeline-rank",
                "generation does not run on interleaved stages",
                "Load the checkpoint without it",
            )
        self._model, self._pad_id = model, pad_id
        self._device = next(model.parameters()).device
        self._context = InferenceContext(max_batch_size, max_length or model.max_sequence_length)
        self._texts: list[GeneratedText] = []

    def next_logits(self, texts: Sequence[GeneratedText]) -> torch.Tensor | None:
        """The logits [B, V] of each text's next token, whole on every tensor-parallel rank."""
        self._forget_all_but(texts)
        logits: dict[GeneratedText, torch.Tensor] = {}
        if self._texts:
            self._collect(logits, self._texts, self._step())
        known = set(self._texts)
        new = [text for text in texts if text not in known]
        if new:
            self._collect(logits, new, self._prefill(new))
        if not logits:
            return None
        return torch.stack([logits[text] for text in texts])

    def prompt_logits(self, text: GeneratedText) -> torch.Tensor | None:
        """Logits [S, V] at every token of a text, without affecting the growing texts."""
        decoder = CachedDecoder(self._model, self._pad_id, 1, len(text.tokens))
        hidden_SBD = decoder._run_prompts([text])
        return None if hidden_SBD is None else decoder._logits(hidden_SBD)[:, 0]

    @staticmethod
    def _collect(
        logits: dict[GeneratedText, torch.Tensor],
        texts: Sequence[GeneratedText],
        rows_BV: torch.Tensor | None,
    ) -> None:
        if rows_BV is not None:
            logits.update(zip(texts, rows_BV, strict=True))

    def _forget_all_but(self, texts: Sequence[GeneratedText]) -> None:
        wanted = set(texts)
        for row in reversed(range(len(self._texts))):
            if self._texts[row] not in wanted:
                self._texts[row] = self._texts[-1]
                self._texts.pop()
                self._context.remove(row)

    def _prefill(self, texts: Sequence[GeneratedText]) -> torch.Tensor | None:
        hidden_SBD = self._run_prompts(texts)
        self._texts += texts
        if hidden_SBD is None:
            return None
        last = torch.tensor([len(text.tokens) - 1 for text in texts], device=self._device)
        last_1BD = hidden_SBD[last, torch.arange(len(texts), device=self._device)][None]
        return self._logits(last_1BD)[0]

    def _run_prompts(self, texts: Sequence[GeneratedText]) -> torch.Tensor | None:
        lengths = [len(text.tokens) for text in texts]
        self._context.prefill(lengths, self._device)
        tokens = [
            text.tokens + [self._pad_id] * (max(lengths) - len(text.tokens)) for text in texts
        ]
        return self._run(torch.tensor(tokens, device=self._device), texts, [0] * len(texts))

    def _step(self) -> torch.Tensor | None:
        lengths = self._context.lengths
        for text, length in zip(self._texts, lengths, strict=True):
            assert len(text.tokens) == length + 1, "a text grows by one token between two calls"
        self._context.step(self._device)
        tokens = torch.tensor([text.tokens[-1:] for text in self._texts], device=self._device)
        hidden_1BD = self._run(tokens, self._texts, lengths)
        return None if hidden_1BD is None else self._logits(hidden_1BD)[0]

    def _run(
        self, tokens_BS: torch.Tensor, texts: Sequence[GeneratedText], starts: Sequence[int]
    ) -> torch.Tensor | None:
        """Run this rank's stage once; returns the output [S, B, D] on the last stage.

        The model's `forward` cannot run it: it rotates all texts of a batch by the same positions
        and returns logits of every position. Here each text has its own positions and last token.
        """
        model, config, current = self._model, self._model.config, self._context.current
        neighbors = self._plan_neighbors(texts, starts)
        hidden = None
        if model.pre_process:
            hidden = model.embedding(tokens_BS, current.positions_SB.t())
        else:
            shape_SBD = (*current.positions_SB.shape, int(config.hidden_size or 0))
            model.decoder.set_input_tensor(self._receive(shape_SBD))
        context = None
        if neighbors is not None and model.neighbor_encoder is not None:
            tokens = torch.from_numpy(neighbors.tokens).flatten(0, 1).to(self._device)
            context = model.embed_neighbors(tokens)
        elif neighbors is not None and self._carries(self._layers.start - 1):
            _, num_neighbors, retrieved_length = neighbors.tokens.shape
            shape = (retrieved_length, len(current.chunks) * num_neighbors)
            context = self._receive((*shape, config.encoder_hidden_size)).to(config.params_dtype)
        hidden = model.decoder(
            hidden_states=hidden,
            attention_mask=None,
            context=context,
            rotary_pos_emb=self._angles(),
            inference_context=self._context,
        )
        if model.post_process:
            return hidden
        self._send(hidden)
        if neighbors is not None and self._carries(self._layers.stop - 1):
            self._send(context if current.encoded is None else current.encoded)
        return None

    def _plan_neighbors(
        self, texts: Sequence[GeneratedText], starts: Sequence[int]
    ) -> RetrievedNeighbors | None:
        """Register chunks that the pass completes in the context; returns neighbors [N, K, R]."""
        chunks, found = [], []
        for row, (text, start) in enumerate(zip(texts, starts, strict=True)):
            if not text.neighbors:
                continue
            config = self._model.config
            places = text.chunks(config.retro_chunk_length, start)
            chunks += [NewChunk(row, place.start, len(place)) for place in places]
            found += text.neighbors[len(text.neighbors) - len(places) :] if places else []
        if not chunks:
            return None
        neighbors = RetrievedNeighbors.join(found)
        mask = torch.from_numpy(neighbors.mask).to(self._device)
        self._context.completes(chunks, mask if self._model.config.retro_mask_padding else None)
        return neighbors

    def _angles(self) -> torch.Tensor | None:
        """Rotary embedding of the new positions, [S, B, 1, C]."""
        if self._model.position_embedding_type != "rope":
            return None
        angles = self._model.rotary_pos_emb(self._context.max_sequence_length)
        return angles[:, 0][self._context.current.positions_SB]

    def _logits(self, hidden_SBD: torch.Tensor) -> torch.Tensor:
        model = self._model
        logits = model.logits(hidden_SBD)
        if model.parallel_output:
            logits = gather_from_tensor_model_parallel_region(logits, group=model.pg_collection.tp)
        return logits

    @property
    def _layers(self) -> range:
        return stage_layer_numbers(self._model.config)

    def _carries(self, last_layer: int) -> bool:
        return carries_neighbors(self._model.config, last_layer)

    @property
    def _dtype(self) -> torch.dtype:
        """Dtype of the states sent between stages."""
        config = self._model.config
        return torch.float32 if config.fp32_residual_connection else config.params_dtype

    def _receive(self, shape: Sequence[int]) -> torch.Tensor:
        group = self._model.pg_collection.pp
        received = torch.empty(*shape, dtype=self._dtype, device=self._device)
        dist.recv(received, dist.get_global_rank(group, get_rank(group) - 1), group)
        return received

    def _send(self, states: torch.Tensor | None) -> None:
        assert states is not None
        group = self._model.pg_collection.pp
        states = states.to(self._dtype).contiguous()
        dist.send(states, dist.get_global_rank(group, get_rank(group) + 1), group)


class FullRecomputation:
    """A `Decoder` that recomputes every text from its first token in each step.

    It uses the model's own forward pass, so it is the reference for the cache. Pipeline stages and
    two-chunk texts run as prompts of an empty cache.

    Args:
        model: The model, or this rank's pipeline stage of it, in eval mode.
        pad_id: Token that pads shorter texts; it does not affect results.
    """

    def __init__(self, model: RetroModel, pad_id: int) -> None:
        _refuse_divided_texts(model.config)
        self._model, self._pad_id = model, pad_id
        self._device = next(model.parameters()).device

    def next_logits(self, texts: Sequence[GeneratedText]) -> torch.Tensor | None:
        """The logits [B, V] of each text's next token, whole on every tensor-parallel rank."""
        if self._needs_prefill(texts):
            longest = max(len(text.tokens) for text in texts)
            decoder = CachedDecoder(self._model, self._pad_id, len(texts), longest)
            return decoder.next_logits(texts)
        lengths_B = torch.tensor([len(text.tokens) for text in texts], device=self._device)
        return self._run(texts)[torch.arange(len(texts), device=self._device), lengths_B - 1]

    def prompt_logits(self, text: GeneratedText) -> torch.Tensor | None:
        """Logits [S, V] at every token of a text; None except on the last pipeline stage."""
        if self._needs_prefill([text]):
            return CachedDecoder(self._model, self._pad_id, 1).prompt_logits(text)
        return self._run([text])[0, : len(text.tokens)]

    def _needs_prefill(self, texts: Sequence[GeneratedText]) -> bool:
        stages = self._model.config.pipeline_model_parallel_size
        return stages > 1 or any(text.two_chunks for text in texts)

    def _run(self, texts: Sequence[GeneratedText]) -> torch.Tensor:
        """Logits [B, S, V] at every position, including padding."""
        tokens_BS = self._padded_tokens(texts)
        position_ids_BS = torch.arange(tokens_BS.shape[1], device=self._device).expand_as(tokens_BS)
        logits_BSV = self._model(
            tokens_BS, position_ids_BS, None, **self._neighbors(texts, tokens_BS.shape[1])
        )
        if self._model.parallel_output:
            logits_BSV = gather_from_tensor_model_parallel_region(
                logits_BSV, group=self._model.pg_collection.tp
            )
        return logits_BSV

    def _padded_tokens(self, texts: Sequence[GeneratedText]) -> torch.Tensor:
        config = self._model.config
        # Sequence parallelism divides the positions, so their number must be divisible.
        multiple = config.tensor_model_parallel_size if config.sequence_parallel else 1
        if isinstance(config, RetroConfig) and config.retro_chunk_alignment == "right":
            # Whole chunks, as in training, where right-aligned and left-aligned grids are the same.
            multiple = math.lcm(multiple, config.retro_chunk_length)
        longest = max(len(text.tokens) for text in texts)
        padded_length = -(-longest // multiple) * multiple
        rows = [text.tokens + [self._pad_id] * (padded_length - len(text.tokens)) for text in texts]
        return torch.tensor(rows, dtype=torch.int64, device=self._device)

    def _neighbors(
        self, texts: Sequence[GeneratedText], sequence_length: int
    ) -> dict[str, torch.Tensor | None]:
        """The model's context arguments; empty while no text has neighbors."""
        if not any(text.neighbors for text in texts):
            return {}
        num_chunks = self._model.config.chunk_grid(sequence_length).num_chunks
        packed = RetrievedNeighbors.pack(
            [text.neighbors for text in texts], num_chunks, self._pad_id
        )
        return retrieved_inputs(
            torch.from_numpy(packed.tokens).to(self._device),
            torch.from_numpy(packed.mask).to(self._device),
        )


def _refuse_divided_texts(config: TransformerConfig) -> None:
    if config.context_parallel_size > 1:
        raise ConfigurationError(
            "context_parallel_size",
            f"{config.context_parallel_size}: generation reads whole texts on every rank",
            "Load the checkpoint without it; tensor and pipeline parallelism generate",
        )
