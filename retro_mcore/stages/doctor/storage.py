"""The file system of a directory: what the pipeline and checkpoints rely on."""

from __future__ import annotations

import fcntl
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np

from retro_mcore.project.space import free_bytes, free_files, show_bytes
from retro_mcore.stages.doctor.findings import Finding, error, note, ok, warning
from retro_mcore.stages.doctor.peers import Peers

AREA = "files"
#: Less free space or fewer free inodes than this is worth a warning.
_LITTLE, _FEW = 10 << 30, 10_000
#: Files of other nodes that take longer than this to appear, in seconds, delay every stage.
_LATE = 5.0


def check_storage(flag: str, directory: Path, peers: Peers) -> list[Finding]:
    """Check a directory; every rank calls it with the same directory.

    A probe folder is made in it, or in the nearest existing parent, and removed at the end.

    Args:
        flag: The flag that names the directory.
        directory: The directory; need not exist.
        peers: All ranks, none of which is missing.
    """
    findings: list[Finding] = []
    place = _existing(directory)
    if place.exists() and not place.is_dir():
        fix = "Name a directory"
        return [error(AREA, f"{flag} {directory}", f"{place} is not a directory", fix)]
    if peers.rank == 0:
        if place != directory.absolute():
            findings.append(note(AREA, f"{flag} {directory}", f"is not there yet; checked {place}"))
        findings += _space(place)
    probe = _make_probe(flag, place, peers, findings)
    if probe is not None:
        try:
            if peers.rank == 0:
                findings += _alone(flag, probe)
            findings += _together(flag, probe, peers)
        finally:
            if peers.rank == 0:
                shutil.rmtree(probe, ignore_errors=True)
    if peers.rank == 0 and all(each.level in ("ok", "note") for each in findings):
        findings.append(ok(AREA, f"{flag} {directory}", "locks, renames, maps and syncs files"))
    return findings


def _existing(path: Path) -> Path:
    path = path.absolute()
    while not path.exists() and path != path.parent:
        path = path.parent
    return path


def _space(place: Path) -> Iterator[Finding]:
    free, files = free_bytes(place), free_files(place)
    if free < _LITTLE:
        fix = "plan_scale estimates what a project needs; a checkpoint takes 16 bytes per parameter"
        yield warning(AREA, str(place), f"{show_bytes(free)} are free", fix)
    else:
        yield ok(AREA, str(place), f"{show_bytes(free)} are free")
    if files is not None and files < _FEW:
        yield warning(AREA, str(place), f"{files} more files can be made", "Remove files")


def _make_probe(flag: str, place: Path, peers: Peers, findings: list[Finding]) -> Path | None:
    """Make the probe folder on rank 0; returns its path on every rank, None if that failed."""
    name = f"probe {flag}"
    if peers.rank != 0:
        told = peers.get(name, 0)
        return Path(told) if told else None
    probe = place / f".retro_doctor_{os.getpid()}_{time.time_ns()}"
    try:
        probe.mkdir()
    except OSError as refused:
        fix = "Make the directory writable, or name another one"
        findings.append(error(AREA, str(place), f"{refused.strerror}", fix))
        peers.put(name, "")
        return None
    peers.put(name, str(probe))
    return probe


def _alone(flag: str, probe: Path) -> Iterator[Finding]:
    """What one process can find out."""
    checks: tuple[tuple[str, Callable[[Path], str | None], str], ...] = (
        ("locks (flock)", _locks, "NFS: version 4, without nolock or local_lock"),
        ("atomic renames", _renames, "Use a POSIX file system, not an object store's mount"),
        ("memory maps", _maps, "Use a POSIX file system, not an object store's mount"),
        ("fsync", _syncs, "Use a POSIX file system, not an object store's mount"),
    )
    for what, check, fix in checks:
        try:
            problem = check(probe)
        except (OSError, ValueError) as caught:
            problem = f"{type(caught).__name__}: {caught}"
        if problem is not None:
            yield error(AREA, f"{flag}, {what}", problem, fix)


