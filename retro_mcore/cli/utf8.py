"""Commands in a locale that knows ASCII alone: text, paths and output are UTF-8 all the same."""

from __future__ import annotations

import codecs
import io
import os
import sys

#: Set for the process that was started again, which must not be a second time.
_AGAIN = "RETRO_MCORE_UTF8"


def use_utf8() -> None:
    """Start the command again in Python's UTF-8 mode if the locale knows ASCII alone.

    Arguments, paths, files and output are then as everywhere. The mode cannot be changed once
    Python runs. It is Python's own choice in such a locale, unless it was switched off.
    """
    arguments = getattr(sys, "orig_argv", [])
    can_start = bool(sys.executable) and len(arguments) > 1 and _AGAIN not in os.environ
    if _is_ascii(sys.getfilesystemencoding()) and can_start:
        os.environ[_AGAIN] = os.environ["PYTHONUTF8"] = "1"
        sys.stdout.flush()
        sys.stderr.flush()
        os.execv(sys.executable, [sys.executable, "-X", "utf8=1", *arguments[1:]])
    write_any_text()


def write_any_text() -> None:
    """Let output escape what its encoding lacks: characters, or the bytes of a path, in UTF-8."""
    for stream in (sys.stdout, sys.stderr):
        if not isinstance(stream, io.TextIOWrapper):
            continue
        if stream.errors == "strict" or not _is_utf(stream.encoding):
            stream.reconfigure(errors="backslashreplace")


def _is_ascii(encoding: str) -> bool:
    return codecs.lookup(encoding).name == "ascii"


def _is_utf(encoding: str) -> bool:
    return codecs.lookup(encoding).name.startswith("utf")
