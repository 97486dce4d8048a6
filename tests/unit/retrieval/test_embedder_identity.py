"""Another model under the name of the one that a project was embedded with is refused."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from retro_mcore.cli.build_db import BuildDbOptions, build_db
from retro_mcore.cli.build_index import BuildIndexOptions, build_index
from retro_mcore.cli.preprocess_corpus import preprocess_corpus
from retro_mcore.cli.query_neighbors import QueryNeighborsOptions, query_neighbors
from retro_mcore.cli.update_db import UpdateDbOptions, update_db
from retro_mcore.errors import ProjectError
from retro_mcore.project.config import ProjectSettings
from retro_mcore.project.paths import ProjectPaths
from retro_mcore.retrieval.bert_tokens import default_bert_vocab
from retro_mcore.retrieval.embedders import build_embedder, static
from retro_mcore.retrieval.embedders.identity import digests_of
from retro_mcore.retrieval.embedders.lexical import count_texts, weights_of
from retro_mcore.retrieval.embedders.model_files import model_files
from retro_mcore.retrieval.embedders.static_models import StaticFiles
from retro_mcore.retrieval.retriever import Retriever
from tests.processes import run_ranks
from tests.unit.data.projects import documents, preprocess_options, write_corpus


def save_static(folder: Path, seed: int = 0) -> Path:
    """A static model of MiniLM's words, with random vectors."""
    folder.mkdir(exist_ok=True)
    source = default_bert_vocab().with_name("tokenizer.json")
    words = len(json.loads(source.read_text())["model"]["vocab"])
    table = np.random.default_rng(seed).normal(size=(words, 16)).astype(np.float32)
    save_file({"embeddings": table}, folder / "model.safetensors")
    shutil.copy(source, folder)
    (folder / "config.json").write_text('{"normalize": true}')
    return folder


def change_weights(file: Path) -> None:
    tensors = {name: tensor + 1 for name, tensor in load_file(file).items()}
    save_file(tensors, file)


