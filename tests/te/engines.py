"""Models of Transformer Engine's modules on a machine without a GPU, and the same of local ones."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pytest
import torch

from tests.unit.huggingface.models import SMALL

MARKS = [
    pytest.mark.te,
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("transformer_engine") is None,
        reason="needs Transformer Engine (make test-te)",
    ),
]


@contextmanager
def constructing() -> Iterator[None]:
    """Let Transformer Engine construct modules: they ask for a GPU, and then do not use it."""
    with mock.patch.object(torch.cuda, "is_available", return_value=True):
        yield


def model_of(engine: bool, stage: dict[str, Any] | None = None, **options: Any) -> Any:
    """The small model in evaluation mode.

    Args:
        engine: Of Transformer Engine's modules, else of local ones.
        stage: Arguments of `ParallelOptions`.
        **options: Of `ModelArguments`, beside `SMALL`.
    """
    from megatron.core.parallel_state import is_pipeline_first_stage as is_first_stage
    from megatron.core.parallel_state import is_pipeline_last_stage as is_last_stage

    from retro_mcore.model.options import ModelArguments
    from retro_mcore.training.options.parallel import ParallelOptions, RecomputeOptions
    from retro_mcore.training.setup.build import assemble_model
    from retro_mcore.training.setup.model_config import build_config

    arguments = ModelArguments(**{**SMALL, **options})
    config = build_config(arguments, ParallelOptions(**(stage or {})), RecomputeOptions())
    where = {"pre_process": is_first_stage(), "post_process": is_last_stage(), "vp_stage": None}
    torch.manual_seed(3)
    with constructing():
        return assemble_model(config, arguments, engine, **where).eval()


def pair(stage: dict[str, Any] | None = None, **options: Any) -> tuple[Any, Any]:
    """The model of local modules, and of Transformer Engine's."""
    return model_of(False, stage, **options), model_of(True, stage, **options)


def weights_of(model: Any) -> dict[str, torch.Tensor]:
    """Its weights by the names of local modules."""
    from retro_mcore.checkpoint.conversion.names import local_name

    state = model.state_dict()
    return {
        local_name(name): value
        for name, value in state.items()
        if isinstance(value, torch.Tensor) and not name.endswith("_extra_state")
    }


def sharded(model: Any) -> dict[str, dict[str, Any]]:
    """What a checkpoint holds of it: each entry's place, by its key."""
    from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensorFactory

    from retro_mcore.checkpoint.state import METADATA

    entries = {}
    for entry in model.sharded_state_dict(metadata=METADATA).values():
        names = ("global_shape", "global_offset", "replica_id", "axis_fragmentations", "dtype")
        found = {name: getattr(entry, name, None) for name in names}
        found["kind"] = type(entry).__name__
        found["any rows"] = getattr(entry, "allow_shape_mismatch", None)
        if isinstance(entry, ShardedTensorFactory):
            found["shape"] = tuple(entry.data.shape)
        key = entry.unique_key if isinstance(entry, ShardedObject) else entry.key
        entries[key + str(found["global_offset"])] = found
    return entries


#: What Megatron's optimizers and gradient sums read from a parameter. (Not `partition_stride`: in
#: 0.19.2 local experts have another than Transformer Engine's. Its FSDP and its RL alone read it.)
ATTRIBUTES = {
    "tensor_model_parallel": False,
    "partition_dim": -1,
    "sequence_parallel": False,
    "allreduce": True,
    "shared": False,
    "shared_embedding": False,
    "is_embedding_or_output_parameter": False,
    "mup_scaled_learning_rate": False,
}


def attributes(model: Any) -> dict[str, dict[str, Any]]:
    """`ATTRIBUTES` of its parameters, by the names of local modules."""
    from retro_mcore.checkpoint.conversion.names import local_name

    return {
        local_name(name): {
            each: getattr(weight, each, absent) for each, absent in ATTRIBUTES.items()
        }
        for name, weight in model.named_parameters()
    }
