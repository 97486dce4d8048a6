"""Flags that keep the documents of a sample apart."""

from __future__ import annotations

from dataclasses import dataclass

from retro_mcore.errors import ConfigurationError


@dataclass(kw_only=True)
class DocumentOptions:
    """How the documents of a sample are kept apart, with Megatron's names and meaning."""

    reset_position_ids: bool = False
    """Restart positions at every document of a sample."""
    reset_attention_mask: bool = False
    """Keep the documents of a sample apart: no token attends to another document, nor reads
    neighbors that were retrieved with tokens of another one."""
    eod_mask_loss: bool = False
    """Leave predictions from end-of-document tokens out of the loss. In an aligned project they
    never count."""

    def check_documents(self, position_embedding_type: str) -> None:
        """Reject positions that restart without effect.

        Raises:
            ConfigurationError: naming --reset-position-ids.
        """
        rotary = position_embedding_type == "rope"
        if self.reset_position_ids and rotary and not self.reset_attention_mask:
            raise ConfigurationError(
                "--reset-position-ids",
                "given with rotary positions, whose distances it does not change",
                "Add --reset-attention-mask, or leave it out",
            )
