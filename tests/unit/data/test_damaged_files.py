"""Damaged and foreign files of a project: one line that names the file, never a traceback.

Met by whoever copies a project from a full disk, or brings one that another program wrote.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import h5py
import numpy as np
import pytest

from retro_mcore.cli import build_db, build_index, inspect_neighbors, query_neighbors
from retro_mcore.cli.preprocess_corpus import preprocess_corpus
from retro_mcore.data.tokens.token_file import TokenFile
from retro_mcore.errors import CorruptFileError, ProjectError, RetroError, TokenizerError
from retro_mcore.project import ProjectConfig, ProjectPaths, ProjectSettings
from retro_mcore.project.hdf5 import map_dataset
from retro_mcore.retrieval.bert_tokens import BertTokenCounter, default_bert_vocab
from retro_mcore.retrieval.database import ChunkDatabase
from retro_mcore.retrieval.embedders.lexical import LexicalEmbedder
from retro_mcore.retrieval.index.project import ProjectIndex
from retro_mcore.retrieval.neighbor_tables import SavedDistances, SavedNeighbors
from retro_mcore.retrieval.rerank import load_reranker
from retro_mcore.samples.retro_dataset import build_retro_datasets
from tests.unit.data.projects import (
    built_project,
    documents,
    forget_neighbors,
    preprocess_options,
    write_corpus,
)


@pytest.fixture
def project(tmp_path):
    return shutil.copytree(built_project(), tmp_path / "project")


#: How the project's stages were run.
SAME = {
    build_db: ("--retro-doc-block-size", "6"),
    build_index: ("--embedder", "static"),
    query_neighbors: ("--num-neighbors-save", "5"),
}


def error_of(capsys, command, project: Path, *more: str) -> str:
    """A command that must stop with exit code 2; its one line."""
    more = more or SAME.get(command, ())
    assert command.main(["--project-dir", str(project), *more]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    return line


# Damages of any file: bytes to bytes.
DAMAGES = {
    "empty": lambda content: b"",
    "zeros": lambda content: bytes(len(content)),
    "half": lambda content: content[: len(content) // 2],
    "one byte less": lambda content: content[:-1],
    "text": lambda content: b"not what it was\n" * 20,
    "ones": lambda content: b"\xff" * len(content),
    "head lost": lambda content: content[64:],
}


def unsigned(path: Path) -> Path:
    """As another program leaves it: without our completion marker."""
    path.with_name(f"{path.name}.done").unlink(missing_ok=True)
    return path


#: The others take the same ways, and a minute.
OFTEN = ("zeros", "half")


@pytest.mark.parametrize(
    "damage",
    [pytest.param(d, marks=() if d in OFTEN else pytest.mark.slow) for d in DAMAGES],
)
@pytest.mark.parametrize(
    ("file", "commands"),
    [
        ("db/merged/train.hdf5", [build_index, query_neighbors, inspect_neighbors]),
        ("db/indexed_dataset_infos.json", [build_index]),
        ("index/faiss-par-add/Flat/added_1.000_1.000.faissindex", [query_neighbors]),
        ("data/corpus_text_document.idx", [build_db, build_index, query_neighbors]),
        ("query/train_*/*.hdf5", [inspect_neighbors]),
        ("query/train_*/distances/*.hdf5", [inspect_neighbors]),
        ("tokenizer/*vocab*", [build_db]),
        ("retro_mcore.json", [query_neighbors]),
    ],
)
@pytest.mark.parametrize("signed", [True, False])
def test_a_damaged_file_is_named_by_every_command(
    capsys, monkeypatch, tmp_path, project, damage, file, commands, signed
):
    monkeypatch.chdir(tmp_path)
    (path, *_) = sorted(project.glob(file))
    if not signed:
        unsigned(path)
    damaged = DAMAGES[damage](path.read_bytes())
    path.write_bytes(damaged)
    for command in commands:
        line = error_of(capsys, command, project)
        assert path.name in line or str(path.parent) in line, line
        assert "Restore it" in line or "another --project-dir" not in line
        assert path.read_bytes() == damaged  # nothing was lost


def rewrite(path: Path, name: str, rows: np.ndarray) -> None:
    """Other rows in a file, as another program would write them."""
    unsigned(path)
    with h5py.File(path, "r+") as file:
        del file[name]
        file[name] = rows


def read(path: Path, name: str) -> np.ndarray:
    with h5py.File(path) as file:
        return file[name][:]


def with_value(rows: np.ndarray, column: int, value: float) -> np.ndarray:
    rows = rows.copy()
    rows[3, column] = value
    return rows


DATABASES = {
    "a dataset that is not there": lambda rows: with_value(rows, 0, 1),
    "a document that is not there": lambda rows: with_value(rows, 1, 20),
    "tokens beyond the document": lambda rows: with_value(rows, 3, 4_000_000_000),
    "a chunk without tokens": lambda rows: with_value(rows, 3, rows[3, 2]),
    "longer chunks": lambda rows: with_value(rows, 2, 0) if rows[3, 2] else rows[:, :4],
    "negative": lambda rows: with_value(rows.astype(np.int64), 2, -1),
    "four columns": lambda rows: rows[:, :4],
    "flat": lambda rows: rows.ravel(),
    "floating point": lambda rows: rows.astype(np.float32),
    "text": lambda rows: rows.astype("S10"),
}


@pytest.mark.parametrize("change", DATABASES)
def test_chunks_that_the_data_does_not_have(project, change):
    path = ProjectPaths(project).merged_db("train")
    rewrite(path, "chunks", DATABASES[change](read(path, "chunks")))
    with pytest.raises(CorruptFileError, match=r"train\.hdf5: "):
        ChunkDatabase.open(project)


NEIGHBORS = {
    "beyond the database": lambda rows: with_value(rows, 1, 107),
    "far beyond it": lambda rows: with_value(rows, 0, 1 << 60),
    "below -1": lambda rows: with_value(rows, 4, -2),
    "floating point": lambda rows: rows.astype(np.float32),
    "NaN": lambda rows: with_value(rows.astype(np.float64), 0, np.nan),
    "text": lambda rows: rows.astype("S10"),
    "objects": lambda rows: rows.astype("S10").astype(object),
    "flat": lambda rows: rows.ravel(),
    "other rows": lambda rows: rows[1:],
    "no columns": lambda rows: rows[:, :0],
    "more columns than the next file": lambda rows: np.hstack([rows, rows]),
}


@pytest.mark.parametrize("change", NEIGHBORS)
def test_neighbors_of_another_writer(capsys, monkeypatch, tmp_path, project, change):
    monkeypatch.chdir(tmp_path)
    (path, *_) = sorted(project.glob("query/train_*/*.hdf5"))
    rewrite(path, "neighbors", NEIGHBORS[change](read(path, "neighbors")))
    with pytest.raises(CorruptFileError, match=r"\.hdf5: "):
        build_retro_datasets(project)
    assert str(path.parent) in error_of(capsys, inspect_neighbors, project)


def test_ids_that_were_not_looked_at_are_when_they_are_read(monkeypatch, project):
    from retro_mcore.retrieval import neighbor_tables as neighbors

    (path, *others) = sorted(project.glob("query/train_*/*.hdf5"))
    # Few of each file, of which a large corpus has thousands.
    monkeypatch.setattr(neighbors, "_LOOKED_AT", 2 * (1 + len(others)))
    rewrite(path, "neighbors", with_value(read(path, "neighbors"), 0, 107))
    saved = SavedNeighbors(path.parent, 107)
    assert len(saved.rows(0, 3)) == 3
    with pytest.raises(CorruptFileError, match="names chunk 107, the database has 107"):
        saved.rows(2, 4)
    kept = read(path, "neighbors").astype(np.uint64)  # -1 as some write it
    kept[3, 0] = 2**64 - 1
    rewrite(path, "neighbors", kept.astype(np.int64))
    assert SavedNeighbors(path.parent, 107).rows(3, 4)[0, 0] == -1


DISTANCES = {
    "NaN": lambda rows: with_value(rows, 0, np.nan),
    "text": lambda rows: rows.astype("S10"),
    "integers": lambda rows: rows.astype(np.int32),
    "fewer columns": lambda rows: rows[:, 1:],
    "other rows": lambda rows: rows[2:],
}


@pytest.mark.parametrize("change", DISTANCES)
def test_distances_of_another_writer(capsys, monkeypatch, tmp_path, project, change):
    monkeypatch.chdir(tmp_path)
    for path in sorted(project.glob("query/train_*/distances/*.hdf5")):
        rewrite(path, "distances", DISTANCES[change](read(path, "distances")))
    assert "distances" in error_of(capsys, inspect_neighbors, project)


def test_stray_files_are_nobodys(capsys, monkeypatch, tmp_path, project):
    """A copy under another name, an editor's file, a folder: upstream's names are numbers."""
    monkeypatch.chdir(tmp_path)
    folders = [
        *project.glob("query/*"),
        *project.glob("query/*/distances"),
        project / "db" / "merged",
        *project.glob("db/individual/*"),
        project / "index" / "embeddings",
    ]
    for folder in folders:
        (folder / "copy of 000-020.hdf5").write_bytes(b"stray")
        (folder / "notes.hdf5").write_text("stray")
        (folder / "x-y.hdf5").mkdir()
        (folder / ".0-1.hdf5").write_text("stray")
        (folder / "readme.txt").write_text("stray")
    where = ["--project-dir", str(project)]
    assert build_db.main([*where, "--retro-doc-block-size", "6"]) == 0
    assert build_index.main([*where, *SAME[build_index]]) == 0
    assert query_neighbors.main([*where, "--num-neighbors-save", "5"]) == 0
    assert inspect_neighbors.main(where) == 0
    build_retro_datasets(project)


def test_files_of_two_searches_are_not_mixed(project):
    (path, *_) = sorted(project.glob("query/train_*/*.hdf5"))
    shutil.copy(path, path.with_name("000-010.hdf5"))
    rewrite(path.with_name("000-010.hdf5"), "neighbors", read(path, "neighbors")[:10])
    with pytest.raises(CorruptFileError, match=r"begins with row 0, the files before it end with"):
        SavedNeighbors(path.parent)
    path.with_name("000-010.hdf5").unlink()
    path.unlink()
    with pytest.raises(CorruptFileError, match=r"begins with row 20, .* end with 0"):
        SavedNeighbors(path.parent)


def header(path: Path, offset: int, content: bytes) -> None:
    data = bytearray(path.read_bytes())
    data[offset : offset + len(content)] = content
    path.write_bytes(data)


COUNT = 20  # sequences of the project, whose lengths begin at byte 34
HUGE = (1 << 62).to_bytes(8, "little")
TOKEN_FILES = {
    "another version": (9, b"\7"),
    "floating point": (17, b"\6"),
    "no such type": (17, b"\x63"),
    "type 0": (17, b"\0"),
    "another width": (17, b"\4"),
    "2^62 sequences": (18, HUGE),
    "no sequences": (18, bytes(8)),
    "2^62 documents": (26, HUGE),
    "no documents": (26, bytes(8)),
    "a negative length": (34, b"\xff\xff\xff\xff"),
    "a longer sequence": (34, b"\xff\xff\xff\x7f"),
    "an offset beyond the tokens": (34 + 4 * COUNT + 8, HUGE),
    "a negative offset": (34 + 4 * COUNT + 8, b"\xff" * 8),
    "an odd offset": (34 + 4 * COUNT + 8, b"\1"),
    "documents beyond the sequences": (34 + 12 * COUNT + 8 * COUNT, HUGE),
    "documents backwards": (34 + 12 * COUNT + 8, HUGE),
}


@pytest.mark.parametrize("change", TOKEN_FILES)
def test_an_idx_that_points_elsewhere(capsys, project, change):
    prefix = project / "data" / "corpus_text_document"
    path = unsigned(prefix.with_suffix(".idx"))
    assert len(TokenFile(prefix)) == COUNT
    header(path, *TOKEN_FILES[change])
    with pytest.raises(CorruptFileError, match=r"corpus_text_document\.(idx|bin): "):
        TokenFile(prefix)
    assert "corpus_text_document" in error_of(capsys, build_db, project)


VOCABULARIES = {
    "zeros": lambda text: bytes(len(text)),
    "empty": lambda text: b"",
    "no UTF-8": lambda text: b"\xff\xfe" + text,
    "half": lambda text: text[300_000:],
    "without [UNK]": lambda text: text.replace(b"[UNK]\n", b""),
    "json": lambda text: b'{"model": {"vocab": {}}}',
}


@pytest.mark.parametrize("change", VOCABULARIES)
def test_a_bert_vocabulary_that_is_none(tmp_path, change):
    path = tmp_path / "vocab.txt"
    path.write_bytes(VOCABULARIES[change](default_bert_vocab().read_bytes()))
    with pytest.raises(TokenizerError, match=r"vocab\.txt: "):
        BertTokenCounter(path)


INFOS = {
    "missing": None,
    "garbage": "{",
    "no list": "{}",
    "no objects": "[1]",
    "empty": "[]",
    "keys missing": '[{"prefix": "a"}]',
    "sampled too many": {"n_chunks_sampled": 10**15},
    "negative": {"n_chunks_train": -1},
    "text": {"n_chunks_train": "many"},
    "another database's": {"n_chunks_train": 5, "n_chunks_sampled": 5},
    "unknown keys": {"surprise": 1},
}


@pytest.mark.parametrize("change", INFOS)
def test_infos_that_cannot_be(capsys, project, change):
    forget_neighbors(project)
    path, content = ProjectPaths(project).dataset_infos, INFOS[change]
    if content is None:
        path.unlink()
    elif isinstance(content, dict):
        path.write_text(json.dumps([{**json.loads(path.read_text())[0], **content}]))
    else:
        path.write_text(content)
    line = error_of(capsys, build_index, project)
    assert "indexed_dataset_infos.json: " in line
    assert "build_db" in line
    assert build_db.main(["--project-dir", str(project), "--retro-doc-block-size", "6"]) == 0
    assert build_index.main(["--project-dir", str(project), *SAME[build_index]]) == 0


def other_index(project: Path, index) -> Path:
    """Another program's index in the place of the project's."""
    import faiss

    path = unsigned(ProjectPaths(project).added_index("Flat"))
    faiss.write_index(index, str(path))
    return path


def indexes() -> dict:
    import faiss

    random = np.random.default_rng(0).normal(size=(107, 384)).astype(np.float32)
    other, fewer, foreign, nan = (
        faiss.IndexFlatL2(16),
        faiss.IndexFlatL2(384),
        faiss.IndexIDMap(faiss.IndexFlatL2(384)),
        faiss.IndexFlatL2(384),
    )
    other.add(random[:, :16].copy())
    fewer.add(random[:50])
    foreign.add_with_ids(random, np.arange(1000, 1107))
    nan.add(np.full_like(random, 1e30))
    return {"dimension": other, "number": fewer, "ids": foreign, "NaN": nan}


@pytest.mark.parametrize("kind", ["dimension", "number", "ids", "NaN"])
def test_an_index_of_another_database(capsys, project, kind):
    forget_neighbors(project)
    other_index(project, indexes()[kind])
    line = error_of(capsys, query_neighbors, project)
    assert "index" in line
    assert "uild" in line  # what helps
    assert not list(project.glob("query/*/*.hdf5"))


def test_a_truncated_index_is_built_again(capsys, project):
    """It was told to be of another project, when all that helps is to build it again."""
    path = ProjectPaths(project).added_index("Flat")
    path.write_bytes(path.read_bytes()[:-100])
    line = error_of(capsys, query_neighbors, project, "--num-neighbors-save", "5")
    assert "added_1.000_1.000.faissindex: is damaged" in line
    assert f"Run build_index --project-dir {project} again" in line
    assert build_index.main(["--project-dir", str(project), *SAME[build_index]]) == 0
    again = ["--project-dir", str(project), "--num-neighbors-save", "5"]
    assert query_neighbors.main(again) == 0


def test_another_programs_finished_project_needs_no_search(capsys, project):
    """It has no index of ours, and needs none."""
    shutil.rmtree(project / "stages")
    shutil.rmtree(project / "index")
    (project / "retro_mcore.json").unlink()
    for path in project.rglob("*.done"):
        path.unlink()
    line = error_of(capsys, query_neighbors, project)
    assert "This project is complete: continue with pretrain_retro" in line
    shutil.rmtree(project / "query")
    assert "Run build_index" in error_of(capsys, query_neighbors, project)


def test_lost_settings_are_told_and_made_again(capsys, tmp_path):
    """Somebody copied a project without its retro_mcore.json: it was read as another program's,
    whose documents have no BOS, and the next stage wrote that down."""
    corpus = write_corpus(tmp_path / "corpus.jsonl", documents())
    options = preprocess_options(tmp_path / "project", corpus, add_bos_token=True)
    preprocess_corpus(options)
    settings = ProjectPaths(tmp_path / "project").settings
    before = settings.read_bytes()
    settings.unlink()
    line = error_of(capsys, build_db, tmp_path / "project")
    assert "retro_mcore.json: no such file, but the project was created with one" in line
    preprocess_corpus(options)
    assert settings.read_bytes() == before


ARRAYS = {
    "half": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "empty": lambda path: path.write_bytes(b""),
    "zeros": lambda path: path.write_bytes(bytes(path.stat().st_size)),
    "text": lambda path: path.write_text("weights"),
    "objects": lambda path: np.save(path, np.array([{}]), allow_pickle=True),
    "floating point": lambda path: np.save(path, np.ones(1 << 17)),
    "other buckets": lambda path: np.save(path, np.ones(7, np.uint16)),
    "an archive": lambda path: np.savez(path.open("wb"), np.ones(7)),
    "2^50 numbers": lambda path: path.write_bytes(
        path.read_bytes().replace(b"(131072,)", b"(2222222222222222,)")
    ),
}


@pytest.mark.parametrize("change", ARRAYS)
def test_lexical_weights_that_are_none(tmp_path, change):
    path = tmp_path / "lexical_weights.npy"
    np.save(path, np.ones(1 << 17, np.uint16))
    LexicalEmbedder.load(path)
    ARRAYS[change](path)
    with pytest.raises(CorruptFileError, match=r"lexical_weights\.npy: .*build_index"):
        LexicalEmbedder.load(path)


@pytest.mark.parametrize(
    "counts", [np.ones(30), np.ones((502, 1)), np.full(502, np.nan), np.ones(502, np.int64)]
)
def test_token_counts_that_are_none(tmp_path, project, counts):
    paths = ProjectPaths(project)
    np.save(paths.token_counts, counts)
    with pytest.raises(CorruptFileError, match=r"token_counts\.npy: "):
        load_reranker("bm25", paths, ChunkDatabase.open(project), 16, 500)


def test_hdf5_files_with_surprises(tmp_path):
    path = tmp_path / "file.hdf5"
    with h5py.File(path, "w") as file:
        file.create_group("group")
        file.create_dataset("claimed", (1 << 45,), np.float32, chunks=(1 << 20,))
        file["text"] = "text"
        file["compound"] = np.zeros(3, [("a", "i4")])
        file.create_dataset("compressed", data=np.arange(10_000), compression="gzip")
        file["nothing"] = h5py.Empty("f4")
        file["broken"] = h5py.SoftLink("/nowhere")
    for name in ("group", "claimed", "text", "compound", "nothing", "broken", "none"):
        with pytest.raises(CorruptFileError, match=r"file\.hdf5: "):
            map_dataset(path, name)
    assert (map_dataset(path, "compressed", "i", 1) == np.arange(10_000)).all()
    with pytest.raises(CorruptFileError, match="not floating-point numbers"):
        map_dataset(path, "compressed", "f")
    with pytest.raises(CorruptFileError, match="has shape"):
        map_dataset(path, "compressed", "i", 2)
    with pytest.raises(ProjectError):
        SavedDistances(tmp_path)
    with pytest.raises(RetroError):
        ProjectIndex(
            ProjectPaths(tmp_path),
            ProjectSettings(),
            3,
            ProjectConfig.load(built_project()).retro_block_size,
        )


@pytest.mark.parametrize("kind", ["link", "raw bytes", "virtual"])
def test_ids_in_another_file_are_refused(tmp_path, kind):
    """The offset of a linked dataset is one in its own file: here, other bytes are there."""
    ids = np.arange(10).reshape(5, 2)
    path, other = tmp_path / "0-5.hdf5", tmp_path / "other.h5"
    other.write_bytes(ids.tobytes())
    if kind != "raw bytes":
        with h5py.File(other, "w") as file:
            file["ids"] = ids
    with h5py.File(path, "w") as file:
        if kind == "link":
            file["neighbors"], file["padding"] = h5py.ExternalLink(str(other), "/ids"), ids
        elif kind == "virtual":
            layout = h5py.VirtualLayout(ids.shape, ids.dtype)
            layout[:] = h5py.VirtualSource(str(other), "ids", ids.shape)
            file.create_virtual_dataset("neighbors", layout)
        else:
            file.create_dataset("neighbors", ids.shape, ids.dtype, external=str(other))
    with pytest.raises(CorruptFileError, match=r"0-5.hdf5: 'neighbors' refers to another file"):
        SavedNeighbors(tmp_path)
