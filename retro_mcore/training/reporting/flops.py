"""FLOPs of a training step, and model FLOPs utilization (MFU).

Only the model's matrix products are counted, with a multiplication and an addition each. Causal
attention is counted in full, as in PaLM (Chowdhery et al. 2022, appendix B), that of a sliding
window with as many keys as the window has. A backward pass
counts as two forward passes, and recomputation is not counted. MFU is the FLOP/s divided by the
devices' peak.
"""

from __future__ import annotations

import torch
from megatron.core.transformer.transformer_config import TransformerConfig

from retro_mcore.model.config import RetroConfig
from retro_mcore.model.specs import decoder_expert_layers
from retro_mcore.platform.windows import layer_window

#: Peak dense bf16 TFLOP/s from vendors' data sheets, by part of the device's name. The first match
#: is used.
_PEAK_TFLOPS = {
    "GB200": 2500.0,
    "B200": 2250.0,
    "H200": 989.0,
    "H100 PCIe": 756.0,
    "H100": 989.0,
    "A100": 312.0,
    "L40S": 362.0,
    "A40": 150.0,
    "A10": 125.0,
    "L4": 121.0,
    "V100": 125.0,
}


def peak_flops(device: torch.device, given_tflops: float | None = None) -> float | None:
    """Peak FLOP/s of the device; None if unknown (always on CPU).

    Args:
        device: The device.
        given_tflops: Value of --device-peak-tflops.
    """
    if given_tflops is not None:
        return given_tflops * 1e12
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    fitting = (peak for part, peak in _PEAK_TFLOPS.items() if part in name)
    tflops = next(fitting, None)
    return None if tflops is None else tflops * 1e12


def training_flops_per_sample(
    config: TransformerConfig, sequence_length: int, vocab_size: int
) -> float:
    """FLOPs of the forward and backward pass for one sample.

    Args:
        config: Configuration of the whole model; a RetroConfig includes retrieval.
        sequence_length: S.
        vocab_size: Number of rows of the output layer.
    """
    return 3.0 * forward_flops_per_sample(config, sequence_length, vocab_size)


def forward_flops_per_sample(
    config: TransformerConfig, sequence_length: int, vocab_size: int
) -> float:
    """FLOPs of the forward pass for one sample. See `training_flops_per_sample`."""
    windows = (layer_window(config, number) for number in range(1, config.num_layers + 1))
    keys = [min(sequence_length, window or sequence_length) for window in windows]
    decoder = sum(_layer(config, sequence_length, each) for each in keys)
    if routed := len(decoder_expert_layers(config)):
        difference = _experts(config) - _mlp(config, config.ffn_hidden_size)
        decoder += routed * 2.0 * sequence_length * difference
    logits = 2.0 * sequence_length * config.hidden_size * vocab_size
    retrieval = _retrieval(config, sequence_length) if isinstance(config, RetroConfig) else 0.0
    return decoder + logits + retrieval


def _layer(config: TransformerConfig, tokens: int, keys: int) -> float:
    """Self-attention and MLP of one layer, for `tokens` that each attend to `keys`."""
    wide = config.num_attention_heads * config.kv_channels
    narrow = config.num_query_groups * config.kv_channels
    projections = config.hidden_size * (2 * wide + 2 * narrow)
    mlp = _mlp(config, config.ffn_hidden_size)
    return 2.0 * tokens * (projections + mlp + 2 * keys * wide)


def _mlp(config: TransformerConfig, width: int) -> int:
    """Multiplications of an MLP, for one token."""
    return (3 if config.gated_linear_unit else 2) * config.hidden_size * width


def _experts(config: TransformerConfig) -> int:
    """Multiplications of a router, the chosen experts and the shared one, for one token."""
    width = config.moe_router_topk * config.moe_ffn_hidden_size
    shared = config.moe_shared_expert_intermediate_size or 0
    gate = config.hidden_size if shared and config.moe_shared_expert_gate else 0
    return _mlp(config, width + shared) + config.hidden_size * config.num_moe_experts + gate


def _retrieval(config: RetroConfig, sequence_length: int) -> float:
    """Neighbor encoder and cross-attentions."""
    grid = config.chunk_grid(sequence_length)
    rows = grid.num_chunks * config.retro_num_neighbors
    length = config.retro_retrieved_length or 0
    encoder = config.encoder_config()
    flops = encoder.num_layers * _layer(encoder, rows * length, length)
    # The encoder's first retrieval layer attends to the querying chunk.
    flops += _cross(
        encoder, config.hidden_size, rows * length, sequence_length, config.retro_chunk_length
    )
    if encoder.hidden_size != config.hidden_size:
        flops += 2.0 * rows * length * config.hidden_size * encoder.hidden_size
    keys = config.retro_num_neighbors * length
    cross = _cross(config, encoder.hidden_size, sequence_length, rows * length, keys)
    return flops + len(config.retro_layer_numbers) * cross


def _cross(
    config: TransformerConfig, key_value_size: int, tokens: int, key_tokens: int, keys: int
) -> float:
    """Cross-attention of `tokens` to `keys` each, with `key_tokens` projected once."""
    wide = config.num_attention_heads * config.kv_channels
    narrow = config.num_query_groups * config.kv_channels
    queries = tokens * (2 * config.hidden_size * wide + 2 * keys * wide)
    return 2.0 * (queries + key_tokens * key_value_size * 2 * narrow)
