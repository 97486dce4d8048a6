"""One rank's error becomes every rank's."""

from __future__ import annotations

import pytest

from retro_mcore.distributed import (
    PeerError,
    broadcast_object,
    get_rank,
    get_world_size,
    raise_together,
)
from retro_mcore.errors import ConfigurationError, CorpusError
from tests.processes import run_ranks


def test_alone_without_a_process_group():
    assert (get_rank(), get_world_size(), broadcast_object("x")) == (0, 1, "x")
    with pytest.raises(ValueError, match="mine"), raise_together():
        raise ValueError("mine")


@pytest.mark.distributed
def test_two_ranks():
    assert run_ranks(2, what_each_rank_sees) == [
        {
            "user error": ("CorpusError", "a.jsonl: line 3. Mend it"),
            "both": ("ConfigurationError", "rank: 0. Mend it"),
            "other": ("PeerError", "rank 1 failed: ValueError: broken"),
            "broadcast": "from 0",
        },
        {
            "user error": ("CorpusError", "a.jsonl: line 3. Mend it"),
            "both": ("ConfigurationError", "rank: 1. Mend it"),
            "other": ("ValueError", "broken"),
            "broadcast": "from 0",
        },
    ]


def what_each_rank_sees():
    def seen(function):
        try:
            with raise_together():
                function()
        except (ConfigurationError, CorpusError, PeerError, ValueError) as error:
            return type(error).__name__, str(error)
        return None

    def only_rank_1(error):
        if get_rank() == 1:
            raise error

    def everybody():
        raise ConfigurationError("rank", str(get_rank()), "Mend it")

    return {
        "user error": seen(lambda: only_rank_1(CorpusError("a.jsonl", "line 3", "Mend it"))),
        "both": seen(everybody),
        "other": seen(lambda: only_rank_1(ValueError("broken"))),
        "broadcast": broadcast_object(f"from {get_rank()}"),
    }
