"""Vectors that nothing is near to, texts that an embedder reads in part: refused, or counted."""

from __future__ import annotations

import json
import shutil

import h5py
import numpy as np
import pytest

from retro_mcore.chunking import NO_NEIGHBOR
from retro_mcore.cli import build_index, query_neighbors
from retro_mcore.data.tokenizers.loading import load_project_tokenizer
from retro_mcore.errors import ConfigurationError, CorruptFileError
from retro_mcore.project import ProjectConfig, ProjectPaths
from retro_mcore.retrieval.chunk_text import chunk_texts
from retro_mcore.retrieval.database import ChunkDatabase
from retro_mcore.retrieval.embedders import build_embedder, sentence
from retro_mcore.retrieval.embedders.base import Embedder, embed_unique
from retro_mcore.retrieval.embedders.half_precision import HalfPrecision
from retro_mcore.retrieval.embedders.static import StaticEmbedder
from retro_mcore.retrieval.index import Embeddings
from retro_mcore.retrieval.neighbor_search import require_found
from retro_mcore.retrieval.retriever import Retriever
from retro_mcore.retrieval.stored_types import StoredCounts
from retro_mcore.retrieval.vectors import EmbeddingCounts, unusable
from tests.unit.data.projects import built_project, forget_neighbors, write_rows

DIMENSION = 8


class Given(Embedder):
    """Gives what it was told to, whatever the texts."""

    name, dimension = "given", DIMENSION

    def __init__(self, vectors) -> None:
        self.vectors = vectors

    def embed(self, texts):
        return self.vectors


def ones(count: int = 4, value: float = 1.0, dtype=np.float32) -> np.ndarray:
    """Rows of ones; `value` in the last of them."""
    rows = np.ones((count, DIMENSION), dtype)
    rows[-1, 0] = value
    return rows


TEXTS = list("abcd")


@pytest.mark.parametrize(
    "value", [np.nan, np.inf, -np.inf, 1e25, -3e38], ids=["nan", "inf", "-inf", "1e25", "-3e38"]
)
def test_vectors_that_nothing_is_near_to_are_refused(value):
    """A model that overflows in half precision left one chunk in ten without neighbors."""
    with pytest.raises(ConfigurationError) as caught:
        embed_unique(Given(ones(value=value)), TEXTS, first=40)
    assert str(caught.value).startswith("--embedder given: 1 of 4 vectors are NaN, infinite or")
    assert "those of chunk 43. Use another --embedder" in str(caught.value)


def test_many_such_vectors_are_counted_and_the_first_are_named():
    rows = ones(20)
    rows[3::2] = np.nan
    with pytest.raises(ConfigurationError, match=r"9 of 20 vectors .* chunks 3, 5, 7, 9, 11 "):
        embed_unique(Given(rows), [str(row) for row in range(20)])


@pytest.mark.parametrize(
    "vectors",
    [
        np.ones((3, DIMENSION)),
        np.ones((4, DIMENSION + 1)),
        np.ones(4 * DIMENSION),
        np.ones((4, 2, DIMENSION)),
        ones().astype(np.complex64),
        ones().astype(str),
        ones().astype(object),
        [[1.0] * DIMENSION, [1.0]],
        None,
    ],
    ids=["rows", "dimension", "flat", "tokens", "complex", "text", "objects", "ragged", "none"],
)
def test_an_embedder_that_gives_something_else_is_named(vectors):
    """Of a user's own Embedder."""
    with pytest.raises(ConfigurationError, match=r"--embedder given: gives .* shape \[4, 8\]"):
        embed_unique(Given(vectors), TEXTS)


@pytest.mark.parametrize("dtype", [np.float16, np.float64, np.int8, np.float32])
def test_real_numbers_of_any_width_are_taken(dtype):
    vectors = embed_unique(Given(ones(dtype=dtype)), TEXTS)
    assert vectors.dtype == np.float32
    assert (vectors == 1).all()
    assert embed_unique(Given(np.empty((0, DIMENSION), dtype)), []).shape == (0, DIMENSION)


def test_double_precision_beyond_single_is_refused():
    with pytest.raises(ConfigurationError, match=r"1 of 4 vectors"):
        embed_unique(Given(ones(value=1e300, dtype=np.float64)), TEXTS)


class Overflowing(Embedder):
    """Its vectors of long texts exceed what half precision holds."""

    name, dimension, precision = "overflowing", 2, np.float32

    def half(self):
        self.precision = np.float16

    def full(self):
        self.precision = np.float32

    def embed(self, texts):
        rows = np.array([[1e4 * len(text), 1] for text in texts], np.float32)
        with np.errstate(over="ignore"):
            return rows.reshape(-1, 2).astype(self.precision)


class OnlyHalf(Overflowing):
    """A registered embedder that does not know the way back."""

    full = None

    def __getattribute__(self, name):
        if name == "full":
            raise AttributeError(name)
        return super().__getattribute__(name)


