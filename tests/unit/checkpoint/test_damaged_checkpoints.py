"""A checkpoint that a disk or a copy damaged is refused by every reader, by the file's name; one
without checksums (an older one, Megatron's own) loads, or is refused in a line."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from contextlib import suppress
from pathlib import Path

import pytest
import torch

from retro_mcore.checkpoint.checksums import CHECKSUMS_FILE
from retro_mcore.errors import CheckpointError, RetroError
from tests.unit.training.small import small_trainer, train

pytestmark = pytest.mark.usefixtures("megatron")


@pytest.fixture(scope="module")
def saved(tmp_path_factory, megatron):
    """A run's directory, with one checkpoint."""
    directory = tmp_path_factory.mktemp("saved")
    train(save=str(directory), train_iters=1)
    return directory


@pytest.fixture
def checkpoint(saved, tmp_path):
    """Its checkpoint again, to be damaged."""
    return next(shutil.copytree(saved, tmp_path / "copy").glob("iter_*"))


def resume(checkpoint: Path) -> None:
    small_trainer(load=str(checkpoint.parent), train_iters=1)


def evaluate(checkpoint: Path) -> None:
    from retro_mcore.training.setup.load_model import load_model_from_checkpoint

    load_model_from_checkpoint(checkpoint.parent)


def convert(checkpoint: Path) -> None:
    from retro_mcore.checkpoint.conversion.formats import open_checkpoint

    for weight in open_checkpoint(checkpoint.parent).weights.values():
        weight.load()


READERS = [resume, evaluate, convert]


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def zero(path: Path) -> None:
    size = path.stat().st_size
    path.write_bytes(path.read_bytes()[: size // 2] + bytes(size - size // 2))


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 3)


def files_of(checkpoint: Path) -> list[Path]:
    return sorted(path for path in checkpoint.iterdir() if path.is_file())


@pytest.mark.parametrize("read", READERS)
@pytest.mark.parametrize("damage", [flip, zero, cut])
@pytest.mark.parametrize(
    "kind", [".distcp", ".metadata", "common.pt", "metadata.json", "sums.json"]
)
def test_damage_is_told_with_the_file(checkpoint, read, damage, kind):
    path = next((path for path in files_of(checkpoint) if path.name.endswith(kind)), None)
    if path is None:
        pytest.skip("this megatron-core writes no such file")
    damage(path)
    with pytest.raises(CheckpointError) as caught:
        read(checkpoint)
    assert path.name in str(caught.value)


@pytest.mark.parametrize("read", READERS)
def test_a_checkpoint_without_checksums_loads(checkpoint, read):
    (checkpoint / CHECKSUMS_FILE).unlink()
    read(checkpoint)


@pytest.mark.parametrize("read", READERS)
@pytest.mark.parametrize("damage", [zero, cut, Path.unlink])
def test_without_checksums_damage_is_told_or_not_seen(checkpoint, read, damage):
    (checkpoint / CHECKSUMS_FILE).unlink()
    for path in files_of(checkpoint):
        content = path.read_bytes()
        damage(path)
        with suppress(RetroError):
            read(checkpoint)
        path.write_bytes(content)


@pytest.mark.parametrize("read", READERS)
@pytest.mark.parametrize("name", ["/etc/passwd", "../../outside.distcp", "", "..", "a\0b", 7])
def test_a_table_of_contents_that_leads_out_of_the_checkpoint(checkpoint, read, name):
    """A checkpoint of a stranger must not make a model of other files of its user."""
    from retro_mcore.checkpoint.contents import read_metadata

    metadata = read_metadata(checkpoint)
    for index, entry in metadata.storage_data.items():
        metadata.storage_data[index] = type(entry)(name, entry.offset, entry.length)
    (checkpoint / ".metadata").write_bytes(pickle.dumps(metadata))
    (checkpoint / CHECKSUMS_FILE).unlink()
    with pytest.raises(CheckpointError, match="outside of"):
        read(checkpoint)


@pytest.mark.parametrize("read", READERS)
@pytest.mark.parametrize(
    "common",
    [7, [], {}, {"args": {"a": 1}, "iteration": 1}, {"args": 5}, {"iteration": -1}],
    ids=str,
)
def test_arguments_that_are_none(checkpoint, read, common):
    if not (checkpoint / "common.pt").is_file():
        pytest.skip("this megatron-core writes no such file")
    torch.save(common, checkpoint / "common.pt")
    (checkpoint / CHECKSUMS_FILE).unlink()
    try:
        read(checkpoint)
    except CheckpointError:
        return
    assert read is convert  # what the weights tell is enough for it


def test_checksums_name_files_of_the_checkpoint_alone(checkpoint):
    content = json.loads((checkpoint / CHECKSUMS_FILE).read_text())
    assert set(content["files"]) == {p.name for p in files_of(checkpoint)} - {CHECKSUMS_FILE}
    from retro_mcore.checkpoint import checksums

    files = {**content["files"], "../../../etc/passwd": {"bytes": 1, "sha256": "0"}}
    changed = {"files": files, "sha256": checksums._digest(files)}
    (checkpoint / CHECKSUMS_FILE).write_text(json.dumps(changed))
    with pytest.raises(CheckpointError, match=CHECKSUMS_FILE):
        evaluate(checkpoint)


def test_a_converted_checkpoint_has_checksums(checkpoint, tmp_path):
    from retro_mcore.cli.convert_checkpoint import ConvertCheckpointOptions, convert_checkpoint

    for target in ("retro-mcore", "megatron-torch"):
        result = convert_checkpoint(
            ConvertCheckpointOptions(
                load=str(checkpoint),
                save=str(tmp_path / target),
                target=target,
                retro_origin=None if target == "retro-mcore" else "mcore-0.15",
            )
        )
        file = max(result.path.rglob("*.distcp" if target == "retro-mcore" else "*.pt"))
        flip(file)
        with pytest.raises(CheckpointError, match=file.name):
            convert(result.path / "x")


def test_a_lost_tracker_file_starts_nothing_again(tmp_path):
    """Somebody copied a run without its tracker file: training began again, over its checkpoints.
    Killed before it is first written, a run has one checkpoint, and goes on from that."""
    from retro_mcore.checkpoint.contents import CONFIG_FILE
    from retro_mcore.checkpoint.files import checkpoint_path, existing_checkpoint
    from retro_mcore.checkpoint.tracker import TRACKER

    assert existing_checkpoint(tmp_path) is None
    for iteration in (2, 4):
        path = checkpoint_path(tmp_path, iteration)
        path.mkdir()
        (path / CONFIG_FILE).write_text("{}")
        if iteration == 2:
            assert existing_checkpoint(tmp_path) == path
    with pytest.raises(CheckpointError, match="iteration to load, of 2, 4"):
        existing_checkpoint(tmp_path)
    (tmp_path / TRACKER).write_text("2")
    assert existing_checkpoint(tmp_path) == checkpoint_path(tmp_path, 2)
