"""Private names of megatron-core and torch that this package relies on."""

from __future__ import annotations

from importlib import import_module
from types import SimpleNamespace

import pytest

# Listed, with the reasons, in docs/decisions/0020-megatrons-private-names.md.
NAMES = [
    "megatron.core.parallel_state:_global_process_group_list",
    "megatron.core.tensor_parallel.random:_get_cuda_rng_state",
    "megatron.core.tensor_parallel.random:_set_cuda_rng_state",
    "megatron.core.tensor_parallel.random:CheckpointWithoutOutput.__init__",
    "megatron.core.tensor_parallel.random:HAVE_TE",
    "megatron.core.dist_checkpointing.strategies.filesystem_async:_results_queue",
    "megatron.core.optimizer.optimizer:MegatronOptimizer.get_grad_norm",
    "megatron.core.optimizer.distrib_optimizer:"
    "DistributedOptimizer._set_main_param_and_optimizer_states",
    "megatron.core.optimizer.distrib_optimizer:"
    "DistributedOptimizer.sharded_param_state_fully_reshardable",
    "megatron.core.optimizer:USING_PYTORCH_OPTIMIZER",
    "megatron.core.optimizer.distrib_optimizer:HAVE_APEX_OR_TE",
    "megatron.core.optimizer.clip_grads:l2_norm_impl",
    "megatron.core.optimizer.clip_grads:multi_tensor_scale_impl",
    "megatron.core.optimizer.optimizer:multi_tensor_scale_impl",
    "megatron.core.datasets.gpt_dataset:GPTDataset._query_document_sample_shuffle_indices",
    "megatron.core.datasets.gpt_dataset:GPTDataset._build_document_sample_shuffle_indices",
    "megatron.core.datasets.gpt_dataset:GPTDataset._key_config_attributes",
    "megatron.core.transformer.transformer_layer:TransformerLayer._forward_mlp",
    "megatron.core.transformer.moe.router:TopKRouter.apply_z_loss",
    "megatron.core.transformer.moe.router:TopKRouter.attach_and_log_load_balancing_loss",
    "megatron.core.transformer.moe.router:TopKRouter.gating",
    "megatron.core.transformer.moe.token_dispatcher:maybe_move_tensor_to_cpu",
    "torch.distributed.checkpoint.default_planner:DefaultLoadPlanner.load_bytes",
    "torch.distributed.checkpoint.default_planner:set_element",
    "torch.serialization:_get_layout",
    "torch.utils._device:_device_constructors",
]


@pytest.mark.parametrize("name", NAMES)
def test_a_private_name_is_there(megatron, name):
    module, _, path = name.partition(":")
    found = import_module(module)
    for part in path.split("."):
        found = getattr(found, part)


def test_objects_are_unpickled_by_the_given_function_and_then_by_torch_again(megatron):
    from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner

    from retro_mcore.platform.torch_checkpoints import _unpickling_with

    before = DefaultLoadPlanner.load_bytes
    with _unpickling_with(lambda file: f"{file} unpickled"):
        planner = DefaultLoadPlanner(flatten_state_dict=False)
        planner.state_dict = {}
        planner.load_bytes(SimpleNamespace(dest_index=SimpleNamespace(fqn="rng")), "bytes")
        assert planner.state_dict == {"rng": "bytes unpickled"}
    assert DefaultLoadPlanner.load_bytes is before
