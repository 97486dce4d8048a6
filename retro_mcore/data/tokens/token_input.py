"""Already tokenized corpora: Megatron .bin and .idx files as input."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from retro_mcore.data.tokenizers.loading import Tokenizer
from retro_mcore.data.tokens.document_ids import ids_path
from retro_mcore.data.tokens.token_file import TokenFile, bin_path, idx_path
from retro_mcore.errors import CorpusError, CorruptFileError, TokenizerError
from retro_mcore.project.markers import link_or_copy

#: Tokens checked in one call.
_BATCH = 1 << 24


def find_token_input(source: Path) -> Path | None:
    """The prefix of the .bin and .idx pair that `source` names; None if it is something else.

    Args:
        source: Either file, or their common path without an ending.

    Raises:
        CorpusError: one file of the pair is missing.
    """
    if source.is_dir():
        return None
    named = source.suffix in (".bin", ".idx")
    prefix = source.with_suffix("") if named else source
    files = bin_path(prefix), idx_path(prefix)
    if not named and (source.exists() or not any(file.is_file() for file in files)):
        return None
    for file in files:
        if not file.is_file():
            raise CorpusError(file, "no such file", "Give both files of an indexed dataset")
    return prefix


def check_token_input(prefix: Path, tokenizer: Tokenizer) -> None:
    """Reject tokens that do not fit `tokenizer`, or documents of more than one sequence.

    Raises:
        TokenizerError: an id is beyond the vocabulary, or documents lack its end-of-document token.
        CorpusError: a document is empty or has several sequences, or the files are damaged.
    """
    try:
        file = TokenFile(prefix)
    except CorruptFileError as error:
        raise CorpusError(error.subject, error.found, "Restore both files of the input") from error
    if file.num_documents != len(file):
        raise CorpusError(
            idx_path(prefix),
            f"{len(file)} sequences for {file.num_documents} documents",
            "Make it without --split-sentences: a document must be one sequence",
        )
    if not len(file) or file.lengths.min() <= 0:
        raise CorpusError(
            idx_path(prefix), "holds an empty document, or no document", "Create it again"
        )
    ends = file.starts + file.lengths
    if file.starts.min() < 0 or ends.max() > len(file.tokens):
        raise CorpusError(
            idx_path(prefix),
            f"places documents outside the {len(file.tokens)} tokens of {bin_path(prefix).name}",
            "Restore both files",
        )
    batches = [file.tokens[i : i + _BATCH] for i in range(0, len(file.tokens), _BATCH)]
    least = min(int(batch.min()) for batch in batches)
    if least < 0:
        raise CorpusError(bin_path(prefix), f"holds token id {least}", "Restore the file")
    largest = max(int(batch.max()) for batch in batches)
    if largest >= tokenizer.vocab_size:
        raise TokenizerError(
            bin_path(prefix),
            f"holds token id {largest}, but the tokenizer given has {tokenizer.vocab_size}",
            "Name the tokenizer that the tokens were made with",
        )
    open_ends = int(np.count_nonzero(file.tokens[ends - 1] != tokenizer.eod))
    if open_ends:
        raise TokenizerError(
            bin_path(prefix),
            f"{open_ends} of {len(file)} documents do not end with the tokenizer's end-of-document "
            f"token ({tokenizer.eod})",
            "Make them with --append-eod, or name the tokenizer that they were made with",
        )
    with_bos, number = count_bos(prefix, tokenizer)
    if tokenizer.adds_bos and with_bos < number:
        raise TokenizerError(
            bin_path(prefix),
            f"{number - with_bos} of {number} documents do not begin with BOS ({tokenizer.bos}), "
            "but those of the project do",
            "Create them with BOS, or the project without it: --add-bos-token False",
        )
    if with_bos and not tokenizer.adds_bos and tokenizer.bos != tokenizer.eod:
        raise TokenizerError(
            bin_path(prefix),
            f"{with_bos} of {number} documents begin with BOS ({tokenizer.bos}), and those of the "
            "project do not",
            "Create them without BOS",
        )


def count_bos(prefix: Path, tokenizer: Tokenizer) -> tuple[int, int]:
    """Number of documents that begin with the tokenizer's BOS, and of those with any text."""
    file = TokenFile(prefix)
    firsts = file.tokens[file.starts[file.lengths > 1]]  # a single token is the end of the document
    bos = -1 if tokenizer.bos is None else tokenizer.bos
    empty = 0 if bos == tokenizer.eod else _count_padded_ends(file, tokenizer.eod)
    return int(np.count_nonzero(firsts == bos)), len(firsts) - empty


def _count_padded_ends(file: TokenFile, eod: int) -> int:
    """Number of documents of several EODs and nothing else: padded, without text."""
    (numbers,) = np.nonzero((file.lengths > 1) & (file.tokens[file.starts] == eod))
    return sum(bool((file.sequence(number) == eod).all()) for number in numbers.tolist())


def begin_with_bos(prefixes: Sequence[Path], tokenizer: Tokenizer) -> bool:
    """Whether the documents of already tokenized corpora begin with BOS.

    Raises:
        TokenizerError: some do and others do not.
    """
    counts = np.array([count_bos(prefix, tokenizer) for prefix in prefixes])
    with_bos, number = counts.sum(0).tolist()
    if with_bos not in (0, number):
        place = int(np.argmax(counts[:, 0] < counts[:, 1]))
        raise TokenizerError(
            bin_path(prefixes[place]),
            f"{counts[place, 1] - counts[place, 0]} of {counts[place, 1]} documents do not begin "
            f"with BOS ({tokenizer.bos}), and {with_bos} of all documents given do",
            "Give tokens that were all created in the same way",
        )
    return with_bos > 0


def take_token_input(prefix: Path, target: Path, fingerprint: str) -> None:
    """Hard-link the pair to `target` (a prefix), or copy it across file systems.

    Document ids are included if the pair has them.
    """
    given = (*([ids_path] if ids_path(prefix).is_file() else []), bin_path, idx_path)
    for path in given:
        link_or_copy(path(prefix), path(target), fingerprint)
