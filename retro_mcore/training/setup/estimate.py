"""Parameters and memory per process, computed without building the model.

Parameters, weights, gradients and optimizer state are exact, except that the state of Muon and Lion
counts norms and biases as matrices, and that dist_muon gives whole matrices to processes.
Activations are an estimate following Korthikanti et al. 2022 (section 4): the tensors that each
layer keeps for its backward pass, with an attention that keeps no probabilities (flash attention,
or PyTorch's). They stand for what is temporary, too: the total is compared with a simulated step
(`simulate`) in the tests.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from megatron.core.transformer.transformer_config import TransformerConfig

from retro_mcore.model.config import RetroConfig
from retro_mcore.model.family_options import family_option
from retro_mcore.model.options import ModelArguments
from retro_mcore.model.pipeline import stage_layer_numbers
from retro_mcore.model.specs import decoder_expert_layers
from retro_mcore.training.options.other_optimizers import MATRIX_OPTIMIZERS
from retro_mcore.training.setup.build import number_of_positions


@dataclass(frozen=True)
class Parameters:
    """Numbers of parameters of a stage, or of a whole model.

    Attributes:
        embedding: Word and position embeddings, and untied output weights.
        decoder: The GPT's layers and final norm.
        retrieval: Neighbor encoder, cross-attentions and their norms.
        copies: Tied copies of embeddings on other stages.
        experts: Those of the decoder that belong to experts.
        inactive: Those of experts that a token does not pass.
    """

    embedding: int
    decoder: int
    retrieval: int
    copies: int = 0
    experts: int = 0
    inactive: int = 0

    @property
    def total(self) -> int:
        """Parameters of the model, excluding copies."""
        return self.embedding + self.decoder + self.retrieval

    @property
    def active(self) -> int:
        """Parameters that one token passes."""
        return self.total - self.inactive


@dataclass(frozen=True)
class Memory:
    """Bytes on the process that needs most."""

    weights: int
    gradients: int
    optimizer: int
    activations: int

    @property
    def total(self) -> int:
        """The sum. The allocator and the communication library need additional memory."""
        return self.weights + self.gradients + self.optimizer + self.activations


def count_parameters(config: TransformerConfig, arguments: ModelArguments) -> Parameters:
    """Parameters of the whole model."""
    every = range(1, config.num_layers + 1)
    return _stage(config, arguments, every, first=True, last=True, parts=1, expert_parts=(1, 1))


def _stage(
    config: TransformerConfig,
    arguments: ModelArguments,
    layers: range,
    first: bool,
    last: bool,
    parts: int,
    expert_parts: tuple[int, int],
) -> Parameters:
    """Parameters of one pipeline stage, on one of `parts` tensor parallel processes.

    Args:
        expert_parts: Expert parallel and expert tensor parallel sizes.
    """
    retrieval, encodes = 0, False
    if isinstance(config, RetroConfig):
        crossing = [number for number in config.retro_layer_numbers if number in layers]
        retrieval = len(crossing) * _cross(config, config.encoder_hidden_size, parts)
        encodes = config.retro_layer_numbers[0] in layers
        retrieval += _encoder(config, parts) if encodes else 0
    routed = len(set(layers) & set(decoder_expert_layers(config)))
    decoder = len(layers) * _layer(config, parts) - routed * _mlp(config, parts)
    decoder += routed * _around_experts(config, parts)
    number, split = config.num_moe_experts or 0, expert_parts[1]
    expert = _mlp(config, split, config.moe_ffn_hidden_size) if routed else 0
    experts = routed * number // expert_parts[0] * expert
    inactive = routed * (number - config.moe_router_topk) * expert
    decoder += experts
    normed = not isinstance(config, RetroConfig) or config.retro_final_layernorm
    decoder += _norm(config) if last and normed else 0
    words = arguments.padded_vocab_size // parts * config.hidden_size
    positions = 0
    if arguments.position_embedding_type == "learned_absolute":
        positions = number_of_positions(arguments) * config.hidden_size
    tied = not arguments.untie_embeddings_and_output_weights
    embedding = (words + positions if first else 0) + (words if last and not tied else 0)
    copies = words if last and tied and not first else 0
    if encodes and not first:
        copies += positions + (0 if last and tied else words)
    return Parameters(embedding, decoder, retrieval, copies, experts, inactive)


def _layer(config: TransformerConfig, parts: int) -> int:
    """Self-attention and MLP with their norms."""
    wide, narrow = _widths(config, parts)
    hidden = config.hidden_size
    qkv = wide + 2 * narrow
    count = hidden * qkv + wide * hidden + _mlp(config, parts) + 2 * _norm(config)
    if config.add_bias_linear:
        count += qkv + hidden
    elif config.add_qkv_bias:
        count += qkv
    if family_option(config, "sublayer_norms") == "both":
        count += 2 * _norm(config)
    if config.qk_layernorm and family_option(config, "qk_layernorm_over") == "all_heads":
        count += (wide + narrow) * parts  # every process holds all of them
    elif config.qk_layernorm:
        count += 2 * _norm(config, config.kv_channels)
    return count


def _mlp(config: TransformerConfig, parts: int, width: int | None = None) -> int:
    """An MLP, or an expert."""
    hidden, ffn = config.hidden_size, (width or config.ffn_hidden_size) // parts
    first = ffn * (2 if config.gated_linear_unit else 1)
    return hidden * (first + ffn) + (first + hidden if config.add_bias_linear else 0)


def _around_experts(config: TransformerConfig, parts: int) -> int:
    """The router and the shared expert of a layer."""
    count = (config.num_moe_experts or 0) * (config.hidden_size + config.add_bias_linear)
    shared = config.moe_shared_expert_intermediate_size
    if shared is not None:
        count += _mlp(config, parts, shared)
        count += config.hidden_size if config.moe_shared_expert_gate else 0
    return count


def _cross(config: TransformerConfig, key_value_size: int, parts: int) -> int:
    """Cross-attention and its norm."""
    wide, narrow = _widths(config, parts)
    hidden = config.hidden_size
    count = hidden * wide + key_value_size * 2 * narrow + wide * hidden + _norm(config)
    return count + (wide + 2 * narrow + hidden if config.add_bias_linear else 0)


def _encoder(config: RetroConfig, parts: int) -> int:
    encoder = config.encoder_config()
    count = encoder.num_layers * _layer(encoder, parts)
    count += _cross(encoder, config.hidden_size, parts)
    if encoder.hidden_size != config.hidden_size:
        count += config.hidden_size * encoder.hidden_size
    return count


def _matrices(
    config: TransformerConfig, layers: range, expert_parts: int
) -> Iterator[tuple[int, int]]:
    """Rows and columns of the matrices of these layers, without tensor parallelism.

    Args:
        config: Configuration of the model.
        layers: Numbers of a stage's layers.
        expert_parts: Expert parallel size.
    """
    routed = decoder_expert_layers(config)
    for number in layers:
        yield from _matrices_of_attention(config)
        if number not in routed:
            yield from _matrices_of_mlp(config, config.ffn_hidden_size)
            continue
        experts, shared = config.num_moe_experts or 0, config.moe_shared_expert_intermediate_size
        yield experts, config.hidden_size
        for _ in range(experts // expert_parts):
            yield from _matrices_of_mlp(config, config.moe_ffn_hidden_size)
        if shared is not None:
            yield from _matrices_of_mlp(config, shared)
            if config.moe_shared_expert_gate:
                yield 1, config.hidden_size
    if not isinstance(config, RetroConfig):
        return
    for _ in {*config.retro_layer_numbers} & {*layers}:
        yield from _matrices_of_cross(config, config.encoder_hidden_size)
    if config.retro_layer_numbers[0] in layers:
        encoder = config.encoder_config()
        for _ in range(encoder.num_layers):
            yield from _matrices_of_attention(encoder)
            yield from _matrices_of_mlp(encoder, encoder.ffn_hidden_size)
        yield from _matrices_of_cross(encoder, config.hidden_size)
        if encoder.hidden_size != config.hidden_size:
            yield encoder.hidden_size, config.hidden_size


def _matrices_of_attention(config: TransformerConfig) -> Iterator[tuple[int, int]]:
    wide, narrow = _widths(config, 1)
    yield wide + 2 * narrow, config.hidden_size
    yield config.hidden_size, wide


def _matrices_of_cross(config: TransformerConfig, key_value_size: int) -> Iterator[tuple[int, int]]:
    wide, narrow = _widths(config, 1)
    yield wide, config.hidden_size
    yield 2 * narrow, key_value_size
    yield config.hidden_size, wide


def _matrices_of_mlp(config: TransformerConfig, width: int | None) -> Iterator[tuple[int, int]]:
    ffn = width or config.ffn_hidden_size
    yield ffn * (2 if config.gated_linear_unit else 1), config.hidden_size
    yield config.hidden_size, ffn


def _widths(config: TransformerConfig, parts: int) -> tuple[int, int]:
    """Widths of all queries and of all keys, on one process."""
    channels = config.kv_channels
    return (
        config.num_attention_heads * channels // parts,
        config.num_query_groups * channels // parts,
    )


def _norm(config: TransformerConfig, size: int | None = None) -> int:
    return (size or config.hidden_size) * (2 if config.normalization == "LayerNorm" else 1)


def estimate_memory(
    config: TransformerConfig,
    arguments: ModelArguments,
    micro_batch_size: int,
    num_microbatches: int,
    data_parallel_size: int,
    distributed_optimizer: bool,
    optimizer: str = "adam",
) -> Memory:
    """Bytes on the process that needs most.

    Args:
        config: Configuration of the model, with its layout.
        arguments: Of the model.
        micro_batch_size: B.
        num_microbatches: Number of micro batches per step; a pipeline keeps several at once.
        data_parallel_size: Number of model copies.
        distributed_optimizer: Whether the copies, and the context parallel processes of each, share
            the optimizer state.
        optimizer: As --optimizer names it. SGD is counted with its momentum.
    """
    shares = distributed_optimizer or optimizer == "dist_muon"
    sharing = data_parallel_size * config.context_parallel_size if shares else 1
    stages = [
        _stage_memory(config, arguments, rank, micro_batch_size, num_microbatches, sharing,
                      optimizer)
        for rank in range(config.pipeline_model_parallel_size)
    ]  # fmt: skip
    return max(stages, key=lambda memory: memory.total)


#: Moments of each weight that an optimizer keeps. With Muon and Lion, embeddings have AdamW's.
_MOMENTS = {
    **{"adam": 2, "adaptive_muon": 2, "soap": 2},
    **{"sgd": 1, "muon": 1, "dist_muon": 1, "lion": 1},
}


def _stage_memory(
    config: TransformerConfig,
    arguments: ModelArguments,
    rank: int,
    micro_batch_size: int,
    num_microbatches: int,
    optimizer_shards: int,
    optimizer: str,
) -> Memory:
    pipeline = config.pipeline_model_parallel_size
    virtual = config.virtual_pipeline_model_parallel_size
    chunks: list[int | None] = [None] if virtual is None else list(range(virtual))
    parameters = experts = embeddings = activations = squares = 0
    for chunk in chunks:
        layers = stage_layer_numbers(config, chunk, rank)
        first = rank == 0 and not chunk
        last = rank == pipeline - 1 and (chunk is None or chunk == len(chunks) - 1)
        parts = config.tensor_model_parallel_size
        expert_parts = (
            config.expert_model_parallel_size,
            config.expert_tensor_parallel_size or parts,
        )
        stage = _stage(config, arguments, layers, first, last, parts, expert_parts)
        parameters += stage.total + stage.copies
        experts += stage.experts
        embeddings += stage.embedding + stage.copies
        squares += sum(
            2 * (rows * rows + columns * columns)
            for rows, columns in _matrices(config, layers, expert_parts[0])
        )
        kept = min(num_microbatches, pipeline - rank)
        activations += kept * micro_batch_size * _activations(config, arguments, layers, last)
    low = config.bf16 or config.fp16
    # Low precision: 2 bytes for weights; 4 each for gradients, main weights and moments.
    state = 4 * (_MOMENTS[optimizer] + low)
    gradient = 2 if config.fp16 else 4
    # Of experts there are fewer copies to share the state.
    of_experts = max(1, optimizer_shards * parts // math.prod(expert_parts))
    of_experts = 1 if optimizer_shards == 1 else of_experts
    more = 4 * squares if optimizer == "soap" else 0
    if optimizer in MATRIX_OPTIMIZERS:
        more += 4 * embeddings * (_MOMENTS["adam"] - _MOMENTS[optimizer]) // optimizer_shards
    return Memory(
        weights=parameters * (2 if low else 4),
        gradients=parameters * gradient,
        optimizer=(parameters - experts) * state // optimizer_shards
        + experts * state // of_experts
        + more,
        activations=activations * (2 if low else 4),
    )


def _activations(
    config: TransformerConfig, arguments: ModelArguments, layers: range, last: bool
) -> int:
    """Number of elements that one sample's forward pass keeps on a stage."""
    tokens = arguments.seq_length // config.context_parallel_size
    parts = config.tensor_model_parallel_size
    full = config.recompute_granularity == "full"
    layers = layers[config.cpu_offloading_num_layers :]  # those before wait in the CPU's memory
    routed = set(decoder_expert_layers(config)) & set(layers)
    if full:
        kept = len(layers) * _boundary(config, tokens)
        kept += max(
            _layer_kept(config, tokens, has_experts) for has_experts in {False, bool(routed)}
        )
    else:
        kept = sum(_layer_kept(config, tokens, number in routed) for number in layers)
    if isinstance(config, RetroConfig):
        kept += _retrieval_kept(config, tokens, layers, full)
    if config.context_parallel_size > 1 and config.cp_comm_type == "all_gather":
        # Keys and values of the other processes' tokens.
        others = 2 * (arguments.seq_length - tokens) * _widths(config, parts)[1]
        kept += (1 if full else len(layers)) * others
    if 1 in layers:
        kept += _masks(config, tokens)
    if last:  # their softmax with 4 bytes, and in low precision logits with 2
        copies = 3 if config.bf16 or config.fp16 else 1
        kept += copies * tokens * arguments.padded_vocab_size // parts
    return kept


