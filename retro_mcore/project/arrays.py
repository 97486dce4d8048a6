"""Small arrays of a project, stored as .npy files."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from retro_mcore.errors import CorruptFileError


def save_array(path: Path, array: np.ndarray) -> None:
    """Write an array as .npy. Unlike `np.save`, reports why the system refused a write.

    Raises:
        OSError: the write failed; carries the errno.
    """
    content = io.BytesIO()
    np.save(content, array)
    path.write_bytes(content.getbuffer())


def load_array(path: Path, shape: Sequence[int | None] | None, kind: str, hint: str) -> np.ndarray:
    """Read an array of the given shape (None: one axis, any length) and `np.dtype.kind`.

    An axis of length None may have any length.

    Raises:
        CorruptFileError: the file holds something else; `hint` is the hint.
    """
    try:
        # Memory-mapped, so a damaged header cannot cause an allocation larger than the file.
        array = np.load(path, mmap_mode="r", allow_pickle=False)
        found = f"holds {array.dtype} of shape {list(array.shape)}"
    except (OSError, ValueError, EOFError, SyntaxError, TypeError, AttributeError) as error:
        reason = str(error).partition("\n")[0]
        raise CorruptFileError(path, f"unreadable ({reason})", hint) from error
    wanted = "one axis" if shape is None else str(list(shape))
    lengths = [None] if shape is None else list(shape)
    fits = len(array.shape) == len(lengths) and all(
        length in (None, size) for length, size in zip(lengths, array.shape, strict=True)
    )
    if not fits or array.dtype.kind not in kind:
        raise CorruptFileError(path, f"{found}, not {wanted}", hint)
    return np.array(array)
