"""Read compressed files as byte streams: .gz with the standard library, .zst with zstandard."""

from __future__ import annotations

import gzip
import io
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, cast

from retro_mcore.errors import CorpusError, MissingDependencyError

#: File name endings that `open_binary` decompresses.
COMPRESSED = (".gz", ".zst")
_BLOCK = 1 << 20
#: `zstd --long=31` frames need a window of this size, in bytes.
_LARGEST_WINDOW = 1 << 31


@contextmanager
def open_binary(path: Path) -> Iterator[BinaryIO]:
    """Open a file and decompress it according to its suffix. Seekable unless compressed.

    Raises:
        CorpusError: the file cannot be read, or its compressed data is damaged or truncated.
        MissingDependencyError: the file is .zst and zstandard is not installed.
    """
    ending = path.suffix.lower()
    try:
        with path.open("rb") as file:
            if ending not in COMPRESSED:
                yield file
                return
            opened = gzip.GzipFile(fileobj=file) if ending == ".gz" else _ZstdFile(file)
            yield cast(BinaryIO, io.BufferedReader(cast(Any, opened), _BLOCK))
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise CorpusError(
            path, f"damaged {ending} data ({error})", "Restore the file, or compress it again"
        ) from error
    except OSError as error:
        raise CorpusError(
            path, f"cannot be read ({error.strerror})", "Check the file and its permissions"
        ) from error


class _ZstdFile(io.RawIOBase):
    """A .zst file with any number of frames. A truncated last frame raises EOFError."""

    def __init__(self, file: BinaryIO) -> None:
        try:
            import zstandard
        except ImportError as error:
            raise MissingDependencyError(
                "zstandard", "not installed, and the corpus is .zst", "Install retro-mcore[corpus]"
            ) from error
        self._file, self._error = file, zstandard.ZstdError
        self._decompressor = zstandard.ZstdDecompressor(max_window_size=_LARGEST_WINDOW)
        self._frame: Any = None
        self._input = self._output = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._output:
            self._input = self._input or self._file.read(_BLOCK)
            if not self._input:
                if self._frame is not None:
                    raise EOFError("ends inside a frame")
                return 0
            self._frame = self._frame or self._decompressor.decompressobj()
            try:
                self._output = self._frame.decompress(self._input)
            except self._error as error:
                raise EOFError(error) from error
            self._input = b""
            if self._frame.eof:
                self._input, self._frame = self._frame.unused_data, None
        count = min(len(buffer), len(self._output))
        buffer[:count], self._output = self._output[:count], self._output[count:]
        return count
