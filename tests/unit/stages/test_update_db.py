"""Growing and exchanging the database of a project whose samples stay."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from retro_mcore.chunking import NO_NEIGHBOR
from retro_mcore.cli.build_db import BuildDbOptions, build_db
from retro_mcore.cli.build_index import BuildIndexOptions, build_index
from retro_mcore.cli.inspect_neighbors import InspectNeighborsOptions, inspect_neighbors
from retro_mcore.cli.preprocess_corpus import preprocess_corpus
from retro_mcore.cli.query_neighbors import QueryNeighborsOptions, query_neighbors
from retro_mcore.cli.update_db import UpdateDbOptions, update_db
from retro_mcore.data.tokenizers.loading import load_project_tokenizer
from retro_mcore.data.tokens.document_ids import DocumentIds
from retro_mcore.data.tokens.token_file import TokenFile
from retro_mcore.errors import ConfigurationError, CorpusError, ProjectError, RetroError, flag_of
from retro_mcore.evaluation.documents import (
    DocumentChunks,
    HeldOutDocuments,
    search_document_neighbors,
)
from retro_mcore.project import ProjectConfig, ProjectPaths
from retro_mcore.project.config import ProjectSettings
from retro_mcore.project.records import stage_report
from retro_mcore.retrieval.database import ChunkDatabase
from retro_mcore.retrieval.neighbor_tables import SavedDistances
from retro_mcore.retrieval.rerank import load_reranker
from retro_mcore.retrieval.retriever import Retriever
from retro_mcore.samples.retro_dataset import build_retro_datasets
from retro_mcore.stages import query_neighbors as query_command
from retro_mcore.stages import update_db as update_stage
from retro_mcore.stages.derived_databases import _reader
from retro_mcore.stages.update_db import UpdateDbConfig
from tests.unit.data.projects import documents, forget_neighbors, preprocess_options, write_corpus


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a finished project and the corpora of others."""
    folder = tmp_path_factory.mktemp("update")
    texts = documents(60)
    write_corpus(folder / "corpus.jsonl", texts[:24])
    write_corpus(folder / "more.jsonl", [*texts[40:50], *texts[:6]])
    write_corpus(folder / "last.jsonl", texts[50:55])
    preprocess_corpus(preprocess_options(folder / "project", folder / "corpus.jsonl"))
    run_stages(folder / "project")
    query_neighbors(QueryNeighborsOptions(str(folder / "project"), num_neighbors_save=5))
    return folder


def run_stages(project: Path) -> None:
    build_db(BuildDbOptions(str(project), retro_doc_block_size=6))
    build_index(BuildIndexOptions(str(project), embedder="lexical"))


@pytest.fixture
def folder(built: Path, tmp_path: Path) -> Path:
    shutil.copytree(built, tmp_path / "copy")
    return tmp_path / "copy"


def samples(project: Path) -> dict[str, np.ndarray]:
    dataset = build_retro_datasets(project, 5, 2)["train"]
    assert dataset is not None
    items = [dataset[i] for i in range(len(dataset))]
    return {key: np.stack([item[key] for item in items]) for key in items[0]}


def distances(project: Path) -> np.ndarray:
    name = ProjectConfig.load(project).neighbor_dir("train")
    saved = SavedDistances(ProjectPaths(project).query / str(name))
    return saved.rows(0, len(saved))


def files(project: Path) -> dict[str, bytes]:
    """Everything but what an update adds."""
    return {
        str(path.relative_to(project)): path.read_bytes()
        for path in sorted(project.rglob("*"))
        if path.is_file() and "updates" not in path.parts and path.name != "config.json"
    }


