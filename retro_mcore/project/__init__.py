"""A project directory: its configuration, paths, atomic writes and completion markers."""

from retro_mcore.project.config import SPLITS, ProjectConfig, ProjectSettings, Split
from retro_mcore.project.paths import ProjectPaths

__all__ = ["SPLITS", "ProjectConfig", "ProjectPaths", "ProjectSettings", "Split"]
