"""Every command module runs as `python -m retro_mcore.cli.COMMAND`, and as a Python function."""

from __future__ import annotations

import runpy
import sys

import pytest

from retro_mcore.cli import commands
from retro_mcore.cli.main import COMMANDS


@pytest.mark.filterwarnings("ignore:.*found in sys.modules.*:RuntimeWarning")
@pytest.mark.parametrize("command", [*COMMANDS, "main"])
def test_a_module_that_is_started_runs_its_command(command, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [command, "--no-such-flag"])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_module(f"retro_mcore.cli.{command}", run_name="__main__", alter_sys=True)
    assert stopped.value.code == 2


def test_every_command_is_a_function():
    functions = {name for name, value in vars(commands).items() if callable(value)}
    assert functions >= set(COMMANDS)
    assert all(getattr(commands, name).__doc__ for name in COMMANDS)
