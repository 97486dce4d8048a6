"""Find the files of an input. Links are followed, and skipped files are reported.

In a folder, corpus files are those that end in .jsonl or .json (optionally with .gz or .zst) or in
.txt. A single file may have any other suffix, except those known not to hold plain text.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from retro_mcore.data.corpus.compressed import COMPRESSED
from retro_mcore.errors import CorpusError

_LINES = 'Write it as JSON lines, an object such as {"text": "…"} for each document'
_RENAME = "Rename it to .jsonl, if it holds JSON lines"
_UNPACK = "Decompress it; JSON lines may stay compressed, as .jsonl.gz or .jsonl.zst"
#: Suffixes of files that are not plain text, and what to do about them.
_FOREIGN = {
    **dict.fromkeys((".csv", ".tsv", ".parquet", ".arrow", ".feather", ".orc", ".avro"), _LINES),
    **dict.fromkeys((".xls", ".xlsx", ".ods", ".ppt", ".pptx", ".doc", ".docx", ".odt"), _LINES),
    **dict.fromkeys((".pdf", ".rtf", ".epub", ".mobi", ".djvu", ".ps"), _LINES),
    **dict.fromkeys((".html", ".htm", ".xhtml", ".xml", ".warc", ".wet"), _LINES),
    **dict.fromkeys((".npy", ".npz", ".pt", ".pth", ".pkl", ".pickle", ".h5", ".hdf5"), _LINES),
    **dict.fromkeys((".sqlite", ".sqlite3", ".db", ".tfrecord", ".msgpack", ".lmdb"), _LINES),
    **dict.fromkeys((".ndjson", ".jsonlines", ".jl"), _RENAME),
    **dict.fromkeys((".zip", ".tar", ".tgz", ".7z", ".rar", ".bz2", ".xz", ".lz4", ".br"), _UNPACK),
    **dict.fromkeys((".z", *COMPRESSED), _UNPACK),
}
_KINDS = ".jsonl, .jsonl.gz, .jsonl.zst or .txt files"


@dataclass(frozen=True)
class CorpusFiles:
    """The files of an input.

    Attributes:
        files: Corpus files in reading order; each is read once.
        left_out: Files in the folder that are not corpus files.
        broken_links: Links in the folder whose target does not exist.
        repeated_links: Links to files and folders that are already read.
    """

    files: tuple[Path, ...]
    left_out: tuple[Path, ...] = ()
    broken_links: tuple[Path, ...] = ()
    repeated_links: tuple[Path, ...] = ()

    @property
    def counts(self) -> Counter[str]:
        """Number of files of each kind, by name."""
        return Counter(
            files=len(self.files),
            files_left_out=len(self.left_out),
            broken_links=len(self.broken_links),
            repeated_links=len(self.repeated_links),
        )

    def describe_left_out(self) -> str:
        """`3 .csv, 1 .md (such as a/b.csv)`; empty if no file is skipped."""
        if not self.left_out:
            return ""
        endings = Counter(path.suffix.lower() or "without an ending" for path in self.left_out)
        kinds = [f"{count} {ending}" for ending, count in endings.most_common(8)]
        more = [f"{len(endings) - 8} other kinds"] if len(endings) > 8 else []
        return f"{', '.join(kinds + more)} (such as {self.left_out[0]})"


def is_json(path: Path) -> bool:
    """Whether the file name is that of JSON lines, compressed or not."""
    name = path.name.lower()
    for ending in COMPRESSED:
        name = name.removesuffix(ending)
    return name.endswith((".jsonl", ".json"))


def find_corpus_files(source: Path | str) -> CorpusFiles:
    """Find the corpus files of an input.

    Raises:
        CorpusError: the input does not exist, cannot be read, or holds no corpus file.
    """
    source = Path(source)
    try:
        is_folder, is_file = source.is_dir(), source.is_file()
        is_there = source.exists() or source.is_symlink()
    except OSError as error:  # for example a whole text given as a file name
        raise CorpusError(str(source)[:200], f"{error.strerror}", "Check --input") from error
    if is_folder:
        return _files_of_folder(source)
    if not is_file:
        found = "neither a file nor a folder" if is_there else "no such file or folder"
        raise CorpusError(source, found, "Check --input")
    if not is_json(source) and (hint := _FOREIGN.get(source.suffix.lower())):
        raise CorpusError(source, f"a {source.suffix} file is not read as text", hint)
    return CorpusFiles((source,))


def _files_of_folder(folder: Path) -> CorpusFiles:
    try:
        walk = _Walk(folder)
    except OSError as error:
        raise CorpusError(
            error.filename or folder, f"cannot be read ({error.strerror})", "Check its permissions"
        ) from error
    found = CorpusFiles(
        tuple(sorted(walk.files)), walk.left_out, tuple(walk.broken), tuple(walk.repeated)
    )
    if not found.files:
        others = f", but {found.describe_left_out()}" if found.left_out else ""
        raise CorpusError(folder, f"holds no {_KINDS}{others}", "Check --input")
    return found


class _Walk:
    """Collects every corpus file below a folder, following links.

    Each link target is read once, however many links lead to it. So cycles end, and folders that
    link to each other are not read repeatedly. Paths without links come first.
    """

    def __init__(self, root: Path) -> None:
        self.files: list[Path] = []
        self.broken: list[Path] = []
        self.repeated: list[Path] = []
        self._others: list[tuple[Path, Path]] = []
        self._links: list[Path] = []
        self._seen: set[Path] = set()
        self._visit(root, root.resolve())
        while self._links:
            links, self._links = sorted(self._links), []
            for link in links:
                self._follow(link)

    @property
    def left_out(self) -> tuple[Path, ...]:
        """Other files, except targets of links whose own name is that of a corpus file."""
        return tuple(sorted(path for path, real in self._others if real not in self._seen))

    def _follow(self, link: Path) -> None:
        if not link.exists():  # also true of a link to itself
            self.broken.append(link)
        elif (real := link.resolve()) in self._seen:
            self.repeated.append(link)
        else:
            self._visit(link, real)

    def _visit(self, path: Path, real: Path) -> None:
        """Visit a file, or a folder and everything below it."""
        waiting = [(path, real)]
        while waiting:
            path, real = waiting.pop()
            if real in self._seen:  # a folder below a linked one
                self.repeated.append(path)
            elif real.is_dir():
                self._seen.add(real)
                for entry in path.iterdir():
                    if entry.is_symlink():
                        self._links.append(entry)
                    else:
                        waiting.append((entry, real / entry.name))
            elif real.is_file() and _is_corpus_file(path):
                self._seen.add(real)
                self.files.append(path)
            else:
                self._others.append((path, real))


def _is_corpus_file(path: Path) -> bool:
    return is_json(path) or path.suffix.lower() == ".txt"


def readable_names(paths: Sequence[Path], limit: int = 20) -> Iterator[str]:
    """The first paths as printable text, since a file name may hold any bytes."""
    for path in paths[:limit]:
        yield os.fsencode(path).decode("utf-8", "replace")
