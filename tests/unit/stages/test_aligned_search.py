"""query_neighbors and update_db on aligned projects, against exhaustive search."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from retro_mcore.chunking import NO_NEIGHBOR
from retro_mcore.cli.build_db import BuildDbOptions, build_db
from retro_mcore.cli.build_index import BuildIndexOptions, build_index
from retro_mcore.cli.preprocess_corpus import preprocess_corpus
from retro_mcore.cli.query_neighbors import QueryNeighborsOptions, query_neighbors
from retro_mcore.cli.update_db import UpdateDbOptions, update_db
from retro_mcore.data.tokenizers.loading import load_project_tokenizer
from retro_mcore.data.tokens.token_file import TokenFile
from retro_mcore.errors import ProjectError
from retro_mcore.evaluation.document_rows import saved_document_neighbors
from retro_mcore.evaluation.documents import HeldOutDocuments, search_document_neighbors
from retro_mcore.project import ProjectConfig, ProjectPaths
from retro_mcore.project.config import ProjectSettings
from retro_mcore.project.records import stage_report
from retro_mcore.retrieval.database import ChunkDatabase
from retro_mcore.retrieval.embedders.lexical import LexicalEmbedder
from retro_mcore.retrieval.index import filling
from retro_mcore.retrieval.index.embeddings import Embeddings
from retro_mcore.retrieval.neighbor_tables import SavedDistances, SavedNeighbors
from retro_mcore.retrieval.project_search import open_search
from retro_mcore.retrieval.query_chunks import ChunkEmbedder
from retro_mcore.samples.chunk_neighbors import NO_ROW
from retro_mcore.samples.retro_dataset import build_retro_datasets
from retro_mcore.stages import query_neighbors as query_command
from retro_mcore.stages.build_index import stored_embeddings
from tests.unit.data.aligned import aligned_database
from tests.unit.data.projects import documents, forget_neighbors, write_corpus

SAVED = 5
#: Stored queries are in fp16: unit vectors move by up to 2^-11, squared distances by 4 times that.
OF_STORING = 2e-3
#: The second corpus: near copies, and a held-out document that repeats a training document.
TEXTS = [*documents(16, 200), documents(16, 200)[1]]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a finished aligned project whose documents begin with BOS."""
    folder = tmp_path_factory.mktemp("aligned")
    project = aligned_database(folder, True, TEXTS)
    write_corpus(folder / "more.jsonl", documents(60, 200)[40:48])
    build_index(BuildIndexOptions(str(project), embedder="lexical"))
    query_neighbors(QueryNeighborsOptions(str(project), num_neighbors_save=SAVED))
    return folder


@pytest.fixture
def project(built: Path, tmp_path: Path) -> Path:
    return shutil.copytree(built, tmp_path / "copy") / "project"


def search_again(project: Path, **options: object) -> object:
    return query_neighbors(QueryNeighborsOptions(str(project), num_neighbors_save=SAVED, **options))


def tables(project: Path) -> dict[str, bytes]:
    """All saved neighbors, distances and markers."""
    query = project / "query"
    return {
        str(path.relative_to(query)): path.read_bytes()
        for path in sorted(query.rglob("*"))
        if path.is_file()
    }


