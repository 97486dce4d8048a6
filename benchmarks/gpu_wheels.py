"""Collect what a GPU machine without a network lacks, as wheels for its Python.

    python -m benchmarks.gpu_wheels --output wheels                       # Python 3.12, x86-64
    python -m benchmarks.gpu_wheels --installed FILE --faiss faiss-gpu    # FILE: `pip list` there

Carry the folder and this repository there, and follow what the command prints. Transformer Engine
has no wheels for PyTorch: it must come with the machine's image.
"""

from __future__ import annotations

import subprocess
import sys
import zipfile
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, field
from email.parser import HeaderParser
from pathlib import Path
from typing import Literal

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

from benchmarks.gpu_report.sections import NEEDS
from retro_mcore.cli.command import run_command
from retro_mcore.errors import ConfigurationError, MissingDependencyError
from retro_mcore.stages.doctor.software import stated_requirements

#: Present wherever PyTorch and torchvision are.
WITH_TORCH = frozenset(
    (
        *("torch", "numpy", "triton", "filelock", "fsspec", "jinja2", "markupsafe", "mpmath"),
        *("networkx", "packaging", "pip", "setuptools", "sympy", "pillow", "typing-extensions"),
    )
)
RETIRED = "megatron-core==0.15.3"
#: pip matches a platform exactly, so each one is named.
_GLIBC = (17, 24, 26, 27, 28, 31, 34)


@dataclass
class Options:
    """Collect wheels for a GPU machine without a network, within a size."""

    output: Path = Path("wheels")
    """Folder for the wheels; one inside, `retired`, for megatron-core 0.15.3."""
    python: str = "3.12"
    """Python of that machine."""
    machine: str = "x86_64"
    """Processor of that machine."""
    installed: Path | None = None
    """Output of `pip list --format=freeze` there (default: PyTorch, torchvision, their needs)."""
    faiss: Literal["faiss-cpu", "faiss-gpu", "faiss-gpu-cuvs"] = "faiss-cpu"
    """Build of Faiss: faiss-gpu for CUDA 12, faiss-gpu-cuvs for CUDA 13; both are larger."""
    also: list[str] = field(default_factory=lambda: ["pytest>=8", "transformers>=4.40"])
    """Requirements besides this package's own."""
    leave_out: list[str] = field(default_factory=lambda: ["matplotlib", "hf-xet"])
    """Requirements to leave out, and what they alone require: what only draws or downloads."""
    limit_mib: float = 60.0
    """Most MiB of all wheels together."""


#: Puts the wheel of a requirement into a folder and returns its path.
Download = Callable[[str, Path], Path]


def collect_all(options: Options, download: Download | None = None) -> list[Path]:
    """Download the wheels and print how to use them; returns their paths.

    Raises:
        ConfigurationError: together they are larger than the limit.
        MissingDependencyError: a wheel cannot be had for that machine.
    """
    download = download or _pip_download(options)
    there = _installed(options)
    absent = set(map(canonicalize_name, options.leave_out)) - there
    wheels = collect(requirements(options), there | absent, options, download)
    names = there | {canonicalize_name(path.name.split("-")[0]) for path in wheels}
    wheels.append(download(RETIRED, options.output / "retired"))
    _check_size(wheels, options.limit_mib)
    print(_instructions(wheels, options.output))
    print("\n".join(["", *_left_out(absent, names)]))
    return wheels


def requirements(options: Options) -> list[str]:
    """The package's own requirements, Faiss, and what else is asked for."""
    return [*map(_without_marker, stated_requirements() or []), options.faiss, *options.also]


def collect(
    wanted: Iterable[str], installed: Iterable[str], options: Options, download: Download
) -> list[Path]:
    """Download requirements, and what they require in turn, except what is installed.

    A wheel that does not fit a later requirement gives way to one that fits all so far.
    """
    queue, installed = list(wanted), set(installed)
    wheels: dict[str, Path] = {}
    asked: dict[str, SpecifierSet] = {}
    while queue:
        requirement = Requirement(queue.pop(0))
        name = canonicalize_name(requirement.name)
        if name in installed:
            continue
        asked[name] = asked.get(name, SpecifierSet()) & requirement.specifier
        if name in wheels and requirement.specifier.contains(_version(wheels[name]), True):
            continue
        if name in wheels:
            wheels[name].unlink()
        wheels[name] = download(f"{requirement.name}{asked[name]}", options.output)
        queue += _required_by(wheels[name], options, requirement.extras)
    return list(wheels.values())