def test_what_half_precision_cannot_hold_is_embedded_in_single_precision():
    embedder, counts = HalfPrecision(Overflowing()), EmbeddingCounts()
    vectors = embed_unique(embedder, ["a", "b" * 9, "", "b" * 9], counts)
    np.testing.assert_allclose(vectors[:, 0], [1e4, 9e4, 0, 9e4], rtol=1e-3)
    assert (counts.chunks, counts.in_full) == (4, 1)
    assert embed_unique(embedder, ["c"], counts)[0, 0] == 1e4  # in half precision again
    assert counts.in_full == 1
    with pytest.raises(ConfigurationError, match="Leave --embed-fp16 out"):
        embed_unique(HalfPrecision(OnlyHalf()), ["b" * 9])
    with pytest.raises(ConfigurationError, match="given has no half precision"):
        HalfPrecision(Given(ones()))


def test_vectors_of_zeros_are_counted():
    counts = EmbeddingCounts()
    embed_unique(Given(np.zeros((4, DIMENSION))), TEXTS, counts)
    assert counts.zero == 4


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_an_older_versions_embeddings_are_looked_at(tmp_path, value):
    embeddings = Embeddings(write_rows(ones(10, value), tmp_path, 4))
    assert embeddings.range(0, 8).shape == (8, DIMENSION)
    with pytest.raises(CorruptFileError) as caught:
        embeddings.range(0, 10)
    assert "08-10.hdf5: 1 vectors are NaN, infinite or too large, those of chunk 9" in str(
        caught.value
    )
    assert unusable(ones(10, value)).tolist() == [False] * 9 + [True]


@pytest.mark.parametrize(
    ("distances", "ids"), [([0.1, np.nan], [0, 1]), ([0.1, 0.2], [0, 9]), ([0.1, 0.2], [-2, 1])]
)
def test_what_an_index_finds_must_be_in_the_database(distances, ids):
    """An index that another program wrote, of other vectors."""
    database = type("Database", (), {"path": "train.hdf5", "__len__": lambda self: 9})()
    with pytest.raises(CorruptFileError, match=r"train\.hdf5: the index"):
        require_found(np.array([distances], np.float32), np.array([ids]), database)
    require_found(np.array([[0.1, np.nan]]), np.array([[8, NO_NEIGHBOR]]), database)


# The commands, with an embedder whose weights or limit were changed under it.


@pytest.fixture
def project(tmp_path):
    return shutil.copytree(built_project(), tmp_path / "project")


def without_index(project):
    """The project as before build_index."""
    forget_neighbors(project)
    shutil.rmtree(project / "index")
    (project / "stages" / "build_index.json").unlink()
    (project / "retro_mcore.json").write_text("{}")
    return project


def spoil(monkeypatch, text: str) -> None:
    """NaN for every text that holds `text`."""
    for kind in (sentence.SentenceEncoder, StaticEmbedder):
        monkeypatch.setattr(kind, "embed", spoiled(kind.embed, text))


def spoiled(embed, text: str):
    def embed_spoiled(self, texts):
        vectors = embed(self, texts)
        vectors[[text in each for each in texts]] = np.nan
        return vectors

    return embed_spoiled


