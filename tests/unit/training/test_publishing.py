"""Whenever a run is killed while a checkpoint takes its name, the tracker file names one that can
be loaded: also where the run was resumed at an earlier step and saves a step again."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from retro_mcore.checkpoint.files import (
    Retention,
    complete_iterations,
    latest_iteration,
    publish,
)
from retro_mcore.checkpoint.tracker import TRACKER


class Killed(BaseException):
    """Nothing runs after it."""


def make_run(folder: Path) -> Path:
    """Checkpoints of steps 2 and 4, the latter about to be saved again."""
    for name, content in (
        ("iter_0000002", "a"),
        ("iter_0000004", "old"),
        ("iter_0000004.tmp", "new"),
    ):
        (folder / name).mkdir(parents=True)
        (folder / name / "metadata.json").write_text(content)
    (folder / TRACKER).write_text("4")
    return folder


@pytest.mark.parametrize("moment", range(12))
def test_a_kill_at_any_moment_leaves_a_checkpoint(tmp_path, monkeypatch, moment):
    run = make_run(tmp_path / "run")
    calls = iter(range(100))

    def dying(function):
        def call(*arguments, **named):
            if next(calls) == moment:
                raise Killed
            return function(*arguments, **named)

        return call

    monkeypatch.setattr(Path, "replace", dying(Path.replace))
    monkeypatch.setattr(shutil, "rmtree", dying(shutil.rmtree))
    try:
        publish(run, 4, Retention(keep_last_n=1))
    except Killed:
        assert latest_iteration(run) in (2, 4)
    else:
        assert complete_iterations(run) == [4]
        assert (run / "iter_0000004" / "metadata.json").read_text() == "new"