def test_appended_documents_are_found(folder: Path) -> None:
    project = folder / "project"
    before, old_distances, old_files = samples(project), distances(project), files(project)
    old = ChunkDatabase.open(project)
    result = update_db(UpdateDbOptions(str(project), append=[str(folder / "more.jsonl")]))
    database = ChunkDatabase.open(project)
    assert len(database) == result.num_chunks > result.num_before == len(old)
    np.testing.assert_array_equal(database.chunks[: len(old)], old.chunks)
    assert set(database.chunks[len(old) :, 0]) == {1}
    assert len(np.unique(database.chunks[len(old) :, 1])) == 16  # all of them, whatever the split
    # The samples stay; the index is exact, so that more documents bring nearer neighbors alone.
    after, new_distances = samples(project), distances(project)
    np.testing.assert_array_equal(after["text"], before["text"])
    assert (new_distances <= old_distances + 1e-6).all()
    assert (new_distances < old_distances - 1e-3).any()
    assert (after["neighbor_chunks"] >= len(old)).any()
    # Nothing of the old is touched, so other readers go on with it.
    now = files(project)
    assert {name: now[name] for name in old_files} == old_files
    # The first stages run again, as the whole chain does, do not take the update back.
    preprocess_corpus(preprocess_options(project, folder / "corpus.jsonl"))
    run_stages(project)
    query_neighbors(QueryNeighborsOptions(str(project), num_neighbors_save=5))
    np.testing.assert_array_equal(samples(project)["neighbor_chunks"], after["neighbor_chunks"])
    # Old embeddings and the training are taken over: the same files, by hard links.
    grown = ProjectPaths(result.project)
    paths = ProjectPaths(project)
    olds = sorted(paths.embeddings.glob("*.hdf5"))
    news = sorted(grown.embeddings.glob("*.hdf5"))
    assert [path.stat().st_ino for path in news[: len(olds)]] == [p.stat().st_ino for p in olds]
    chunks = sorted(paths.individual_db("corpus_text_document").glob("*.hdf5"))
    for path in chunks:
        taken = grown.individual_db("corpus_text_document") / path.name
        assert taken.stat().st_ino == path.stat().st_ino


def test_own_documents_are_still_left_out(folder: Path) -> None:
    """The first corpus keeps its number, and its chunks are not neighbors of its own samples."""
    project = folder / "project"
    update_db(UpdateDbOptions(str(project), append=[str(folder / "more.jsonl")]))
    dataset = build_retro_datasets(project, 5, 1)["train"]
    assert dataset is not None
    for i in range(len(dataset)):
        own = set(dataset.samples.document_ids(i).tolist())
        ids = dataset[i]["neighbor_chunks"]
        for source, document in dataset.database.documents(ids[ids != NO_NEIGHBOR]).tolist():
            assert source == 1 or document not in own


@pytest.mark.parametrize("recorded_in", ["settings", "stage", "flags"])
def test_new_documents_are_read_as_the_old(
    folder: Path, monkeypatch: pytest.MonkeyPatch, recorded_in: str
) -> None:
    """A project of --id-key url and --clean-text, whose update had neither."""
    project = folder / "project"
    paths = ProjectPaths(project)
    settings, record = paths.settings, paths.stage_record("preprocess_corpus")
    kept = {**json.loads(settings.read_text()), "json_keys": ["title", "body"]}
    run = json.loads(record.read_text())
    read = {"id_key": "url", "clean_text": True}
    if recorded_in == "settings":
        kept |= read
    else:  # a project of before these were settings
        del kept["id_key"], kept["clean_text"]
    if recorded_in == "stage":
        run["options"] |= {"--id-key": "url", "--clean-text": True}
    settings.write_text(json.dumps(kept))
    record.write_text(json.dumps(run))
    broken = "gr\u00fcn".encode().decode("latin-1")
    line = {"url": "https://a", "id": "7", "title": "T", "body": broken}
    (folder / "new.jsonl").write_text(json.dumps(line) + '\n{"title": "", "body": ""}\n')
    monkeypatch.setattr("retro_mcore.stages.build_db.run", _interrupt)
    options = UpdateDbOptions(str(project), append=[str(folder / "new.jsonl")])
    if recorded_in == "flags":
        options = dataclasses.replace(options, **read)
    with pytest.raises(KeyboardInterrupt):
        update_db(options)
    (grown,) = (project / "updates").iterdir()
    prefix = grown / "data" / "new_title_body_document"
    tokenizer = load_project_tokenizer(ProjectConfig.load(grown), ProjectPaths(grown))
    tokens = TokenFile(prefix).sequence(0)[:-1].tolist()
    assert tokenizer.detokenize(tokens) == "T\n\ngr\u00fcn"
    assert DocumentIds(prefix)[0] == "https://a"
    report = stage_report(ProjectPaths(grown), "update_db")
    assert report["empty_documents"] == report["documents"] == report["cleaned_documents"] == 1


