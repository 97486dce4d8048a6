"""Set up a project's tokenizer: copy or train its files, and choose its special tokens."""

from __future__ import annotations

import itertools
import shutil
from dataclasses import dataclass
from pathlib import Path

from retro_mcore.data.tokenizers.gguf import read_gguf_tokenizer, unpacked_tokenizer
from retro_mcore.data.tokenizers.loading import (
    GPTSentencePieceTokenizer,
    SpecialTokenChoice,
    Tokenizer,
    build_tokenizer,
    recorded_choice,
    train_sentencepiece,
)
from retro_mcore.data.tokenizers.special_tokens import KEPT_FILES, DeclaredTokens
from retro_mcore.data.tokenizers.training import first_characters
from retro_mcore.data.tokens.token_file import bin_path
from retro_mcore.data.tokens.token_input import begin_with_bos
from retro_mcore.distributed import barrier, get_rank, raise_together
from retro_mcore.errors import TokenizerError, flag_of
from retro_mcore.gguf_file import is_gguf
from retro_mcore.project.markers import (
    FileState,
    checksum,
    fingerprint_of,
    signed_write,
    state_of,
)
from retro_mcore.project.paths import ProjectPaths
from retro_mcore.retrieval.bert_tokens import default_bert_vocab
from retro_mcore.stages.preprocessing.config import PreprocessCorpusConfig
from retro_mcore.stages.preprocessing.corpora import Corpora


@dataclass(frozen=True)
class TokenizerFiles:
    """Files of the tokenizers, relative to the project; None where the type has none."""

    type: str
    model: str | None
    vocab: str | None
    merges: str | None
    bert: str


def special_token_choice(
    config: PreprocessCorpusConfig, paths: ProjectPaths, stage: str
) -> SpecialTokenChoice:
    """Requested special tokens; the recorded ones if the stage has finished before."""
    if paths.stage_record(stage).is_file() and paths.settings.is_file():
        return recorded_choice(paths)
    return SpecialTokenChoice(config.eod_token, config.bos_token, config.add_bos_token)


def tokenizer_digests(config: PreprocessCorpusConfig, choice: SpecialTokenChoice) -> dict[str, str]:
    """Digest of each given tokenizer file, by flag.

    Raises:
        TokenizerError: a file is missing.
    """
    digests = {}
    for flag in ("tokenizer_model", "vocab_file", "merge_file"):
        if (value := getattr(config, flag)) is not None:
            file = _file_of(value)
            digests[flag_of(flag)] = _gguf_digest(file) if is_gguf(file) else checksum(file)
    digests["--bert-vocab-file"] = checksum(_bert_vocab(config))
    given = config.tokenizer_model or config.vocab_file
    if given is not None and not is_gguf(given) and not choice.first_known_eod:
        declared = DeclaredTokens.read(_file_of(given).parent)
        if declared:
            digests["special tokens of the tokenizer's directory"] = declared.digest
    return digests


def require_tokenizer(config: PreprocessCorpusConfig, corpora: Corpora) -> None:
    """Reject tokens that come without the tokenizer that made them.

    Raises:
        TokenizerError: an input holds tokens, and no tokenizer is given.
    """
    if not config.trains_tokenizer:
        return
    for source in corpora.given_tokens():
        raise TokenizerError(
            f"--input {source}",
            "holds tokens, and no tokenizer is given",
            "Name the one that they were made with: --tokenizer-type, --tokenizer-model",
        )


