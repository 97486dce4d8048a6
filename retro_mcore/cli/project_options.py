"""Flag that every stage's command has."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class ProjectOptions:
    """Base of a command's options: the project first, then the stage's configuration."""

    project_dir: str
    """Project directory."""
