"""The one allow-list: what is read from pickled files, and what stands for the rest."""

from __future__ import annotations

import io
import pickle
from argparse import Namespace
from fractions import Fraction
from pathlib import PurePosixPath
from signal import SIGTERM

import numpy as np
import pytest
import torch

from retro_mcore.checkpoint.safe_loading import (
    Placeholder,
    load_local_state,
    load_run_state,
    load_torch_file,
)
from retro_mcore.errors import CheckpointError


def saved(content: object) -> io.BytesIO:
    file = io.BytesIO()
    torch.save(content, file)
    file.seek(0)
    return file


def test_arguments_are_read_and_what_nobody_needs_stands_as_a_placeholder():
    state = np.random.RandomState(1).get_state()
    args = load_torch_file(saved(Namespace(size=3, signal=SIGTERM, random=state[1])), "file")
    assert args.size == 3
    assert isinstance(args.signal, Placeholder)
    assert isinstance(args.random, Placeholder)


def test_a_runs_state_holds_its_arrays():
    state = np.random.RandomState(1).get_state()
    loaded = load_run_state(saved([{"numpy": state, "extra": io.BytesIO(b"fp8")}]))
    np.testing.assert_equal(loaded[0]["numpy"], state)
    assert loaded[0]["extra"].getvalue() == b"fp8"


def test_what_the_process_allows_elsewhere_is_refused():
    before = set(torch.serialization.get_safe_globals())
    with torch.serialization.safe_globals([Fraction, PurePosixPath]):
        with pytest.raises(CheckpointError, match=r"holds fractions\.Fraction"):
            load_torch_file(saved(Fraction(1, 3)), "file")
        with pytest.raises(pickle.UnpicklingError, match=r"fractions\.Fraction"):
            load_run_state(saved(Fraction(1, 3)))
        assert torch.load(saved(Fraction(1, 3)), weights_only=True) == Fraction(1, 3)
    assert set(torch.serialization.get_safe_globals()) == before


@pytest.mark.usefixtures("megatron")
@pytest.mark.parametrize("mapped", [False, True])
def test_a_local_checkpoint_holds_sharded_tensors_and_nothing_that_runs(tmp_path, mapped):
    from megatron.core.dist_checkpointing import ShardedTensor

    weight = torch.arange(6.0).reshape(2, 3)
    path = tmp_path / "iter_0000005_0_local.pt"
    torch.save({"w": ShardedTensor.from_rank_offsets("w", weight)}, path)
    found = load_local_state(path, (ShardedTensor,), mapped)["w"]
    assert (found.key, found.data.tolist()) == ("w", weight.tolist())
    torch.save({"w": Fraction(1, 3)}, path)
    with pytest.raises(CheckpointError, match=r"holds fractions\.Fraction"):
        load_local_state(path, (ShardedTensor,), mapped)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_local_state(path, (ShardedTensor,), mapped)