@dataclass(frozen=True)
class TokenizerSetup:
    """Sets up the tokenizers of a project.

    Attributes:
        config: Configuration of the stage.
        paths: The project.
        corpora: Inputs, which train a tokenizer if none is given.
        choice: Special tokens.
        fingerprint: Fingerprint of the inputs of the tokens.
    """

    config: PreprocessCorpusConfig
    paths: ProjectPaths
    corpora: Corpora
    choice: SpecialTokenChoice
    fingerprint: str

    def prepare(self) -> tuple[Tokenizer, TokenizerFiles]:
        """Copy or train the tokenizers' files, then load the tokenizer; on all ranks.

        Raises:
            TokenizerError: the tokenizer cannot be loaded or trained, or does not match the given
                tokens.
            CorpusError: a corpus to train on is malformed.
        """
        with raise_together():
            files = self._install()
        barrier()
        with raise_together():
            model, vocab, merges = (
                self.paths.root / name if name else None
                for name in (files.model, files.vocab, files.merges)
            )
            tokenizer = build_tokenizer(files.type, model, vocab, merges, self.choice)
            self._follow_given_tokens(tokenizer)
        return tokenizer, files

    def _install(self) -> TokenizerFiles:
        """Write the files, on rank 0; all ranks return their names."""
        config = self.config
        kind = config.chosen_tokenizer_type()
        trains = kind == GPTSentencePieceTokenizer.name and config.tokenizer_model is None
        if not trains:  # a tokenizer that cannot be loaded is not copied
            self._try(kind)
        model = self._copy_given(config.tokenizer_model, declares=True)
        vocab = self._copy_given(config.vocab_file, declares=True)
        merges = self._copy_given(config.merge_file)
        bert = _bert_vocab(config)
        return TokenizerFiles(
            type=kind,
            model=self._train() if trains else model,
            vocab=vocab,
            merges=merges,
            bert=self._copy(bert, f"bert-{bert.name}"),
        )

    def _try(self, kind: str) -> None:
        config = self.config
        given = (config.vocab_file, config.merge_file, self.choice)
        if config.tokenizer_model is None or not is_gguf(config.tokenizer_model):
            build_tokenizer(kind, config.tokenizer_model, *given)
            return
        with unpacked_tokenizer(_file_of(config.tokenizer_model)) as file:
            build_tokenizer(kind, file, *given)

    def _copy_given(self, given: str | None, declares: bool = False) -> str | None:
        """Copy a tokenizer's file, and the files in its folder that declare special tokens."""
        if given is None:
            return None
        file = _file_of(given)
        if is_gguf(file):
            with unpacked_tokenizer(file) as unpacked:
                return self._copy_given(str(unpacked), declares)
        name = self._copy(file, file.name)
        if declares and not self.choice.first_known_eod:
            for declaring in KEPT_FILES:
                if (beside := file.with_name(declaring)).is_file():
                    self._copy(beside, declaring)
        return name

    def _copy(self, file: Path, name: str) -> str:
        target = self.paths.tokenizer / name
        if self._is_mine_to_write(target):
            with signed_write(target, self.fingerprint) as temporary:
                shutil.copyfile(file, temporary)
        return self.paths.relative(target)

    def _train(self) -> str:
        target = self.paths.tokenizer / "sentencepiece.model"
        if self._is_mine_to_write(target):
            first = itertools.islice(self.corpora.texts(), self.config.training_documents)
            with signed_write(target, self.fingerprint) as temporary:
                train_sentencepiece(
                    first_characters(first), self.config.trained_vocab_size, temporary
                )
        return self.paths.relative(target)

    def _is_mine_to_write(self, target: Path) -> bool:
        return get_rank() == 0 and state_of(target, self.fingerprint) is not FileState.COMPLETE

    def _follow_given_tokens(self, tokenizer: Tokenizer) -> None:
        """Let tokenized inputs determine whether the project's documents begin with BOS."""
        asked, given = self.config.add_bos_token, list(self.corpora.given_tokens().values())
        if not given or (self.choice.add_bos is not None and asked is not False):
            return
        begun = begin_with_bos(given, tokenizer)
        if begun and asked is False:
            raise TokenizerError(
                bin_path(given[0]),
                f"documents begin with BOS ({tokenizer.bos}), but --add-bos-token is False",
                "Leave --add-bos-token out, or create the tokens without BOS",
            )
        tokenizer.adds_bos = begun


def _bert_vocab(config: PreprocessCorpusConfig) -> Path:
    return _file_of(config.bert_vocab_file or default_bert_vocab())


def _gguf_digest(file: Path) -> str:
    """Digest of the tokenizer alone, as the weights beside it do not matter."""
    contents = read_gguf_tokenizer(file).contents
    return fingerprint_of({name: content.decode("latin-1") for name, content in contents.items()})


def _file_of(given: str | Path) -> Path:
    path = Path(given)
    file = path / "tokenizer.json" if path.is_dir() else path
    if not file.is_file():
        raise TokenizerError(file, "no such file", "Check the path")
    return file
