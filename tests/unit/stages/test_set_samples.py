"""`set_samples`: other samples of the same documents, and what it refuses."""

from __future__ import annotations

import shutil

import pytest

from retro_mcore.cli.build_db import BuildDbOptions, build_db
from retro_mcore.cli.preprocess_corpus import preprocess_corpus
from retro_mcore.cli.set_samples import SetSamplesOptions, set_samples
from retro_mcore.data.tokens.token_file import TokenFile
from retro_mcore.errors import ConfigurationError, ProjectError, SeveralErrors
from retro_mcore.project.config import ProjectConfig, ProjectSettings
from retro_mcore.project.paths import ProjectPaths
from retro_mcore.project.records import recorded_options, stage_report
from retro_mcore.samples.retro_dataset import build_retro_datasets
from retro_mcore.stages.preprocessing import project_config
from tests.unit.data.aligned import M, aligned_database, save_tables
from tests.unit.data.projects import (
    built_project,
    documents,
    forget_neighbors,
    preprocess_options,
    write_corpus,
)

PREPROCESS = "preprocess_corpus"


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    changes = {"input_weights": [0.5, 0.5], "train_epochs": 2.0, "train_samples": None}
    made = aligned_database(tmp_path_factory.mktemp("set"), False, documents(11, 300), **changes)
    return save_tables(made)


@pytest.fixture
def project(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "project")


def change(project, **changes):
    return set_samples(SetSamplesOptions(str(project), **changes))


def test_other_samples_need_no_new_search(project, finished, capsys):
    report = change(project, seq_length=6 * M, seed=9, train_samples=10, input_weights=[0.2, 0.8])
    config = ProjectConfig.load(project)
    assert report.config == config
    assert (config.retro_gpt_seq_length, config.retro_gpt_seed) == (6 * M, 9)
    assert config.retro_gpt_data_path[::2] == ["0.2", "0.8"]
    assert set(report.changed) == {
        "retro_gpt_seq_length",
        "retro_gpt_seed",
        "retro_gpt_train_samples",
        "retro_gpt_data_path",
    }
    assert "retro_gpt_seed" in capsys.readouterr().out
    train = build_retro_datasets(project)["train"]
    assert len(train) == 10
    assert train[0]["neighbor_tokens"].shape[0] == 6
    # Earlier stages take the project as it is now.
    build_db(BuildDbOptions(str(project), retro_doc_block_size=6))
    infos = [ProjectPaths(each).dataset_infos.read_bytes() for each in (finished, project)]
    assert infos[0] == infos[1]  # else build_index would refuse to go on
    counts = [stage_report(ProjectPaths(each), PREPROCESS) for each in (finished, project)]
    assert counts[0]["datasets"] == counts[1]["datasets"]
    assert counts[1]["splits"]["train"]["samples"] == 10
    assert counts[0]["splits"]["train"]["padding_tokens"] > 0
    paddings = [{n: s["padding_tokens"] for n, s in each["splits"].items()} for each in counts]
    assert paddings[0] == paddings[1]


def test_the_record_is_that_of_the_same_preprocessing(project, finished, tmp_path):
    """The same files as if preprocess_corpus had been run with the new flags."""
    changes = {"global_batch_size": 4, "eval_interval": 2, "eval_iters": 2, "seq_length": 2 * M}
    change(project, **changes)
    weights = {"input_weights": [0.5, 0.5], "train_epochs": 2.0, "train_samples": None}
    fresh = aligned_database(tmp_path / "fresh", False, documents(11, 300), **weights, **changes)
    mine, theirs = ProjectConfig.load(project), ProjectConfig.load(fresh)
    theirs.retro_block_size = mine.retro_block_size
    assert mine == theirs
    records = [recorded_options(ProjectPaths(each), PREPROCESS) for each in (project, fresh)]
    assert records[0] == records[1]
    changed = change(project, train_epochs=1.0)
    assert set(changed.changed) == {"retro_gpt_train_samples"}
    assert not change(project).changed
    change(project, train_samples=8)
    assert recorded_options(ProjectPaths(project), PREPROCESS)["--train-epochs"] is None


def test_the_command_of_before_is_told_of_the_change(tmp_path):
    project = aligned_database(tmp_path, False, train_samples=8)
    change(project, seed=5)
    with pytest.raises(ProjectError, match=r"--seed: .* with 5, asked for 1234.*as set_samples"):
        aligned_database(tmp_path, False, train_samples=8)


