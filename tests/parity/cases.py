"""The grid that both implementations run: every axis at its ends, then combinations.

A case is plain data, because it travels to the process that runs the retired release. Names are
the fields of `RetroConfig` and the arguments of `GPTModel`, which both sides share.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

VOCABULARY = 96
MAX_SEQUENCE_LENGTH = 64


@dataclass(frozen=True)
class Case:
    """One configuration and batch.

    Attributes:
        final_layernorm: Give the retired model the final norm that releases 0.5 to 0.7 had
            (origin "mcore-0.5").
        zero_centered_gamma: Load the retired model's norms into ours as gamma - 1 (LayerNorm-1p).
        dropout: Give each dropout a rate of its own. Such a model runs in evaluation mode: only its
            numbers without dropout, and where each rate went, can be compared.
    """

    name: str
    num_layers: int = 6
    hidden_size: int = 32
    num_attention_heads: int = 4
    ffn_hidden_size: int = 64
    kv_channels: int | None = None
    normalization: str = "LayerNorm"
    layernorm_epsilon: float = 1e-5
    swiglu: bool = False
    add_bias_linear: bool = True
    add_qkv_bias: bool = False
    retro_chunk_length: int = 8
    retro_num_neighbors: int = 2
    retro_num_retrieved_chunks: int = 2
    retro_encoder_num_layers: int = 2
    position_embedding_type: str = "learned_absolute"
    rotary_percent: float = 1.0
    rotary_base: int = 10000
    tied: bool = True
    sequence_length: int = 24
    batch_size: int = 2
    final_layernorm: bool = False
    zero_centered_gamma: bool = False
    dropout: bool = False

    @property
    def origin(self) -> str:
        """What `RetroConfig.from_upstream` is told."""
        return "mcore-0.5" if self.final_layernorm else "mcore-0.15"

    def config_fields(self) -> dict[str, Any]:
        """Fields of either RetroConfig."""
        rates = (0.11, 0.12, 0.13, 0.14) if self.dropout else (0.0,) * 4
        same = [
            field.name
            for field in dataclasses.fields(self)
            if field.name.startswith(("num_", "hidden_", "ffn_", "kv_", "norm", "layern", "retro_"))
        ]
        return {
            **{name: getattr(self, name) for name in same},
            "add_bias_linear": self.add_bias_linear,
            "add_qkv_bias": self.add_qkv_bias,
            "gated_linear_unit": self.swiglu,
            "activation_func": torch.nn.functional.silu
            if self.swiglu
            else torch.nn.functional.gelu,
            "hidden_dropout": rates[0],
            "attention_dropout": rates[1],
            "retro_encoder_hidden_dropout": rates[2],
            "retro_encoder_attention_dropout": rates[3],
        }

    def model_arguments(self) -> dict[str, Any]:
        """Arguments of either RetroModel."""
        return {
            "vocab_size": VOCABULARY,
            "max_sequence_length": MAX_SEQUENCE_LENGTH,
            "position_embedding_type": self.position_embedding_type,
            "rotary_percent": self.rotary_percent,
            "rotary_base": self.rotary_base,
            "share_embeddings_and_output_weights": self.tied,
        }

    def inputs(self) -> dict[str, Tensor]:
        """A random batch; row `(b * L + l) * K + k` of the context is a neighbor of chunk l."""
        generator = torch.Generator().manual_seed(sum(self.name.encode()))
        chunks = -(-self.sequence_length // self.retro_chunk_length)
        rows = self.batch_size * chunks * self.retro_num_neighbors
        text = (self.batch_size, self.sequence_length)
        retrieved = (rows, self.retro_num_retrieved_chunks * self.retro_chunk_length)
        return {
            "input_ids": torch.randint(VOCABULARY, text, generator=generator),
            "position_ids": torch.arange(text[1]).expand(text).contiguous(),
            "context_input_ids": torch.randint(VOCABULARY, retrieved, generator=generator),
            "context_position_ids": torch.arange(retrieved[1]).expand(retrieved).contiguous(),
            "labels": torch.randint(VOCABULARY, text, generator=generator),
        }


_PARTIAL: dict[str, Any] = {"position_embedding_type": "rope", "rotary_percent": 0.5}
_ROTARY: dict[str, Any] = {"position_embedding_type": "rope"}
_LLAMA: dict[str, Any] = {
    **_ROTARY,
    "normalization": "RMSNorm",
    "swiglu": True,
    "add_bias_linear": False,
    "tied": False,
}
_INSTRUCTRETRO: dict[str, Any] = {
    **_PARTIAL,
    "swiglu": True,
    "add_bias_linear": False,
    "tied": False,
}

CASES = [
    Case("base"),
    # Each axis.
    Case("9_layers", num_layers=9),
    Case("15_layers", num_layers=15),
    Case("16_layers", num_layers=16),
    Case("18_layers", num_layers=18),
    Case("1_neighbor", retro_num_neighbors=1),
    Case("3_neighbors", retro_num_neighbors=3),
    Case("4_neighbors", retro_num_neighbors=4),
    Case("1_retrieved_chunk", retro_num_retrieved_chunks=1),
    Case("3_retrieved_chunks", retro_num_retrieved_chunks=3),
    Case("1_encoder_layer", retro_encoder_num_layers=1),
    Case("3_encoder_layers", retro_encoder_num_layers=3),
    Case("rotary", **_ROTARY),
    Case("partial_rotary", **_PARTIAL),
    Case("rmsnorm", normalization="RMSNorm"),
    Case("swiglu", swiglu=True),
    Case("no_bias", add_bias_linear=False),
    Case("qkv_bias_only", add_bias_linear=False, add_qkv_bias=True),
    Case("untied", tied=False),
    Case("wide_heads", kv_channels=16),
    Case("narrow_heads", kv_channels=4),
    Case("ragged", sequence_length=29),
    Case("one_token_in_the_first_chunk", sequence_length=17),
    Case("shorter_than_a_chunk", sequence_length=5),
    Case("exactly_a_chunk", sequence_length=8),
    Case("one_token", sequence_length=1),
    Case("dropout", dropout=True),
    Case("layernorm_1p", zero_centered_gamma=True),
    # Combinations.
    Case("smallest", retro_num_neighbors=1, retro_num_retrieved_chunks=1,
         retro_encoder_num_layers=1, batch_size=1, sequence_length=3, **_ROTARY),
    Case("largest", num_layers=18, retro_num_neighbors=4, retro_num_retrieved_chunks=3,
         retro_encoder_num_layers=3, batch_size=3, sequence_length=29, **_ROTARY),
    Case("llama", num_layers=12, hidden_size=48, num_attention_heads=6, retro_num_neighbors=3,
         layernorm_epsilon=1e-3, rotary_base=500000, **_LLAMA),
    Case("llama_ragged", sequence_length=21, kv_channels=16, add_qkv_bias=True, **_LLAMA),
    Case("instructretro", num_layers=18, sequence_length=19, zero_centered_gamma=True,
         **_INSTRUCTRETRO),
    Case("rmsnorm_bias_ragged", normalization="RMSNorm", swiglu=True, sequence_length=13,
         kv_channels=12, retro_encoder_num_layers=1, **_PARTIAL),
    Case("no_bias_short", add_bias_linear=False, sequence_length=6, retro_num_neighbors=4,
         retro_encoder_num_layers=3, tied=False),
    # The final norm of releases 0.5 to 0.7.
    Case("final_norm", final_layernorm=True),
    Case("final_norm_ragged", final_layernorm=True, num_layers=9, sequence_length=29, **_ROTARY),
    Case("final_norm_llama", final_layernorm=True, num_layers=18, **_LLAMA),
]  # fmt: skip
