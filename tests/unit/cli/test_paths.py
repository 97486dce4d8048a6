"""Paths that a user mistypes, may not read, or that are something else: one line, exit code 2."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from retro_mcore.cli import (
    build_db,
    build_index,
    command,
    convert_checkpoint,
    evaluate_perplexity,
    evaluate_qa,
    finetune_retro,
    generate,
    inspect_neighbors,
    plan_scale,
    preprocess_corpus,
    pretrain_retro,
    query_neighbors,
    serve,
    update_db,
)
from retro_mcore.errors import RetroError, system_refusal

MODEL = [
    "--num-layers",
    "2",
    "--hidden-size",
    "8",
    "--num-attention-heads",
    "1",
    "--micro-batch-size",
    "1",
    "--lr",
    "1",
]
TUNING = ["--micro-batch-size", "1", "--global-batch-size", "1", "--train-iters", "1", "--lr", "1"]
STAGES = (build_db, build_index, query_neighbors, update_db)


def error_lines(capsys) -> list[str]:
    return [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]


@pytest.mark.parametrize(
    ("module", "flags", "named"),
    [
        *((module, ["--project-dir", ""], "--project-dir") for module in STAGES),
        (preprocess_corpus, ["--project-dir", "p", "--input", "a", ""], "--input"),
        (pretrain_retro, [*MODEL, "--project-dir", "p", "--save", ""], "--save"),
        (pretrain_retro, [*MODEL, "--project-dir", "p", "--load", ""], "--load"),
        (pretrain_retro, [*MODEL, "--project-dir="], "--project-dir"),
        (finetune_retro, [*TUNING, "--project-dir", "p", "--data-path", ""], "--data-path"),
        (convert_checkpoint, ["--load", "", "--save", "x"], "--load"),
        (evaluate_perplexity, ["--project-dir", "p", "--load", ""], "--load"),
        (evaluate_qa, ["--sample-input-file", "", "--output", "x"], "--sample-input-file"),
        (generate, ["--project-dir", "p", "--load", "x", "--prompt-file", ""], "--prompt-file"),
        (serve, ["--project-dir", "", "--load", "x"], "--project-dir"),
        (inspect_neighbors, ["--project-dir", "p", "--output", ""], "--output"),
    ],
)
def test_an_empty_path_is_not_the_current_directory(capsys, module, flags, named):
    assert module.main(flags) == 2
    (line,) = error_lines(capsys)
    assert line.startswith(f"error: {named}: an empty path")


def test_all_empty_paths_are_told_together(capsys):
    assert convert_checkpoint.main(["--load", "", "--save", ""]) == 2
    assert [line.split(":")[1] for line in error_lines(capsys)] == [" --load", " --save"]


@pytest.mark.parametrize(
    ("module", "flags", "named"),
    [
        (inspect_neighbors, ["--project-dir", "p", "--output"], "--output"),
        (plan_scale, ["--tokens", "1B", "--json"], "--json"),
    ],
)
def test_a_directory_in_place_of_a_file_is_refused_before_the_work(
    capsys, tmp_path, module, flags, named
):
    """The error named a temporary file."""
    assert module.main([*flags, str(tmp_path)]) == 2
    assert error_lines(capsys) == [f"error: {named} {tmp_path}: a directory. Name a file"]


@pytest.mark.parametrize("name", ["preprocess_corpus", "query_neighbors"])
def test_a_project_whose_path_is_not_utf8_is_refused(tmp_path, name):
    """SentencePiece ended in a TypeError. Run apart: pytest-xdist cannot report such a path."""
    folder = os.fsencode(tmp_path) + b"/\xff"
    flags = ["--input", str(tmp_path)] if name == "preprocess_corpus" else []
    ran = subprocess.run(
        [sys.executable, "-m", f"retro_mcore.cli.{name}", "--project-dir", folder, *flags],
        capture_output=True,
    )
    assert ran.returncode == 2
    assert ran.stderr.strip().endswith(
        b"a path that is not UTF-8. Rename the folder, or use another"
    )


def make_file(path: Path) -> None:
    path.write_text("a file")


def make_loop(path: Path) -> None:
    path.symlink_to(path.name)


def make_dangling(path: Path) -> None:
    path.symlink_to("nowhere")


def make_closed(path: Path) -> None:
    path.mkdir()
    path.chmod(0)


def leave_out(path: Path) -> None:
    pass


@pytest.mark.parametrize("make", [leave_out, make_file, make_loop, make_dangling, make_closed])
@pytest.mark.parametrize("module", [*STAGES[:3], inspect_neighbors])
def test_a_project_that_is_none(capsys, tmp_path, module, make):
    if make is make_closed and os.geteuid() == 0:
        pytest.skip("everything is open to the superuser")
    path = tmp_path / "project"
    make(path)
    assert module.main(["--project-dir", str(path)]) == 2
    (line,) = error_lines(capsys)
    assert str(path) in line


@pytest.mark.parametrize("name", ["x" * 300, "config.json/deeper", "a\nb"])
def test_a_name_that_no_file_can_have(capsys, tmp_path, name):
    (tmp_path / "config.json").write_text("{}")
    assert build_db.main(["--project-dir", str(tmp_path / name)]) == 2
    assert error_lines(capsys)


@dataclass
class Options:
    """Do something."""

    tokens: list[str] = field(default_factory=list)
    """Whatever."""


def run(function) -> int:
    return command.run_command(Options, function, [])


KINDS = "EACCES EPERM EROFS ENOENT EISDIR ENOTDIR ELOOP ENAMETOOLONG ENOSPC EMFILE ESTALE EIO"


@pytest.mark.parametrize("kind", KINDS.split())
def test_what_the_system_refuses_is_told_with_its_file(capsys, kind):
    number = getattr(errno, kind)

    def refuse(options: Options) -> None:
        raise OSError(number, os.strerror(number), "/some/file")

    assert run(refuse) == 2
    (line,) = error_lines(capsys)
    assert line.startswith(f"error: /some/file: {os.strerror(number)}. ")


@pytest.mark.parametrize(
    "error",
    [OSError("no number"), OSError(errno.EBADF, "bad"), OSError(errno.EIO, "?"), KeyError()],
)
def test_faults_of_ours_keep_their_traceback(error):
    def fail(options: Options) -> None:
        raise error

    assert system_refusal(error) is None
    with pytest.raises(type(error)):
        run(fail)


def test_ranks_tell_a_refusal_together(monkeypatch):
    """On several ranks it travels as an error of the user's, so that all end alike."""
    from retro_mcore import distributed

    monkeypatch.setattr(distributed, "get_world_size", lambda group=None: 2)
    monkeypatch.setattr(
        distributed.dist, "all_gather_object", lambda out, mine, group: out.__setitem__(1, mine)
    )
    with (
        pytest.raises(RetroError, match="nowhere: No such file") as caught,
        distributed.raise_together(),
    ):
        Path("nowhere").read_text()
    assert caught.value.raised_together
