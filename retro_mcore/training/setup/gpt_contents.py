"""The GPT that a run began from, by content, so that it is not resumed with another one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path

from retro_mcore.checkpoint.conversion.formats import latest_directory
from retro_mcore.errors import CheckpointError
from retro_mcore.project.markers import fingerprint_of
from retro_mcore.training.setup.data_contents import quick_digest

_SUFFIXES = {".safetensors", ".bin", ".pt", ".distcp"}

# Of each file: a GPT may be large, and other weights differ everywhere.
_BLOCKS = 16


def contents_of_gpt(directory: Path) -> dict[str, str]:
    """The entry in a checkpoint's arguments for the GPT that a run began from.

    Args:
        directory: Directory of its files.
    """
    files = [path for path in sorted(directory.rglob("*")) if _decides(path, directory)]
    digests = [[str(path.relative_to(directory)), quick_digest(path, _BLOCKS)] for path in files]
    return {"directory": directory.name, "digest": fingerprint_of(digests)}


def _decides(path: Path, directory: Path) -> bool:
    named = path.suffix in _SUFFIXES or path == directory / "config.json"
    return named and path.is_file()


def check_same_gpt(load_gpt: str | None, saved: Mapping[str, str] | None, run: Path) -> None:
    """Reject resuming a run with another GPT than it began from.

    A GPT that is not there any more is not needed, and not compared.

    Args:
        load_gpt: Value of --load-gpt.
        saved: `contents_of_gpt` as the run recorded it; None where it did not.
        run: The checkpoint that is resumed.

    Raises:
        CheckpointError: none of the checkpoints in --load-gpt is the one that it began from.
    """
    if load_gpt is None or saved is None:
        return
    found = [contents_of_gpt(path) for path in _candidates(Path(load_gpt), saved["directory"])]
    if found and all(each["digest"] != saved["digest"] for each in found):
        raise CheckpointError(
            str(run),
            f"began from another GPT ({saved['directory']}) than --load-gpt {load_gpt} holds",
            "Give --load-gpt as it was, or --use-checkpoint-args in its place, or choose another "
            "--load and --save",
        )


def _candidates(load_gpt: Path, name: str) -> Iterator[Path]:
    """The checkpoint that would be loaded now, and that which was: its own training may go on."""
    with suppress(CheckpointError):
        yield latest_directory(load_gpt)
    if (load_gpt / name).is_dir():
        yield load_gpt / name
