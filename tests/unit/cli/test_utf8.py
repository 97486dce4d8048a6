"""A cluster's job script with LC_ALL=C: text and paths are UTF-8 all the same."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from retro_mcore.data.tokenizers.loading import build_tokenizer, train_sentencepiece
from tests.unit.data.tokenizer_shapes import byte_level, save

ASCII = {"LC_ALL": "C", "LANG": "", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
SHOWN = "Zürich 漢\N{BEAR FACE}"


def run(arguments, **more):
    """A new process in a locale of ASCII; its exit code, output and errors."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    environment = {**kept, **ASCII, "PYTHONPATH": str(Path.cwd()), **more}
    command = [sys.executable, *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, check=False)
    return done.returncode, done.stdout.decode(), done.stderr.decode()


@pytest.mark.parametrize("locale", ["C", "POSIX"])
def test_arguments_files_and_output(tmp_path, locale):
    script = tmp_path / "Skript-ü.py"
    script.write_text(
        "import sys; from pathlib import Path; from retro_mcore.cli.utf8 import use_utf8\n"
        "use_utf8()\n"
        "assert sys.flags.utf8_mode\n"
        "Path(sys.argv[1]).write_text(sys.argv[2])\n"
        "print(Path(sys.argv[1]).name, Path(sys.argv[1]).read_text())\n",
        encoding="utf-8",
    )
    file = tmp_path / "Ausgabe-ß.txt"
    assert run([str(script), str(file), SHOWN], LC_ALL=locale) == (
        0, f"{file.name} {SHOWN}\n", ""
    )  # fmt: skip
    assert file.read_text(encoding="utf-8") == SHOWN


def test_a_command_names_its_files(tmp_path):
    """Its configuration, paths and messages hold what no ASCII has."""
    folder = tmp_path / "Ordner-ü"
    folder.mkdir()
    (folder / "flags-é.yaml").write_text(f"input: [{folder}/fehlt-漢.jsonl]\n", encoding="utf-8")
    arguments = ["--config", f"{folder}/flags-é.yaml", "--project-dir", f"{folder}/Projekt"]
    code, _, errors = run(["-m", "retro_mcore.cli.main", "preprocess_corpus", *arguments])
    assert (code, "fehlt-漢.jsonl" in errors, "Traceback" in errors) == (2, True, False)


def test_a_command_that_python_calls_prints_any_text():
    """It ended in a UnicodeEncodeError, and its output file was not written."""
    script = (
        "from retro_mcore.cli.log_files import command_in_python\n"
        f"with command_in_python('generate', None): print({SHOWN!a})\n"
    )
    assert run(["-c", script])[:2] == (0, "Z\\xfcrich \\u6f22\\U0001f43b\n")


def test_output_that_lacks_a_character_escapes_it():
    """A terminal of Latin 1, which is no reason to start again."""
    script = f"from retro_mcore.cli.utf8 import use_utf8; use_utf8(); print({SHOWN!a})"
    code, shown, _ = run(["-c", script], PYTHONUTF8="1", PYTHONIOENCODING="ascii")
    assert (code, shown) == (0, "Z\\xfcrich \\u6f22\\U0001f43b\n")


def test_arguments_that_were_read_as_ascii_are_tokenized_as_they_are_meant(tmp_path):
    meant, read = SHOWN, SHOWN.encode().decode("ascii", "surrogateescape")
    train_sentencepiece(["some text of an example"] * 3, 290, tmp_path / "a.model")
    for tokenizer in (
        build_tokenizer("GPTSentencePieceTokenizer", tmp_path / "a.model"),
        build_tokenizer("HuggingFaceTokenizer", save(tmp_path / "b", byte_level(["</s>"]))),
    ):
        assert tokenizer.tokenize(read) == tokenizer.tokenize(meant)
        assert tokenizer.tokenize("a\ud83d") == tokenizer.tokenize("a\ufffd")
