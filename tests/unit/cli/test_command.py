"""Flags, configuration files, exit codes, and the commands as Python functions."""

from __future__ import annotations

import logging
import subprocess
import sys
from dataclasses import dataclass, field, fields
from importlib import import_module
from pathlib import Path

import pytest

from retro_mcore.cli.command import run_command
from retro_mcore.cli.flags import parse_options
from retro_mcore.cli.help import print_help
from retro_mcore.cli.main import COMMANDS, main
from retro_mcore.cli.option_groups import group_of
from retro_mcore.cli.output import print_summary
from retro_mcore.cli.tables.doctor import print_diagnosis
from retro_mcore.errors import ConfigurationError, CorpusError
from retro_mcore.stages.doctor import Diagnosis, Finding

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


@pytest.mark.parametrize("how", ["flag", "file", "environment"])
def test_the_level_of_the_log(how, tmp_path, capsys, monkeypatch):
    def work(options):
        logging.getLogger("retro_mcore.work").debug("a detail")

    (tmp_path / "c.yaml").write_text("log_level: debug\n")
    monkeypatch.setenv("RETRO_LOG_LEVEL", "debug" if how == "environment" else "")
    flags = {"flag": ["--log_level=debug"], "file": ["--config", str(tmp_path / "c.yaml")]}
    assert run_command(Options, work, ["--project-dir", "p", *flags.get(how, [])]) == 0
    assert "[rank 0] a detail" in capsys.readouterr().err
    assert run_command(Options, work, ["--project-dir", "p", "--log-level", "info"]) == 0
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("flags", "variable", "found"),
    [
        (["--log-level", "loud"], "", "error: --log-level: 'loud'. Choose one of debug, "),
        (["--log-level"], "", "error: --log-level: given without a value"),
        ([], "loud", "error: RETRO_LOG_LEVEL: 'loud'"),
        (["--config", "a", "--config", "b"], "", "error: --config: given more than once"),
    ],
)
def test_bad_options_of_every_command(flags, variable, found, capsys, monkeypatch):
    monkeypatch.setenv("RETRO_LOG_LEVEL", variable)
    assert run_command(Options, print, ["--project-dir", "p", *flags]) == 2
    assert capsys.readouterr().err.startswith(found)


def test_a_level_that_yaml_reads_as_a_switch_is_refused(tmp_path, capsys):
    (tmp_path / "c.yaml").write_text("log_level: off\n")
    assert (
        run_command(Options, print, ["--project-dir", "p", "--config", f"{tmp_path}/c.yaml"]) == 2
    )
    assert capsys.readouterr().err.startswith("error: --log-level: 'False'. Choose one of debug, ")


def test_a_stage_logs_into_its_project(tmp_path, capsys):
    def build_db(options):
        logging.getLogger("retro_mcore.work").info("working")
        raise CorpusError("a.jsonl", "line 3 is not JSON", "Mend the line")

    flags = ["--project-dir", str(tmp_path)]
    assert run_command(Options, build_db, flags) == 2
    assert not any(tmp_path.iterdir())  # not a project
    (tmp_path / "config.json").touch()
    assert run_command(Options, build_db, flags) == 2
    assert len(capsys.readouterr().err.splitlines()) == 4  # twice a log line and an error
    lines = (tmp_path / "logs" / "build_db_rank_0000.log").read_text().splitlines()
    assert [line.split(": ", 1)[1].split(":")[0] for line in lines] == [
        f"build_db {' '.join(flags)} started",
        "working",
        "build_db ended by CorpusError",
    ]


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


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_every_option_in_a_group(command, capsys):
    module = import_module(f"retro_mcore.cli.{command}")
    options_type = getattr(module, "".join(map(str.title, command.split("_"))) + "Options")
    names = [option.name for option in fields(options_type)]
    assert [name for name in names if group_of(name) is None] == []
    with pytest.raises(SystemExit):
        print_help(options_type)
    shown = capsys.readouterr().out
    for name in [*names, "config", "log_level"]:
        flag = name.replace("_", "-")
        assert f"--{flag} " in shown or f"--no-{flag} " in shown


def test_help_shows_groups_texts_and_defaults(capsys):
    with pytest.raises(SystemExit):
        parse_options(Options, ["--help"])
    shown = capsys.readouterr().out
    assert "What the test's command takes." in shown
    assert "model options" not in shown
    for text in (
        "data options",
        "precision options",
        "Where. (required)",
        "Tokens. (default: 512)",
        "Several.",
    ):
        assert text in shown


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


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_output_into_a_full_disk_is_one_line():
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "retro_mcore.cli.main", "help"],
            stdout=full, stderr=subprocess.PIPE, text=True, check=False,
        )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr == ("error: standard output: No space left on device. Write it elsewhere\n")


def test_a_broken_pipe_that_is_not_our_output_is_told():
    def fail(options):
        raise BrokenPipeError("of a worker")

    with pytest.raises(BrokenPipeError, match="of a worker"):
        run_command(Options, fail, ["--project-dir", "p"])


def test_a_summary_shows_long_paths_whole(capsys):
    path = "folder/" * 30 + "loss_curve.png"
    print_summary("stage", {"loss curve": path})
    assert path in capsys.readouterr().out


def test_brackets_are_no_markup(capsys):
    """Paths, names of extras and words between colons are shown as they are."""
    value = "/data/[wiki]/[/red] retro-mcore[gpu] :warning:"
    print_summary("stage", {"project": value})
    finding = Finding("software", "warning", "TE", "is not installed", f"pip install {value}")
    print_diagnosis(Diagnosis.of({0: [finding]}, 1))
    shown = capsys.readouterr().out
    assert shown.count(value) == 2


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