def test_a_grown_project_of_before_is_read_as_its_origin(folder: Path) -> None:
    """The second update of a project whose settings lack --id-key read the ids of the default."""
    origin, grown = ProjectPaths(folder / "project"), ProjectPaths(folder / "project/updates/a")
    settings = dataclasses.replace(ProjectSettings.load(origin.root), id_key=None, clean_text=None)
    settings.save(origin.root)
    record = json.loads(origin.stage_record("preprocess_corpus").read_text())
    record["options"] |= {"--id-key": "url", "--clean-text": True}
    origin.stage_record("preprocess_corpus").write_text(json.dumps(record))
    dataclasses.replace(settings, grown_from="../..").save(grown.root)
    reader, clean = _reader(UpdateDbConfig(), grown, ProjectSettings.load(grown.root))
    assert (reader.id_key, clean) == ("url", True)


#: What a project may have been built with, by stage and option. Only how a run goes is not kept.
KEPT: dict[str, dict[str, object]] = {
    "build_db": {"retro_index_ntrain": 3, "retro_doc_block_size": 5},
    "build_index": {
        "embedder": "minilm",
        "embedder_pooling": "cls",
        "embed_precision": "bf16",
        "embed_fp16": True,
        "embed_batch_size": 3,
        "embed_batch_tokens": 512,
        "embeddings_dtype": "fp16",
        "index": "IVF4,Flat",
        "index_memory": "24G",
        "index_recall": 0.9,
        "nprobe": 2,
        "ef_search": 9,
        "on_disk": True,
        "split_index": True,
        "rescore": True,
        "faiss_gpu": False,
    },
    "query_neighbors": {
        "num_neighbors_query": 7,
        "num_neighbors_save": 4,
        "rerank": "bm25",
        "rescore": True,
        "embed_batch_size": None,  # the search itself goes on as before
        "embed_batch_tokens": None,
        "embed_precision": "bf16",
        "embed_fp16": True,
        "faiss_gpu": False,
    },
}
OF_A_RUN = {"stage", "shard", "device", "verify"}
OF_A_RUN |= {"distributed_timeout_minutes", "stall_timeout_minutes"}
ASKED: dict[str, dict[str, object]] = {
    "num_neighbors_query": {"num_neighbors_query": 9},
    "num_neighbors_save": {"num_neighbors_save": 2},
    "embed_batch_size": {"embed_batch_size": 5},
    "embed_batch_tokens": {"embed_batch_tokens": 99},
    "embed_precision": {"embed_precision": "fp32", "embed_fp16": False},
    "embed_fp16": {"embed_fp16": True, "embed_precision": None},
    "faiss_gpu": {"faiss_gpu": True},
    "verify": {"verify": True},
}


@pytest.mark.parametrize("asked", [None, *ASKED])
def test_a_project_is_updated_as_it_was_built(
    folder: Path, monkeypatch: pytest.MonkeyPatch, asked: str | None
) -> None:
    """A project of --num-neighbors-query 1000 was updated with 200, one of --no-faiss-gpu on the
    GPU."""
    project = folder / "project"
    record_as_built(project)
    given = recorded_runs(monkeypatch)
    changed = {} if asked is None else ASKED[asked]
    wanted = {} if asked is None else {asked: changed[asked]}
    update_stage.run(project, UpdateDbConfig(append=[str(folder / "more.jsonl")], **wanted))
    for stage, kept in KEPT.items():
        kind = type(given[stage])
        assert set(kept) == {field.name for field in dataclasses.fields(kind)} - OF_A_RUN
        expected = dict(kept)
        if stage == "query_neighbors":
            expected |= changed
        elif stage == "build_index":
            expected |= {name: changed[name] for name in ("faiss_gpu", "verify") if name in changed}
        assert {name: getattr(given[stage], name) for name in expected} == expected
    grown = ProjectConfig.load(next((project / "updates").iterdir()))
    before, after = vars(ProjectConfig.load(project)), vars(grown)
    differ = {key for key in before if before[key] != after[key]}
    assert differ <= {"retro_gpt_data_path", "retro_neighbor_dirs"}


