"""The distributed optimizer's saved state is each parameter's own, with several buckets."""

from __future__ import annotations

import pytest
import torch

from tests.unit.training.small import NO_DROPOUT, small_trainer


@pytest.fixture
def optimizer(megatron, monkeypatch):
    """A distributed optimizer after a step, whose first bucket ends with padding."""
    from retro_mcore.training import trainer as trainer_module

    wrap_model = trainer_module.wrap_model

    def with_a_bucket_for_the_embedding(model, *args):
        model.embedding.word_embeddings.weight.shared_embedding = True  # as in a pipeline
        return wrap_model(model, *args)

    monkeypatch.setattr(trainer_module, "wrap_model", with_a_bucket_for_the_embedding)
    # Sizes whose first bucket is no multiple of what it is padded to.
    sizes = {"retro_encoder_num_layers": 1, "ffn_hidden_size": 60}
    trainer = small_trainer(**NO_DROPOUT, **sizes, use_distributed_optimizer=True)
    parts = trainer._parts
    for index, parameter in enumerate(parts.chunks[0].parameters()):
        parameter.main_grad.copy_(torch.full_like(parameter, 1e-3 * (index + 1)))
    parts.optimizer.step()
    return parts


def test_saved_moments_are_the_parameters_own(optimizer):
    from retro_mcore.training.checkpointing import _METADATA
    from retro_mcore.training.optimizer import unwrap_model
    from retro_mcore.training.optimizer_state import unpadded_bucket_offsets

    parts = optimizer
    inner = parts.optimizer.chained_optimizers[0]
    (buffer,) = inner.buffers
    assert len(buffer.buckets) > 1
    assert buffer.buckets[0].numel_unpadded < buffer.buckets[0].grad_data.numel()
    model = unwrap_model(parts.chunks[0])
    sharded = model.sharded_state_dict(metadata=_METADATA)
    with unpadded_bucket_offsets(parts.optimizer):
        state = inner.sharded_param_state_fully_reshardable(sharded, metadata=_METADATA)
    for parameter, saved in zip(buffer.param_index_map, state.values(), strict=True):
        own = inner._get_main_param_and_optimizer_states(parameter)
        for key in ("param", "exp_avg", "exp_avg_sq"):
            assert torch.equal(saved[key].data.flatten(), own[key].flatten()), saved[key].key