def _version(wheel: Path) -> str:
    return wheel.name.split("-")[1]


def _without_marker(requirement: Requirement) -> str:
    return f"{requirement.name}{requirement.specifier}"


def _required_by(wheel: Path, options: Options, extras: set[str]) -> list[str]:
    """What a wheel requires on that machine."""
    with zipfile.ZipFile(wheel) as archive:
        name = next(name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        metadata = HeaderParser().parsestr(archive.read(name).decode("utf-8"))
    there = {
        "python_version": options.python,
        "python_full_version": f"{options.python}.0",
        "platform_machine": options.machine,
        "sys_platform": "linux",
        "platform_system": "Linux",
        "os_name": "posix",
        "implementation_name": "cpython",
        "platform_python_implementation": "CPython",
    }
    found = [Requirement(text) for text in metadata.get_all("Requires-Dist") or []]
    return [
        f"{each.name}{_extras(each)}{each.specifier}"
        for each in found
        if each.marker is None
        or any(each.marker.evaluate({**there, "extra": extra}) for extra in ("", *extras))
    ]


def _extras(requirement: Requirement) -> str:
    return f"[{','.join(sorted(requirement.extras))}]" if requirement.extras else ""


def _installed(options: Options) -> set[str]:
    if options.installed is None:
        return set(WITH_TORCH)
    lines = options.installed.read_text(encoding="utf-8").splitlines()
    return {canonicalize_name(line.split("==")[0].split(" @ ")[0].strip()) for line in lines}


def _pip_download(options: Options) -> Download:
    platforms = [f"manylinux_2_{minor}_{options.machine}" for minor in _GLIBC]
    platforms += [f"manylinux2014_{options.machine}", "any"]
    flags = ["--quiet", "--disable-pip-version-check", "--no-deps", "--only-binary=:all:"]
    flags += ["--implementation", "cp", "--python-version", options.python]
    for platform in platforms:
        flags += ["--platform", platform]

    def download(requirement: str, folder: Path) -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "pip", "download", *flags, "-d", str(folder), requirement]
        before = set(folder.glob("*.whl"))
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise MissingDependencyError(
                requirement,
                f"pip finds no wheel: {' '.join(done.stderr.split())[-300:]}",
                "Connect to a package index, or name it in --installed if that machine has it",
            )
        name = canonicalize_name(Requirement(requirement).name)
        found = set(folder.glob("*.whl"))
        return next(
            path
            for path in sorted(found - before) or sorted(found)
            if canonicalize_name(path.name.split("-")[0]) == name
        )

    return download


def _check_size(wheels: Iterable[Path], limit_mib: float) -> None:
    sizes = sorted(((path.stat().st_size / 2**20, path.name) for path in wheels), reverse=True)
    total = sum(size for size, _ in sizes)
    if total > limit_mib:
        largest = ", ".join(f"{name} {size:.1f}" for size, name in sizes[:4])
        raise ConfigurationError(
            f"--limit-mib {limit_mib:g}",
            f"the wheels have {total:.1f} MiB, the largest {largest}",
            "Give --installed, another --faiss, or a higher limit",
        )


def _left_out(absent: Collection[str], names: Collection[str]) -> Iterator[str]:
    """What is not collected, and what the report skips for want of it."""
    if absent:
        yield f"Left out: {', '.join(sorted(absent))}."
    for need in NEEDS:
        if not any(name in names for name in need.packages):
            skipped = list(need.sections)
            skipped += [f"a part of {', '.join(need.parts)}"] if need.parts else []
            packages = " or ".join(need.packages)
            yield f"Unless that machine has {packages}, it skips {', '.join(skipped)}."


def _instructions(wheels: list[Path], folder: Path) -> str:
    total = sum(path.stat().st_size for path in wheels) / 2**20
    return f"""{len(wheels)} wheels, {total:.1f} MiB, in {folder}.
Carry the folder there with this repository, then run:

    python3 -m pip install --no-index --no-deps --target site {folder}/*.whl
    python3 -m pip install --no-index --no-deps --ignore-requires-python --target retired \\
        {folder}/retired/*.whl
    export PYTHONPATH=$PWD/site:$PWD
    python3 -m benchmarks.gpu_report --output report --retired retired
    make test-gpu GPU_PYTHON=python3

Or, into an environment: python3 -m pip install --no-index --find-links {folder} {folder}/*.whl"""


def main() -> int:
    """The command line."""
    return run_command(Options, collect_all)


if __name__ == "__main__":
    sys.exit(main())
