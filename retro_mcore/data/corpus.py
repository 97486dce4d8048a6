"""Reading a corpus: JSON lines (also compressed), text files and folders of them.

A corpus is cut into parts (ranges of a JSONL file, groups of text files), so that any number of
ranks can share it and the order of the documents never depends on how many they are. A compressed
file is one part, since it can only be read from its beginning.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from retro_mcore.data.compressed import COMPRESSED, open_binary
from retro_mcore.errors import CorpusError, MissingDependencyError

#: Size that a part aims at, in bytes of text.
PART_BYTES = 32 << 20


@dataclass(frozen=True)
class Document:
    """One document.

    Attributes:
        text: Its text, never empty.
        source_id: Where it came from: the JSON line's own id, else `file:byte` (decompressed); the
            file for text.
    """

    text: str
    source_id: str


@dataclass(frozen=True)
class CorpusPart:
    """A piece of work: bytes [start, end) of one JSONL file, or whole text files."""

    files: tuple[Path, ...]
    start: int = 0
    end: int | None = None

    @property
    def is_jsonl(self) -> bool:
        """Whether the files hold JSON lines."""
        return _is_jsonl(self.files[0])


def text_cleaner() -> Callable[[str], str]:
    """ftfy's `fix_text`: mends mojibake, stray control characters and HTML entities.

    Raises:
        MissingDependencyError: ftfy is not installed.
    """
    try:
        import ftfy
    except ImportError as error:
        raise MissingDependencyError(
            "ftfy", "not installed, and --clean-text needs it", "Install retro-mcore[corpus]"
        ) from error
    return ftfy.fix_text


def read_documents(
    source: Path | str,
    json_keys: Sequence[str] = ("text",),
    clean: Callable[[str], str] | None = None,
    id_key: str = "id",
) -> Iterator[Document]:
    """All documents of a JSONL file, a text file, or a folder (sorted by path, recursive).

    Documents that are empty or only white space are left out.

    Args:
        source: The file or folder.
        json_keys: Keys of a JSON line that hold the text; several are joined by an empty line.
        clean: Applied to every text, such as `text_cleaner()`.
        id_key: Key of a JSON line that holds its id; lines without it are named by their place.

    Raises:
        CorpusError: nothing to read, or a malformed line or file; names file and line.
    """
    for part in list_parts(source):
        yield from read_part(part, json_keys, clean, id_key)


def list_files(source: Path | str) -> list[Path]:
    """The corpus files of `source`, in reading order.

    Raises:
        CorpusError: it doesn't exist, or is a folder without files that can be read.
    """
    source = Path(source)
    if source.is_file():
        return [source]
    if not source.is_dir():
        raise CorpusError(source, "no such file or folder", "Check --input")
    files = sorted(
        path
        for path in source.rglob("*")
        if path.is_file() and (path.suffix == ".txt" or _is_jsonl(path))
    )
    if not files:
        raise CorpusError(
            source, "holds no .jsonl, .jsonl.gz, .jsonl.zst or .txt files", "Check --input"
        )
    return files


def list_parts(source: Path | str, part_bytes: int = PART_BYTES) -> list[CorpusPart]:
    """Cut `source` into parts of about `part_bytes`, the same for any number of ranks."""
    parts: list[CorpusPart] = []
    texts: list[Path] = []
    size = 0
    for file in list_files(source):
        file_bytes = file.stat().st_size
        if _is_jsonl(file):
            parts.extend([CorpusPart(tuple(texts))] if texts else [])
            texts, size = [], 0
            if file.suffix in COMPRESSED:
                parts.append(CorpusPart((file,)))
                continue
            starts = range(0, max(file_bytes, 1), part_bytes)
            parts.extend(
                CorpusPart((file,), start, min(start + part_bytes, file_bytes)) for start in starts
            )
            continue
        texts.append(file)
        size += file_bytes
        if size >= part_bytes:
            parts.append(CorpusPart(tuple(texts)))
            texts, size = [], 0
    return [*parts, CorpusPart(tuple(texts))] if texts else parts


def read_part(
    part: CorpusPart,
    json_keys: Sequence[str] = ("text",),
    clean: Callable[[str], str] | None = None,
    id_key: str = "id",
) -> Iterator[Document]:
    """The documents of one part; see `read_documents`."""
    for document in _read_raw(part, json_keys, id_key):
        text = clean(document.text) if clean else document.text
        if text.strip():
            yield Document(text, document.source_id)


def _read_raw(part: CorpusPart, json_keys: Sequence[str], id_key: str) -> Iterator[Document]:
    if part.is_jsonl:
        yield from _read_lines(part, json_keys, id_key)
        return
    for file in part.files:
        try:
            text = file.read_bytes().decode("utf-8")
        except UnicodeDecodeError as error:
            raise CorpusError(file, _not_utf8(error), "Convert it to UTF-8") from error
        yield Document(text, str(file))


def _read_lines(part: CorpusPart, json_keys: Sequence[str], id_key: str) -> Iterator[Document]:
    """Lines that begin inside the part's bytes; the last one may run past its end."""
    (path,) = part.files
    with open_binary(path) as file:
        position = part.start
        if part.start:
            file.seek(part.start - 1)
            position += len(file.readline()) - 1
        while (part.end is None or position < part.end) and (line := file.readline()):
            begin, position = position, position + len(line)
            if not line.strip():
                continue
            try:
                record = _record_of_line(line)
                text = _text_of_record(record, json_keys)
            except CorpusError as error:
                where = f"{path}:{_line_number(path, begin)}"
                raise CorpusError(where, error.found, error.mend) from error
            given = record.get(id_key)
            named = isinstance(given, str | int) and not isinstance(given, bool)
            yield Document(text, str(given) if named else f"{path}:{begin}")


def _record_of_line(line: bytes) -> dict[str, Any]:
    try:
        record = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise CorpusError("", _not_utf8(error), "Convert the file to UTF-8") from error
    except json.JSONDecodeError as error:
        raise CorpusError(
            "", f"invalid JSON ({error.msg}, column {error.colno})", "Mend or remove the line"
        ) from error
    if not isinstance(record, dict):
        raise CorpusError("", "not a JSON object", 'Write lines like {"text": "…"}')
    return record


def _text_of_record(record: dict[str, Any], json_keys: Sequence[str]) -> str:
    texts = []
    for key in json_keys:
        if key not in record:
            raise CorpusError(
                "", f"no key {key!r} among {sorted(record)}", "Name the text's key with --json-keys"
            )
        if not isinstance(record[key], str):
            raise CorpusError(
                "",
                f"{key!r} is {type(record[key]).__name__}, not a string",
                "Mend the line, or name another key with --json-keys",
            )
        texts.append(record[key])
    return "\n\n".join(texts)


def _line_number(path: Path, position: int) -> int:
    """1-based number of the line that begins at byte `position`."""
    lines, left = 1, position
    with open_binary(path) as file:
        while left and (block := file.read(min(left, 1 << 20))):
            lines += block.count(b"\n")
            left -= len(block)
    return lines


def _not_utf8(error: UnicodeDecodeError) -> str:
    return f"not UTF-8 (byte 0x{error.object[error.start]:02x} at offset {error.start})"


def _is_jsonl(path: Path) -> bool:
    name = path.stem if path.suffix in COMPRESSED else path.name
    return name.endswith((".jsonl", ".json"))
