"""Parts of the bake-off of memories: neighbors in the context, and kNN-LM's probabilities."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.memory_bakeoff_context import interleave
from benchmarks.memory_bakeoff_knn import Datastore, Mixture, States, probability, tuned


def test_every_token_is_predicted_as_without_neighbors():
    text, counted = np.arange(1, 10), np.array([1, 1, 0, 1, 1, 1, 1, 0], np.float32)
    neighbors = np.array([[50, 51], [60, 61]])
    mixed, mask = interleave(text, counted, neighbors)
    assert mixed.tolist() == [1, 2, 3, 4, 50, 51, 5, 6, 7, 8, 60, 61, 9]
    labels = mixed[1:][mask > 0]
    np.testing.assert_array_equal(labels, text[1:][counted > 0])
    assert mask.sum() == counted.sum()


def test_neighbors_vote_for_the_tokens_that_followed_them():
    distances = np.array([[0.0, 1.0, 2.0], [3.0, 3.0, 9.0]], np.float32)
    tokens = np.array([[7, 8, 7], [5, 6, -1]])
    found = probability(np.array([7, 6]), distances, tokens, temperature=1.0)
    weights = np.exp([-0.0, -1.0, -2.0])
    np.testing.assert_allclose(found, [(weights[0] + weights[2]) / weights.sum(), 0.5])
    states = States(np.zeros((2, 1)), np.array([7, 6]), -np.log([0.25, 0.5]))
    half = Mixture(0.5, 1.0).losses(states, distances, tokens)
    np.testing.assert_allclose(np.exp(-half), 0.5 * (np.array([0.25, 0.5]) + found))


def test_a_datastore_finds_what_followed_a_state():
    generator = np.random.default_rng(0)
    keys, labels = generator.normal(size=(400, 8)).astype(np.float32), np.arange(400) % 50
    parts = [States(keys[i : i + 40], labels[i : i + 40], np.ones(40)) for i in range(0, 400, 40)]
    store = Datastore(parts, lists=4, probes=4)
    assert len(store) == 400
    distances, tokens = store.search(keys[:30])
    # Eight bits per dimension: a state's own code is nearest to it.
    np.testing.assert_array_equal(tokens[:, 0], labels[:30])
    assert store.num_bytes == 400 * (8 + 8 + 4)
    known = States(keys[:30], labels[:30], np.full(30, np.log(50)))
    best = tuned(known, distances, tokens)
    assert best.losses(known, distances, tokens).mean() < np.log(50) - 0.5


@pytest.mark.slow
def test_five_memories_side_by_side(tmp_path, monkeypatch, capsys):
    import json
    import sys

    from benchmarks import memory_bakeoff

    monkeypatch.chdir(tmp_path)
    rows = tmp_path / "rows.json"
    flags = ["--smoke", "--folder", "models", "--timed", "1", "--json", str(rows)]
    monkeypatch.setattr(sys, "argv", ["memory_bakeoff", *flags])
    memory_bakeoff.main()
    (found,) = json.loads(rows.read_text("utf-8"))
    names = ["GPT", "Retro", "kNN-LM", "text in context", "Retro++"]
    assert [row["model"] for row in found] == names
    assert len({row["perplexity"] for row in found}) == len(names)
    assert all(0 < row["perplexity"] < 1000 for row in found)
    assert "Retro++" in capsys.readouterr().out