@pytest.mark.parametrize("layout", ["aligned", "packed"])
def test_rows_per_file_follow_from_what_is_searched(tmp_path, monkeypatch, layout):
    """A few samples of a large corpus made a file for every 64 chunks of its database."""
    monkeypatch.setattr(project_config, "choose_shard_length", lambda rows, longest: rows)
    changes = {"samples": layout, "retro_block_size": None, "train_samples": 3}
    paths = ProjectPaths(aligned_database(tmp_path, False, documents(9), **changes))
    config = ProjectConfig.load(paths.root)
    files = [TokenFile(paths.data / prefix) for prefix in config.blend[1]]
    chunks = sum(len(file.tokens) for file in files) // M
    assert config.retro_block_size == (chunks if layout == "aligned" else 3 * 4)


def test_preprocessing_again_keeps_the_rows_per_file(tmp_path):
    project = aligned_database(tmp_path, False, retro_block_size=None, train_samples=8)
    rows = ProjectConfig.load(project).retro_block_size
    change(project, train_samples=5000)
    aligned_database(tmp_path, False, retro_block_size=None, train_samples=5000)
    config = ProjectConfig.load(project)
    assert (config.retro_gpt_train_samples, config.retro_block_size) == (5000, rows)


def test_impossible_values_are_refused_together_and_change_nothing(project):
    before = (project / "config.json").read_bytes()
    with pytest.raises(SeveralErrors, match=r"(?s)--seq-length: 40 .*--global-batch-size"):
        change(project, seq_length=40, global_batch_size=0)
    with pytest.raises(ConfigurationError, match="both given"):
        change(project, train_samples=3, train_epochs=1.0)
    with pytest.raises(ConfigurationError, match="--input-weights"):
        change(project, input_weights=[1.0])
    assert (project / "config.json").read_bytes() == before
    shutil.rmtree(project / "stages")
    with pytest.raises(ProjectError, match="another program made the project"):
        change(project, seed=2)


def test_a_packed_project_keeps_the_samples_that_were_searched(tmp_path):
    project = shutil.copytree(built_project(), tmp_path / "project")
    assert ProjectSettings.load(project).samples == "packed"
    with pytest.raises(ProjectError, match="cannot change retro_gpt_seed: the project is packed"):
        change(project, seed=7)
    assert not change(project).changed


def test_a_packed_project_may_change_before_its_search(tmp_path):
    project = shutil.copytree(built_project(), tmp_path / "project")
    forget_neighbors(project)
    config = ProjectConfig.load(project)
    config.retro_neighbor_dirs = dict.fromkeys(config.retro_neighbor_dirs)
    config.save(project)
    change(project, seed=7)
    assert ProjectConfig.load(project).retro_gpt_seed == 7
    with pytest.raises(ProjectError, match="--seed"):
        preprocess_corpus(preprocess_options(project, built_project().parent / "corpus.jsonl"))


def test_an_extended_project_names_the_one_it_was_made_from(project, tmp_path):
    for grown, base in (("first", project), ("second", tmp_path / "first")):
        shutil.copytree(project, tmp_path / grown)
        settings = ProjectSettings.load(tmp_path / grown)
        settings.grown_from = f"../{base.name}"
        settings.save(tmp_path / grown)
    with pytest.raises(ProjectError, match=rf"update_db made .*--project-dir {project}$"):
        change(tmp_path / "second", seed=2)


@pytest.mark.parametrize(
    ("layout", "sampled", "found"),
    [
        ("aligned", 10, "took the 10 chunks of --retro-index-ntrain by the weights"),
        ("packed", None, "the database was built with 0.5 corpus_text_document 0.5 0_text"),
    ],
)
def test_weights_that_the_database_depends_on_stay(tmp_path, layout, sampled, found):
    paths = ProjectPaths(tmp_path / "project")
    corpora = [write_corpus(tmp_path / f"{name}.jsonl", documents(9)) for name in ("corpus", "0")]
    options = preprocess_options(paths.root, corpora[0], samples=layout, input_weights=[0.5, 0.5])
    options.input.append(str(corpora[1]))
    preprocess_corpus(options)
    change(paths.root, input_weights=[0.6, 0.4])
    change(paths.root, input_weights=[0.5, 0.5])
    build_db(BuildDbOptions(str(paths.root), retro_index_ntrain=sampled))
    with pytest.raises(ProjectError, match=f"--input-weights: cannot change: .*{found}"):
        change(paths.root, input_weights=[0.6, 0.4])
    change(paths.root, input_weights=[0.5, 0.5], seed=3)
    build_db(BuildDbOptions(str(paths.root), retro_index_ntrain=sampled))
