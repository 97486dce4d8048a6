"""Megatron-Core's BERT: loaded from a checkpoint, and its last hidden states."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.models.bert import bert_layer_specs
from megatron.core.models.bert.bert_model import BertModel
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
from megatron.core.transformer.transformer_config import TransformerConfig

from retro_mcore import distributed
from retro_mcore.checkpoint.contents import check_files, read_metadata
from retro_mcore.checkpoint.safe_loading import load_run_state
from retro_mcore.errors import CheckpointError, ConfigurationError
from retro_mcore.platform import distributed_backend
from retro_mcore.platform.torch_checkpoints import load_sharded_state

#: Prefixes of the parameters that are loaded; the output layer is not needed.
_PARTS = ("embedding.", "encoder.", "rotary_pos_emb.")


def join_megatron() -> None:
    """Initialize Megatron with the whole model on every rank.

    Raises:
        ConfigurationError: it is initialized with tensor or pipeline parallelism.
    """
    distributed.initialize(distributed_backend())
    if not parallel_state.model_parallel_is_initialized():
        parallel_state.initialize_model_parallel()
    sizes = (
        parallel_state.get_tensor_model_parallel_world_size(),
        parallel_state.get_pipeline_model_parallel_world_size(),
    )
    if sizes != (1, 1):
        raise ConfigurationError(
            "--embedder",
            f"a Megatron BERT with tensor parallel size {sizes[0]}, pipeline {sizes[1]}",
            "Run one process per model, or use another embedder",
        )


def load_bert(checkpoint: Path, arguments: dict[str, Any]) -> BertModel:
    """Build the model that a checkpoint's arguments describe, with the checkpoint's weights.

    Raises:
        CheckpointError: it is damaged, or belongs to another model.
    """
    metadata = read_metadata(checkpoint)
    check_files(checkpoint, metadata)
    model = _build(checkpoint, arguments)
    # Without extra states: which there are depends on the kind of layers, and they hold no weights.
    request = {
        key: value
        for key, value in model.sharded_state_dict().items()
        if key.startswith(_PARTS) and not key.endswith("_extra_state")
    }
    state = load_sharded_state({"model": request}, checkpoint, load_run_state)
    missing, unexpected = model.load_state_dict(state["model"], strict=False)
    missing = [key for key in missing if key.startswith(_PARTS) and "_extra_state" not in key]
    if missing or unexpected:
        raise CheckpointError(
            checkpoint, f"lacks {missing or unexpected}", "Name a checkpoint of pretrain_bert.py"
        )
    return model


def _build(checkpoint: Path, arguments: dict[str, Any]) -> BertModel:
    model_parallel_cuda_manual_seed(1)
    try:
        config = TransformerConfig(
            num_layers=arguments["num_layers"],
            hidden_size=arguments["hidden_size"],
            num_attention_heads=arguments["num_attention_heads"],
            ffn_hidden_size=arguments["ffn_hidden_size"],
            kv_channels=arguments.get("kv_channels"),
            normalization=arguments.get("normalization") or "LayerNorm",
            layernorm_epsilon=arguments.get("norm_epsilon") or 1e-5,
            apply_residual_connection_post_layernorm=bool(
                arguments.get("apply_residual_connection_post_layernorm")
            ),
            hidden_dropout=0.0,
            attention_dropout=0.0,
            use_cpu_initialization=True,
            gradient_accumulation_fusion=False,
        )
        spec = (
            bert_layer_specs.get_bert_layer_with_transformer_engine_spec()
            if bert_layer_specs.HAVE_TE and torch.cuda.is_available()
            else bert_layer_specs.bert_layer_local_spec
        )
        return BertModel(
            config,
            num_tokentypes=2 if arguments.get("bert_binary_head", True) else 0,
            transformer_layer_spec=spec,
            vocab_size=arguments["padded_vocab_size"],
            max_sequence_length=arguments["max_position_embeddings"],
            add_binary_head=False,
            position_embedding_type=arguments.get("position_embedding_type", "learned_absolute"),
            rotary_percent=arguments.get("rotary_percent", 1.0),
        )
    except KeyError as error:
        raise CheckpointError(
            checkpoint, f"its arguments lack {error}", "Name a checkpoint of pretrain_bert.py"
        ) from error


def hidden_states(model: BertModel, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """The last hidden states, [texts, tokens, D]: BertModel.forward up to its output layer."""
    types = torch.zeros_like(ids) if model.embedding.num_tokentypes else None
    hidden = model.embedding(ids, model.bert_position_ids(ids), tokentype_ids=types)
    rotary = None
    if model.position_embedding_type == "rope":
        rotary = model.rotary_pos_emb(ids.shape[1])
    extended = model.bert_extended_attention_mask(mask)
    return model.encoder(hidden, extended, rotary_pos_emb=rotary).transpose(0, 1)
