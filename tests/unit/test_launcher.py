"""The launcher's variables: whatever is wrong with them is one error with the variable's name."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from retro_mcore import distributed, launcher
from retro_mcore.cli import commands, verify
from retro_mcore.errors import ConfigurationError

ROOT = Path(__file__).parents[2]
NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")

WRONG = [
    ({"RANK": "abc", "WORLD_SIZE": "2"}, "RANK: 'abc' is not a number"),
    ({"RANK": "0", "WORLD_SIZE": ""}, "WORLD_SIZE: '' is not a number"),
    ({"RANK": "-1", "WORLD_SIZE": "2"}, "RANK: -1, less than 0"),
    ({"RANK": "0", "WORLD_SIZE": "0"}, "WORLD_SIZE: 0, less than 1"),
    ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK: 2, and WORLD_SIZE is 2"),
    ({"RANK": "1"}, "RANK: 1, and WORLD_SIZE is not set"),
    ({"WORLD_SIZE": "2"}, "WORLD_SIZE: 2, and RANK is not set"),
    ({"LOCAL_RANK": "-1"}, "LOCAL_RANK: -1, less than 0"),
    ({"LOCAL_RANK": "1.5"}, "LOCAL_RANK: '1.5' is not a number"),
    ({"LOCAL_WORLD_SIZE": "all"}, "LOCAL_WORLD_SIZE: 'all' is not a number"),
    ({"LOCAL_RANK": "4", "LOCAL_WORLD_SIZE": "4"}, "LOCAL_RANK: 4, and LOCAL_WORLD_SIZE is 4"),
]
NOWHERE = [
    ({}, "MASTER_ADDR: is not set"),
    ({"MASTER_ADDR": "node1"}, "MASTER_PORT: '' is no port"),
    ({"MASTER_ADDR": "node1", "MASTER_PORT": "http"}, "MASTER_PORT: 'http' is no port"),
    ({"MASTER_ADDR": "node1", "MASTER_PORT": "70000"}, "MASTER_PORT: '70000' is no port"),
]


@pytest.fixture
def launched(monkeypatch):
    """Sets the launcher's variables to what is given alone, in a process that has not joined."""
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: False)

    def launch(variables: dict[str, str]) -> None:
        for name in NAMES:
            monkeypatch.delenv(name, raising=False)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    return launch


@pytest.mark.parametrize(("variables", "message"), WRONG)
def test_wrong_variables_are_named(launched, tmp_path, capsys, variables, message):
    """By every way to them: a command, a function, and whoever asks for one of them."""
    launched(variables)
    assert verify.main(["--project-dir", str(tmp_path)]) == 2
    assert capsys.readouterr().err.startswith(f"error: {message}. ")
    for ask in (
        launcher.read,
        launcher.local_rank,
        launcher.local_world_size,
        distributed.initialize,
        lambda: commands.inspect_neighbors(project_dir=str(tmp_path)),
    ):
        with pytest.raises(ConfigurationError, match=re.escape(message)):
            ask()


@pytest.mark.parametrize(("variables", "message"), NOWHERE)
def test_a_place_that_is_none_is_named(launched, tmp_path, capsys, variables, message):
    launched({"RANK": "0", "WORLD_SIZE": "2", **variables})
    with pytest.raises(ConfigurationError, match=re.escape(message)):
        distributed.initialize()
    assert verify.main(["--project-dir", str(tmp_path)]) == 2
    assert capsys.readouterr().err.startswith(f"error: {message}. ")


def test_what_the_launcher_says(launched):
    launched({})
    assert launcher.read() == launcher.Launch(None, None, None, None)
    assert not launcher.read().in_job
    asked = launcher.shown_rank(), launcher.local_rank(), launcher.local_world_size(7)
    assert asked == (0, 0, 7)
    launched({"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"})
    assert launcher.read() == launcher.Launch(5, 8, 1, 4)
    assert launcher.read().in_job
    launched({"RANK": "0"})  # alone, whatever its number is told for
    assert not launcher.read().in_job


def test_help_needs_no_launcher(launched, capsys):
    launched({"RANK": "abc"})
    with pytest.raises(SystemExit) as ended:
        verify.main(["--help"])
    assert ended.value.code == 0


def test_nobody_else_reads_them():
    """In the package: a variable that is read elsewhere is not checked there."""
    read = re.compile(r"""environ(\.get\(|\[)\s*["'](LOCAL_)?(RANK|WORLD_SIZE)\b""")
    for path in (ROOT / "retro_mcore").rglob("*.py"):
        if path.name != "launcher.py":
            assert not read.search(path.read_text(encoding="utf-8")), path


def test_the_error_of_a_rank_is_shown():
    """Also of one that is not the first: the others may be well."""
    variables = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "x"}
    done = subprocess.run(
        [sys.executable, "tools/verify.py", "--project-dir", "nowhere"],
        cwd=ROOT,
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: LOCAL_RANK: 'x' is not a number")
