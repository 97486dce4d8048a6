"""Names and shapes in the checkpoints of small models. `python -m` this module prints them."""

from __future__ import annotations

import json
from typing import Any

import torch

SIZES: dict[str, Any] = {
    "num_layers": 2,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "retro_decoder_layers": [2],
    "retro_encoder_num_layers": 1,
    "seq_length": 32,
    "retro_chunk_length": 8,
    "vocab_size": 90,
    "padded_vocab_size": 96,
    "tokenizer_type": "NullTokenizer",
    "tokenizer_fingerprint": "",
}
#: Options of each model, beside `SIZES`.
MODELS: dict[str, dict[str, Any]] = {
    "learned positions": {},
    "rotary, untied": {
        "position_embedding_type": "rope",
        "untie_embeddings_and_output_weights": True,
        "normalization": "RMSNorm",
        "swiglu": True,
        "disable_bias_linear": True,
        "num_query_groups": 2,
        "qk_layernorm": True,
    },
    "narrow encoder": {"retro_encoder_hidden_size": 16, "retro_encoder_num_attention_heads": 2},
    "retired": {"retro_origin": "mcore-0.15"},
    "experts": {"num_experts": 2, "disable_bias_linear": True},
    "GPT": {"no_retrieval": True},
    "GPT, rotary, untied": {
        "no_retrieval": True,
        "position_embedding_type": "rope",
        "untie_embeddings_and_output_weights": True,
    },
}


def checkpoint_names(name: str) -> dict[str, dict[str, str]]:
    """What a model of `MODELS` has in checkpoints, as text by name in the model.

    Returns:
        "state": shape. "sharded": name in the checkpoint, whole shape, and what is unusual.
    """
    from retro_mcore.checkpoint.state import METADATA
    from retro_mcore.model.options import ModelArguments
    from retro_mcore.training.options.parallel import ParallelOptions
    from retro_mcore.training.setup.build import build_model

    model = build_model(ModelArguments(**{**SIZES, **MODELS[name]}), ParallelOptions())
    tensors = {k: v for k, v in model.state_dict().items() if isinstance(v, torch.Tensor)}
    sharded = model.sharded_state_dict(metadata=METADATA)
    return {
        "state": {key: str(list(tensor.shape)) for key, tensor in tensors.items()},
        "sharded": {key: _described(key, entry) for key, entry in sharded.items()},
    }


def _described(key: str, entry: Any) -> str:
    shape = getattr(entry, "global_shape", None)
    shape = tuple(entry.data.shape) if shape is None else shape
    parts = ["" if entry.key == key else entry.key, str(list(shape))]
    offset = getattr(entry, "global_offset", ())
    parts += [f"at {list(offset)}"] if any(offset) else []
    parts += [] if set(entry.replica_id) == {0} else [f"replica {entry.replica_id}"]
    parts += ["any rows"] if getattr(entry, "allow_shape_mismatch", False) else []
    return " ".join([*filter(None, parts), type(entry).__name__.removeprefix("Sharded")])


def main() -> None:
    """Print the names of all models."""
    from tests.processes import join_megatron

    join_megatron()
    print(json.dumps({name: checkpoint_names(name) for name in MODELS}, indent=0))


if __name__ == "__main__":
    main()
