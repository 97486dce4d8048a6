"""Progress on a terminal and elsewhere."""

from __future__ import annotations

import fcntl
import logging
import os
import pty
import struct
import subprocess
import sys
import termios

import pytest

from retro_mcore import progress
from retro_mcore.progress import Progress, track

# A line of output and a warning while a bar is open.
SCRIPT = """
import logging
from retro_mcore.logs import command_logs
from retro_mcore.progress import Progress
with command_logs(), Progress("embed", 1000) as bar:
    bar.write("a line of output")
    for step in range(1000):
        bar.update()
    logging.getLogger("retro_mcore.test").warning("a warning")
"""


@pytest.fixture
def seconds(monkeypatch):
    """A clock that the test moves: `seconds[0]`."""
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


@pytest.fixture
def lines(caplog):
    caplog.set_level(logging.INFO, "retro_mcore")
    return lambda: [record.getMessage() for record in caplog.records]


def test_first_last_and_every_half_minute(seconds, lines):
    for _ in track(range(100), "embed"):
        seconds[0] += 2
    assert [line.split(",")[0] for line in lines()] == [
        f"embed: {done} of 100" for done in (1, 16, 31, 46, 61, 76, 91, 100)
    ]
    assert lines()[1] == "embed: 16 of 100, 2 s each, 0:02:48 left"
    assert lines()[-1] == "embed: 100 of 100, 2 s each, done in 0:03:20"


def test_a_thousand_fast_steps_are_two_lines(seconds, lines):
    for _ in track(iter(range(1000)), "embed", total=1000):
        seconds[0] += 0.001
    assert len(lines()) == 2
    assert lines()[-1] == "embed: 1000 of 1000, 1000/s, done in 0:00:01"


def test_work_that_stops_says_how_far_it_came(seconds, lines):
    def work() -> None:
        for item in track(range(10), "embed"):
            seconds[0] += 1
            assert item < 4

    with pytest.raises(AssertionError):
        work()
    assert lines()[-1] == "embed: 4 of 10, 1.25 s each, 0:00:08 left"


def test_a_resumed_run_counts_its_own_steps_for_the_rate(seconds, lines):
    with Progress("train", 100, initial=90) as bar:
        seconds[0] += 5
        bar.update(5)
        bar.details(loss="2.5")
    assert lines() == ["train: 95 of 100, 1/s, 0:00:05 left", lines()[0] + ", loss 2.5"]


def test_other_lines_take_the_place_of_ours(seconds, lines, capsys):
    with Progress("train", 100) as bar:
        for step in range(100):
            seconds[0] += 2
            bar.update()
            if step % 10 == 9:
                bar.write(f"iteration {step + 1}")
    assert len(lines()) == 2
    assert capsys.readouterr().out.count("iteration") == 10


@pytest.mark.parametrize("total", [0, 5])
def test_nothing_is_said_where_hidden_or_nothing_is_to_do(total, lines):
    assert list(track(range(total), "embed", hidden=total > 0)) == list(range(total))
    assert lines() == []


def test_no_steps_are_no_line(seconds, lines):
    with Progress("embed", 2) as progress:
        progress.update(0)
        assert lines() == []
        progress.update(2)


def test_a_pipe_gets_lines():
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True
    )
    assert done.stdout == "a line of output\n"
    assert "\r" not in done.stderr
    first, warning, last = done.stderr.splitlines()
    assert "[rank 0] embed: 1 of 1000, " in first
    assert "[rank 0] embed: 1000 of 1000, " in last
    assert warning.endswith("[rank 0] a warning")


def test_a_terminal_gets_a_bar():
    parent, child = pty.openpty()
    fcntl.ioctl(child, termios.TIOCSWINSZ, struct.pack("4H", 24, 80, 0, 0))
    process = subprocess.Popen([sys.executable, "-c", SCRIPT], stdout=child, stderr=child)
    os.close(child)
    shown = b""
    while True:
        try:
            part = os.read(parent, 4096)
        except OSError:  # the other end is closed
            break
        if not part:
            break
        shown += part
    os.close(parent)
    assert process.wait() == 0
    text = shown.decode()
    assert "\r" in text
    assert "embed: 100%" in text
    assert "a line of output\r\n" in text
    assert "[rank 0] a warning\r\n" in text
    assert "1000 of 1000" not in text
