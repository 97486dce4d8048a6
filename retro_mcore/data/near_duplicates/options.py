"""How a project's near-duplicates are searched and treated."""

from __future__ import annotations

from dataclasses import dataclass

from retro_mcore.data.near_duplicates.search import NearDuplicateSearch
from retro_mcore.data.tokenizers.base import Tokenizer
from retro_mcore.project.config import NearDuplicateMode, ProjectSettings

#: Threshold of NeMo Curator and SlimPajama, and words per shingle of datatrove and text-dedup.
_THRESHOLD, _WORDS = 0.8, 5
#: Below it, 128 hashes cannot find nearly all pairs with few false candidates.
LEAST_THRESHOLD = 0.1


@dataclass(frozen=True)
class NearDuplicates:
    """Options of near-duplicates.

    Attributes:
        mode: What is done with them; see `PreprocessCorpusConfig.near_duplicates`.
        threshold: Least Jaccard similarity.
        words: Words per shingle.
    """

    mode: NearDuplicateMode
    threshold: float
    words: int

    @classmethod
    def of(
        cls, mode: NearDuplicateMode, threshold: float | None, words: int | None
    ) -> NearDuplicates:
        """Options with defaults for what is None."""
        return cls(
            mode, _THRESHOLD if threshold is None else threshold, _WORDS if words is None else words
        )

    @classmethod
    def recorded(cls, settings: ProjectSettings) -> NearDuplicates:
        """Options of a project."""
        threshold, words = settings.near_duplicate_threshold, settings.near_duplicate_words
        return cls.of(settings.near_duplicates, threshold, words)

    @property
    def are_searched(self) -> bool:
        """Whether near-duplicates are searched at all."""
        return self.mode != "keep"

    @property
    def are_dropped(self) -> bool:
        """Whether documents are dropped."""
        return self.mode in ("decontaminate", "drop")

    @property
    def first_survives(self) -> bool:
        """Whether near-duplicates of training documents are dropped, too."""
        return self.mode == "drop"

    def search(self, tokenizer: Tokenizer) -> NearDuplicateSearch:
        """The search for them."""
        return NearDuplicateSearch(tokenizer, self.threshold, self.words)

    def __str__(self) -> str:
        return (
            f"{self.mode}; Jaccard similarity {self.threshold:g} or more of sequences of "
            f"{self.words} words"
        )