def _boundary(config: TransformerConfig, tokens: int) -> int:
    """Bytes passed from layer to layer."""
    return tokens * config.hidden_size // _sequence_parts(config)


def _masks(config: TransformerConfig, tokens: int) -> int:
    """The mask of a dropout of hidden states: as wide as they are on the CPU, a byte on a GPU."""
    return _boundary(config, tokens) if config.hidden_dropout else 0


def _layer_kept(config: TransformerConfig, tokens: int, has_experts: bool = False) -> int:
    """Inputs of norms, linear layers, attention and activation.

    Balanced experts are assumed: each token is held by as many as it chooses.
    """
    wide, narrow = _widths(config, config.tensor_model_parallel_size)
    ffn = config.ffn_hidden_size
    inner = 2 * wide + 2 * narrow
    if has_experts:
        ffn = config.moe_ffn_hidden_size * config.moe_router_topk
        ffn += config.moe_shared_expert_intermediate_size or 0
        inner += 2 * config.hidden_size * config.moe_router_topk // _sequence_parts(config)
    inner += ffn // config.tensor_model_parallel_size * (3 if config.gated_linear_unit else 2)
    return 4 * _boundary(config, tokens) + 2 * _masks(config, tokens) + tokens * inner


def _retrieval_kept(config: RetroConfig, tokens: int, layers: range, full: bool) -> int:
    wide, narrow = _widths(config, config.tensor_model_parallel_size)
    chunks = config.chunk_grid(tokens).num_chunks
    of_chunk = config.retro_num_neighbors * (config.retro_retrieved_length or 0)
    retrieved = chunks * of_chunk
    # Under context parallelism also those of the chunks before the process's two pieces.
    attended = retrieved if config.context_parallel_size == 1 else (chunks + 2) * of_chunk
    encoder = config.encoder_config()
    cross = 2 * _boundary(config, tokens) + tokens * 2 * wide + attended * 2 * narrow
    cross += _masks(config, tokens)
    count = len([number for number in config.retro_layer_numbers if number in layers])
    kept = (1 if full and count else 0 if full else count) * cross
    if config.retro_layer_numbers[0] in layers:
        of_encoder = encoder.num_layers * _layer_kept(encoder, retrieved)
        of_encoder += 2 * _boundary(encoder, retrieved) + retrieved * 2 * wide
        of_encoder += 2 * _masks(encoder, retrieved)  # of its input and its cross-attention
        kept += of_encoder  # recomputed together with the layer that calls it, so needed completely
    return kept