class Oracle:
    """The nearest chunks of each row by exhaustive search, not of the row's document."""

    def __init__(self, project: Path) -> None:
        paths, search = ProjectPaths(project), open_search(project)
        config = ProjectConfig.load(project)
        directories = config.neighbor_dirs(ProjectSettings.load(project))
        self.database = search.database
        source = search.source
        stored = Embeddings(stored_embeddings(source).shards)
        vectors = stored.range(0, len(stored))
        tokenizer = load_project_tokenizer(config, paths)
        ends = search.source_settings.document_ends
        embedder = ChunkEmbedder(tokenizer, search.load_embedder(), ends)
        self.own = {name: ChunkDatabase.open(project, name, own=True) for name in directories}
        self.saved = {
            name: SavedNeighbors(paths.query / directory, len(self.database))
            for name, directory in directories.items()
        }
        self.distances = {}
        for name, rows in self.own.items():
            queries = embedder.embed(rows.tokens(range(len(rows))), 0)
            distances = ((queries[:, None] - vectors) ** 2).sum(-1)
            mine, theirs = (self._keys(database, source, paths) for database in (rows, None))
            distances[mine[:, None] == theirs] = np.inf
            self.distances[name] = distances

    def _keys(self, database, source, paths) -> np.ndarray:
        """A text for each row's document: that of the dataset's file and its number."""
        of = database or self.database
        names = [file.prefix.name for file in of.token_sources]
        return np.array([f"{names[dataset]} {number}" for dataset, number in of.chunks[:, :2]])

    def check(self) -> None:
        """Distances are the smallest there are; ids may differ where they tie."""
        for name, distances in self.distances.items():
            ids = self.saved[name].rows_at(np.arange(len(distances)))
            saved = SavedDistances(self.saved[name].directory).rows(0, len(ids))
            wanted = np.sort(distances, axis=1)[:, : ids.shape[1]]
            np.testing.assert_allclose(saved, wanted, atol=OF_STORING)
            rows = np.arange(len(ids))[:, None]
            np.testing.assert_allclose(distances[rows, ids], saved, atol=OF_STORING)


def test_every_row_has_the_nearest_chunks_of_other_documents(built: Path) -> None:
    oracle = Oracle(built / "project")
    oracle.check()
    assert set(oracle.saved) == {"train", "valid"}
    assert len(oracle.saved["train"]) == len(oracle.database)
    names = ProjectConfig.load(built / "project").retro_neighbor_dirs
    assert set(names.values()) == {None}  # other readers stop


