"""Reads a Dockerfile: its instructions, and the files that its COPY lines take.

Only what our Dockerfile uses: COPY from the context, and .dockerignore without exceptions.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Instruction:
    """One instruction: its name, and the rest of its line."""

    name: str
    words: str


def read_instructions(text: str) -> list[Instruction]:
    """The instructions in order, each with its continued lines."""
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith("#")]
    joined = "\n".join(lines).replace("\\\n", "")
    return [Instruction(*line.split(maxsplit=1)) for line in joined.splitlines()]


def read_variables(instruction: Instruction) -> dict[str, str]:
    """The variables of an ENV instruction."""
    return dict(word.split("=", 1) for word in instruction.words.split())


class Ignored:
    """The paths that a .dockerignore leaves out, with all below them.

    Patterns start at the context's root. `*` stands for any part of a name, `**/` for any folders
    (https://docs.docker.com/build/concepts/context/#dockerignore-files).
    """

    def __init__(self, text: str) -> None:
        lines = [line.strip() for line in text.splitlines()]
        patterns = [line.strip("/") for line in lines if line and not line.startswith("#")]
        assert not any(pattern.startswith("!") for pattern in patterns), "exceptions are not read"
        translated = "|".join(map(self._translate, patterns))
        self._expression = re.compile(f"(?:{translated})(?:/.*)?")

    @staticmethod
    def _translate(pattern: str) -> str:
        escaped = re.escape(pattern)
        return escaped.replace(r"\*\*/", "(?:.*/)?").replace(r"\*", "[^/]*").replace(r"\?", "[^/]")

    def __contains__(self, path: str) -> bool:
        return self._expression.fullmatch(path) is not None


def _files(context: Path, source: str, ignored: Ignored) -> Iterator[Path]:
    """The files of a file or folder in the context, but for those that are left out."""
    root = context / source
    if root.is_file() and source not in ignored:
        yield root
    for folder, folders, names in os.walk(root):
        below = Path(folder).relative_to(context)
        folders[:] = [name for name in folders if (below / name).as_posix() not in ignored]
        for name in names:
            if (below / name).as_posix() not in ignored:
                yield Path(folder, name)


def copy(instruction: Instruction, context: Path, work_folder: Path, ignored: Ignored) -> None:
    """Does what COPY does: files keep their names, of a folder its content is copied."""
    *sources, target = instruction.words.split()
    for source in sources:
        files = list(_files(context, source, ignored))
        assert files, f"COPY {instruction.words}: nothing is left of {source}"
        root = context / source
        for path in files:
            inner = path.name if root.is_file() else path.relative_to(root)
            copied = work_folder / target / inner
            copied.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(path, copied, follow_symlinks=False)
