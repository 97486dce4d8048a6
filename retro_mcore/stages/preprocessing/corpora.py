"""Inputs of `preprocess_corpus`: their names, digests, texts and tokens."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from retro_mcore.data.corpus.documents import read_documents, text_cleaner
from retro_mcore.data.corpus.sources import digest_inputs, name_datasets
from retro_mcore.data.tokenizers.loading import Tokenizer
from retro_mcore.data.tokens.token_input import find_token_input
from retro_mcore.data.tokens.tokenizing import CorpusReader, empty_corpus, make_dataset
from retro_mcore.stages.preprocessing.config import PreprocessCorpusConfig


@dataclass(frozen=True)
class Corpora:
    """All inputs, in the given order.

    Attributes:
        sources: Path of each.
        prefixes: Name of each input's dataset.
        reader: How text is read.
    """

    sources: tuple[Path, ...]
    prefixes: tuple[str, ...]
    reader: CorpusReader

    @classmethod
    def of(cls, config: PreprocessCorpusConfig) -> Corpora:
        """Inputs of a configuration.

        Raises:
            MissingDependencyError: `clean_text` without ftfy.
        """
        cleaner = text_cleaner() if config.clean_text else None
        sources = tuple(Path(source) for source in config.input)
        prefixes = tuple(name_datasets(sources, config.json_keys))
        return cls(sources, prefixes, CorpusReader(config.json_keys, config.id_key, cleaner))

    def digests(self, recorded: Mapping[str, str]) -> dict[str, str]:
        """Digest of each input; see `digest_inputs`.

        Raises:
            CorpusError: an input is missing or cannot be read.
        """
        return digest_inputs(self.sources, recorded)

    def given_tokens(self) -> dict[Path, Path]:
        """Inputs that are already tokenized: source to the path of its .bin and .idx."""
        found = {source: find_token_input(source) for source in self.sources}
        return {source: prefix for source, prefix in found.items() if prefix is not None}

    def texts(self) -> Iterator[str]:
        """Texts of all documents.

        Raises:
            CorpusError: an input is malformed or holds no text.
        """
        for source in self.sources:
            found = False
            for document in read_documents(source, self.reader.json_keys, self.reader.cleaner):
                found = True
                yield document.text
            if not found:
                raise empty_corpus(source)

    def tokenize(self, folder: Path, tokenizer: Tokenizer, fingerprint: str, multiple: int) -> bool:
        """Write the dataset of each input, on all ranks; returns whether all existed already.

        Args:
            folder: Folder of the datasets.
            tokenizer: The project's tokenizer.
            fingerprint: Fingerprint of the inputs and the options.
            multiple: Documents are padded to a multiple of this number of tokens.

        Raises:
            CorpusError: an input is missing, empty or malformed.
            TokenizerError: given tokens do not match the tokenizer.
        """
        made = [
            make_dataset(source, folder / prefix, tokenizer, self.reader, fingerprint, multiple)
            for source, prefix in zip(self.sources, self.prefixes, strict=True)
        ]
        return all(shards is None for shards in made)
