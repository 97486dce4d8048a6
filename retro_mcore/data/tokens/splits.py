"""Assign documents to the training, validation and test splits."""

from __future__ import annotations

from retro_mcore.errors import ConfigurationError
from retro_mcore.project.config import SPLITS, Split
from retro_mcore.project.fields import percentages_of


def parse_split(split: str) -> tuple[float, float, float]:
    """Parse the percentages of training, validation and test documents.

    Raises:
        ConfigurationError: not three numbers that sum to 100, or the training part is empty.
    """
    percentages = percentages_of(split)
    if percentages is None:
        raise ConfigurationError(
            "--split",
            repr(split),
            "Give three percentages that sum to 100, the first above 0, such as 90,5,5",
        )
    return percentages


def document_ranges(split: str, num_documents: int) -> dict[Split, tuple[int, int]]:
    """Documents [start, end) of each split, rounded as in Megatron's dataset builder."""
    bounds, share = [0.0], [part / sum(parse_split(split)) for part in parse_split(split)]
    for part in share:
        bounds.append(bounds[-1] + part)
    edges = [round(bound * float(num_documents)) for bound in bounds]
    return {name: (edges[i], edges[i + 1]) for i, name in enumerate(SPLITS)}


def num_retrieved_documents(split: str, num_documents: int) -> int:
    """Number of leading documents that are retrieved from, rounded as in Megatron's Retro.

    One less than the training documents at most, which are rounded otherwise.
    """
    return int(float(split.split(",")[0]) / 100 * num_documents)


def check_documents(split: str, num_documents: int, where: object) -> None:
    """Reject a split that requests a part but gives it no document.

    The retrieval database takes the first floor(percentage · documents) documents, so it needs at
    least one, too.

    Raises:
        ConfigurationError: names the part and a split that works.
    """
    parts = parse_split(split)
    ranges = document_ranges(split, num_documents)
    for name, part in zip(SPLITS, parts, strict=True):
        start, end = ranges[name]
        empty = end <= start or (name == "train" and int(part / 100 * num_documents) == 0)
        if part and empty:
            raise ConfigurationError(
                "--split",
                f"{split!r} leaves no {name} documents of the {num_documents} in {where}",
                "Give more documents, or a split such as "
                + ("60,20,20" if num_documents >= 5 else "100,0,0"),
            )
