"""Options of the report, and the setting that each section runs in."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal, TypeVar

Value = TypeVar("Value")


@dataclass
class Options:
    """Check and measure this package on a GPU, without a network.

    The result of each section is saved as it ends. A rerun with the same folder runs only what is
    missing. Exit code 0: no check failed; 1: a section failed; 3: the time limit left some out.
    """

    output: Path = Path("gpu_report")
    """Folder of the results: SECTION.json, report.json and report.md."""
    sections: list[str] = field(default_factory=list)
    """Sections to run (default: all)."""
    device: Literal["cuda", "cpu"] = "cuda"
    """Device to run on. The CPU only shows that the script works."""
    small: bool = False
    """Use tiny sizes. Figures of speed then mean nothing."""
    time_limit: float = 540.0
    """Seconds after which no section starts, and a running one is ended."""
    retired: Path | None = None
    """Folder with megatron-core 0.15.3 (`pip install --no-deps --target`), to compare with."""
    repeat: bool = False
    """Run sections again that have a result, also failed ones."""


@dataclass(frozen=True)
class Setting:
    """What a section runs with.

    Attributes:
        device: "cuda" or "cpu".
        small: Whether sizes are tiny.
        retired: Folder of megatron-core 0.15.3, if given.
    """

    device: str = "cuda"
    small: bool = False
    retired: str | None = None

    def pick(self, full: Value, small: Value) -> Value:
        """A size of the full run, or of the small one."""
        return small if self.small else full

    def setup(self) -> Any:
        """Choose the device of this process; returns the torch.device."""
        from retro_mcore.platform import setup_device

        return setup_device(self.device)  # type: ignore[arg-type]

    @contextmanager
    def folder(self) -> Iterator[Path]:
        """A temporary folder for files of a section."""
        with TemporaryDirectory(prefix="gpu_report_") as folder:
            yield Path(folder)
