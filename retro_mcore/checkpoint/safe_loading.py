"""Reading pickled files without running anything that they hold: the one allow-list.

Torch files are read with `weights_only=True`. Beyond torch's own safe list the names of this
module are allowed, in place of what others (megatron among them) told torch to allow in this
process. Any other name is refused. See docs/decisions/0012-safe-conversion.md.
"""

from __future__ import annotations

import io
import pickle
import re
from argparse import Namespace
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch.distributed.checkpoint import filesystem, metadata, planner

from retro_mcore.errors import CheckpointError


class Placeholder:
    """Stands for a value that is not read: nothing is imported or called for it."""

    def __init__(self, *values: Any) -> None:
        self.values = values

    def __setstate__(self, state: object) -> None:
        self.state = state

    def __repr__(self) -> str:
        return "<not read>"


# Megatron keeps its arguments in a Namespace.
_VALUES = {"argparse.Namespace": Namespace}

# Megatron's checkpoints hold these (megatron.core.safe_globals), and nothing here needs them.
_NOT_READ = dict.fromkeys(
    (
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
    ),
    Placeholder,
)

# Read for a run that is resumed: numpy's random state, and Transformer Engine's extra states.
_reconstruct = np.zeros(1).__reduce__()[0]
_RUN_STATE = {
    "_io.BytesIO": io.BytesIO,
    "io.BytesIO": io.BytesIO,
    "numpy._core.multiarray._reconstruct": _reconstruct,
    "numpy.core.multiarray._reconstruct": _reconstruct,
    "numpy.dtype": np.dtype,
    "numpy.dtypes.UInt32DType": type(np.dtype(np.uint32)),
    "numpy.ndarray": np.ndarray,
}

# The table of contents of a torch_dist checkpoint: records of names, offsets and sizes.
_CONTENTS: dict[str, Any] = {
    "collections.OrderedDict": OrderedDict,
    "torch.Size": torch.Size,
    "torch.serialization._get_layout": torch.serialization._get_layout,  # type: ignore[attr-defined]
} | {
    f"{module.__name__}.{name}": getattr(module, name)
    for module, names in {
        filesystem: ("_StorageInfo", "_StoragePrefix"),
        metadata: (
            "BytesStorageMetadata",
            "ChunkStorageMetadata",
            "Metadata",
            "MetadataIndex",
            "StorageMeta",
            "TensorProperties",
            "TensorStorageMetadata",
            "_MEM_FORMAT_ENCODING",
        ),
        planner: ("SavePlan", "TensorWriteData", "WriteItem", "WriteItemType"),
    }.items()
    for name in names
}
_OTHER_RELEASES = ("torch.distributed.checkpoint.", "megatron.core.dist_checkpointing.strategies.")

_REFUSED = re.compile(r"GLOBAL ([\w.]+)|whitelisted[^.]*: ([\w.]+)")


def load_torch_file(file: Path | IO[bytes], name: object, mapped: bool = False) -> Any:
    """Load a file that `torch.save` wrote, tensors on the CPU.

    Args:
        file: A path, or an open file.
        name: The file's, for errors.
        mapped: Map tensors into memory instead of reading them, where the file allows it.

    Raises:
        CheckpointError: it is damaged, or holds a class that is not allowed, which is named.
    """
    with _allowed_only({**_NOT_READ, **_VALUES}):
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


def load_run_state(content: IO[bytes]) -> Any:
    """Load one object of a run's state (random states among them), on the device it was saved from.

    Raises:
        pickle.UnpicklingError: it holds a class that is not allowed, which is named.
    """
    with _allowed_only({**_NOT_READ, **_VALUES, **_RUN_STATE}):
        return torch.load(content, weights_only=True)


def load_local_state(path: Path, records: Sequence[type], mapped: bool = False) -> Any:
    """Load what a rank saved as its local checkpoint, tensors on the CPU.

    Args:
        path: The file.
        records: Classes of Megatron's records of names, places and tensors, which are allowed.
        mapped: Map tensors into memory instead of reading them.

    Raises:
        CheckpointError: it is damaged, or holds a class that is not allowed, which is named.
    """
    named = {f"{kind.__module__}.{kind.__name__}": kind for kind in records}
    with _allowed_only({**_NOT_READ, **_VALUES, **_RUN_STATE, **named}):
        try:
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
        except pickle.UnpicklingError as error:
            raise _unsafe(path, _refused_names(path, error)) from error
        except Exception as error:
            raise _damaged(path, error) from error


@contextmanager
def _allowed_only(allowed: Mapping[str, Any]) -> Iterator[None]:
    before = torch.serialization.get_safe_globals()
    torch.serialization.clear_safe_globals()
    names: list[Any] = [(value, name) for name, value in allowed.items()]
    torch.serialization.add_safe_globals(names)
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


class Record:
    """Attributes of an object whose class the installed releases lack, or do not need."""

    def __init__(self, *values: Any) -> None:
        self.values = values

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, dict):
            self.__dict__.update(state)
        else:
            self.values = state


class _ContentsUnpickler(pickle.Unpickler):
    """Unpickles a table of contents; classes of other releases are read as plain records."""

    def __init__(self, file: IO[bytes], name: object, other_releases: bool) -> None:
        super().__init__(file)
        self._name, self._other_releases = name, other_releases

    def find_class(self, module: str, name: str) -> Any:
        full = f"{module}.{name}"
        if full in _CONTENTS:
            return _CONTENTS[full]
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        if self._other_releases and full in _NOT_READ:
            return Placeholder
        if self._other_releases and full.startswith(_OTHER_RELEASES) and "." not in name:
            return Record
        raise _unsafe(self._name, full)


def load_contents(path: Path, other_releases: bool = False) -> Any:
    """Load a torch_dist checkpoint's `.metadata`: torch's Metadata, or a Record like it.

    Args:
        path: The file.
        other_releases: Also read classes that other releases of torch and megatron wrote. Without
            it, whatever passes here also passes the unguarded reader of the installed torch.

    Raises:
        CheckpointError: it is damaged, or holds a class that is not allowed, which is named.
    """
    try:
        with path.open("rb") as file:
            return _ContentsUnpickler(file, path, other_releases).load()
    except CheckpointError:
        raise
    except Exception as error:  # a pickle can be damaged in many ways
        raise _damaged(path, error) from error


def _unsafe(name: object, found: str) -> CheckpointError:
    return CheckpointError(
        name,
        f"cannot be read safely (it holds {found}, which could run code); nothing was read",
        "If you trust it: load it where it was written, keep only the tensors and the plain "
        "arguments, and save those again (docs/migration.md, section 'Checkpoints that are "
        "refused')",
    )


def _damaged(name: object, error: Exception) -> CheckpointError:
    return CheckpointError(
        name,
        f"cannot be read ({type(error).__name__}: {str(error).partition(chr(10))[0]})",
        "Restore the file or copy it again, or load an earlier checkpoint (--ckpt-step)",
    )
