"""Ranks meet in the store of torchrun's agent, whatever earlier ranks have left there."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
import torch.distributed as dist

from retro_mcore.agent_store import _PREFIX, fresh_part
from tests.rendezvous import host_store

RANKS = 3


@pytest.fixture
def store(monkeypatch):
    store, address = host_store()
    for name, value in address.items():
        monkeypatch.setenv(name, value)
    return store


def meet(ranks=range(RANKS), seconds=60):
    """What each of these ranks gets."""
    with ThreadPoolExecutor(RANKS) as threads:
        waiting = [
            threads.submit(fresh_part, rank, RANKS, timedelta(seconds=seconds)) for rank in ranks
        ]
    return waiting


def test_all_ranks_share_a_part_that_nobody_has_used(store):
    names = []
    for attempt in range(3):
        parts, own = zip(*(each.result() for each in meet()), strict=True)
        assert len(set(own)) == 1
        names.append(own[0])
        assert not parts[1].check(["address"])
        parts[0].set("address", f"of attempt {attempt}")
        assert parts[2].get("address").decode() == f"of attempt {attempt}"
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("gone", [[0], [1], [0, 2]])
def test_an_attempt_that_has_ended_before_all_came_is_forgotten(store, gone):
    came = [rank for rank in range(RANKS) if rank not in gone]
    assert isinstance(meet(came, seconds=1)[0].exception(), TimeoutError)
    names = {each.result()[1] for each in meet()}
    assert len(names) == 1


def test_old_answers_are_read_by_nobody(store):
    left = dist.PrefixStore(_PREFIX, store)
    left.set("rank/1", "an old rank")
    left.set("answer/an old rank", "an old name")
    left.set("came/an old name/1", "an old rank")
    names = {each.result()[1] for each in meet()}
    assert len(names) == 1
    assert "an old name" not in names


def test_who_did_not_come_is_named(store):
    (first,) = meet([0], seconds=1)
    with pytest.raises(TimeoutError, match=r"2 of 3 ranks \(1, 2\) did not come"):
        first.result()
    (second,) = meet([1], seconds=1)
    with pytest.raises(TimeoutError, match="rank 0 did not come to the start within 1 s"):
        second.result()