def _locks(probe: Path) -> str | None:
    path = probe / "lock"
    with path.open("w") as first, path.open("w") as second:
        fcntl.flock(first, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return "a second lock on a locked file succeeds" if _can_lock(second) else None


def _can_lock(file: object) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # type: ignore[arg-type]
    except BlockingIOError:
        return False
    return True


def _renames(probe: Path) -> str | None:
    old, new = probe / "old", probe / "new"
    old.write_text("old")
    new.write_text("new")
    new.replace(old)
    if new.exists() or old.read_text() != "new":
        return "a renamed file did not take the other's place"
    return None


def _maps(probe: Path) -> str | None:
    path = probe / "map"
    mapped = np.memmap(path, np.uint8, "w+", shape=(8192,))
    mapped[4096] = 7
    mapped.flush()
    del mapped
    if np.memmap(path, np.uint8, "r")[4096] != 7:
        return "a value written through a map is lost"
    return None


def _syncs(probe: Path) -> str | None:
    with (probe / "sync").open("wb") as file:
        file.write(b"x")
        file.flush()
        os.fsync(file.fileno())
    return None


def _together(flag: str, probe: Path, peers: Peers) -> list[Finding]:
    """Whether nodes see each other's files and locks. The first rank of each node takes part."""
    if peers.world_size == 1:
        return []
    step = f"files {flag}"
    held = (probe / "held").open("w") if peers.rank == 0 else None
    try:
        if held is not None:
            with suppress(OSError):
                fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        peers.meet(f"{step}, locked")
        findings = [] if peers.rank == 0 or not peers.leads else _from_another(flag, probe, peers)
        peers.meet(f"{step}, written")
    finally:
        if held is not None:
            held.close()
    if peers.rank == 0:
        findings = _written_by_others(flag, probe, peers)
    peers.meet(f"{step}, read")
    return findings


def _from_another(flag: str, probe: Path, peers: Peers) -> list[Finding]:
    """On a node that may be another one than rank 0's: see its file, meet its lock, write one."""
    seconds = _wait_for(probe / "held", peers.seconds / 2)
    if seconds is None:
        fix = "Name a directory on a file system that all nodes share"
        return [error(AREA, flag, f"{peers.host} does not see the files of rank 0", fix)]
    findings = []
    if seconds > _LATE:
        found = f"{peers.host} sees a new file after {seconds:.0f} s"
        findings.append(warning(AREA, flag, found, "NFS: lower the attribute cache (actimeo)"))
    fix = "NFS: version 4, without nolock or local_lock; else do not share a project"
    try:
        with (probe / "held").open("r+") as file:
            if _can_lock(file):
                found = f"{peers.host} can lock what rank 0 has locked"
                findings.append(error(AREA, f"{flag}, locks (flock)", found, fix))
        (probe / f"rank_{peers.rank}").write_text(peers.host)
    except OSError as refused:
        found = f"{peers.host}: {refused}"
        return [*findings, error(AREA, f"{flag}, locks and writes", found, fix)]
    peers.put(f"wrote {flag}", True)
    return findings


def _written_by_others(flag: str, probe: Path, peers: Peers) -> list[Finding]:
    wrote = [rank for rank in range(1, peers.world_size) if peers.get(f"wrote {flag}", rank, False)]
    unseen = [
        rank for rank in wrote if _wait_for(probe / f"rank_{rank}", peers.seconds / 2) is None
    ]
    return _unseen(flag, unseen) if unseen else []


def _unseen(flag: str, ranks: Sequence[int]) -> list[Finding]:
    found = f"rank 0 does not see the files of ranks {', '.join(map(str, ranks))}"
    return [error(AREA, flag, found, "Name a directory on a file system that all nodes share")]


def _wait_for(path: Path, seconds: float) -> float | None:
    """Seconds until a file is seen; None if it is not."""
    start = time.monotonic()
    while time.monotonic() - start < seconds:
        with suppress(OSError):
            list(path.parent.iterdir())  # some network file systems look again only then
        if path.exists():
            return time.monotonic() - start
        time.sleep(0.05)
    return None
