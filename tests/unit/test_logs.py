"""Handlers of a running command."""

from __future__ import annotations

import logging
import warnings

import pytest

from retro_mcore.logs import CONTEXT, PRINTED, command_logs

LOG = logging.getLogger("retro_mcore.test_logs")


@pytest.fixture
def file(tmp_path):
    return tmp_path / "run" / "logs" / "rank_0000.log"


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)


def test_lines_have_time_and_rank(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("WORLD_SIZE", "4")
    with command_logs() as logs:
        logs.add_file(tmp_path, "build_db")
        LOG.warning("%d lines", 2)
        LOG.info("for the file")
    (line,) = capsys.readouterr().err.splitlines()
    assert line[19:] == " [rank 3] 2 lines"
    lines = (tmp_path / "logs" / "build_db_rank_0003.log").read_text().splitlines()
    assert [line[19:] for line in lines] == [
        " rank 3 WARNING retro_mcore.test_logs: 2 lines",
        " rank 3 INFO retro_mcore.test_logs: for the file",
    ]


def test_what_is_printed_goes_to_the_file_only(capsys, tmp_path, file):
    file.parent.parent.mkdir()
    with command_logs() as logs:
        logs.add_file(file.parent.parent)
        LOG.info("iteration 1", extra=PRINTED)
    assert capsys.readouterr().err == ""
    assert "iteration 1" in file.read_text()


def test_the_level_is_honoured_and_restored(capsys):
    root, package = logging.getLogger(), logging.getLogger("retro_mcore")
    before = root.level, package.level, list(root.handlers)
    with command_logs() as logs:
        LOG.debug("too fine")
        logging.getLogger("library").info("of no interest")
        logs.set_level("debug")
        LOG.debug("fine")
        logging.getLogger("library").info("asked for")
        logs.set_level("error")
        LOG.warning("not asked for")
        logging.getLogger("library").error("failed")
    shown = [line.split("] ")[1] for line in capsys.readouterr().err.splitlines()]
    assert shown == ["fine", "asked for", "failed"]
    assert (root.level, package.level, list(root.handlers)) == before


def test_a_file_waits_for_its_folder_and_is_appended_to(file):
    for start in range(2):
        with command_logs() as logs:
            logs.add_file(file.parent.parent)
            LOG.info("begin %d", start)
            assert file.exists() == bool(start)
            file.parent.parent.mkdir(exist_ok=True)
            LOG.info("end %d", start)
    ends = [line.split(": ")[1] for line in file.read_text().splitlines()]
    assert ends == ["begin 0", "end 0", "begin 1", "end 1"]


def test_a_refused_command_leaves_no_file(file):
    file.parent.parent.mkdir()
    for work in (False, True, False):
        with command_logs() as logs:
            logs.add_file(file.parent.parent)
            LOG.info("start", extra=CONTEXT)
            if work:
                LOG.info("work")
            assert file.exists() or not work
            LOG.error("refused", extra=CONTEXT)
    messages = [line.split(": ")[1] for line in file.read_text().splitlines()]
    assert messages == ["start", "work", "refused", "start", "refused"]


def test_a_mistyped_folder_is_not_made(tmp_path):
    with command_logs() as logs:
        logs.add_file(tmp_path / "typo")
        LOG.error("no such project")
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_cannot_be_written_is_one_warning(capsys, tmp_path):
    (tmp_path / "logs").write_text("in the way")
    with command_logs() as logs:
        logs.add_file(tmp_path)
        LOG.info("first")
        LOG.info("second")
    lines = capsys.readouterr().err.splitlines()
    assert [line.split("] ")[1] for line in lines if "cannot be written" not in line] == [
        "first",
        "second",
    ]
    assert sum("rank_0000.log cannot be written" in line for line in lines) == 1


def test_a_command_within_another_shows_lines_once(capsys):
    with command_logs(), command_logs():
        LOG.warning("once")
    assert capsys.readouterr().err.count("once") == 1


def test_warnings_of_libraries_are_lines_too(capsys):
    with command_logs(), warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.warn("look here", UserWarning, stacklevel=1)
    assert "[rank 0]" in capsys.readouterr().err
