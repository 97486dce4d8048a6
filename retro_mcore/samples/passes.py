"""Count how often the samples of a split pass over its documents.

Samples are cut from the concatenated documents of their split, which are repeated as often as
needed. A split with few documents is therefore repeated silently, even within one sample.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from retro_mcore.data.tokens.splits import document_ranges
from retro_mcore.data.tokens.token_file import TokenSource
from retro_mcore.project.config import SPLITS, ProjectConfig, Split


@dataclass(frozen=True)
class SplitPasses:
    """The documents and samples of one split.

    Attributes:
        name: The split.
        datasets: Names of the datasets.
        documents: Number of documents of each dataset.
        tokens: Number of tokens of each dataset.
        weights: Share of each dataset in the samples; 0 for datasets without documents.
        samples: Number of samples that training or evaluation requests; 0 without documents.
        samples_at_once: Number of samples in one evaluation; all samples for the training split.
        sample_length: S.
    """

    name: Split
    datasets: tuple[str, ...]
    documents: tuple[int, ...]
    tokens: tuple[int, ...]
    weights: tuple[float, ...]
    samples: int
    samples_at_once: int
    sample_length: int

    @property
    def passes(self) -> float:
        """Number of passes of all samples over the split (0 without samples)."""
        return self.samples * self.sample_length / max(sum(self.tokens), 1)

    @property
    def passes_by_dataset(self) -> dict[str, float]:
        """Number of passes over each dataset that has documents in the split."""
        return {
            name: share * self.samples * self.sample_length / tokens
            for name, share, tokens in zip(self.datasets, self.weights, self.tokens, strict=True)
            if tokens
        }

    @property
    def most_passes_at_once(self) -> float:
        """Number of passes of one evaluation over the dataset that it repeats most."""
        at_once = self.samples_at_once / max(self.samples, 1)
        return at_once * max(self.passes_by_dataset.values(), default=0.0)

    @property
    def unread(self) -> list[str]:
        """Names of datasets whose weight is too small for a single sample."""
        if not self.samples:
            return []
        shares = zip(self.datasets, self.weights, self.tokens, strict=True)
        return [name for name, share, tokens in shares if tokens and share * self.samples < 0.5]

    @property
    def most_repeated_in_a_sample(self) -> float:
        """Sample length over the tokens of the smallest dataset; above 1, samples repeat it."""
        return max((self.sample_length / tokens for tokens in self.tokens if tokens), default=0.0)

    @property
    def samples_text(self) -> str:
        """`train 160 (1 pass)`, `test 0 (no documents)`."""
        if not self.samples:
            reason = "no documents" if not sum(self.documents) else "none asked for"
            return f"{self.name} 0 ({reason})"
        return f"{self.name} {self.samples} ({_times(self.passes)} over {sum(self.tokens)} tokens)"

    @property
    def warning(self) -> str:
        """Warning about datasets that are never read, or repeated in a sample or an evaluation."""
        if not self.samples:
            return ""
        if self.unread:
            return f"no sample is cut from {', '.join(self.unread)}; give it a larger weight"
        if self.most_repeated_in_a_sample > 1:
            return (
                f"a dataset's documents stand {self.most_repeated_in_a_sample:.3g} times in one "
                f"sample of {self.sample_length} tokens; give it more documents"
            )
        if self.name != "train" and self.most_passes_at_once > 1:
            return (
                f"one evaluation reads a dataset's documents {self.most_passes_at_once:.3g} times; "
                "lower --eval-iters, or give it more documents"
            )
        return ""

    @property
    def report(self) -> dict[str, Any]:
        """Counts for the stage's record."""
        return {
            "documents": sum(self.documents),
            "tokens": sum(self.tokens),
            "samples": self.samples,
            "passes": round(self.passes, 6),
            "passes_per_evaluation": round(self.most_passes_at_once, 6),
            "repeats_in_a_sample": round(self.most_repeated_in_a_sample, 6),
            "passes_by_dataset": {
                name: round(passes, 6) for name, passes in self.passes_by_dataset.items()
            },
        }


def _times(passes: float) -> str:
    text = f"{passes:.3g}"
    return f"{text} pass" if text == "1" else f"{text} passes"


def count_passes(config: ProjectConfig, datasets: Sequence[TokenSource]) -> list[SplitPasses]:
    """Count each split's documents and samples.

    Args:
        config: The project's configuration.
        datasets: Its datasets, in the order of `retro_gpt_data_path`.
    """
    given = np.array(config.blend[0])
    ranges = [document_ranges(config.retro_gpt_split, len(each.lengths)) for each in datasets]
    passes = []
    for split in SPLITS:
        bounds = [each[split] for each in ranges]
        documents = tuple(end - start for start, end in bounds)
        tokens = tuple(
            int(each.lengths[start:end].sum(dtype=np.int64))
            for each, (start, end) in zip(datasets, bounds, strict=True)
        )
        shares = given * (np.array(documents) > 0)
        samples = config.num_samples(split) if sum(documents) else 0
        at_once = samples if split == "train" else min(samples, config.num_test_samples)
        weights = tuple((shares / (shares.sum() or 1.0)).tolist())
        passes.append(
            SplitPasses(
                name=split,
                datasets=tuple(config.blend[1]),
                documents=documents,
                tokens=tokens,
                weights=weights,
                samples=samples,
                samples_at_once=at_once,
                sample_length=config.retro_gpt_seq_length,
            )
        )
    return passes