def error_of(capsys, command, *arguments: object) -> str:
    assert command.main([*map(str, arguments)]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    return line


def test_live_retrieval_refuses_nan(monkeypatch):
    retriever = Retriever(built_project())
    spoil(monkeypatch, "zebra")
    with pytest.raises(ConfigurationError, match=r"1 of 2 vectors .* text 1"):
        retriever.search_texts(["horse", "zebra"])


def test_query_neighbors_refuses_nan(capsys, monkeypatch, project):
    spoil(monkeypatch, "")
    told = error_of(capsys, query_neighbors, "--project-dir", forget_neighbors(project))
    assert "20 of 20 vectors" in told
    assert "of query chunks 0, 1, 2, 3, 4 ..." in told
    assert not list(project.rglob("query/*/*.hdf5"))


def test_build_index_refuses_nan(capsys, monkeypatch, project):
    """68 of 732 vectors were NaN, and the command ended with exit code 0."""
    database, paths = ChunkDatabase.open(project), ProjectPaths(project)
    tokenizer = load_project_tokenizer(ProjectConfig.load(project), paths)
    texts = database.texts(range(len(database)), tokenizer)
    wrong = [row for row, text in enumerate(texts[20:40], 20) if texts[30] in text]
    spoil(monkeypatch, texts[30])
    told = error_of(capsys, build_index, "--project-dir", without_index(project))
    assert f"{len(wrong)} of 20 vectors" in told
    assert f" {wrong[0]}" in told
    assert not paths.index_choice.exists()


def test_what_was_cut_and_found_too_little_is_counted(capsys, monkeypatch, project):
    """512-token chunks with MiniLM, which reads 256 of its own tokens."""
    without_index(project)
    monkeypatch.setattr(sentence, "token_limit", lambda tokens: 20)
    assert build_index.main(["--project-dir", str(project)]) == 0
    database = ChunkDatabase.open(project)
    lengths = database.chunks[:, 4].astype(int) + 2  # WordPiece's count is the embedder's own
    cut = int((lengths > 20).sum())
    assert cut > 3
    report = json.loads((project / "stages" / "build_index.json").read_text())["report"]
    assert (report["chunks"], report["chunks_cut"]) == (len(database), cut)
    assert report["tokens"] == lengths.sum()
    assert report["tokens_cut"] == np.maximum(lengths - 20, 0).sum()
    told = capsys.readouterr().out
    assert f"{cut} of {len(database)} chunks ({cut / len(database):.1%})" in told
    assert "the embedder reads 20 tokens" in told
    # Again: the counts are those of the files that are reused.
    assert build_index.main(["--project-dir", str(project)]) == 0
    assert f"{cut} of {len(database)} chunks" in capsys.readouterr().out

    save = ["--project-dir", str(project), "--num-neighbors-save", str(len(database))]
    assert query_neighbors.main(save) == 0
    told = capsys.readouterr().out
    assert "train, cut by the embedder" in told
    assert f"fewer than {len(database)} neighbors" in told
    report = json.loads((project / "stages" / "query_neighbors.json").read_text())["report"]
    assert report["train"]["chunks"] == report["train"]["chunks_short"] == 32
    assert report["train"]["chunks_without"] == 0
    assert report["valid"]["chunks_cut"] > 0


def test_files_of_older_versions_count_nothing(capsys, project):
    for path in [*project.rglob("embeddings/*.hdf5"), *project.rglob("distances/*.hdf5")]:
        with h5py.File(path, "r+") as file:
            del file["counts"]
        path.with_name(f"{path.name}.done").unlink()
    from retro_mcore.project.shards import cut
    from retro_mcore.retrieval.index.embeddings import count_embedded

    shards = cut(ProjectPaths(project).embeddings, 107, 20)
    assert count_embedded(shards) == StoredCounts()


@pytest.mark.parametrize("pooling", [None, "mean"])
def test_an_encoder_counts_its_own_tokens(pooling):
    embedder = build_embedder("minilm", device="cpu", pooling=pooling)
    assert embedder.max_tokens == (256 if pooling is None else 512)
    assert embedder.count_tokens(["", "one two", "x " * 600]).tolist() == [2, 4, 602]
    counts = EmbeddingCounts()
    embed_unique(embedder, ["x " * 600, "one"], counts)
    assert (counts.chunks, counts.chunks_cut) == (2, 1)
    assert counts.tokens_cut == 602 - embedder.max_tokens


def test_ends_of_documents_are_embedded_as_megatron_does(project):
    """23 of 2,240 neighbors differed from those that megatron-core 0.15.3 found.

    A project that was indexed before keeps the line break that its neighbors were found with.
    """
    paths = ProjectPaths(project)
    tokenizer = load_project_tokenizer(ProjectConfig.load(project), paths)
    words = [tokenizer.tokenize(word) for word in ("one", "two")]
    chunk = np.array([*words[0], tokenizer.eod, *words[1]])
    assert Retriever(project)._project.source_settings.document_ends == "detokenized"
    assert chunk_texts(tokenizer, [chunk], "detokenized") == [tokenizer.detokenize(chunk.tolist())]
    assert chunk_texts(tokenizer, [chunk]) == ["one\ntwo"]
    # As an older version left it.
    settings = json.loads(paths.settings.read_text())
    del settings["document_ends"]
    paths.settings.write_text(json.dumps(settings))
    record = paths.stage_record("query_neighbors")
    values = json.loads(record.read_text())
    del values["options"]["document_ends of build_index"]
    record.write_text(json.dumps(values))
    static, saved = ["--embedder", "static"], ["--num-neighbors-save", "5"]
    for command, more in ((build_index, static), (query_neighbors, saved)):
        assert command.main(["--project-dir", str(project), *more]) == 0
    assert Retriever(project)._project.source_settings.document_ends == "line break"


def test_embeddings_that_an_older_version_began_are_gone_on_with(project):
    """build_index was interrupted, and retro-mcore updated meanwhile: days of embedding stay, and
    one index does not mix two ways."""
    paths = ProjectPaths(without_index(project))
    paths.settings.write_text('{"embedder": "static"}')  # whose ends of documents are line breaks
    flags = ["--project-dir", str(project), "--embedder", "static"]
    assert build_index.main([*flags, "--stage", "embed"]) == 0
    (first, *others) = sorted(paths.embeddings.glob("*.hdf5"))
    before = first.read_bytes()
    for path in others:
        path.unlink()
    paths.settings.write_text("{}")  # it is written when the index is there
    result = build_index.build_index(build_index.BuildIndexOptions(str(project), embedder="static"))
    assert result.embeddings.reused == 1
    assert first.read_bytes() == before
    assert json.loads(paths.settings.read_text())["document_ends"] == "line break"


def test_a_wider_search_may_find_nothing_either():
    """Repeated chunks may all fall into an empty list of an index, which is no foreign one then."""
    database = type("Database", (), {"path": "train.hdf5", "__len__": lambda self: 9})()
    nothing = np.full((16, 2), np.inf), np.full((16, 2), NO_NEIGHBOR)
    require_found(*nothing, database, may_be_empty=True)
    with pytest.raises(CorruptFileError, match="finds nothing for 16 query chunks"):
        require_found(*nothing, database)