@pytest.mark.parametrize("kind", ["sentence", "pooled", "static", "static package"])
def test_what_decides_the_vectors_is_in_the_digest(
    tiny_bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    folder = tiny_bert if kind in ("sentence", "pooled") else save_static(tmp_path / "static")
    name = str(folder)
    if kind == "static package":
        files = StaticFiles(folder / "model.safetensors", folder / "tokenizer.json", True)
        monkeypatch.setattr(static, "installed_files", lambda: files)
        name = "static"

    def digests() -> dict[str, str]:
        pooling = "mean" if kind == "pooled" else None
        return digests_of(build_embedder(name, device="cpu", pooling=pooling))

    before = digests()
    assert set(before) == {"model"}
    (folder / "README.md").write_text("words")
    (folder / "pytorch_model.bin").write_bytes(b"not loaded beside safetensors")
    assert digests() == before
    moved = shutil.copytree(folder, tmp_path / "moved")
    assert sorted(f.name for f in model_files(str(moved))) == sorted(
        f.name for f in model_files(str(folder))
    )
    changes: dict[str, Callable[[Path], object]] = {
        "model.safetensors": change_weights,
        "tokenizer.json": lambda file: file.write_text(file.read_text() + "\n"),
        "config.json": lambda file: file.write_text(file.read_text() + "\n"),
    }
    for file, change in changes.items():
        if kind == "static package" and file == "config.json":
            continue
        change(folder / file)
        now = digests()
        assert now != before
        before = now


def test_a_model_without_files_has_no_digest(tmp_path: Path) -> None:
    """The lexical embedder's weights are the project's own, and have a completion marker."""
    weights = tmp_path / "weights.npy"
    np.save(weights, weights_of(count_texts(["a few words"])))
    assert digests_of(build_embedder("lexical", weights=weights)) == {}


def test_modules_and_hub_names_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    repository = tmp_path / "models--sentence-transformers--tiny"
    folder = repository / "snapshots" / "abc"
    (folder / "2_Dense").mkdir(parents=True)
    (folder / "onnx").mkdir()
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("abc")
    modules = [{"path": "", "type": "Transformer"}, {"path": "2_Dense", "type": "Dense"}]
    (folder / "modules.json").write_text(json.dumps(modules))
    for name in ("config.json", "pytorch_model.bin", "2_Dense/config.json", "onnx/config.json"):
        (folder / name).write_text(name)
    (folder / "2_Dense" / "model.safetensors").write_text("weights")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    expected = {
        "modules.json", "config.json", "pytorch_model.bin", "2_Dense/config.json",
        "2_Dense/model.safetensors",
    }  # fmt: skip
    for name in ("sentence-transformers/tiny", "tiny", str(folder)):
        assert {str(file.relative_to(folder)) for file in model_files(name)} == expected
    assert model_files("sentence-transformers/none") == []


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, a finished project that was embedded with it, and a corpus."""
    folder = tmp_path_factory.mktemp("identity")
    save_static(folder / "model")
    write_corpus(folder / "corpus.jsonl", documents())
    write_corpus(folder / "more.jsonl", documents(30)[20:])
    preprocess_corpus(preprocess_options(folder / "project", folder / "corpus.jsonl"))
    build_db(BuildDbOptions(str(folder / "project"), retro_doc_block_size=6))
    with contextlib.chdir(folder):
        build(folder)
        query(folder)
    return folder


@pytest.fixture
def folder(built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy. The project names its model relative to it."""
    copy = shutil.copytree(built, tmp_path / "copy")
    monkeypatch.chdir(copy)
    return copy


def build(folder: Path, **options: object) -> None:
    values: dict = {"embedder": "model", "index": "Flat", **options}
    build_index(BuildIndexOptions(str(folder / "project"), **values))


def query(folder: Path) -> None:
    query_neighbors(QueryNeighborsOptions(str(folder / "project"), num_neighbors_save=5))


def search(folder: Path) -> None:
    Retriever(folder / "project", device="cpu").search_texts(["a few words"])


def append(folder: Path) -> None:
    update_db(UpdateDbOptions(str(folder / "project"), append=[str(folder / "more.jsonl")]))


@pytest.mark.parametrize("command", [build, query, search, append])
def test_a_model_that_was_overwritten_is_refused(
    folder: Path, command: Callable[[Path], None]
) -> None:
    """Its vectors would be compared with those of the one before."""
    recorded = ProjectSettings.load(folder / "project").embedder_digests
    assert recorded is not None
    save_static(folder / "model", seed=1)
    now = digests_of(build_embedder("model"))
    with pytest.raises(ProjectError) as caught:
        command(folder)
    assert caught.value.subject == "embedder model"
    for digest in (recorded["model"], now["model"]):
        assert digest[:8] in caught.value.found
    assert "Restore the model" in caught.value.hint
    save_static(folder / "model")
    command(folder)


def test_a_run_that_goes_on_has_the_model_that_it_was_begun_with(folder: Path) -> None:
    """The hint's way to a new model, which is interrupted."""
    paths = ProjectPaths(folder / "project")
    save_static(folder / "model", seed=1)
    for place in (paths.index, paths.query):
        shutil.rmtree(place)
    for stage in ("build_index", "query_neighbors"):
        paths.stage_record(stage).unlink()
    build(folder, stage="embed", shard="1/2")
    save_static(folder / "model")
    with pytest.raises(ProjectError, match="embedder model: the digest of its model"):
        build(folder, stage="embed", shard="2/2")
    save_static(folder / "model", seed=1)
    for step in ("embed", "train", "add", "merge"):
        build(folder, stage=step)
    query(folder)
    search(folder)
    settings = ProjectSettings.load(paths.root)
    assert settings.embedder_digests == digests_of(build_embedder("model"))


def test_a_project_of_an_earlier_version_is_not_compared(folder: Path) -> None:
    paths = ProjectPaths(folder / "project")
    paths.embedder_record.unlink()
    settings = json.loads(paths.settings.read_text())
    del settings["embedder_digests"]
    paths.settings.write_text(json.dumps(settings))
    save_static(folder / "model", seed=1)
    for command in (build, query, search):
        command(folder)
    assert ProjectSettings.load(paths.root).embedder_digests is None


def _build_in(folder: Path) -> str:
    os.chdir(folder)
    try:
        build(folder)
    except ProjectError as error:
        return f"{error.raised_together} {error}"
    return "built"


def test_all_ranks_refuse_it_together(folder: Path) -> None:
    save_static(folder / "model", seed=1)
    first, second = run_ranks(2, _build_in, folder)
    assert first == second
    assert first.startswith("True embedder model: the digest")
