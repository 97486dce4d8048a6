"""Flags that several commands have."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from retro_mcore.project.integrity import verifying


@dataclass
class ProjectOptions:
    """Base of a command's options: the project first, then the stage's configuration."""

    project_dir: str
    """Project directory."""


@runtime_checkable
class _Verifiable(Protocol):
    verify: bool


def verification_of(options: object) -> AbstractContextManager[None]:
    """Context in which files of any size are read completely, if the command's --verify says so."""
    return verifying(isinstance(options, _Verifiable) and options.verify)
