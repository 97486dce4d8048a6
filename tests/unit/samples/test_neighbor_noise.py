"""Noise on neighbors: in training only, the same for every worker and for a resumed run."""

from __future__ import annotations

import pickle
from dataclasses import replace

import numpy as np
import pytest
from torch.utils.data import DataLoader

from retro_mcore.chunking import NO_NEIGHBOR
from retro_mcore.errors import ConfigurationError
from retro_mcore.samples.neighbor_noise import NeighborNoise
from retro_mcore.samples.retro_dataset import build_retro_datasets
from tests.unit.data.projects import built_project
from tests.unit.training.small import small_plan

ALL = {
    "drop_chunks": 0.3,
    "drop_neighbors": 0.3,
    "replace_neighbors": 0.5,
    "replace_tokens": 0.2,
}


def samples(split="train", seed=1, **noise):
    datasets = build_retro_datasets(
        built_project(), train_noise=NeighborNoise(seed, **noise) if noise else None
    )
    dataset = datasets[split]
    return dataset, [dataset[index] for index in range(len(dataset))]


def stacked(items, key):
    return np.stack([item[key] for item in items])


def equal(items, others):
    return all(
        np.array_equal(value, other[key])
        for item, other in zip(items, others, strict=True)
        for key, value in item.items()
    )


def test_whole_chunks_lose_their_neighbors():
    plain = stacked(samples()[1], "neighbor_chunks")[..., 0]
    items = samples(drop_chunks=0.5)[1]
    ids = stacked(items, "neighbor_chunks")[..., 0]
    gone = (ids == NO_NEIGHBOR).all(-1)
    assert 0.2 < gone.mean() < 0.8
    assert np.array_equal(ids[~gone], plain[~gone])
    assert stacked(items, "neighbor_mask")[gone].all()
    assert (stacked(samples(drop_chunks=1.0)[1], "neighbor_chunks") == NO_NEIGHBOR).all()


def test_single_neighbors_are_dropped():
    plain = stacked(samples()[1], "neighbor_chunks")
    ids = stacked(samples(drop_neighbors=0.5)[1], "neighbor_chunks")
    gone = ids[..., 0] == NO_NEIGHBOR
    assert (gone.any(-1) & ~gone.all(-1)).any()  # one of a chunk's two
    assert np.array_equal(ids[~gone], plain[~gone])
    assert (ids[gone] == NO_NEIGHBOR).all()  # with their continuations


def test_replacements_are_whole_chunks_of_others_documents():
    plain = stacked(samples()[1], "neighbor_chunks")
    dataset, items = samples(replace_neighbors=1.0)
    ids = stacked(items, "neighbor_chunks")
    assert (ids != plain).mean() > 0.5
    assert np.array_equal(ids[..., 0] == NO_NEIGHBOR, plain[..., 0] == NO_NEIGHBOR)
    assert np.array_equal(ids[..., 1], dataset.database.continuation(ids[..., 0]))
    for index, item in enumerate(items):
        found = item["neighbor_chunks"][item["neighbor_chunks"] != NO_NEIGHBOR]
        documents = dataset.database.documents(found)[:, 1]
        assert not np.isin(documents, dataset.samples.document_ids(index)).any()


def test_own_documents_are_those_of_the_dataset_in_another_database():
    """An exchanged database numbers its datasets otherwise, or lacks them."""
    dataset, _ = samples(replace_neighbors=1.0)
    assert dataset.numbers == [0]
    other = replace(dataset, numbers=[7])
    own = 0
    for index in range(len(other)):
        found = other[index]["neighbor_chunks"]
        documents = other.database.documents(found[found != NO_NEIGHBOR])[:, 1]
        own += np.isin(documents, other.samples.document_ids(index)).sum()
    assert own


def test_tokens_are_exchanged_for_others_of_the_sample():
    plain, items = samples()[1], samples(replace_tokens=0.25)[1]
    for before, after in zip(plain, items, strict=True):
        there = ~before["neighbor_mask"]
        assert np.array_equal(before["neighbor_mask"], after["neighbor_mask"])
        assert np.array_equal(before["neighbor_tokens"][~there], after["neighbor_tokens"][~there])
        tokens = before["neighbor_tokens"][there]
        assert np.isin(after["neighbor_tokens"][there], tokens).all()
        assert 0.1 < (after["neighbor_tokens"][there] != tokens).mean() < 0.4


def test_the_same_for_workers_and_copies_and_another_for_another_seed():
    dataset, items = samples(**ALL)
    assert equal(items, [pickle.loads(pickle.dumps(dataset))[i] for i in range(len(dataset))])
    loaded = DataLoader(dataset, batch_size=None, num_workers=2)
    assert equal(items, [{k: np.asarray(v) for k, v in item.items()} for item in loaded])
    assert not equal(items, samples(seed=2, **ALL)[1])


def test_one_probability_does_not_move_anothers_draws():
    ids = stacked(samples(drop_chunks=0.3)[1], "neighbor_chunks")
    both = stacked(samples(drop_chunks=0.3, drop_neighbors=0.3)[1], "neighbor_chunks")
    assert (both[ids == NO_NEIGHBOR] == NO_NEIGHBOR).all()


def test_only_in_training():
    for split in ("valid", "test"):
        assert equal(samples(split)[1], samples(split, **ALL)[1])
    assert not equal(samples()[1], samples(**ALL)[1])


@pytest.mark.usefixtures("megatron")
def test_a_resumed_run_sees_the_same_noise(tmp_path):
    from retro_mcore.cli.pretrain_retro import PretrainRetroOptions, pretrain_retro

    def run(**changes):
        noise = {f"retro_{name}": value for name, value in ALL.items()}
        flags = {"num_layers": 2, "hidden_size": 32, "num_attention_heads": 2, "lr": 0.01}
        flags |= {"retro_decoder_layers": [1, 2], "micro_batch_size": 2, "device": "cpu"}
        options = {"project_dir": str(built_project()), "num_workers": 0, **flags, **noise}
        return pretrain_retro(PretrainRetroOptions(**{**options, **changes}))

    whole = run()
    first = run(save=str(tmp_path), exit_interval=2)
    second = run(save=str(tmp_path), load=str(tmp_path))
    assert first.train_losses + second.train_losses == whole.train_losses
    assert run(retro_drop_chunks=0.0).train_losses != whole.train_losses


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"retro_drop_chunks": 1.5}, "--retro-drop-chunks: 1.5"),
        ({"retro_replace_tokens": 0.1, "no_retrieval": True}, "--retro-replace-tokens: given with"),
    ],
)
@pytest.mark.usefixtures("megatron")
def test_noise_that_cannot_work_is_refused(flags, message):
    with pytest.raises(ConfigurationError, match=message):
        small_plan(**flags)
