"""A disk that really fills up: a small tmpfs in a mount namespace of our own."""

import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from tests.integration.test_data_errors import flags
from tests.unit.data.projects import preprocess_options, write_corpus

# Preprocess on a full disk, list what is left, enlarge the disk, and go on.
SCRIPT = """
mount -t tmpfs -o size=$1 tmpfs "$2" && shift 2 || exit 77
"$@"; echo "exit $?"
find "$OLDPWD" -name '.*.tmp' -o -name .lock
mount -o remount,size=64m "$DISK"
"$@"; echo "exit $?"
"""


def can_mount() -> bool:
    command = ["unshare", "-rm", "mount", "-t", "tmpfs", "tmpfs", "/mnt"]
    return (
        shutil.which("unshare") is not None
        and subprocess.run(command, capture_output=True, check=False).returncode == 0
    )


@pytest.mark.skipif(not can_mount(), reason="needs a mount namespace")
def test_a_stage_goes_on_after_space_was_made(tmp_path):
    texts = [f"document {i} " + " ".join(map(str, range(i, i + 5000))) for i in range(60)]
    corpus = write_corpus(tmp_path / "corpus.jsonl", texts)
    disk = tmp_path / "disk"
    disk.mkdir()
    options = replace(preprocess_options(disk / "project", corpus), vocab_size=400)
    script = SCRIPT.replace("$OLDPWD", str(disk)).replace("$DISK", str(disk))
    tool = Path(__file__).parents[2] / "tools" / "preprocess_corpus.py"
    command = [sys.executable, str(tool), *flags(options)]
    result = subprocess.run(
        ["unshare", "-rm", "sh", "-c", script, "sh", "1m", str(disk), *command],
        capture_output=True,
        text=True,
        check=False,
    )
    lines = [line for line in result.stdout.splitlines() if line.startswith(("exit", "/"))]
    assert lines == ["exit 2", "exit 0"], result.stderr
    (error,) = [line for line in result.stderr.splitlines() if line.startswith("error:")]
    assert "the disk is full: more than" in error
    assert "KiB are free. Free space" in error
