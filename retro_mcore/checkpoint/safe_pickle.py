"""Reading others' pickled files without running anything that they hold.

Torch files are read with `weights_only=True`. Beyond torch's own safe list only
`argparse.Namespace` is allowed, which Megatron keeps its arguments in. A few other names that
Megatron's checkpoints hold, and that no conversion needs (enumerations and paths in the arguments,
numpy's random states), are read as placeholders: nothing is imported or called for them. Any other
name is refused. See docs/decisions/0012-safe-conversion.md.
"""

from __future__ import annotations

import argparse
import pickle
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import torch

from retro_mcore.errors import CheckpointError


class Placeholder:
    """Stands for a value that is not read."""

    def __init__(self, *values: Any) -> None:
        self.values = values

    def __setstate__(self, state: object) -> None:
        self.state = state

    def __repr__(self) -> str:
        return "<not read>"


# What Megatron's own checkpoints hold (megatron.core.safe_globals), but for Namespace.
_NOT_READ = (
    "_io.BytesIO",
    "io.BytesIO",
    "megatron.core.enums.ModelType",
    "megatron.core.optimizer.optimizer_config.OptimizerConfig",
    "megatron.core.rerun_state_machine.RerunDiagnostic",
    "megatron.core.rerun_state_machine.RerunMode",
    "megatron.core.rerun_state_machine.RerunState",
    "megatron.core.transformer.enums.AttnBackend",
    "megatron.core.transformer.enums.CudaGraphModule",
    "megatron.core.transformer.enums.CudaGraphScope",
    "megatron.core.transformer.enums.InferenceCudaGraphScope",
    "megatron.model.enums.ModelType",
    "numpy._core.multiarray._reconstruct",
    "numpy.core.multiarray._reconstruct",
    "numpy.dtype",
    "numpy.dtypes.UInt32DType",
    "numpy.ndarray",
    "pathlib.PosixPath",
    "pathlib._local.PosixPath",
    "signal.Signals",
    "torch._C.Generator",
    "types.SimpleNamespace",
)
_REFUSED = re.compile(r"GLOBAL ([\w.]+)|whitelisted[^.]*: ([\w.]+)")


def load_torch_file(file: Path | IO[bytes], name: object, mapped: bool = False) -> Any:
    """What `torch.save` wrote, tensors on the CPU.

    Args:
        file: A path, or an open file.
        name: The file's, for errors.
        mapped: Map tensors into memory instead of reading them, where the file allows it.

    Raises:
        CheckpointError: it is damaged, or holds a class that is not allowed, which is named.
    """
    with _allowed_only():
        try:
            return torch.load(file, map_location="cpu", weights_only=True, mmap=mapped)
        except pickle.UnpicklingError as error:
            raise _unsafe(name, _refused_names(file, error)) from error
        except RuntimeError as error:
            if mapped and "mmap" in str(error):  # the layout before torch 1.6
                return load_torch_file(file, name)
            raise _damaged(name, error) from error
        except Exception as error:  # torch finds many kinds of damage in as many ways
            raise _damaged(name, error) from error


@contextmanager
def _allowed_only() -> Iterator[None]:
    """In place of what others (megatron among them) have told torch to allow in this process."""
    before = torch.serialization.get_safe_globals()
    torch.serialization.clear_safe_globals()
    names: list[Any] = [(Placeholder, name) for name in _NOT_READ]
    torch.serialization.add_safe_globals([argparse.Namespace, *names])
    try:
        yield
    finally:
        torch.serialization.clear_safe_globals()
        torch.serialization.add_safe_globals(before)


def _refused_names(file: Path | IO[bytes], error: Exception) -> str:
    try:
        if not isinstance(file, Path):
            file.seek(0)
        names = torch.serialization.get_unsafe_globals_in_checkpoint(file)
    except Exception:  # not a zip archive, or too damaged to be listed
        names = []
    match = _REFUSED.search(str(error))
    return ", ".join(sorted(names)) or (match and (match[1] or match[2])) or str(error)[:200]


def _unsafe(name: object, found: str) -> CheckpointError:
    return CheckpointError(
        name,
        f"holds {found}, which could run code when it is read; nothing was read",
        "If you trust it: load it where it was written, keep only the tensors and the plain "
        "arguments, and save those again (docs/migration.md, section 'Checkpoints that are "
        "refused')",
    )


def _damaged(name: object, error: Exception) -> CheckpointError:
    return CheckpointError(
        name,
        f"cannot be read ({type(error).__name__}: {str(error).partition(chr(10))[0]})",
        "Restore or copy it again",
    )


class _Unpickler(pickle.Unpickler):
    """Unpickles the table of contents of a torch_dist checkpoint.

    Its classes are records of offsets and sizes. None of them is imported: they are read as plain
    attributes.
    """

    _RECORDS = ("torch.distributed.checkpoint.", "megatron.core.dist_checkpointing.strategies.")
    _PLAIN: Mapping[str, Any] = {"torch.Size": tuple, "collections.OrderedDict": dict}

    def __init__(self, file: IO[bytes], name: object) -> None:
        super().__init__(file)
        self._name = name

    def find_class(self, module: str, name: str) -> Any:
        full = f"{module}.{name}"
        if full.startswith(self._RECORDS) and "." not in name:
            return Record
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        if full == "torch.serialization._get_layout" or full in _NOT_READ:
            return Placeholder
        if full not in self._PLAIN:
            raise _unsafe(self._name, full)
        return self._PLAIN[full]


class Record:
    """Attributes of an object of another class."""

    def __init__(self, *values: Any) -> None:
        self.values = values

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, dict):
            self.__dict__.update(state)
        else:
            self.values = state


def load_dist_metadata(path: Path) -> Record:
    """A torch_dist checkpoint's `.metadata`, as records of plain values.

    Raises:
        CheckpointError: it is damaged, or holds a class that is not allowed, which is named.
    """
    try:
        with path.open("rb") as file:
            return _Unpickler(file, path).load()
    except CheckpointError:
        raise
    except Exception as error:  # a pickle can be damaged in many ways
        raise _damaged(path, error) from error
