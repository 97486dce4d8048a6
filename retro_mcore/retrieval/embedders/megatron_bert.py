"""Megatron-Core BERT checkpoints (torch_dist) as embedders.

Megatron's own pooling: the mean of the last hidden states of a text's tokens, without [CLS] and
[SEP] (its `BertModel(return_embeddings=True)`); zero for a text without tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from retro_mcore import distributed
from retro_mcore.checkpoint.checksums import verify_checkpoint
from retro_mcore.checkpoint.contents import (
    check_files,
    is_torch_dist,
    read_common,
    read_metadata,
)
from retro_mcore.checkpoint.safe_loading import load_run_state
from retro_mcore.checkpoint.tracker import tracked_checkpoint
from retro_mcore.errors import CheckpointError, ConfigurationError, TokenizerError
from retro_mcore.platform import distributed_backend, setup_device
from retro_mcore.retrieval.bert_tokens import default_bert_vocab, load_word_piece
from retro_mcore.retrieval.embedders.base import Embedder, Pooling, embed_by_length

#: Prefixes of the parameters that are loaded; the output layer is not needed.
_PARTS = ("embedding.", "encoder.", "rotary_pos_emb.")


def find_bert_checkpoint(name: str) -> Path | None:
    """The checkpoint in a folder, directly or through its tracker file; None if there is none.

    Raises:
        CheckpointError: the tracker file names no checkpoint.
    """
    folder = Path(name)
    if is_torch_dist(folder):
        return folder
    return tracked_checkpoint(folder)


class MegatronBertEmbedder(Embedder):
    """A BertModel of megatron-core, rebuilt from a torch_dist checkpoint and its arguments.

    Every rank holds the whole model on its own device. All ranks must build it together.

    Args:
        name: Folder of the checkpoint, or of its tracker file. Its `vocab.txt` is the tokenizer's;
            without one, the installed MiniLM package's is, which is BERT-base-uncased's.
        batch_size: Texts per forward pass.
        device: "cpu", "cuda" …; None: CUDA if available.
        pooling: "mean" (default), or "cls": the first hidden state.

    Raises:
        CheckpointError: it cannot be read, or is of another model.
        ConfigurationError: megatron-core runs with tensor or pipeline parallelism.
    """

    def __init__(
        self,
        name: str,
        batch_size: int = 16,
        device: str | None = None,
        pooling: Pooling | None = None,
    ) -> None:
        from tokenizers import Tokenizer

        self.name, self._batch_size = name, batch_size
        self._pooling: Pooling = pooling or "mean"
        checkpoint = find_bert_checkpoint(name)
        assert checkpoint is not None
        self._device = setup_device("cpu" if device == "cpu" else "auto")
        arguments = vars(read_common(checkpoint).get("args") or _no_arguments(checkpoint))
        verify_checkpoint(checkpoint)
        _join_megatron()
        self._model = _load(checkpoint, arguments).to(self._device).eval()
        self.dimension = int(arguments["hidden_size"])
        own = [folder / "vocab.txt" for folder in (checkpoint, checkpoint.parent)]
        vocab = next((file for file in own if file.is_file()), None) or default_bert_vocab()
        cased = arguments.get("tokenizer_type") == "BertWordPieceCase"
        try:
            self._tokenizer = load_word_piece(vocab, not cased)
        except TokenizerError as error:
            raise CheckpointError(vocab, error.found, "Put BERT's vocab.txt there") from error
        if self._tokenizer.get_vocab_size() > int(arguments["padded_vocab_size"]):
            raise CheckpointError(
                vocab,
                f"has {self._tokenizer.get_vocab_size()} tokens, the model "
                f"{arguments['padded_vocab_size']}",
                "Put the model's own vocab.txt into the checkpoint's folder",
            )
        # A copy that neither cuts nor pads.
        self._counter = Tokenizer.from_str(self._tokenizer.to_str())
        self.max_tokens = int(arguments["max_position_embeddings"])
        self._tokenizer.enable_truncation(self.max_tokens)
        self._tokenizer.enable_padding()

    def half(self) -> None:
        """Compute in half precision."""
        self._model.half()

    def full(self) -> None:
        """Compute in single precision again."""
        self._model.float()

    def count_tokens(self, texts: Sequence[str]) -> np.ndarray | None:
        return np.array([len(row) for row in self._counter.encode_batch(list(texts))], np.int64)

    def embed(self, texts: Any) -> np.ndarray:
        return embed_by_length(texts, self._batch_size, self.dimension, self._embed_batch)

    @torch.inference_mode()
    def _embed_batch(self, texts: list[str]) -> np.ndarray:
        encoded = self._tokenizer.encode_batch(texts)
        ids = torch.tensor([row.ids for row in encoded], device=self._device)
        mask = torch.tensor([row.attention_mask for row in encoded], device=self._device)
        hidden = _hidden_states(self._model, ids, mask).float()  # [texts, tokens, D]
        if self._pooling == "cls":
            return hidden[:, 0].cpu().numpy()
        position = torch.arange(ids.shape[1], device=self._device)
        words = (position > 0) & (position < mask.sum(1, keepdim=True) - 1)
        total = (hidden * words[..., None]).sum(1)
        return (total / words.sum(1, keepdim=True).clamp(min=1)).cpu().numpy()


def is_of_kind(name: str) -> bool:
    """Whether a name is the folder of a checkpoint; see `retrieval.embedders`."""
    return find_bert_checkpoint(name) is not None


def build(name: str, batch_size: int, device: str | None, pooling: Pooling | None) -> Embedder:
    """The embedder of a checkpoint's folder; see `retrieval.embedders`."""
    return MegatronBertEmbedder(name, batch_size, device, pooling)


def _no_arguments(checkpoint: Path) -> Any:
    raise CheckpointError(checkpoint, "holds no arguments", "Name a checkpoint of pretrain_bert.py")


def _join_megatron() -> None:
    """Initialize Megatron with the whole model on every rank."""
    from megatron.core import parallel_state

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


def _load(checkpoint: Path, arguments: dict[str, Any]) -> Any:
    from retro_mcore.platform.torch_checkpoints import load_sharded_state

    metadata = read_metadata(checkpoint)
    check_files(checkpoint, metadata)
    model = _build(checkpoint, arguments)
    request = {
        key: value for key, value in model.sharded_state_dict().items() if key.startswith(_PARTS)
    }
    state = load_sharded_state({"model": request}, checkpoint, load_run_state)
    missing, unexpected = model.load_state_dict(state["model"], strict=False)
    missing = [key for key in missing if key.startswith(_PARTS) and "_extra_state" not in key]
    if missing or unexpected:
        raise CheckpointError(
            checkpoint, f"lacks {missing or unexpected}", "Name a checkpoint of pretrain_bert.py"
        )
    return model


def _build(checkpoint: Path, arguments: dict[str, Any]) -> Any:
    from megatron.core.models.bert import bert_layer_specs
    from megatron.core.models.bert.bert_model import BertModel
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
    from megatron.core.transformer.transformer_config import TransformerConfig

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


def _hidden_states(model: Any, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """The last hidden states, [texts, tokens, D]: BertModel.forward up to its output layer."""
    types = torch.zeros_like(ids) if model.embedding.num_tokentypes else None
    hidden = model.embedding(ids, model.bert_position_ids(ids), tokentype_ids=types)
    rotary = None
    if model.position_embedding_type == "rope":
        rotary = model.rotary_pos_emb(ids.shape[1])
    extended = model.bert_extended_attention_mask(mask)
    return model.encoder(hidden, extended, rotary_pos_emb=rotary).transpose(0, 1)
