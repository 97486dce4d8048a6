"""Report of `preprocess_corpus`: what was tokenized, lost and repeated."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from retro_mcore.data.corpus.counts import read_counts, total
from retro_mcore.data.near_duplicates.dropping import OF_HELD_OUT, OF_TRAINING
from retro_mcore.data.tokens.layout import ends_and_padding
from retro_mcore.data.tokens.splits import document_ranges
from retro_mcore.data.tokens.token_file import TokenFile
from retro_mcore.project.config import SPLITS, ProjectConfig, Split
from retro_mcore.project.paths import ProjectPaths
from retro_mcore.samples.passes import SplitPasses
from retro_mcore.stages.preprocessing.near_duplicates import NearDuplicateCounts


@dataclass(frozen=True)
class PreprocessCorpusReport:
    """Result of `preprocess_corpus`.

    Attributes:
        config: Configuration that was written to config.json.
        num_documents: Documents of all datasets.
        num_tokens: Tokens of all datasets.
        vocab_size: Token ids of the tokenizer.
        reused: Whether all datasets existed already.
        report: Counts of what was read, dropped, replaced and repeated; see docs/data_formats.md.
        passes: Samples of each split, and how often they repeat its documents.
        tokenizer_type: Type of the tokenizer.
        eod_id: Token that ends every document.
        eod_token: Its text.
        bos_id: Token that begins every document; None if there is none.
        bos_token: Its text.
    """

    config: ProjectConfig
    num_documents: int
    num_tokens: int
    vocab_size: int
    reused: bool
    report: dict[str, Any] = field(default_factory=dict)
    passes: tuple[SplitPasses, ...] = ()
    tokenizer_type: str = ""
    eod_id: int = 0
    eod_token: str = ""
    bos_id: int | None = None
    bos_token: str | None = None


def count_all(
    paths: ProjectPaths,
    prefixes: Sequence[str],
    datasets: Sequence[TokenFile],
    passes: Sequence[SplitPasses],
    padding: Mapping[Split, int],
    near: NearDuplicateCounts | None = None,
) -> dict[str, Any]:
    """Counts of all datasets together, of each dataset, and of the samples of each split.

    Args:
        paths: The project.
        prefixes: Name of each dataset.
        datasets: Tokens of each dataset.
        passes: Samples of each split.
        padding: Tokens of padding in each split; empty if documents are not padded.
        near: Near-duplicates of each dataset and split; None if they are not searched.

    Raises:
        CorruptFileError: a file of counts is damaged.
    """
    found: Sequence[dict[str, int]] = [{}] * len(datasets) if near is None else near.datasets
    each = {
        prefix: {
            **read_counts(paths.data / prefix),
            "documents": len(dataset),
            "tokens": len(dataset.tokens),
            **of_dataset,
        }
        for prefix, dataset, of_dataset in zip(prefixes, datasets, found, strict=True)
    }
    summed = total(list(each.values()))
    # Only training documents are dropped.
    dropped = {name: summed[name] for name in (OF_HELD_OUT, OF_TRAINING) if name in summed}
    return {
        **summed,
        "splits": {
            split.name: {
                **split.report,
                **({"padding_tokens": padding[split.name]} if padding else {}),
                **(near.splits[split.name] if near is not None else {}),
                **(dropped if split.name == "train" else {}),
            }
            for split in passes
        },
        "datasets": each,
    }


def count_padding(
    datasets: Sequence[TokenFile], split: str, chunk_length: int, eod: int
) -> dict[Split, int]:
    """Tokens of padding in the documents of each split.

    Args:
        datasets: Datasets of padded documents.
        split: Percentages of training, validation and test documents.
        chunk_length: M.
        eod: Id of the end-of-document token.
    """
    padding: dict[Split, int] = dict.fromkeys(SPLITS, 0)
    for dataset in datasets:
        for name, (start, end) in document_ranges(split, len(dataset)).items():
            ends = ends_and_padding(dataset, start, end, chunk_length, eod)
            padding[name] += int((ends - 1).sum())
    return padding