def record_as_built(project: Path) -> None:
    """Record what `KEPT` says in a project that was built in another way."""
    paths = ProjectPaths(project)
    index, search = KEPT["build_index"], KEPT["query_neighbors"]
    of_search = ("num_neighbors_query", "num_neighbors_save", "rerank", "rescore", "faiss_gpu")
    dataclasses.replace(
        ProjectSettings.load(project),
        index_string=index["index"],
        index_faiss_gpu=index["faiss_gpu"],
        nprobe=index["nprobe"],
        ef_search=index["ef_search"],
        **{name: search[name] for name in of_search},
    ).save(project)
    for stage, options in KEPT.items():
        record = json.loads(paths.stage_record(stage).read_text())
        record["options"] |= {
            flag_of(name): value for name, value in options.items() if name != "faiss_gpu"
        }
        paths.stage_record(stage).write_text(json.dumps(record))


def recorded_runs(monkeypatch: pytest.MonkeyPatch) -> dict[str, object]:
    """The configurations of the stages that update_db would run, by stage."""
    given: dict[str, object] = {}
    for stage, function in (
        ("build_db", "run"),
        ("build_index", "run"),
        ("query_neighbors", "query_other_database"),
    ):
        monkeypatch.setattr(
            f"retro_mcore.stages.{stage}.{function}",
            lambda *arguments, stage=stage: given.update({stage: arguments[1]}),
        )
    return given


@pytest.mark.parametrize(
    ("given", "flags"),
    [
        ({"index": "Flat", "nprobe": 2, "ef_search": 9}, {"--nprobe", "--ef-search"}),
        ({"index": "IVF4,Flat", "nprobe": 2, "ef_search": 9}, {"--ef-search"}),
        ({"index": "IVF4,Flat", "nprobe": 5}, {"--nprobe"}),
        ({"index": "OPQ8,IVF16_HNSW32,PQ8", "nprobe": 17}, {"--nprobe"}),
        ({"index": "HNSW8", "nprobe": 2, "ef_search": 9}, {"--nprobe"}),
    ],
)
def test_a_breadth_that_an_index_does_not_have(folder: Path, given: dict, flags: set) -> None:
    """It was ignored. What an earlier version built so goes on."""
    paths = ProjectPaths(folder / "project")
    options = BuildIndexOptions(str(paths.root), embedder="lexical", **given)
    record = paths.stage_record("build_index").rename(folder / "record.json")
    with pytest.raises(RetroError) as caught:
        build_index(options)
    assert {problem.subject for problem in caught.value.problems} == flags
    record.rename(paths.stage_record("build_index"))
    with pytest.raises(ProjectError, match="was built by build_index with"):
        build_index(options)


