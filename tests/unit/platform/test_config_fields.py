"""Fields read from megatron's source are those of its dataclasses."""

from __future__ import annotations

import dataclasses

import pytest

from retro_mcore.platform.config_fields import config_fields
from retro_mcore.training.options import megatron as flags

FLAGS = {
    "TransformerConfig": {},
    "ModelParallelConfig": {},
    "DistributedDataParallelConfig": flags.DATA_PARALLEL_FLAGS,
    "OptimizerConfig": flags.OPTIMIZER_FLAGS,
}


@pytest.mark.parametrize("name", FLAGS)
def test_names_and_defaults_are_the_dataclass_own(megatron, name):
    from megatron.core import ModelParallelConfig
    from megatron.core.distributed import DistributedDataParallelConfig
    from megatron.core.optimizer import OptimizerConfig
    from megatron.core.transformer import TransformerConfig

    classes = (
        ModelParallelConfig,
        DistributedDataParallelConfig,
        OptimizerConfig,
        TransformerConfig,
    )
    (real,) = (kind for kind in classes if kind.__name__ == name)
    defaults = {field.name: field.default for field in dataclasses.fields(real)}
    read = config_fields(name)
    assert read
    assert {field.name: field.default for field in read}.items() <= defaults.items()
    assert set(FLAGS[name].values()) <= {field.name for field in read}


def test_every_flag_of_the_layers_has_a_field():
    read = {f.name for name in ("TransformerConfig", "ModelParallelConfig")
            for f in config_fields(name)}  # fmt: skip
    assert set(flags.LAYER_FLAGS.values()) <= read