def test_no_training_chunk_is_embedded_and_copies_are_counted(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    embedded: list[str] = []
    embed = LexicalEmbedder.embed
    monkeypatch.setattr(
        LexicalEmbedder, "embed", lambda self, texts: embedded.extend(texts) or embed(self, texts)
    )
    before = tables(project)
    report = search_again(forget_neighbors(project))
    assert tables(project) == before
    oracle = Oracle(project)
    train, valid = report.counts["train"], report.counts["valid"]
    assert train.vectors_stored == train.chunks == len(oracle.own["train"])
    assert (valid.vectors_stored, valid.chunks) == (0, len(oracle.own["valid"]))
    texts = {tuple(chunk) for chunk in oracle.own["valid"].tokens(range(valid.chunks))}
    assert len(set(embedded[: len(texts)])) <= len(texts)
    for name, counts in report.counts.items():
        chunks = oracle.own[name].tokens(range(counts.chunks))
        found = [
            [
                neighbor != NO_NEIGHBOR
                and np.array_equal(chunk, oracle.database.tokens([neighbor])[0])
                for neighbor in row
            ]
            for chunk, row in zip(chunks, oracle.saved[name].rows(0, len(chunks)), strict=True)
        ]
        assert counts.copy_found == sum(map(any, found))
        assert counts.nearest_is_copy == sum(row[0] for row in found)
        assert counts.near_copy_found >= sum(any(row[:2]) for row in found)
        recorded = stage_report(ProjectPaths(project), "query_neighbors")[name]
        assert recorded["copy_found"] == counts.copy_found
    assert valid.copy_found >= 10  # the document that is in both


def test_held_out_chunks_are_embedded_once(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before, query = tables(project), ProjectPaths(project).query
    embed, embedded = LexicalEmbedder.embed, Counter[str]()
    monkeypatch.setattr(
        LexicalEmbedder, "embed", lambda self, texts: embedded.update(texts) or embed(self, texts)
    )
    first, *_ = sorted((query / "vectors_valid").glob("*.hdf5"))
    for damaged in (False, True):
        if damaged:
            first.write_bytes(bytes(first.stat().st_size))
        for name in ("chunks_train", "chunks_valid"):
            shutil.rmtree(query / name)
        (project / "stages" / "query_neighbors.json").unlink()
        search_again(project)
        assert tables(project) == before
        assert bool(embedded) == damaged


def test_other_samples_need_no_search(project: Path) -> None:
    config = json.loads((project / "config.json").read_text())
    changed = {"seed": 7, "seq_length": 32, "train_samples": 3, "global_batch_size": 1}
    config |= {f"retro_gpt_{name}": value for name, value in changed.items()}
    (project / "config.json").write_text(json.dumps(config))
    report = search_again(project)
    assert all(shards.reused == shards.total for shards in report.reports.values())
    dataset = build_retro_datasets(project, 2, 2)["train"]
    assert dataset is not None
    assert (dataset[0]["neighbor_chunks"][..., 0] >= 0).any()
    config["retro_gpt_split"] = "50,25,25"
    (project / "config.json").write_text(json.dumps(config))
    with pytest.raises(ProjectError, match="retro_gpt_split"):
        search_again(project)


def test_missing_vectors_are_refused_and_made_again(project: Path) -> None:
    before = tables(project)
    paths = ProjectPaths(project)
    first, *_, last = sorted(paths.embeddings.glob("*.hdf5"))
    first.unlink()
    report = search_again(project)  # nothing is searched, so nothing is missing
    assert report.counts["train"].vectors_stored
    forget_neighbors(project)
    with pytest.raises(ProjectError, match=r"1 of \d+ files are missing.*--stage embed"):
        search_again(project)
    build_index(BuildIndexOptions(str(project), embedder="lexical", stage="embed"))
    content = last.read_bytes()
    last.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(ProjectError, match="is damaged"):
        search_again(project)
    last.write_bytes(content)
    search_again(project)
    assert tables(project) == before


def test_the_order_of_bm25(project: Path) -> None:
    search_again(forget_neighbors(project), rerank="bm25")
    oracle = Oracle(project)
    tokenizer = load_project_tokenizer(ProjectConfig.load(project), ProjectPaths(project))
    bm25 = open_search(project).load_reranker("bm25", tokenizer)
    assert bm25 is not None
    for name, saved in oracle.saved.items():
        ids = saved.rows(0, len(saved))
        for row, chunk in enumerate(oracle.own[name].tokens(range(len(ids)))):
            others = np.flatnonzero(oracle.distances[name][row] < np.inf)
            best = np.sort(bm25.scores(chunk, others))[::-1][:SAVED]
            np.testing.assert_allclose(bm25.scores(chunk, ids[row]), best)


def test_appended_documents_are_found(project: Path) -> None:
    before = Oracle(project)
    old = before.saved["train"].rows(0, len(before.saved["train"]))
    vectors = {path: path.stat().st_ino for path in project.glob("query/vectors_valid/*.hdf5")}
    result = update_db(UpdateDbOptions(str(project), append=[str(project.parent / "more.jsonl")]))
    after = Oracle(project)
    after.check()
    train = result.neighbors.counts["train"]
    assert train.vectors_stored == train.chunks == len(old)
    assert vectors == {path: path.stat().st_ino for path in vectors}  # not embedded again
    assert not list(project.glob("query/vectors_valid_*"))
    assert len(after.database) > len(before.database)
    assert (after.saved["train"].rows(0, len(old)) >= len(before.database)).any()
    # The new documents are laid out as the old, and the old neighbors stay.
    (prefix,) = ProjectPaths(result.project).data.glob("more*.bin")
    assert not (TokenFile(prefix.with_suffix("")).lengths % 16).any()
    assert (project / "query" / "chunks_train").is_dir()
    dataset = build_retro_datasets(project, 2, 2)["train"]
    assert dataset is not None
    assert len(dataset.database) == len(after.database)
    assert dataset[0]["neighbor_chunks"].max() >= 0
    # A second update, and back.
    write_corpus(project.parent / "last.jsonl", documents(60, 200)[50:53])
    update_db(UpdateDbOptions(str(project), append=[str(project.parent / "last.jsonl")]))
    Oracle(project).check()
    update_db(UpdateDbOptions(str(project), exchange=str(project)))
    np.testing.assert_array_equal(Oracle(project).saved["train"].rows(0, len(old)), old)


@pytest.fixture(scope="module")
def listed(built: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The project with an index of lists, of which a search probes some."""
    folder = tmp_path_factory.mktemp("listed") / "copy"
    project = shutil.copytree(built, folder) / "project"
    shutil.rmtree(project / "index")
    (project / "stages" / "build_index.json").unlink()
    options = BuildIndexOptions(str(project), embedder="lexical", index="IVF8,Flat", nprobe=3)
    build_index(options)
    search_again(forget_neighbors(project))
    return folder


def test_only_new_chunks_are_searched_where_the_rest_is_known(
    listed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The nearest in the probed lists are the nearest of the old and the new ones in them."""
    found = []
    for known in (True, False):
        folder = shutil.copytree(listed, tmp_path / str(known))
        if not known:
            monkeypatch.setattr(query_command, "find_old_neighbors", lambda *given: None)
        result = []
        for name in ("more", "last"):
            corpus = folder / f"{name}.jsonl"
            if name == "last":
                write_corpus(corpus, documents(60, 200)[50:53])
            # Fewer candidates than are saved, so that the search is widened.
            options = {"append": [str(corpus)], "num_neighbors_query": 2}
            result.append(update_db(UpdateDbOptions(str(folder / "project"), **options)))
        for update in result:
            new = update.num_chunks - update.num_before
            assert update.neighbors.num_searched == (new if known else None)
        assert build_retro_datasets(folder / "project")["train"] is not None
        found.append(Oracle(folder / "project"))
    # Without the old index everything is searched.
    project = tmp_path / "False" / "project"
    monkeypatch.undo()
    shutil.rmtree(project / "index" / "faiss-par-add")
    shutil.rmtree(project / "query" / "chunks_valid")
    options = {"exchange": str(result[0].project), "num_neighbors_query": 2}
    again = update_db(UpdateDbOptions(str(project), **options))
    assert again.neighbors.num_searched is None
    for name, distances in found[0].distances.items():
        ids = [oracle.saved[name].rows(0, len(distances)) for oracle in found]
        saved = [SavedDistances(oracle.saved[name].directory) for oracle in found]
        rows = [each.rows(0, len(distances)) for each in saved]
        np.testing.assert_allclose(*rows, atol=1e-5)
        np.testing.assert_array_equal(ids[0] >= 0, ids[1] >= 0)
        same = np.take_along_axis(distances, np.maximum(ids[0], 0), 1)
        np.testing.assert_allclose(same[ids[0] >= 0], rows[0][ids[0] >= 0], atol=OF_STORING)
        assert (ids[0] >= result[0].num_before).any()


@pytest.mark.parametrize("index", ["Flat", "SQ8"])
def test_an_exhaustive_index_goes_on_to_the_bytes_of_a_full_search(
    built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, index: str
) -> None:
    """Old chunks are appended again, so distances tie; part of a block is searched again."""
    monkeypatch.setattr(filling, "_FLAT_BLOCK", 32)
    begun = shutil.copytree(built, tmp_path / "begun")
    if index != "Flat":
        shutil.rmtree(begun / "project" / "index")
        (begun / "project" / "stages" / "build_index.json").unlink()
        build_index(BuildIndexOptions(str(begun / "project"), embedder="lexical", index=index))
        search_again(forget_neighbors(begun / "project"))
    write_corpus(begun / "last.jsonl", [*documents(60, 200)[50:53], TEXTS[0], TEXTS[3]])
    found = []
    for known in (True, False):
        folder = shutil.copytree(begun, tmp_path / str(known))
        if not known:
            monkeypatch.setattr(query_command, "find_old_neighbors", lambda *given: None)
        for name in ("more", "last"):
            options = {"append": [str(folder / f"{name}.jsonl")], "num_neighbors_query": 2}
            update = update_db(UpdateDbOptions(str(folder / "project"), **options))
            new = update.num_chunks - update.num_before
            assert update.neighbors.num_searched == (new if known else None)
        saved = Oracle(folder / "project").saved
        assert (saved["train"].rows(0, 40) >= update.num_before).any()
        found.append(
            [
                rows.rows(0, len(rows)).tobytes()
                for split in ("train", "valid")
                for rows in (saved[split], SavedDistances(saved[split].directory))
            ]
        )
    assert found[0] == found[1]


@pytest.mark.parametrize("samples", ["aligned", "packed"])
def test_another_projects_database(project: Path, samples: str) -> None:
    """Its embedder has other weights, so the chunks are embedded for it."""
    other = project.parent / "other"
    options = json.loads((project / "stages" / "preprocess_corpus.json").read_text())["options"]
    given = preprocess_given(project, other, samples)
    preprocess_corpus(given)
    assert options["--samples"] == "aligned"
    build_db(BuildDbOptions(str(other)))
    build_index(BuildIndexOptions(str(other), embedder="lexical"))
    if samples == "packed":
        with pytest.raises(ProjectError, match="has packed samples"):
            update_db(UpdateDbOptions(str(project), exchange=str(other)))
        return
    result = update_db(UpdateDbOptions(str(project), exchange=str(other)))
    assert result.neighbors.counts["train"].vectors_stored == 0
    assert list(project.glob("query/vectors_valid_*/*.hdf5"))
    Oracle(project).check()


def preprocess_given(project: Path, other: Path, samples: str):
    from tests.unit.data.projects import preprocess_options

    corpora = [str(project.parent / name) for name in ("more.jsonl", "0.jsonl", "corpus.jsonl")]
    return preprocess_options(
        other,
        project.parent / "more.jsonl",
        input=corpora,
        tokenizer_model=str(project.parent / "tokenizer_True"),
        samples=samples,
    )


def test_documents_are_searched_as_their_rows(project: Path) -> None:
    """evaluate_perplexity's chunks of documents are those of the aligned samples."""
    tokenizer = load_project_tokenizer(ProjectConfig.load(project), ProjectPaths(project))
    oracle = Oracle(project)
    held_out = HeldOutDocuments.open(project, "valid", tokenizer.eod)
    texts = [held_out.tokens(number).tolist() for number in range(len(held_out))]
    assert all(text[0] == tokenizer.bos and tokenizer.eod not in text for text in texts)
    search_document_neighbors(project, held_out, tokenizer, SAVED, "cpu")
    found = SavedDistances(ProjectPaths(project).query / "valid_documents")
    # Those that query_neighbors saved are the same, so evaluate_perplexity searches nothing.
    rows = saved_document_neighbors(project, held_out, 3)
    assert rows is not None
    assert saved_document_neighbors(project, held_out, SAVED + 1) is None
    assert (len(rows), rows.num_saved) == (held_out.num_chunks, 3)
    ids, wordless = rows.rows(0, len(rows)), rows.places == NO_ROW
    assert (ids[wordless] == NO_NEIGHBOR).all()
    assert not wordless.all()
    distances = oracle.distances["valid"][rows.places[:, None], np.maximum(ids, 0)]
    wanted = found.rows(0, len(rows))[:, :3]
    np.testing.assert_allclose(distances[~wordless], wanted[~wordless], atol=1e-4)
    chunks = oracle.own["valid"].chunks
    saved = SavedDistances(oracle.saved["valid"].directory)
    for number, first in enumerate(held_out.first_rows[:-1].tolist()):
        own = chunks[:, :2] == (held_out.corpus[number], held_out.number[number])
        for row in np.flatnonzero(own.all(axis=1)).tolist():
            place = first + int(chunks[row, 2]) // 16
            np.testing.assert_allclose(
                found.rows(place, place + 1), saved.rows(row, row + 1), atol=1e-4
            )
