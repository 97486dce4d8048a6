"""Read a corpus: JSON lines (also compressed), text files, or folders of both.

A corpus is divided into parts: byte ranges of a JSONL file, or groups of text files. Any number of
ranks can share the parts, and the document order does not depend on the number of ranks. A
compressed file is a single part because it can only be read from the start.
"""

from __future__ import annotations

import codecs
import shlex
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from retro_mcore.data.corpus.compressed import COMPRESSED, open_binary
from retro_mcore.data.corpus.files import find_corpus_files, is_json
from retro_mcore.errors import CorpusError, MissingDependencyError
from retro_mcore.json_text import (
    JsonError,
    RecordWithRepeats,
    parse_json,
    replace_surrogates,
)

#: Target size of a part, in bytes of text.
PART_BYTES = 32 << 20


@dataclass(frozen=True)
class Document:
    """One document.

    Attributes:
        text: The text, never empty.
        source_id: Origin of the document: the id in its JSON line, else `file:byte` with the
            offset in the decompressed file. For a text file, its path.
    """

    text: str
    source_id: str


@dataclass(frozen=True)
class CorpusPart:
    """A unit of work: bytes [start, end) of one JSONL file, or whole text files."""

    files: tuple[Path, ...]
    start: int = 0
    end: int | None = None

    @property
    def is_jsonl(self) -> bool:
        """Whether the files hold JSON lines."""
        return is_json(self.files[0])


