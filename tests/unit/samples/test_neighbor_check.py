"""Neighbors that were searched for other samples are refused, and moved projects are not.

Whoever edits config.json after query_neighbors (a seed, a split, the blend) trained on, each sample
with another sample's neighbors.
"""

from __future__ import annotations

import json
import shutil

import pytest

from retro_mcore.errors import CorruptFileError, ProjectError, RetroError
from retro_mcore.project import ProjectConfig, ProjectPaths
from retro_mcore.samples.project_samples import build_all_gpt_samples
from retro_mcore.samples.retro_dataset import build_retro_datasets
from tests.unit.data.projects import blended_project


@pytest.fixture(scope="module")
def blended():
    return blended_project()


def changed(project, tmp_path, **changes):
    copy = shutil.copytree(project, tmp_path / "copy")
    values = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**values, **changes}))
    return copy


CHANGES = {
    "seed": {"retro_gpt_seed": 4321},
    "split": {"retro_gpt_split": "50,30,20"},
    "weights": {"retro_gpt_data_path": ["0.2", "a_text_document", "0.8", "b_text_document"]},
    "order": {"retro_gpt_data_path": ["0.5", "b_text_document", "0.5", "a_text_document"]},
    "samples": {"retro_gpt_train_samples": 10**12},
}


def without_records(project):
    """As upstream leaves a project: no records and no markers."""
    shutil.rmtree(project / "stages")
    for marker in project.rglob("*.done"):
        marker.unlink()


@pytest.mark.parametrize("recorded", [True, False])
@pytest.mark.parametrize("change", CHANGES)
def test_neighbors_of_other_samples_are_refused(blended, tmp_path, change, recorded):
    project = changed(blended, tmp_path, **CHANGES[change])
    if not recorded:
        without_records(project)
    with pytest.raises(RetroError, match=next(iter(CHANGES[change])) if recorded else "neighbors"):
        build_retro_datasets(project)


def test_exchanged_tokens_are_refused(blended, tmp_path):
    project = changed(blended, tmp_path)
    data = project / "data"
    for suffix in (".bin", ".idx", ".bin.done", ".idx.done"):
        shutil.copy(data / f"a_text_document{suffix}", data / f"b_text_document{suffix}")
    with pytest.raises(ProjectError, match=r"b_text_document\.bin: holds other tokens"):
        build_retro_datasets(project)


@pytest.mark.parametrize("recorded", [True, False])
def test_settings_that_are_written_otherwise_and_a_moved_project_are_taken(
    blended, tmp_path, recorded
):
    path = ["1", "a_text_document", "1.0", "b_text_document"]
    settings = {"retro_gpt_data_path": path, "retro_gpt_split": "60.0, 20,20"}
    project = changed(blended, tmp_path, **settings)
    if not recorded:
        without_records(project)
    assert build_retro_datasets(project)["train"] is not None


def test_megatrons_own_description_tells_which_samples_were_searched_for(blended, tmp_path):
    """Upstream's directory, moved, with the description that megatron left with the old path."""
    project = changed(blended, tmp_path)
    without_records(project)
    paths = ProjectPaths(blended)
    samples = build_all_gpt_samples(ProjectConfig.load(blended), paths)
    folder = project / "data" / "cache"
    folder.mkdir(exist_ok=True)
    for split, part in samples.items():
        name = f"{part.description_hash}-BlendedDataset-{split}-description.txt"
        (folder / name).write_text(part.description)
    assert build_retro_datasets(project)["train"] is not None
    values = json.loads((project / "config.json").read_text())
    (project / "config.json").write_text(json.dumps({**values, "retro_gpt_seed": 77}))
    with pytest.raises(RetroError, match="random_seed is"):
        build_retro_datasets(project)


@pytest.mark.parametrize("recorded", [True, False])
@pytest.mark.parametrize("place", ["", "mine/"])
@pytest.mark.parametrize("named", [{"valid": "test"}, {"valid": "test", "test": "valid"}])
def test_neighbors_of_another_split_are_refused(blended, tmp_path, recorded, place, named):
    """Validation and test have as many samples, so the number of rows tells nothing."""
    dirs = ProjectConfig.load(blended).retro_neighbor_dirs
    given = {**dirs, **{split: place + dirs[other] for split, other in named.items()}}
    project = changed(blended, tmp_path, retro_neighbor_dirs=given)
    if place:
        shutil.copytree(project / "query", project / "query" / "mine")
    if not recorded:
        without_records(project)
    with pytest.raises(RetroError, match=r"config\.json: .* for the valid samples, .* of test"):
        build_retro_datasets(project)


def test_files_of_another_projects_search_are_refused(blended, tmp_path):
    """Met by who copies a directory of neighbors with its markers, as rsync does."""
    project = changed(blended, tmp_path)
    folder = project / "query" / str(ProjectConfig.load(blended).retro_neighbor_dirs["valid"])
    for marker in folder.glob("*.hdf5.done"):
        values = json.loads(marker.read_text())
        marker.write_text(json.dumps({**values, "fingerprint": "0" * 32}))
    with pytest.raises(CorruptFileError, match="was written by another search"):
        build_retro_datasets(project)


@pytest.mark.parametrize("seed", [1234, 4321])
def test_a_renamed_directory_is_compared_by_its_documents(blended, tmp_path, seed):
    """Of another writer, whose name holds no hash."""
    dirs = dict.fromkeys(("train", "valid", "test"))
    for split, name in ProjectConfig.load(blended).retro_neighbor_dirs.items():
        dirs[split] = f"of {split}"
        assert name
    project = changed(blended, tmp_path, retro_neighbor_dirs=dirs, retro_gpt_seed=seed)
    for split, name in ProjectConfig.load(blended).retro_neighbor_dirs.items():
        (project / "query" / name).rename(project / "query" / f"of {split}")
    without_records(project)
    if seed == 1234:
        assert build_retro_datasets(project)["train"] is not None
        return
    with pytest.raises(ProjectError, match="has neighbors of its own documents"):
        build_retro_datasets(project)
