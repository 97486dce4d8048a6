"""Linters of the Dockerfile, the shell scripts and the manifests (`make style` installs them)."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = (".ci", "benchmarks", "examples", "requirements", "tools")
MANIFESTS = sorted((ROOT / "examples" / "kubernetes").glob("*.yaml"))


def program(name: str) -> str:
    """A program beside this Python or on the path; the test is skipped where there is none."""
    places = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return shutil.which(name, path=places) or pytest.skip(
        f"{name} is not installed: pip install -r requirements/lint.txt"
    )


def check(*words: str | Path) -> None:
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def shell_scripts() -> list[Path]:
    """Every file that starts with the name of a shell."""
    files = [path for name in FOLDERS for path in (ROOT / name).rglob("*") if path.is_file()]
    starts = {path: path.read_bytes()[:40].split(b"\n")[0] for path in files}
    return sorted(path for path, line in starts.items() if line[:2] == b"#!" and b"sh" in line)


def test_dockerfile():
    check(program("hadolint"), "Dockerfile")


def test_shell_scripts():
    scripts = shell_scripts()
    assert {"run", "pipeline.sh", "pretrain.sbatch"} <= {path.name for path in scripts}
    check(program("shellcheck"), "--severity=style", *scripts)


def pods(node: object) -> list[dict]:
    """The specs of pods below a node: what has containers."""
    if isinstance(node, list):
        return [spec for inner in node for spec in pods(inner)]
    if not isinstance(node, dict):
        return []
    return [node] if "containers" in node else pods(list(node.values()))


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.stem)
def test_manifests(path):
    """Jobs, and the pods of kinds that Kubernetes does not have, by its schemas."""
    kubernetes_validate = pytest.importorskip(
        "kubernetes_validate", reason="pip install -r requirements/lint.txt"
    )
    version = kubernetes_validate.latest_version()
    for document in yaml.safe_load_all(path.read_text()):
        found = [{"apiVersion": "v1", "kind": "Pod", "spec": spec} for spec in pods(document)]
        for each in found if document["kind"] != "Job" else [document]:
            kubernetes_validate.validate(each, version, strict=True)
