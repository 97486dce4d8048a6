"""Tensor and sequence parallelism give the one-process model's losses and gradients."""

from __future__ import annotations

import pytest
import torch

from tests.processes import join_megatron, run_ranks
from tests.unit.model.builders import build_model, make_inputs, run_model

pytestmark = pytest.mark.distributed

VARIANTS = {
    "learned positions, biases": {},
    "rotary, grouped queries, SwiGLU": {
        "position_embedding_type": "rope",
        "num_query_groups": 2,
        "normalization": "RMSNorm",
        "gated_linear_unit": True,
        "activation_func": torch.nn.functional.silu,
        "add_bias_linear": False,
    },
    "DeepNorm, muP": {
        "retro_deepnorm": True,
        "retro_mup_base_hidden_size": 16,
        "retro_encoder_hidden_size": 24,
        "retro_encoder_num_attention_heads": 2,
        "num_query_groups": 2,
        "share_embeddings_and_output_weights": True,
    },
    "muP": {"retro_mup_base_hidden_size": 16},
    "like OLMo and Granite": {
        "position_embedding_type": "rope",
        "normalization": "RMSNorm",
        "num_query_groups": 2,
        "sublayer_norms": "post",
        "qk_layernorm": True,
        "qk_layernorm_over": "all_heads",
        "residual_multiplier": 0.4,
        "embedding_multiplier": 2.0,
        "logit_softcap": 3.0,
    },
    "parallel residual, limited scores": {"parallel_residual": True, "attention_softcap": 2.0},
    "right-aligned": {"retro_chunk_alignment": "right"},
    "packed documents": {"position_embedding_type": "rope", "documents": (9, 4, 19)},
    "packed documents, embedded": {"documents": (9, 4, 19), "embedded": True},
}


SEQUENCE_PARALLEL = {"TP": False, "TP+SP": True}


@pytest.fixture(scope="module")
def two_ranks():
    """What each of two ranks computes, by variant and kind of parallelism."""
    return run_ranks(2, every_variant)


@pytest.mark.parametrize("parallelism", SEQUENCE_PARALLEL)
@pytest.mark.parametrize("variant", VARIANTS)
def test_two_ranks_equal_one(megatron, two_ranks, variant, parallelism):
    loss, gradients = losses_and_gradients(1, False, VARIANTS[variant])
    for rank in two_ranks:
        parallel_loss, parallel_gradients = rank[variant, parallelism]
        torch.testing.assert_close(parallel_loss, loss, atol=1e-5, rtol=0)
        assert parallel_gradients.keys() == gradients.keys()
        for name, wanted in gradients.items():
            error = (parallel_gradients[name] - wanted).norm() / wanted.norm().clamp_min(1e-3)
            assert error < 1e-4, f"{name}: relative error {error:.1e}"


def every_variant():
    join_megatron(tensor_model_parallel_size=2)
    return {
        (variant, parallelism): losses_and_gradients(2, sequence_parallel, overrides)
        for variant, overrides in VARIANTS.items()
        for parallelism, sequence_parallel in SEQUENCE_PARALLEL.items()
    }


def losses_and_gradients(tensor_parallel, sequence_parallel, overrides):
    """The losses, and every parameter's gradient put together from all ranks."""
    from megatron.core.packed_seq_params import PackedSeqParams

    overrides = dict(overrides)
    lengths, documents = overrides.pop("documents", ()), {}
    embedded = overrides.pop("embedded", False)
    torch.manual_seed(1234)
    model = build_model(
        tensor_model_parallel_size=tensor_parallel,
        sequence_parallel=sequence_parallel,
        **overrides,
    )
    # No multiple of the chunk length, but of the number of ranks.
    length, batch_size = (sum(lengths), 1) if lengths else (30, 2)
    inputs = make_inputs(model.config, length, batch_size)
    if lengths:
        ends = torch.tensor([0, *lengths]).cumsum(0)
        documents["packed_seq_params"] = PackedSeqParams(qkv_format="thd", cu_seqlens_q=ends)
    if embedded:  # under sequence parallelism a part of the row
        positions = torch.arange(length)[None]
        documents["decoder_input"] = model.embedding(inputs["tokens"], positions)
        inputs["tokens"] = None
    losses = run_model(model, inputs, labels=inputs["labels"], **documents)
    losses.mean().backward()
    return losses.detach(), {
        name: whole_gradient(name, parameter, model.config)
        for name, parameter in model.named_parameters()
    }


def whole_gradient(name, parameter, config):
    """A parameter's gradient as one process would have it."""
    from megatron.core import parallel_state

    group, gradient = parallel_state.get_tensor_model_parallel_group(), parameter.grad.contiguous()
    if getattr(parameter, "tensor_model_parallel", False):
        parts = [torch.empty_like(gradient) for _ in range(group.size())]
        torch.distributed.all_gather(parts, gradient, group=group)
        if "linear_fc1" in name and config.gated_linear_unit:
            gates, ups = zip(*(part.chunk(2) for part in parts), strict=True)
            return torch.cat((*gates, *ups))
        return torch.cat(parts, dim=parameter.partition_dim)
    if (
        getattr(parameter, "sequence_parallel", False)
        or "q_layernorm" in name
        or "k_layernorm" in name
    ):
        # As megatron's finalize_model_grads does.
        torch.distributed.all_reduce(gradient, group=group)
    return gradient
