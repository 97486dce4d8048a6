"""Prompts and the files that hold them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from retro_mcore.errors import ConfigurationError, RetroError
from retro_mcore.json_text import JsonError, has_surrogates, json_lines, parse_json

#: Suffixes of files with several prompts, or compressed ones, that would be read as one text.
_OTHER_FORMATS = (".ndjson", ".jsonlines", ".jl", ".csv", ".tsv", ".yaml", ".yml", ".gz", ".zst")


@dataclass(frozen=True)
class Prompt:
    """A text to continue.

    Attributes:
        text: The prompt.
        neighbors: Texts to use instead of retrieved neighbors; None: according to the options.
        source: File and line of the prompt, if any.
    """

    text: str
    neighbors: Sequence[str] | None = None
    source: str | None = field(default=None, compare=False)

    def problem(self, error: RetroError) -> RetroError:
        """Add the prompt's file and line to an error."""
        if self.source is None:
            return error
        return type(error)(f"{self.source}: {error.subject}", error.found, error.hint)


def prompts_of_flags(
    prompt: str | None, prompt_file: str | None, neighbors: Sequence[str] | None
) -> list[Prompt]:
    """Prompts from --prompt, --prompt-file and --neighbors.

    Raises:
        ConfigurationError: a prompt is missing or invalid. Names the flag, or the file and line.
    """
    if (prompt is None) == (prompt_file is None):
        raise ConfigurationError(
            "--prompt and --prompt-file",
            "neither given" if prompt is None else "both given",
            "Give one of them",
        )
    if prompt is not None:
        if not prompt:
            raise ConfigurationError("--prompt", "empty", "Give some text to continue")
        return [Prompt(prompt, neighbors)]
    if neighbors is not None:
        raise ConfigurationError(
            "--neighbors", "given with --prompt-file", "Write them into the file's lines"
        )
    return read_prompt_file(Path(str(prompt_file)))


def read_prompt_file(path: Path) -> list[Prompt]:
    """Read the prompts of a file: JSON lines (.jsonl, .json) or one text (.txt, any other suffix).

    Raises:
        ConfigurationError: the file is missing, empty, malformed, or named as another format.
            Names the line.
    """
    subject = f"--prompt-file {path}"
    if path.suffix.lower() in _OTHER_FORMATS:
        hint = "Write JSON lines (.jsonl), or a text (.txt)"
        raise ConfigurationError(subject, f"a {path.suffix} file is not read as prompts", hint)
    try:
        if path.suffix.lower() in (".jsonl", ".json"):
            lines = json_lines(path.read_bytes())
            prompts = [_prompt_of_line(f"{subject}:{n}", line) for n, line in lines]
        else:
            prompts = [Prompt(path.read_text(encoding="utf-8-sig").rstrip("\n"))]
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError(subject, str(error), "Name a UTF-8 file") from error
    if not any(prompt.text for prompt in prompts):
        raise ConfigurationError(subject, "no prompt", "Write some text to continue")
    return prompts


def _prompt_of_line(subject: str, line: bytes) -> Prompt:
    hint = 'Each line is an object {"prompt": "some text"}, perhaps with {"neighbors": ["text"]}'
    try:
        value = parse_json(line, allow_nan=True, unique_keys=True)
    except JsonError as error:
        raise ConfigurationError(subject, f"invalid JSON ({error.in_line})", hint) from error
    if has_surrogates(value):
        found = "half of a surrogate pair (such as \\ud83d), which is not a character"
        raise ConfigurationError(subject, found, "Fix the text")
    prompt = value.get("prompt") if isinstance(value, dict) else None
    if not isinstance(prompt, str) or not prompt:
        raise ConfigurationError(subject, "no text under the key 'prompt'", hint)
    neighbors = value.get("neighbors")
    is_list = isinstance(neighbors, list) and all(isinstance(one, str) for one in neighbors)
    if neighbors is not None and not is_list:
        raise ConfigurationError(subject, "'neighbors' is not a list of texts", hint)
    return Prompt(prompt, neighbors, subject)