def text_cleaner() -> Callable[[str], str]:
    """ftfy's `fix_text`, which repairs mojibake, stray control characters and HTML entities.

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
    """Read all documents of a JSONL file, a text file, or a folder (recursive, sorted by path).

    Empty and whitespace-only documents are skipped, and lone surrogates become U+FFFD. `read_part`
    counts both.

    Args:
        source: The file or folder.
        json_keys: Keys of a JSON line that hold text. Several texts are joined by an empty line.
        clean: Function applied to every text, such as `text_cleaner()`.
        id_key: Key of a JSON line that holds its id. Lines without it are identified by position.

    Raises:
        CorpusError: there is nothing to read, or a line or file is malformed. Names file and line.
    """
    for part in list_parts(source):
        yield from read_part(part, json_keys, clean, id_key)


def list_parts(source: Path | str, part_bytes: int = PART_BYTES) -> list[CorpusPart]:
    """Divide `source` into parts of about `part_bytes`, the same for any number of ranks."""
    parts: list[CorpusPart] = []
    texts: list[Path] = []
    size = 0
    for file in find_corpus_files(source).files:
        file_bytes = file.stat().st_size
        if is_json(file):
            parts.extend([CorpusPart(tuple(texts))] if texts else [])
            texts, size = [], 0
            if file.suffix.lower() in COMPRESSED:
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
    counts: Counter[str] | None = None,
) -> Iterator[Document]:
    """Read the documents of one part; see `read_documents`.

    Args:
        part: The part to read.
        json_keys: See `read_documents`.
        clean: See `read_documents`.
        id_key: See `read_documents`.
        counts: Updated with what is skipped and replaced, by name: `empty_documents`,
            `empty_files`, `replaced_characters` (lone surrogates replaced by U+FFFD),
            `byte_order_marks_removed`, `cleaned_documents`, `documents_without_id`.
    """
    counts = Counter() if counts is None else counts
    for document in _read_raw(part, json_keys, id_key, counts):
        text, replaced = replace_surrogates(document.text)
        cleaned = clean(text) if clean else text
        counts["replaced_characters"] += replaced
        counts["cleaned_documents"] += cleaned != text
        if cleaned.strip():
            yield Document(cleaned, document.source_id)
        else:
            counts["empty_documents"] += 1


def _read_raw(
    part: CorpusPart, json_keys: Sequence[str], id_key: str, counts: Counter[str]
) -> Iterator[Document]:
    if part.is_jsonl:
        yield from _read_lines(part, json_keys, id_key, counts)
        return
    for file in part.files:
        yield Document(_read_text(file, counts), str(file))


def _read_text(file: Path, counts: Counter[str]) -> str:
    with open_binary(file) as stream:
        data = stream.read()
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise CorpusError(file, "is UTF-16 text", "Convert it to UTF-8")
    place = data.find(b"\0")
    if place >= 0 or data.startswith(b"%PDF-"):
        found = f"a NUL byte at offset {place}" if place >= 0 else "a PDF file"
        raise CorpusError(file, f"is not text ({found})", "Remove it, or convert it to UTF-8 text")
    counts["empty_files"] += not data
    return _decode(file, data, "Convert it to UTF-8", counts)


def _decode(where: object, data: bytes, hint: str, counts: Counter[str]) -> str:
    """Decode UTF-8 and remove the byte order mark, which is not part of the text."""
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise CorpusError(where, _not_utf8(error), hint) from error
    counts["byte_order_marks_removed"] += text.startswith("\ufeff")
    return text.removeprefix("\ufeff")


def _read_lines(
    part: CorpusPart, json_keys: Sequence[str], id_key: str, counts: Counter[str]
) -> Iterator[Document]:
    """Read the lines that begin inside the part's bytes; the last one may run past its end.

    Lines end at line feeds only.
    """
    (path,) = part.files
    with open_binary(path) as file:
        position = part.start
        if part.start:
            file.seek(part.start - 1)
            position += len(file.readline()) - 1
        while (part.end is None or position < part.end) and (line := file.readline()):
            begin, position = position, position + len(line)
            if not line.removeprefix(codecs.BOM_UTF8).strip():
                continue
            try:
                record = _record_of_line(line, counts)
                _refuse_repeats(record, (*json_keys, id_key))
                text = _text_of_record(record, json_keys)
            except CorpusError as error:
                where = f"{path}:{_line_number(path, begin)}"
                found, hint = _several_lines(path, line) or (error.found, error.hint)
                raise CorpusError(where, found, hint) from error
            given = _id_of_record(record, id_key)
            counts["documents_without_id"] += given is None and bool(text.strip())
            yield Document(text, f"{path}:{begin}" if given is None else given)
        counts["empty_files"] += not part.start and not position


def _id_of_record(record: dict[str, Any], id_key: str) -> str | None:
    """The id as text, from a string or an integer; None if there is none."""
    given = record.get(id_key)
    named = isinstance(given, str | int) and not isinstance(given, bool)
    return replace_surrogates(str(given))[0] if named else None


def _record_of_line(line: bytes, counts: Counter[str]) -> dict[str, Any]:
    text = _decode("", line, "Convert the file to UTF-8", counts)
    try:
        record = parse_json(text, allow_nan=True)
    except JsonError as error:
        found = "NUL bytes, which no JSON holds" if "\0" in text else error.in_line
        hint = "Fix or remove the line; each document must be one line of JSON"
        raise CorpusError("", f"invalid JSON ({found})", hint) from error
    if not isinstance(record, dict):
        found = f"not a JSON object but {type(record).__name__}"
        raise CorpusError("", found, 'Write a line like {"text": "…"} for each document')
    return record


def _refuse_repeats(record: dict[str, Any], keys: Sequence[str]) -> None:
    """Reject a line with two texts or two ids. Unused keys may be repeated."""
    repeated = record.repeated if isinstance(record, RecordWithRepeats) else ()
    for key in keys:
        if key in repeated:
            raise CorpusError("", f"has the key {key!r} more than once", "Keep one of them")


def _several_lines(path: Path, line: bytes) -> tuple[str, str] | None:
    """Error text and hint for a JSON file that is not JSON lines, such as a list.

    None if the line is malformed for another reason.
    """
    with open_binary(path) as file:
        lines = (each.removeprefix(codecs.BOM_UTF8).strip() for each in file)
        first = next(filter(None, lines), b"")
    if _begins_list(first):
        found, convert = "a list, not a document on each line", "jq -c '.[]'"
    elif any(map(_begins_object, (first, line.strip()))):
        found, convert = "an object over several lines, not one on each line", "jq -c ."
    else:
        return None
    hint = f"Write JSON lines, such as with: {convert}"
    if path.suffix.lower() not in COMPRESSED:
        target = path.with_suffix(".lines.jsonl" if path.suffix == ".jsonl" else ".jsonl")
        hint += f" {shlex.quote(str(path))} > {shlex.quote(str(target))}"
    return f"invalid JSON lines: it holds {found}", hint


def _begins_list(line: bytes) -> bool:
    """Whether a line is, or begins, a list of objects."""
    try:
        values = parse_json(line, allow_nan=True)
    except JsonError:
        return line.startswith(b"[")
    return isinstance(values, list) and any(isinstance(value, dict) for value in values)


def _begins_object(line: bytes) -> bool:
    """Whether a line begins an object that continues on the next line."""
    return line.startswith(b"{") and (line == b"{" or line.endswith(b","))


def _text_of_record(record: dict[str, Any], json_keys: Sequence[str]) -> str:
    texts = []
    for key in json_keys:
        if key not in record:
            raise CorpusError(
                "", f"no key {key!r} among {_some(record)}", "Name the text's key with --json-keys"
            )
        if not isinstance(record[key], str):
            raise CorpusError(
                "",
                f"{key!r} is {type(record[key]).__name__}, not a string",
                "Fix the line, or name another key with --json-keys",
            )
        texts.append(record[key])
    return "\n\n".join(texts)


def _some(record: dict[str, Any]) -> str:
    """Names of a record's first keys."""
    names = sorted(key[:50] for key in record)
    return repr(names[:10]) + (f" and {len(names) - 10} more" if len(names) > 10 else "")


def _line_number(path: Path, position: int) -> int:
    """1-based number of the line that begins at byte `position`."""
    lines, left = 1, position
    with open_binary(path) as file:
        while left and (block := file.read(min(left, 1 << 20))):
            lines += block.count(b"\n")
            left -= len(block)
    return lines


#: Leading bytes of other file formats.
_MAGIC = {
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
    b"\x1f\x8b": "gzip, to be named .gz",
    b"\x28\xb5\x2f\xfd": "Zstandard, to be named .zst",
}


def _not_utf8(error: UnicodeDecodeError) -> str:
    kinds = [kind for magic, kind in _MAGIC.items() if error.object.startswith(magic)]
    perhaps = f", perhaps {kinds[0]}" if kinds else ""
    place = f"byte 0x{error.object[error.start]:02x} at offset {error.start}"
    return f"not UTF-8 ({place}{perhaps})"