def context_parallel_bytes(
    config: TransformerConfig, arguments: ModelArguments, micro_batch_size: int
) -> int:
    """Bytes that a process sends for context parallelism, at most, for each micro batch.

    Keys and values of its tokens go to the other processes in each layer of the stage, and their
    gradients come back likewise. The encoded neighbors of two chunks of each sample go to the
    processes with the tokens that follow. Recomputation sends again, which is not counted, nor is
    what Transformer Engine's "p2p" sends more in the backward pass.
    """
    ranks = config.context_parallel_size
    if ranks == 1:
        return 0
    layers = -(-config.num_layers // config.pipeline_model_parallel_size)
    tokens = arguments.seq_length // ranks
    narrow = _widths(config, config.tensor_model_parallel_size)[1]
    elements = layers * (ranks - 1) * tokens * 2 * narrow
    if isinstance(config, RetroConfig):
        retrieved = (config.retro_retrieved_length or 0) // _sequence_parts(config)
        messages = 1 if ranks == 2 else 2
        elements += messages * retrieved * config.retro_num_neighbors * config.encoder_hidden_size
    return 2 * micro_batch_size * elements * (2 if config.bf16 or config.fp16 else 4)


def _sequence_parts(config: Any) -> int:
    return config.tensor_model_parallel_size if config.sequence_parallel else 1
