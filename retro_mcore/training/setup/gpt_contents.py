"""Compare the GPT that a run started from by content, so that it is not resumed with another."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path

from retro_mcore.checkpoint.conversion.formats import latest_checkpoint
from retro_mcore.errors import CheckpointError
from retro_mcore.project.markers import fingerprint_of
from retro_mcore.training.setup.data_contents import quick_digest

_SUFFIXES = {".safetensors", ".bin", ".pt", ".distcp"}

# Blocks per file. A GPT may be large, but different weights differ everywhere.
_BLOCKS = 16


def contents_of_gpt(path: Path) -> dict[str, str]:
    """The entry in a checkpoint's arguments for the GPT that a run started from.

    Args:
        path: Directory of its files, or its only file.
    """
    files = [path] if path.is_file() else sorted(path.rglob("*"))
    digests = [
        [str(file.relative_to(path)), quick_digest(file, _BLOCKS)]
        for file in files
        if file == path or _decides(file, path)
    ]
    return {"directory": path.name, "digest": fingerprint_of(digests)}


def _decides(path: Path, directory: Path) -> bool:
    named = path.suffix in _SUFFIXES or path == directory / "config.json"
    return named and path.is_file()


def check_same_gpt(load_gpt: str | None, saved: Mapping[str, str] | None, run: Path) -> None:
    """Reject resuming a run with a different GPT from the one it started from.

    A GPT that no longer exists is not needed, and not compared.

    Args:
        load_gpt: Value of --load-gpt.
        saved: `contents_of_gpt` as recorded by the run; None if not recorded.
        run: The checkpoint to resume from.

    Raises:
        CheckpointError: no checkpoint in --load-gpt is the one that it started from.
    """
    if load_gpt is None or saved is None:
        return
    found = [contents_of_gpt(path) for path in _candidates(Path(load_gpt), saved["directory"])]
    if found and all(each["digest"] != saved["digest"] for each in found):
        raise CheckpointError(
            str(run),
            f"started from another GPT ({saved['directory']}) than --load-gpt {load_gpt} holds",
            "Give the original --load-gpt, or --use-checkpoint-args instead, or choose another "
            "--load and --save",
        )


def _candidates(load_gpt: Path, name: str) -> Iterator[Path]:
    """The checkpoint to load now, and the one loaded before, as the GPT's training may continue."""
    with suppress(CheckpointError):
        yield latest_checkpoint(load_gpt)
    if (load_gpt / name).is_dir():
        yield load_gpt / name
