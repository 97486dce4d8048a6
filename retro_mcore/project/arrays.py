"""Small arrays in .npy files of a project."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from retro_mcore.errors import CorruptFileError


def save_array(path: Path, array: np.ndarray) -> None:
    """Write an array as .npy; a write that the system refuses says why, which `np.save` does not.

    Raises:
        OSError: with the system's number.
    """
    content = io.BytesIO()
    np.save(content, array)
    path.write_bytes(content.getbuffer())


def load_array(path: Path, shape: Sequence[int] | None, kind: str, mend: str) -> np.ndarray:
    """Read an array of a shape (None: one axis, any length) and a kind (as `np.dtype.kind` has it).

    Raises:
        CorruptFileError: with `mend` as the way out.
    """
    try:
        # Mapped, so that no more is allocated than the file holds, whatever it claims.
        array = np.load(path, mmap_mode="r", allow_pickle=False)
        found = f"holds {array.dtype} of shape {list(array.shape)}"
    except (OSError, ValueError, EOFError, SyntaxError, TypeError, AttributeError) as error:
        reason = str(error).partition("\n")[0]
        raise CorruptFileError(path, f"unreadable ({reason})", mend) from error
    wanted = "one axis" if shape is None else str(list(shape))
    fits = len(array.shape) == 1 if shape is None else array.shape == tuple(shape)
    if not fits or array.dtype.kind not in kind:
        raise CorruptFileError(path, f"{found}, not {wanted}", mend)
    return np.array(array)
