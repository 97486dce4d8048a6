"""Flags, configuration files, exit codes, and the commands as Python functions."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path

import pytest

from retro_mcore.cli.command import parse_options, print_summary, run_command
from retro_mcore.cli.main import COMMANDS, main
from retro_mcore.errors import ConfigurationError, CorpusError

TOOLS = Path(__file__).parents[3] / "tools"


@dataclass
class Options:
    """What the test's command takes."""

    project_dir: str
    """Where."""
    seq_length: int = 512
    """Tokens."""
    bf16: bool = False
    """Half precision."""
    layers: list[int] = field(default_factory=list)
    """Several."""


def test_flags_are_megatrons():
    options = parse_options(
        Options, ["--project-dir", "p", "--seq-length", "64", "--bf16", "--layers", "2", "4"]
    )
    assert options == Options("p", 64, True, [2, 4])


def test_underscores_are_accepted_too():
    assert parse_options(Options, ["--project_dir", "p"]) == Options("p")


def test_a_flag_wins_over_the_configuration_file(tmp_path):
    config = tmp_path / "config.yaml"
    config.write_text("project_dir: p\nseq_length: 64\nbf16: true\n")
    options = parse_options(Options, ["--config", str(config), "--seq-length", "128"])
    assert options == Options("p", 128, True)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("sequence: 3", "unknown option 'sequence'"),
        ("- 3", "not a mapping"),
        (None, "no such file"),
    ],
)
def test_a_bad_configuration_file_is_named(tmp_path, text, message):
    config = tmp_path / "config.yaml"
    if text is not None:
        config.write_text(text)
    with pytest.raises(ConfigurationError, match=message) as caught:
        parse_options(Options, ["--config", str(config)])
    assert str(config) in str(caught.value)


def test_a_configuration_file_may_leave_required_options_to_flags(tmp_path):
    config = tmp_path / "config.yaml"
    config.write_text("seq_length: 64\n")
    options = parse_options(Options, ["--config", str(config), "--project-dir", "p"])
    assert options == Options("p", 64)


def test_values_of_a_configuration_file_are_checked_like_flags(tmp_path):
    config = tmp_path / "config.yaml"
    config.write_text("seq_length: many\nproject_dir: p\n")
    with pytest.raises(SystemExit) as stopped:
        parse_options(Options, ["--config", str(config)])
    assert stopped.value.code == 2


def test_lists_of_a_configuration_file_give_way_to_flags(tmp_path):
    config = tmp_path / "config.yaml"
    config.write_text("project_dir: p\nlayers: [2, 4]\n")
    assert parse_options(Options, ["--config", str(config)]).layers == [2, 4]
    assert parse_options(Options, ["--config", str(config), "--layers", "6"]).layers == [6]


def test_an_error_of_the_users_is_one_line_and_exit_code_2(capsys):
    def fail(options):
        raise CorpusError("a.jsonl", "line 3 is not JSON", "Mend the line")

    assert run_command(Options, fail, ["--project-dir", "p"]) == 2
    assert capsys.readouterr().err == "error: a.jsonl: line 3 is not JSON. Mend the line\n"


def test_an_error_of_ours_keeps_its_traceback():
    def fail(options):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run_command(Options, fail, ["--project-dir", "p"])


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_and_refuses_unknown_flags(command, capsys):
    module = import_module(f"retro_mcore.cli.{command}")
    assert (TOOLS / f"{command}.py").is_file()
    with pytest.raises(SystemExit) as stopped:
        module.main(["--help"])
    assert stopped.value.code == 0
    assert "--project-dir" in capsys.readouterr().out
    with pytest.raises(SystemExit) as stopped:
        module.main(["--no-such-flag"])
    assert stopped.value.code == 2


def test_launchers_end_with_the_commands_exit_code(tmp_path):
    launcher = [sys.executable, TOOLS / "build_db.py", "--project-dir", tmp_path / "none"]
    done = subprocess.run(launcher, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert "preprocess_corpus" in done.stderr


@pytest.mark.parametrize(
    "command", ["tools/pretrain_retro.py --help", "-m retro_mcore.cli.main help"]
)
def test_a_reader_that_goes_gets_no_traceback(command):
    """Who looks a flag up with `--help | head -1`."""
    line = f"set -o pipefail; {sys.executable} {command} | head -c 1"
    done = subprocess.run(
        ["bash", "-c", line], cwd=TOOLS.parent, capture_output=True, text=True, check=False
    )
    assert done.returncode in (0, 141)  # whether `head` went first is a race
    assert "Traceback" not in done.stderr
    assert "BrokenPipe" not in done.stderr


def test_a_broken_pipe_that_is_not_our_output_is_told():
    def fail(options):
        raise BrokenPipeError("of a worker")

    with pytest.raises(BrokenPipeError, match="of a worker"):
        run_command(Options, fail, ["--project-dir", "p"])


def test_a_summary_shows_long_paths_whole(capsys):
    path = "folder/" * 30 + "loss_curve.png"
    print_summary("stage", {"loss curve": path})
    assert path in capsys.readouterr().out


def test_the_console_script_lists_the_commands(capsys):
    assert main([]) == 0
    listed = capsys.readouterr().out
    assert all(command in listed for command in COMMANDS)
    assert main(["no-such-command"]) == 2


def test_commands_are_python_functions():
    from retro_mcore.cli import commands

    with pytest.raises(ConfigurationError, match="Known: project_dir"):
        commands.build_db(project="p")
    with pytest.raises(AttributeError):
        commands.no_such_command  # noqa: B018


def test_the_published_settings_of_instruction_tuning_are_options():
    from retro_mcore.cli.finetune_retro import FinetuneRetroOptions

    file = Path(__file__).parents[3] / "examples" / "instruct" / "retro-843m.yaml"
    given = ["--project-dir", "p", "--load", "l", "--save", "s", "--data-folder", "d"]
    options = parse_options(FinetuneRetroOptions, ["--config", str(file), *given])
    options.check()
    assert (options.lr, options.global_batch_size, options.train_iters) == (5e-6, 128, 1000)
    assert (options.adam_beta2, options.weight_decay, options.data_path[1]) == (
        0.98,
        0.01,
        "open_inst",
    )
