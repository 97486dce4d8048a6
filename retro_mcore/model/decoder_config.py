"""Configuration of the decoder without retrieval."""

from __future__ import annotations

from dataclasses import dataclass

from megatron.core.transformer import TransformerConfig

from retro_mcore.errors import raise_problems
from retro_mcore.model.family_options import FamilyOptions, problems_of_family


@dataclass
class DecoderConfig(FamilyOptions, TransformerConfig):
    """Megatron's TransformerConfig with the options in which families differ.

    Raises:
        ConfigurationError: a value cannot work; the message names the field.
    """

    def __post_init__(self) -> None:
        """Validate, after Megatron's own checks."""
        super().__post_init__()
        raise_problems([*problems_of_family(self, self.num_layers)])
