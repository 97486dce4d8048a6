"""The environment of the retired Retro: megatron-core 0.15.3 in a folder of its own.

Megatron-Core dropped Retro after 0.15.3, so its numbers come from a second process in which that
release shadows ours: same interpreter, same torch, its folder first on PYTHONPATH.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from retro_mcore.errors import MissingDependencyError

VERSION = "0.15.3"
ROOT = Path(__file__).parents[2]
FOLDER = ROOT / ".parity" / f"megatron-core-{VERSION}"
_MARKER = ".complete"
_OF_BUILT_MODELS = ("NVTE_FLASH_ATTN", "NVTE_FUSED_ATTN", "NVTE_UNFUSED_ATTN")


def install(folder: Path = FOLDER) -> Path:
    """Install the retired release once; later calls, also from other processes, reuse it.

    Args:
        folder: Where to; made, and emptied of an installation that did not complete.

    Returns:
        The folder.

    Raises:
        MissingDependencyError: pip cannot get the release, most likely for lack of a network.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with (folder.parent / f"{folder.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / _MARKER).exists():
            shutil.rmtree(folder, ignore_errors=True)
            _pip_install(folder)
            (folder / _MARKER).touch()
    return folder


def variables(folder: Path | None = None) -> dict[str, str]:
    """Environment variables under which `python` imports the retired release in place of ours.

    Args:
        folder: Where it is; None: it is installed.

    Raises:
        MissingDependencyError: see `install`.
    """
    # Models that were built in this process have set these; the retired one refuses their values.
    own = {name: value for name, value in os.environ.items() if name not in _OF_BUILT_MODELS}
    release = install() if folder is None else folder
    # Where torch may come from.
    further = filter(None, [own.get("PYTHONPATH")])
    return {**own, "PYTHONPATH": os.pathsep.join([str(release.absolute()), str(ROOT), *further])}


def run(arguments: Sequence[str]) -> None:
    """Run `python ARGUMENTS` under the retired release, from the repository root.

    Raises:
        MissingDependencyError: see `install`.
        RuntimeError: the process failed; the message ends with what it wrote to stderr.
    """
    process = subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env=variables(),
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    if process.returncode:
        raise RuntimeError(
            f"{' '.join(arguments)} failed under megatron-core {VERSION} "
            f"with exit code {process.returncode}:\n{process.stderr[-4000:]}"
        )


def _pip_install(folder: Path) -> None:
    requirement = f"megatron-core=={VERSION}"
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    # Its dependencies are torch, which is shared, and packages that Retro does not use.
    command += ["--no-deps", "--ignore-requires-python", "--target", str(folder), requirement]
    pip = subprocess.run(command, capture_output=True, text=True, check=False)
    if pip.returncode:
        raise MissingDependencyError(
            requirement,
            f"pip could not install it into {folder}: {pip.stderr.strip()[-1000:]}",
            "The comparison with the retired Retro needs it once: connect to a package index, or "
            "point PIP_FIND_LINKS at a folder with its wheel",
        )
