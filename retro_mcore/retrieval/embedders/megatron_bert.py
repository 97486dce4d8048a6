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

from retro_mcore.checkpoint.checksums import CHECKSUMS_FILE, verify_checkpoint
from retro_mcore.checkpoint.contents import is_torch_dist, read_common
from retro_mcore.checkpoint.tracker import tracked_checkpoint
from retro_mcore.errors import CheckpointError, TokenizerError
from retro_mcore.platform import setup_device
from retro_mcore.retrieval.bert_tokens import default_bert_vocab, load_word_piece
from retro_mcore.retrieval.embedders.base import Embedder, Encoder, Pooling


def find_bert_checkpoint(name: str) -> Path | None:
    """The checkpoint in a folder, directly or through its tracker file; None if there is none.

    Raises:
        CheckpointError: the tracker file names no checkpoint.
    """
    folder = Path(name)
    if is_torch_dist(folder):
        return folder
    return tracked_checkpoint(folder)


class MegatronBertEmbedder(Encoder):
    """A BertModel of megatron-core, rebuilt from a torch_dist checkpoint and its arguments.

    Every rank holds the whole model on its own device. All ranks must build it together.

    Args:
        name: Folder of the checkpoint, or of its tracker file. Its `vocab.txt` is used for the
            tokenizer; without one, that of the installed MiniLM package, which is
            BERT-base-uncased's.
        batch_size: Texts per forward pass.
        device: "cpu", "cuda" …; None: CUDA if available.
        pooling: "mean" (default), or "cls": the first hidden state.

    Raises:
        CheckpointError: it cannot be read, or belongs to another model.
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

        self.name, self.batch_size = name, batch_size
        self._pooling: Pooling = pooling or "mean"
        checkpoint = find_bert_checkpoint(name)
        assert checkpoint is not None
        self._device = setup_device("cpu" if device == "cpu" else "auto")
        arguments = vars(read_common(checkpoint).get("args") or _no_arguments(checkpoint))
        verify_checkpoint(checkpoint)
        from retro_mcore.retrieval.embedders import megatron_bert_model as bert

        bert.join_megatron()
        self._hidden_states = bert.hidden_states
        self._model = bert.load_bert(checkpoint, arguments).to(self._device).eval()
        self.dimension = int(arguments["hidden_size"])
        own = [folder / "vocab.txt" for folder in (checkpoint, checkpoint.parent)]
        vocab = next((file for file in own if file.is_file()), None) or default_bert_vocab()
        self.files = {"model": [*_files_of(checkpoint), Path(vocab)]}
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

    def bfloat16(self) -> None:
        """Compute in bfloat16; hidden states are pooled in single precision."""
        self._model.bfloat16()

    def full(self) -> None:
        """Compute in single precision again."""
        self._model.float()

    def count_tokens(self, texts: Sequence[str]) -> np.ndarray | None:
        return np.array([len(row) for row in self._counter.encode_batch(list(texts))], np.int64)

    @torch.inference_mode()
    def embed_batch(self, texts: list[str]) -> np.ndarray:
        encoded = self._tokenizer.encode_batch(texts)
        ids = torch.tensor([row.ids for row in encoded], device=self._device)
        mask = torch.tensor([row.attention_mask for row in encoded], device=self._device)
        hidden = self._hidden_states(self._model, ids, mask).float()  # [texts, tokens, D]
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


def _files_of(checkpoint: Path) -> list[Path]:
    return [file for file in checkpoint.iterdir() if file.is_file() and file.name != CHECKSUMS_FILE]


def _no_arguments(checkpoint: Path) -> Any:
    raise CheckpointError(checkpoint, "holds no arguments", "Name a checkpoint of pretrain_bert.py")
