"""Which start's local checkpoints are resumed, and which folders may be removed."""

from __future__ import annotations

import pytest

from retro_mcore.checkpoint.local_runs import (
    RUN_FILE,
    LocalRuns,
    announce,
    new_name,
    runs_of,
    take_over,
)
from retro_mcore.errors import CheckpointError

A, B, C = (new_name() for _ in range(3))


def test_a_start_takes_over_when_it_has_saved(tmp_path):
    assert runs_of(tmp_path) == LocalRuns(None)
    assert announce(tmp_path, A) == ()
    assert runs_of(tmp_path).run is None  # it may crash before it has saved
    assert take_over(tmp_path, A) == ()
    assert announce(tmp_path, B) == ()
    assert runs_of(tmp_path) == LocalRuns(A, (B,))
    assert announce(tmp_path, C) == (B,)  # B crashed while saving: A is still the latest
    assert take_over(tmp_path, C) == (B, A)
    assert take_over(tmp_path, C) == (B, A)
    assert runs_of(tmp_path) == LocalRuns(C, (B, A))


def test_a_start_that_first_saves_in_save_is_not_among_the_former(tmp_path):
    take_over(tmp_path, A)
    assert take_over(tmp_path, B) == (A,)
    assert announce(tmp_path, B) == (A,)
    assert take_over(tmp_path, B) == (A,)


def test_after_a_start_without_local_checkpoints_none_is_resumed(tmp_path):
    assert take_over(tmp_path, None) == ()
    assert not [*tmp_path.iterdir()]
    take_over(tmp_path, A)
    for _ in range(2):
        take_over(tmp_path, None)
        assert runs_of(tmp_path) == LocalRuns(None, (A,))


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"[]",
        b"{}",
        b'{"run": "../..", "former": []}',
        b'{"run": null, "former": [".."]}',
        b'{"run": 1, "former": []}',
        b'{"run": "", "former": null}',
    ],
)
def test_a_damaged_file_is_refused_when_resuming_and_replaced_when_saving(tmp_path, content):
    (tmp_path / RUN_FILE).write_bytes(content)
    with pytest.raises(CheckpointError, match="is damaged"):
        runs_of(tmp_path)
    assert take_over(tmp_path, A) == ()
    assert runs_of(tmp_path) == LocalRuns(A)
