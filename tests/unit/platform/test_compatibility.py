"""Workarounds for megatron-core: each test fails without the function that it is about."""

from __future__ import annotations

import importlib.util
import multiprocessing
import queue
import sys
from importlib.metadata import version
from types import SimpleNamespace

import pytest
import torch

from retro_mcore import missing_triton
from retro_mcore.platform import compatibility
from retro_mcore.platform.compatibility import (
    takes_configurations,
    tokens_and_document_ids,
)
from tests.unit.training.small import NO_DROPOUT, small_trainer, train


@pytest.mark.skipif(importlib.util.find_spec("triton") is not None, reason="Triton is installed")
def test_the_kernels_that_need_triton_import_and_refuse_to_run(monkeypatch):
    monkeypatch.delitem(sys.modules, missing_triton.MODULE, raising=False)
    missing_triton.allow_missing_triton()
    kernels = sys.modules[missing_triton.MODULE]
    with pytest.raises(ImportError, match="needs the package triton"):
        kernels.paged_stash_reset()


def test_saving_starts_no_manager_process(megatron, tmp_path):
    before = set(multiprocessing.active_children())
    train(train_iters=1, save=str(tmp_path))
    assert set(multiprocessing.active_children()) == before


def test_results_of_any_size_come_from_a_forked_writer():
    results = compatibility._FileQueue()
    for content in (b"0", b"1", b"2"):  # one queue serves every save of Megatron-LM's trainer
        large = content * 1_000_000  # more than a pipe holds
        writer = multiprocessing.get_context("fork").Process(target=results.put, args=(large,))
        writer.start()
        writer.join(60)
        assert results.get_nowait() == large
    with pytest.raises(queue.Empty):
        results.get_nowait()


def test_a_writer_that_died_left_no_results():
    with pytest.raises(queue.Empty):
        compatibility._FileQueue().get_nowait()


OPTIMIZERS = pytest.mark.parametrize("distributed", [False, True], ids=["plain", "distributed"])


@OPTIMIZERS
def test_a_checkpoint_is_saved_and_loaded_before_the_first_step(megatron, tmp_path, distributed):
    from retro_mcore.checkpoint.loading import load_checkpoint
    from retro_mcore.checkpoint.saving import save_checkpoint

    trainer = small_trainer(use_distributed_optimizer=distributed)
    args = trainer.plan.checkpoint_args()
    checkpoint = save_checkpoint(tmp_path, trainer._parts, trainer._progress, args)
    again = small_trainer(use_distributed_optimizer=distributed)
    load_checkpoint(checkpoint, again._parts)
    assert adam_steps(again) == {0.0}


@OPTIMIZERS
def test_each_parameter_counts_its_own_steps_after_loading(megatron, tmp_path, distributed):
    options = {**NO_DROPOUT, "use_distributed_optimizer": distributed}
    train(**options, save=str(tmp_path), exit_interval=2)
    trainer = small_trainer(**options, load=str(tmp_path), exit_interval=3)
    assert adam_steps(trainer) == {2.0}
    trainer.train()
    assert adam_steps(trainer) == {3.0}


def adam_steps(trainer):
    (part,) = trainer._parts.optimizer.chained_optimizers
    return {float(state["step"]) for state in part.optimizer.state.values()}


def test_padded_offsets_are_found_in_the_releases_that_have_them(megatron):
    from retro_mcore.platform.optimizer_state import _has_padded_offsets

    release = tuple(int(part) for part in version("megatron-core").split(".")[:2])
    assert _has_padded_offsets() == (release < (0, 20))


@pytest.fixture
def parts_with_padded_buckets(megatron, monkeypatch):
    """A distributed optimizer after a step, whose first bucket ends with padding."""
    from retro_mcore.training.loop import trainer as trainer_module

    wrap_model = trainer_module.wrap_model

    def with_a_bucket_for_the_embedding(model, *args):
        model.embedding.word_embeddings.weight.shared_embedding = True  # as in a pipeline
        return wrap_model(model, *args)

    monkeypatch.setattr(trainer_module, "wrap_model", with_a_bucket_for_the_embedding)
    # Sizes whose first bucket is no multiple of what it is padded to.
    sizes = {"retro_encoder_num_layers": 1, "ffn_hidden_size": 60}
    trainer = small_trainer(**NO_DROPOUT, **sizes, use_distributed_optimizer=True)
    parts = trainer._parts
    for index, parameter in enumerate(parts.stages[0].parameters()):
        parameter.main_grad.copy_(torch.full_like(parameter, 1e-3 * (index + 1)))
    parts.optimizer.step()
    return parts


def test_an_infinite_gradient_norm_stops_the_step_before_the_weights_change(megatron):
    from retro_mcore.platform.optimizer_state import InfiniteNormError

    trainer = small_trainer(**NO_DROPOUT)
    optimizer, (model,) = trainer._parts.optimizer, trainer._parts.stages
    before = [parameter.detach().clone() for parameter in model.parameters()]
    for parameter in model.parameters():
        parameter.main_grad.fill_(1e-3)
    model.module.embedding.word_embeddings.weight.main_grad[0, 0] = float("nan")
    with pytest.raises(InfiniteNormError, match="norm is nan"):
        optimizer.step()
    assert all(map(torch.equal, before, model.parameters()))


def test_an_item_of_the_gpt_dataset_begins_with_tokens_and_document_ids(megatron):
    from megatron.core.datasets.gpt_dataset import GPTDataset

    assert hasattr(GPTDataset, "_query_document_sample_shuffle_indices")
    for later in [(), ("lengths",)]:
        item = ("tokens", "ids", *later)
        dataset = SimpleNamespace(_query_document_sample_shuffle_indices=lambda index, it=item: it)
        assert tokens_and_document_ids(dataset, 0) == ("tokens", "ids")


def test_pretrain_takes_configurations_from_0_18_on():
    assert not takes_configurations(lambda train_valid_test_dataset_provider, model_provider: None)
    assert takes_configurations(lambda cfg_container, model_provider=None: None)


def test_saved_moments_are_the_parameters_own(parts_with_padded_buckets):
    from retro_mcore.checkpoint.state import METADATA
    from retro_mcore.platform.optimizer_state import unpadded_bucket_offsets
    from retro_mcore.platform.parallel import unwrap_model

    parts = parts_with_padded_buckets
    inner = parts.optimizer.chained_optimizers[0]
    (buffer,) = inner.buffers
    assert len(buffer.buckets) > 1
    assert buffer.buckets[0].numel_unpadded < buffer.buckets[0].grad_data.numel()
    model = unwrap_model(parts.stages[0])
    sharded = model.sharded_state_dict(metadata=METADATA)
    with unpadded_bucket_offsets(parts.optimizer):
        state = inner.sharded_param_state_fully_reshardable(sharded, metadata=METADATA)
    for parameter, saved in zip(buffer.param_index_map, state.values(), strict=True):
        own = inner._get_main_param_and_optimizer_states(parameter)
        for key in ("param", "exp_avg", "exp_avg_sq"):
            assert torch.equal(saved[key].data.flatten(), own[key].flatten()), saved[key].key
