"""Write a checkpoint as a directory for transformers: weights, configuration, code, tokenizer and
model card."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from retro_mcore.checkpoint.conversion.families_out import decoder_files
from retro_mcore.checkpoint.conversion.formats import Checkpoint
from retro_mcore.checkpoint.conversion.model_fields import Flags
from retro_mcore.checkpoint.conversion.retro_config import DOCUMENT_TOKENS
from retro_mcore.checkpoint.conversion.retro_huggingface import (
    CONFIG,
    GENERATION_CONFIG,
    copy_code,
    generation_config,
    retro_model_files,
)
from retro_mcore.checkpoint.conversion.safetensors_files import bytes_of, write_safetensors
from retro_mcore.data.tokenizers.fast import GPT2BPETokenizer, HuggingFaceTokenizer
from retro_mcore.data.tokenizers.loading import load_project_tokenizer
from retro_mcore.errors import CheckpointError
from retro_mcore.project.atomic import atomic_write, write_json
from retro_mcore.project.config import ProjectConfig
from retro_mcore.project.paths import ProjectPaths
from retro_mcore.training.setup.model_card import model_card

_TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "merges.txt", "tokenizer.model", "chat_template.jinja",
)  # fmt: skip


@dataclass(frozen=True)
class HuggingFaceOptions:
    """How a directory for transformers is written.

    Attributes:
        decoder_only: Write the decoder alone, as a model of the family that computes it.
        max_shard_size: Most bytes of a file of weights, such as "5GB".

    Raises:
        ConfigurationError: the size is none.
    """

    decoder_only: bool = False
    max_shard_size: str = "5GB"

    def __post_init__(self) -> None:
        bytes_of(self.max_shard_size)


def check_free(directory: Path) -> None:
    """Reject a directory that holds a model or a checkpoint.

    Raises:
        CheckpointError: it does.
    """
    if any((directory / name).exists() for name in (CONFIG, "latest_checkpointed_iteration.txt")):
        raise CheckpointError(f"--save {directory}", "holds a checkpoint", "Choose another")


def write_huggingface(
    directory: Path,
    checkpoint: Checkpoint,
    flags: Flags,
    options: HuggingFaceOptions,
    project_dir: str | None = None,
) -> list[str]:
    """Write a directory that `from_pretrained` reads.

    config.json comes last: a directory that was interrupted is none of a model.

    Args:
        directory: To write to.
        checkpoint: The original.
        flags: The model's options, resolved.
        options: How.
        project_dir: The model's project, for the tokenizer and the model card.

    Returns:
        Notes for the user.

    Raises:
        CheckpointError: the directory holds a model, or a weight cannot be read.
        ConfigurationError: the target computes something else.
    """
    check_free(directory)
    notes: list[str] = []
    code: list[Path] = []
    if options.decoder_only:
        values, weights, remarks = decoder_files(flags, checkpoint.weights)
        tokens = flags.get(DOCUMENT_TOKENS) or {}
        ids = {"eos_token_id": tokens.get("eod"), "bos_token_id": tokens.get("bos")}
        values |= {name: value for name, value in ids.items() if value is not None}
        notes += remarks
    else:
        values, weights, code = retro_model_files(flags, checkpoint.weights)
    directory.mkdir(parents=True, exist_ok=True)
    write_safetensors(directory, weights, bytes_of(options.max_shard_size))
    copy_code(code, directory)
    write_json(directory / GENERATION_CONFIG, generation_config(values, flags))
    notes += _write_tokenizer(directory, checkpoint, project_dir)
    card = model_card(checkpoint, flags, values, project_dir)
    with atomic_write(directory / "README.md") as file:
        file.write_text(card, encoding="utf-8")
    write_json(directory / CONFIG, values)
    return notes


def _write_tokenizer(directory: Path, checkpoint: Checkpoint, project_dir: str | None) -> list[str]:
    """Copy the tokenizer's files, if it is one of Hugging Face's."""
    if project_dir is None:
        if checkpoint.source != "huggingface":
            return ["no tokenizer is written: give the model's --project-dir"]
        return _copy_tokenizer(checkpoint.path, directory)
    project, paths = ProjectConfig.load(project_dir), ProjectPaths(project_dir)
    tokenizer = load_project_tokenizer(project, paths)
    if isinstance(tokenizer, HuggingFaceTokenizer):
        source = paths.root / str(project.retro_gpt_tokenizer_model)
        if source.is_file():
            shutil.copyfile(source, directory / "tokenizer.json")
        _copy_tokenizer(source if source.is_dir() else source.parent, directory)
        kind = "PreTrainedTokenizerFast"
    elif isinstance(tokenizer, GPT2BPETokenizer):
        for name, file in (
            ("vocab.json", project.retro_gpt_vocab_file),
            ("merges.txt", project.retro_gpt_merge_file),
        ):
            shutil.copyfile(paths.root / str(file), directory / name)
        kind = "GPT2Tokenizer"
    else:
        kinds = f"{HuggingFaceTokenizer.name} and {GPT2BPETokenizer.name}"
        return [f"no tokenizer is written: transformers reads {kinds} alone as the project does"]
    bos = next(iter(tokenizer.beginning), None)
    names = {"eos_token": tokenizer.token_name(tokenizer.eod)}
    names |= {} if bos is None else {"bos_token": tokenizer.token_name(bos)}
    notes: list[str] = []
    config = directory / "tokenizer_config.json"
    if config.exists():
        notes = _declare(directory, names)
    else:
        write_json(config, {"tokenizer_class": kind, "pad_token": names["eos_token"], **names})
    if bos is not None:
        _begin_with_bos(directory / "tokenizer.json", names["bos_token"], bos)
    return notes


def _declare(directory: Path, names: Mapping[str, str]) -> list[str]:
    """Let copied files declare the project's tokens, which --eod-token may have chosen.

    Args:
        directory: The directory that is written.
        names: The project's tokens by role.

    Returns:
        A note for every token that the files declared otherwise.
    """
    notes: dict[str, None] = {}
    for file in (directory / name for name in ("tokenizer_config.json", "special_tokens_map.json")):
        if not file.is_file():
            continue
        values = json.loads(file.read_text(encoding="utf-8"))
        before = {role: values.get(role) for role in names}
        plain = {role: t.get("content") if isinstance(t, dict) else t for role, t in before.items()}
        if plain != dict(names):
            write_json(file, {**values, **names})
        notes |= {
            f"the tokenizer's {role} {plain[role]} becomes {name}, the project's": None
            for role, name in names.items()
            if plain[role] not in (None, name)
        }
    return list(notes)


def _begin_with_bos(file: Path, name: str, bos: int) -> None:
    """Let a tokenizer.json that has no rule of its own begin texts with BOS, as the project does.

    transformers ignores `add_bos_token` for such files.
    """
    if not file.is_file():
        return
    content = json.loads(file.read_text(encoding="utf-8"))
    if content.get("post_processor") is not None:
        return
    token = {"SpecialToken": {"id": name, "type_id": 0}}
    first, second = ({"Sequence": {"id": which, "type_id": 0}} for which in "AB")
    content["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [token, first],
        "pair": [token, first, second],
        "special_tokens": {name: {"id": name, "ids": [bos], "tokens": [name]}},
    }
    write_json(file, content)


def _copy_tokenizer(source: Path, directory: Path) -> list[str]:
    for name in _TOKENIZER_FILES:
        if (source / name).is_file() and not (directory / name).exists():
            shutil.copyfile(source / name, directory / name)
    found = any((directory / name).is_file() for name in _TOKENIZER_FILES)
    return [] if found else ["no tokenizer is written: the original has none"]
