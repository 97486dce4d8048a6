"""Configurations of stages: the commands' flags, and records that they are restored from."""

from __future__ import annotations

import dataclasses
import json
from importlib import import_module
from pathlib import Path

import pytest

from retro_mcore.errors import CorruptFileError
from retro_mcore.project import ProjectPaths
from retro_mcore.stages.build_db import BuildDbConfig
from retro_mcore.stages.configuration import recorded_config

STAGES = ("preprocess_corpus", "build_db", "build_index", "query_neighbors", "update_db")


@pytest.mark.parametrize("stage", STAGES)
def test_a_command_has_the_flags_of_its_configuration(stage):
    name = "".join(map(str.title, stage.split("_")))
    config = getattr(import_module(f"retro_mcore.stages.{stage}"), f"{name}Config")
    options = getattr(import_module(f"retro_mcore.cli.{stage}"), f"{name}Options")
    names = [field.name for field in dataclasses.fields(config)]
    assert [field.name for field in dataclasses.fields(options)] == ["project_dir", *names]
    assert all(field.kw_only for field in dataclasses.fields(config))


@dataclasses.dataclass(kw_only=True)
class Config:
    """Configuration of the test's stage."""

    index: str = "auto"
    nprobe: int | None = None
    embed_fp16: bool = False


def record(tmp_path: Path, options: dict[str, object]) -> ProjectPaths:
    paths = ProjectPaths(tmp_path)
    paths.stages.mkdir()
    paths.stage_record("stage").write_text(json.dumps({"options": options, "inputs": {}}))
    return paths


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, Config()),
        ({"--nprobe": 4, "--embed-fp16": True}, Config(nprobe=4, embed_fp16=True)),
        ({"retro_block_size": 20, "--nprobe of build_index": 7}, Config()),
        # Versions whose index had no --index.
        ({"--index-str": "Flat", "--nprobe": None}, Config(index="Flat")),
        ({"--index-str": None, "--nprobe": None}, Config()),
    ],
)
def test_a_recorded_configuration_is_restored(tmp_path, options, expected):
    assert recorded_config(record(tmp_path, options), "stage", Config) == expected


@pytest.mark.parametrize(
    ("options", "found"),
    [
        ({"--other": 1}, "--other is unknown to stage"),
        ({"--nprobe": "4"}, "--nprobe is '4', not a whole number or null"),
        ({"--index": None, "--x": 1}, "--x is unknown to stage; --index is null, not a text"),
    ],
)
def test_a_record_of_something_else_is_refused(tmp_path, options, found):
    with pytest.raises(CorruptFileError, match=rf"stage\.json: {found}\. Restore the file"):
        recorded_config(record(tmp_path, options), "stage", Config)


def test_a_stage_that_has_not_finished_has_no_configuration(tmp_path):
    assert recorded_config(ProjectPaths(tmp_path), "build_db", BuildDbConfig) is None