def test_candidates_by_default_depend_on_the_database(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = recorded_runs(monkeypatch)
    update_stage.run(folder / "project", UpdateDbConfig(append=[str(folder / "more.jsonl")]))
    assert given["query_neighbors"].num_neighbors_query is None  # type: ignore[attr-defined]


def test_stages_record_whether_they_used_gpus(folder: Path) -> None:
    """Without the flag, update_db searched a project of --no-faiss-gpu on the GPU."""
    project = folder / "project"
    assert ProjectSettings.load(project).faiss_gpu
    query = QueryNeighborsOptions(str(project), num_neighbors_save=5, faiss_gpu=False)
    query_neighbors(query)
    build_index(BuildIndexOptions(str(project), embedder="lexical", faiss_gpu=False))
    settings = ProjectSettings.load(project)
    assert (settings.index_faiss_gpu, settings.faiss_gpu) == (True, True)  # nothing was built
    shutil.rmtree(project / "index")
    ProjectPaths(project).stage_record("build_index").unlink()
    build_index(BuildIndexOptions(str(project), embedder="lexical", faiss_gpu=False))
    forget_neighbors(project)
    query_neighbors(query)
    settings = ProjectSettings.load(project)
    assert (settings.index_faiss_gpu, settings.faiss_gpu) == (False, False)


def test_preprocess_corpus_records_how_it_read(folder: Path) -> None:
    more = preprocess_options(folder / "p", folder / "more.jsonl", id_key="url", clean_text=True)
    preprocess_corpus(more)
    settings = ProjectSettings.load(folder / "p")
    assert (settings.id_key, settings.clean_text) == ("url", True)


def test_a_second_update_goes_on_from_the_first(folder: Path, tmp_path: Path) -> None:
    project = folder / "project"
    first = update_db(UpdateDbOptions(str(project), append=[str(folder / "more.jsonl")]))
    second = update_db(UpdateDbOptions(str(project), append=[str(folder / "last.jsonl")]))
    assert second.num_before == first.num_chunks < second.num_chunks
    expected = samples(project)
    # Names of corpora, moved projects, live retrieval and the page.
    moved = tmp_path / "elsewhere"
    project.rename(moved)
    for key, value in samples(moved).items():
        np.testing.assert_array_equal(value, expected[key])
    retriever = Retriever(moved, 2, 1)
    text = retriever.database.texts([second.num_chunks - 1], retriever.tokenizer)
    ((found, _),) = retriever.describe(retriever.search_texts(text))
    assert found.id == second.num_chunks - 1
    assert found.source == "topic-4 (document 4 of last_text_document)"
    page = tmp_path / "page.html"
    inspect_neighbors(InspectNeighborsOptions(str(moved), output=str(page), num_samples=8))
    assert "more_text_document" in page.read_text()
    # Back to its own, and forward again: nothing is searched twice.
    update_db(UpdateDbOptions(str(moved), exchange=str(moved)))
    assert ProjectConfig.load(moved).retro_database is None
    assert len(ChunkDatabase.open(moved)) == first.num_before


def test_an_interrupted_update_leaves_the_old_in_use(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    project = folder / "project"
    before = samples(project)
    options = UpdateDbOptions(str(project), append=[str(folder / "more.jsonl")])
    for module, name in (
        ("retro_mcore.stages.build_db", "run"),
        ("retro_mcore.stages.build_index", "run"),
        ("retro_mcore.stages.query_neighbors", "finish_stage"),
    ):
        with monkeypatch.context() as broken:
            broken.setattr(f"{module}.{name}", _interrupt)
            with pytest.raises(KeyboardInterrupt):
                update_db(options)
        for key, value in samples(project).items():
            np.testing.assert_array_equal(value, before[key])
    built = []
    run = query_command.query_split
    monkeypatch.setattr(query_command, "query_split", lambda *a: built.append(run(*a)) or built[-1])
    update_db(options)
    assert all(report.reused == report.total for report in built)  # searched before the last one
    assert (samples(project)["neighbor_chunks"] != before["neighbor_chunks"]).any()


def test_finished_stages_are_shown_even_if_a_later_one_fails(folder, monkeypatch, capsys):
    """Their counts would be lost from the log of a run that is killed in the search."""
    monkeypatch.setattr("retro_mcore.stages.query_neighbors.query_other_database", _interrupt)
    with pytest.raises(KeyboardInterrupt):
        update_db(UpdateDbOptions(str(folder / "project"), append=[str(folder / "more.jsonl")]))
    printed = capsys.readouterr().out
    assert "build_db" in printed
    assert "build_index" in printed
    assert "query_neighbors" not in printed


def _interrupt(*args: object, **kwargs: object) -> None:
    raise KeyboardInterrupt


def test_another_projects_database(folder: Path) -> None:
    """It holds the project's own corpus under another number, which the filter must know."""
    project, other = folder / "project", folder / "other"
    corpora = [str(folder / "more.jsonl"), str(folder / "corpus.jsonl")]
    model = str(project / "tokenizer" / "sentencepiece.model")
    preprocess_corpus(
        preprocess_options(other, folder / "more.jsonl", input=corpora, tokenizer_model=model)
    )
    run_stages(other)
    before = samples(project)
    update_db(UpdateDbOptions(str(project), exchange=str(other)))
    after = samples(project)
    np.testing.assert_array_equal(after["text"], before["text"])
    dataset = build_retro_datasets(project, 5, 1)["train"]
    assert dataset is not None
    assert dataset.database.path == ProjectPaths(other).merged_db("train")
    seen = set()
    for i in range(len(dataset)):
        own = set(dataset.samples.document_ids(i).tolist())
        ids = dataset[i]["neighbor_chunks"]
        for source, document in dataset.database.documents(ids[ids != NO_NEIGHBOR]).tolist():
            seen.add(source)
            assert source == 0 or document not in own
    assert seen == {0, 1}
    check_held_out_neighbors(project, other)
    update_db(UpdateDbOptions(str(project), exchange=str(project)))
    for key, value in samples(project).items():
        np.testing.assert_array_equal(value, before[key])


def check_held_out_neighbors(project: Path, other: Path) -> None:
    """evaluate_perplexity's documents search the database that is used, too."""
    tokenizer = load_project_tokenizer(ProjectConfig.load(project), ProjectPaths(project))
    documents = HeldOutDocuments.open(project, "valid", tokenizer.eod)
    saved = search_document_neighbors(project, documents, tokenizer, 3, "cpu")
    rows = saved.rows(0, documents.num_chunks)
    chunks = [DocumentChunks(documents).read(row)[0][:16] for row in range(len(rows))]
    live = Retriever(project, 3, 1).search_tokens(chunks)
    assert len(rows) > 3
    distances = SavedDistances(saved.directory).rows(0, documents.num_chunks)
    np.testing.assert_allclose(distances, live.distances, atol=1e-5)  # ids may be tied
    assert (rows == live.ids).mean() > 0.9
    assert len(ChunkDatabase.open(other)) > rows.max() >= 0


def test_the_order_of_bm25_is_kept(folder: Path) -> None:
    project = forget_neighbors(folder / "project")
    query_neighbors(QueryNeighborsOptions(str(project), num_neighbors_save=5, rerank="bm25"))
    before = samples(project)["neighbor_chunks"]
    update_db(UpdateDbOptions(str(project), append=[str(folder / "more.jsonl")]))
    dataset = build_retro_datasets(project, 5, 1)["train"]
    assert dataset is not None
    config = ProjectConfig.load(project)
    source = config.database_paths(project)
    bm25 = load_reranker("bm25", source, dataset.database, config.retro_gpt_chunk_length)
    assert bm25 is not None
    for i in range(len(dataset)):
        chunks = dataset[i]["text"][:64].reshape(-1, 16)
        for chunk, ids in zip(chunks, dataset[i]["neighbor_chunks"][:, :, 0], strict=True):
            scores = bm25.scores(chunk, ids[ids != NO_NEIGHBOR])
            assert (np.diff(scores) <= 1e-9).all()
    assert (samples(project)["neighbor_chunks"] != before).any()


#: Options that would be ignored, and the subjects of the refusal.
IGNORED: list[tuple[dict, set[str]]] = [
    (
        {"exchange": "y", "json_keys": ["a"], "id_key": "b", "num_neighbors_save": 0},
        {"--json-keys and --id-key", "--num-neighbors-save"},
    ),
    (
        {"remove": ["a"], "clean_text": True, "num_neighbors_query": 3, "embed_batch_size": 0},
        {"--clean-text", "--num-neighbors-query", "--embed-batch-size"},
    ),
    (
        {"compact": True, "json_keys": ["a"], "embed_batch_size": 1, "embed_batch_tokens": 1},
        {"--json-keys", "--embed-batch-tokens"},
    ),
    (
        {"append": ["x"], "num_neighbors_query": 0, "embed_precision": "fp32", "embed_fp16": True},
        {"--num-neighbors-query", "--embed-fp16"},
    ),
]


def test_what_does_not_fit_is_refused(folder: Path) -> None:
    project, other = folder / "project", folder / "other"
    preprocess_corpus(preprocess_options(other, folder / "more.jsonl"))
    run_stages(other)
    with pytest.raises(ProjectError, match=r"other: has a different tokenizer"):
        update_db(UpdateDbOptions(str(project), exchange=str(other)))
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "retro_gpt_chunk_length": 32}))
    with pytest.raises(ProjectError, match=r"has chunks of 32 tokens, .* of 16"):
        update_db(UpdateDbOptions(str(project), exchange=str(other)))
    with pytest.raises(CorpusError, match="no such file or folder"):
        update_db(UpdateDbOptions(str(project), append=[str(folder / "none")]))
    for options in ({}, {"append": ["x"], "exchange": "y"}):
        with pytest.raises(ConfigurationError, match="--append and --exchange"):
            update_db(UpdateDbOptions(str(project), **options))
    itself = {"exchange": str(project), "num_neighbors_save": 3}
    for options, flags in [*IGNORED, (itself, {"--num-neighbors-save"})]:
        with pytest.raises(RetroError) as caught:
            update_db(UpdateDbOptions(str(project), **options))
        assert {problem.subject for problem in caught.value.problems} == flags
    with pytest.raises(ProjectError, match="names no neighbors"):
        update_db(UpdateDbOptions(str(other), exchange=str(project)))
    assert ProjectConfig.load(project).retro_database is None
