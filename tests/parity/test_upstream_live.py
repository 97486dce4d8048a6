"""RetroConfig.from_upstream against megatron-core 0.15.3 itself, run live beside ours.

"mcore-0.15" is the installed release as it is. "mcore-0.5" is that release with the decoder's final
norm put back, which is what set 0.5 to 0.7 apart in the forward pass.

Not covered: "legacy", the InstructRetro branch, whose code is no package and whose encoder adds its
cross-attention to the raw stream; only its sizes and options are run here (`instructretro`), as is
the gamma of its norms (LayerNorm-1p), which the retired local spec refuses: there its plain gamma
is handed to ours less one. Transformer Engine's spec needs a GPU.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.parity.cases import CASES, Case
from tests.parity.oracle import dropout_rates, run_double, run_single

pytestmark = pytest.mark.parity

every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


@pytest.fixture
def answer(case: Case, megatron: None, retired: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The retired model's answer to this case."""
    found = retired[case.name]
    if "error" in found:
        pytest.fail(f"megatron-core 0.15.3 refuses this case:\n{found['error']}")
    return found


def build_ours(case: Case, state_dict: dict[str, Tensor]) -> Any:
    from retro_mcore import RetroConfig, RetroModel, get_retro_decoder_block_spec
    from retro_mcore.checkpoint.conversion import upstream

    config = RetroConfig.from_upstream(
        case.origin,
        layernorm_zero_centered_gamma=case.zero_centered_gamma,
        **case.config_fields(),
    )
    model = RetroModel(
        config=config,
        transformer_layer_spec=get_retro_decoder_block_spec(config),
        **case.model_arguments(),
    )
    upstream.load_state_dict(model, state_dict)
    return model.train(not case.dropout)


def weights_for_ours(case: Case, answer: dict[str, Any]) -> dict[str, Tensor]:
    """The retired weights, gammas less one for LayerNorm-1p (exact: they are between 1/2 and 2)."""
    weights = dict(answer["state_dict"])
    if case.zero_centered_gamma:
        for name in weights:
            if "norm" in name and name.endswith("weight"):
                assert ((weights[name] > 0.5) & (weights[name] < 2)).all()
                weights[name] = weights[name] - 1.0
    return weights


def assert_same_gradients(
    model: Any, ours: dict[str, Tensor], wanted: dict[str, Tensor], tolerance: float
) -> None:
    """Every parameter of either side has a gradient, equal to `tolerance` relative in norm."""
    from retro_mcore.checkpoint.conversion.upstream import to_upstream_name

    first = model.config.retro_layer_numbers[0]
    ours = {to_upstream_name(name, first): gradient for name, gradient in ours.items()}
    assert ours.keys() == wanted.keys()
    relative = {
        name: ((gradient - wanted[name]).norm() / wanted[name].norm()).item()
        for name, gradient in ours.items()
    }
    # Not `>`: a gradient of zero or NaN must not pass.
    wrong = {name: error for name, error in relative.items() if not error <= tolerance}
    assert not wrong


@every_case
def test_logits_and_gradients_in_fp64(case: Case, answer: dict[str, Any]) -> None:
    model = build_ours(case, weights_for_ours(case, answer))
    ours, wanted = run_double(model, case.inputs()), answer["fp64"]
    torch.testing.assert_close(ours["logits"], wanted["logits"], atol=1e-10, rtol=0)
    assert_same_gradients(model, ours["gradients"], wanted["gradients"], 1e-10)


@every_case
def test_losses_and_gradients_in_fp32(case: Case, answer: dict[str, Any]) -> None:
    model = build_ours(case, weights_for_ours(case, answer))
    ours, wanted = run_single(model, case.inputs()), answer["fp32"]
    torch.testing.assert_close(ours["losses"], wanted["losses"], atol=1e-5, rtol=1e-5)
    assert_same_gradients(model, ours["gradients"], wanted["gradients"], 1e-4)


@every_case
def test_export_is_lossless(case: Case, answer: dict[str, Any]) -> None:
    from retro_mcore.checkpoint.conversion import upstream

    weights = weights_for_ours(case, answer)
    exported = upstream.export_state_dict(build_ours(case, weights))
    assert exported.keys() == weights.keys()
    for name, tensor in exported.items():
        assert tensor.dtype == weights[name].dtype
        assert torch.equal(tensor, weights[name]), name


@every_case
def test_neighbors_show_in_the_logits(case: Case, answer: dict[str, Any]) -> None:
    """Or the agreement above would say nothing about retrieval."""
    model = build_ours(case, weights_for_ours(case, answer)).double()
    inputs = case.inputs()
    with torch.no_grad():
        alone = model(inputs["input_ids"], inputs["position_ids"], None)
    assert (alone - answer["fp64"]["logits"]).abs().max() > 0.1


@pytest.mark.parametrize("case", [case for case in CASES if case.dropout], ids=lambda c: c.name)
def test_every_dropout_has_its_rate(case: Case, answer: dict[str, Any]) -> None:
    from retro_mcore.checkpoint.conversion.upstream import to_upstream_name

    model = build_ours(case, answer["state_dict"])
    first = model.config.retro_layer_numbers[0]
    ours = {
        to_upstream_name(name, first).replace(
            "cross_attention.core", "cross_attention.attn.core"
        ): rate
        for name, rate in dropout_rates(model).items()
    }
    assert set(ours.values()) == {0.11, 0.12, 0.13, 0.14}
    assert ours == answer["dropout_rates"]
