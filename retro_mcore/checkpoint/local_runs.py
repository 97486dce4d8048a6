"""Which local checkpoints are those of the run that saves in a directory.

Each start of a run saves its local checkpoints under a name of its own, so files of two starts
never mix. `local_checkpoints.json` in --save names the start that saved last, here or on the nodes.
"""

from __future__ import annotations

import re
import uuid
from dataclasses import asdict, dataclass
from pathlib import Path

from retro_mcore.errors import CheckpointError
from retro_mcore.json_text import parse_json
from retro_mcore.project.atomic import write_json

RUN_FILE = "local_checkpoints.json"


@dataclass(frozen=True)
class LocalRuns:
    """The starts of a run, by the names of their folders on the nodes.

    Attributes:
        run: Whose local checkpoints may be resumed; None if a start without any has saved since.
        former: The others, whose folders a start with local checkpoints removes.
    """

    run: str | None
    former: tuple[str, ...] = ()


def new_name() -> str:
    """A name for a start, which no other has."""
    return uuid.uuid4().hex


def runs_of(directory: str | Path) -> LocalRuns:
    """The starts that have saved in a directory.

    Raises:
        CheckpointError: the file that names them is damaged.
    """
    path = Path(directory) / RUN_FILE
    if not path.is_file():
        return LocalRuns(None)
    try:
        values = parse_json(path.read_bytes())
        found = LocalRuns(values["run"], tuple(values["former"]))
    except (ValueError, KeyError, TypeError):
        found = LocalRuns("")
    names = [*found.former] if found.run is None else [*found.former, found.run]
    if not all(isinstance(name, str) and re.fullmatch(r"[0-9a-f]{32}", name) for name in names):
        raise CheckpointError(path, "is damaged", "Remove it, to go on without local checkpoints")
    return found


def announce(directory: str | Path, run: str) -> tuple[str, ...]:
    """Before a start saves its first local checkpoint: its folder may be left by a crash.

    Returns:
        The names of former ones, whose folders can be removed.
    """
    before = _readable(directory)
    if before.run != run:
        _write(directory, LocalRuns(before.run, (*before.former, run)))
    return before.former


def take_over(directory: str | Path, run: str | None) -> tuple[str, ...]:
    """When a start saves: what other starts have on the nodes is no longer resumed.

    Args:
        directory: --save.
        run: The start's name; None if it has no local checkpoints.

    Returns:
        The names of the others.
    """
    if run is None and not (Path(directory) / RUN_FILE).is_file():
        return ()
    before = _readable(directory)
    if before.run == run:
        return before.former
    former = tuple(name for name in (*before.former, before.run) if name and name != run)
    _write(directory, LocalRuns(run, former))
    return former


def _readable(directory: str | Path) -> LocalRuns:
    try:
        return runs_of(directory)
    except CheckpointError:  # nothing can be resumed, and the next start shall be
        return LocalRuns("")


def _write(directory: str | Path, runs: LocalRuns) -> None:
    Path(directory).mkdir(parents=True, exist_ok=True)
    write_json(Path(directory) / RUN_FILE, asdict(runs))
