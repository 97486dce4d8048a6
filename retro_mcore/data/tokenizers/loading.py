"""Load a tokenizer from Megatron's flags, or the tokenizer of a project."""

from __future__ import annotations

from pathlib import Path

from retro_mcore.data.tokenizers.base import Tokenizer
from retro_mcore.data.tokenizers.fast import GPT2BPETokenizer, HuggingFaceTokenizer, bos_habit
from retro_mcore.data.tokenizers.sentencepiece import GPTSentencePieceTokenizer
from retro_mcore.data.tokenizers.special_tokens import SpecialTokenChoice
from retro_mcore.data.tokenizers.training import train_sentencepiece
from retro_mcore.errors import TokenizerError
from retro_mcore.project.config import ProjectConfig, ProjectSettings
from retro_mcore.project.markers import FileState, marker_path, state_of
from retro_mcore.project.paths import ProjectPaths

__all__ = [
    "TOKENIZER_TYPES",
    "GPT2BPETokenizer",
    "GPTSentencePieceTokenizer",
    "HuggingFaceTokenizer",
    "SpecialTokenChoice",
    "Tokenizer",
    "bos_habit",
    "build_tokenizer",
    "load_project_tokenizer",
    "recorded_choice",
    "train_sentencepiece",
]

TOKENIZER_TYPES = (
    GPTSentencePieceTokenizer.name,
    GPT2BPETokenizer.name,
    HuggingFaceTokenizer.name,
)


def build_tokenizer(
    tokenizer_type: str,
    model: Path | str | None = None,
    vocab_file: Path | str | None = None,
    merge_file: Path | str | None = None,
    choice: SpecialTokenChoice | None = None,
) -> Tokenizer:
    """Load a tokenizer from Megatron's flags.

    Args:
        tokenizer_type: One of `TOKENIZER_TYPES`.
        model: A SentencePiece model, or a tokenizer.json or its directory.
        vocab_file: GPT-2's vocab.json.
        merge_file: GPT-2's merges.txt.
        choice: Requested BOS and EOD; None: as declared by the tokenizer's files.

    Raises:
        TokenizerError: the type is unknown, a required flag is missing, a file is malformed, or
            the tokenizer does not declare which token ends a document.
    """
    if tokenizer_type == GPT2BPETokenizer.name:
        if vocab_file is None or merge_file is None:
            raise TokenizerError(
                "--vocab-file and --merge-file", "not both given", f"{tokenizer_type} needs them"
            )
        return GPT2BPETokenizer(vocab_file, merge_file, choice)
    if tokenizer_type not in TOKENIZER_TYPES:
        raise TokenizerError(
            "--tokenizer-type", repr(tokenizer_type), f"Choose one of {', '.join(TOKENIZER_TYPES)}"
        )
    if model is None:
        raise TokenizerError("--tokenizer-model", "not given", f"{tokenizer_type} needs it")
    if tokenizer_type == HuggingFaceTokenizer.name:
        return HuggingFaceTokenizer(model, choice)
    return GPTSentencePieceTokenizer(model, choice)


def load_project_tokenizer(
    config: ProjectConfig, paths: ProjectPaths, choice: SpecialTokenChoice | None = None
) -> Tokenizer:
    """Load the tokenizer that the project's data was tokenized with.

    Args:
        config: The project's configuration.
        paths: The project.
        choice: Requested BOS and EOD; None: as recorded in the project.

    Raises:
        TokenizerError: a file is missing, malformed, or not the one the project was built with.
    """

    def resolve(name: str | None) -> Path | None:
        if name is None:
            return None
        path = paths.root / name
        if not path.exists():
            raise TokenizerError(path, "no such file, but config.json names it", "Restore it")
        if marker_path(path).exists() and state_of(path) is not FileState.COMPLETE:
            raise TokenizerError(
                path, "not the tokenizer that the project was built with", "Restore the file"
            )
        return path

    _check_configuration(config, paths)
    return build_tokenizer(
        config.retro_gpt_tokenizer_type,
        resolve(config.retro_gpt_tokenizer_model),
        resolve(config.retro_gpt_vocab_file),
        resolve(config.retro_gpt_merge_file),
        choice or recorded_choice(paths),
    )


def _check_configuration(config: ProjectConfig, paths: ProjectPaths) -> None:
    """Report problems by config.json key, where `build_tokenizer` would name flags."""
    kind = config.retro_gpt_tokenizer_type
    if kind not in TOKENIZER_TYPES:
        found = f"retro_gpt_tokenizer_type is {kind!r}"
        raise TokenizerError(paths.written_config, found, f"Known are {', '.join(TOKENIZER_TYPES)}")
    needed = ("vocab_file", "merge_file") if kind == GPT2BPETokenizer.name else ("tokenizer_model",)
    keys = [f"retro_gpt_{name}" for name in needed]
    if missing := [key for key in keys if getattr(config, key) is None]:
        found = f"{' and '.join(missing)} missing or null"
        raise TokenizerError(
            paths.written_config, found, f"{kind} needs {' and '.join(keys)}: restore the file"
        )


def recorded_choice(paths: ProjectPaths) -> SpecialTokenChoice:
    """The BOS and EOD of an existing project.

    Projects of early versions recorded neither: they have no BOS, and EOD as those versions chose
    it. For projects of other programs, EOD is the one declared by the tokenizer's files.
    """
    settings = ProjectSettings.load(paths.root)
    return SpecialTokenChoice(
        settings.eod_id,
        settings.bos_id,
        settings.add_bos,
        first_known_eod=settings.eod_id is None and paths.settings.is_file(),
        own_eod=settings.eod_id is None,
    )
