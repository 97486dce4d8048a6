"""Verify files against the checksums written with them, before a long run.

The ranks share the files. Each rank reads its smallest files first, for a few seconds. Only the
sizes of the others are compared, and rank 0 reports how many. `--verify` reads all files.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path

from retro_mcore.distributed import get_rank, get_world_size
from retro_mcore.errors import CorruptFileError, RetroError, raise_problems
from retro_mcore.project.markers import checksum, read_marker
from retro_mcore.project.paths import ProjectPaths
from retro_mcore.project.space import show_bytes

_LOG = logging.getLogger(__name__)

#: Bytes that a process reads per call: 4 to 20 seconds of SHA-256.
QUICK_BYTES = 8 << 30

_everything: ContextVar[bool] = ContextVar("everything", default=False)
_warned: set[str] = set()

#: The command that writes each folder of a project.
COMMANDS = {
    "data": "preprocess_corpus",
    "tokenizer": "preprocess_corpus",
    "db": "build_db",
    "index": "build_index",
    "query": "query_neighbors",
}


@dataclass(frozen=True)
class SignedFile:
    """A file with its size in bytes and its SHA-256 when it was written."""

    path: Path
    size: int
    sha256: str


@contextmanager
def verifying(everything: bool) -> Iterator[None]:
    """Context in which files of any size are read completely (`--verify`)."""
    token = _everything.set(everything or _everything.get())
    try:
        yield
    finally:
        _everything.reset(token)


def verify_files(
    files: Sequence[SignedFile],
    hint: Callable[[Path], str],
    error: type[RetroError] = CorruptFileError,
    everything: bool = False,
) -> None:
    """Reject files whose size or bytes differ. All ranks must call this in `raise_together`.

    Args:
        files: The files, the same on every rank.
        hint: Returns the hint for a damaged file.
        error: Type of error to raise.
        everything: Read all files completely, whatever their size.

    Raises:
        RetroError: a file differs; of type `error`, on the rank whose share holds the file.
        SeveralErrors: several files are damaged.
    """
    everything = everything or _everything.get()
    shares = _shares(files)
    share = shares[get_rank()]
    problems = []
    num_read = _num_read(share, everything)
    for number, file in enumerate(share):
        found = _problem(file, number < num_read)
        if found is not None:
            problems.append(error(file.path, found, hint(file.path)))
    raise_problems(problems)
    unread = [file for share in shares for file in share[_num_read(share, everything) :]]
    if unread and get_rank() == 0:
        _warn_unread(unread)


def verify_project(
    paths: ProjectPaths,
    files: Iterable[Path],
    everything: bool = False,
    sizes_only: bool = False,
) -> None:
    """Apply `verify_files` to files written by stages. Files without a marker are trusted.

    Args:
        paths: The project.
        files: The files.
        everything: Read all files completely, whatever their size.
        sizes_only: Read none, and compare all sizes in this process.

    Raises:
        CorruptFileError: a file differs. Names the file and the stage that writes it.
    """
    signed = [file for path in files if (file := signed_file(path)) is not None]

    def hint(path: Path) -> str:
        folder = path.relative_to(paths.root).parts[0] if path.is_relative_to(paths.root) else ""
        command = COMMANDS.get(folder, "the stage that made it")
        return f"Run {command} --project-dir {paths.root} again, or restore the file"

    if sizes_only:
        problems = [(file.path, _problem(file, read=False)) for file in signed]
        raise_problems(
            [CorruptFileError(path, found, hint(path)) for path, found in problems if found]
        )
    else:
        verify_files(signed, hint, everything=everything)


def signed_file(path: Path) -> SignedFile | None:
    """`path` with the size and checksum in its completion marker; None if it has no marker."""
    marker = read_marker(path)
    if marker is None:
        return None
    size, sha256 = marker.get("bytes"), marker.get("sha256")
    # A damaged marker matches no file.
    return SignedFile(path, size if isinstance(size, int) else -1, str(sha256))


def _problem(file: SignedFile, read: bool) -> str | None:
    size = _size_of(file.path)
    if size is None:
        return "is missing"
    if size != file.size:
        return f"has {size} bytes, not {file.size}"
    if read and checksum(file.path) != file.sha256:
        return "its bytes differ from its checksum: it is damaged"
    return None


def _shares(files: Sequence[SignedFile]) -> list[list[SignedFile]]:
    """Each rank's files, the smallest first."""
    ordered = sorted(files, key=lambda file: (file.size, str(file.path)))
    world = get_world_size()
    return [ordered[rank::world] for rank in range(world)]


def _num_read(share: Sequence[SignedFile], everything: bool) -> int:
    """Number of files of a share, from the first, that are read completely."""
    read = 0
    for number, file in enumerate(share):
        read += file.size
        if read > QUICK_BYTES and not everything:
            return number
    return len(share)


def _size_of(path: Path) -> int | None:
    return path.stat().st_size if path.is_file() else None


def _warn_unread(unread: Sequence[SignedFile]) -> None:
    size = show_bytes(sum(file.size for file in unread))
    names = ", ".join(file.path.name for file in unread[:3]) + (", …" if len(unread) > 3 else "")
    text = (
        f"note: {len(unread)} large files ({size}: {names}) in {unread[0].path.parent} and below "
        "were compared by their sizes alone; the command verify reads them whole"
    )
    if text not in _warned:
        _warned.add(text)
        _LOG.warning("%s", text)
