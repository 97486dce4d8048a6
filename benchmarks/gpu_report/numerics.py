"""The same weights in other precisions and other layers: logits and gradients."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu_report.findings import Findings
from benchmarks.gpu_report.options import Setting
from benchmarks.gpu_report.small_runs import build_model, make_batch, require_engine, shape_of

#: bf16 keeps 8 bits: a rounding is off by up to 2^-9 of the value. Tens of them add up, at random,
#: along a path through the layers.
BF16_LOGITS, BF16_GRADIENTS = 0.02, 0.04
#: Transformer Engine multiplies fp32 matrices in TF32, with 11 bits: an eighth of bf16's errors.
TF32_LOGITS, TF32_GRADIENTS = 0.0025, 0.005


@dataclass
class Outcome:
    """Loss, logits and gradients of one step, in fp32.

    Attributes:
        loss: Mean cross-entropy.
        logits: [B, S, vocabulary].
        gradients: By the local layers' names.
    """

    loss: float
    logits: Tensor
    gradients: dict[str, Tensor]


def precision(setting: Setting, findings: Findings) -> None:
    """Local layers in bf16 against fp32."""
    reference, weights = _reference(setting)
    found = _outcome(setting, weights, bf16=True)
    _compare(findings, "bf16", found, reference, BF16_LOGITS, BF16_GRADIENTS)


def transformer_engine(setting: Setting, findings: Findings) -> None:
    """Transformer Engine's layers in fp32 and in bf16 against local ones in fp32.

    In bf16 they may be at most twice as far from fp32 as the local layers in bf16.
    """
    require_engine(setting)
    reference, weights = _reference(setting)
    engine = {"transformer_impl": "transformer_engine"}
    in_fp32 = _outcome(setting, weights, **engine)
    _compare(findings, "fp32", in_fp32, reference, TF32_LOGITS, TF32_GRADIENTS)
    in_bf16 = _outcome(setting, weights, bf16=True, **engine)
    _compare(findings, "bf16", in_bf16, reference, BF16_LOGITS, BF16_GRADIENTS)
    local = distance(_outcome(setting, weights, bf16=True).logits, reference.logits)
    ratio = distance(in_bf16.logits, reference.logits) / local
    findings.at_most("bf16, logits' distance / the local layers'", ratio, 2.0)


def _reference(setting: Setting) -> tuple[Outcome, dict[str, Tensor]]:
    """The outcome of local layers in fp32, and its weights, which bf16 holds without loss."""
    model = build_model(setting, shape_of(setting))
    from retro_mcore.checkpoint.conversion.model_weights import parameters

    weights = {}
    with torch.no_grad():
        for name, value in parameters(model):
            value.copy_(value.bfloat16())
            weights[name] = value.detach().clone()
    return _step(setting, model), weights


def _outcome(setting: Setting, weights: dict[str, Tensor], **flags: Any) -> Outcome:
    model = build_model(setting, shape_of(setting), **flags)
    from retro_mcore.checkpoint.conversion.model_weights import put_weights
    from retro_mcore.checkpoint.conversion.weights import Weight

    put_weights([model], {name: Weight.of(value) for name, value in weights.items()})
    return _step(setting, model)


def _step(setting: Setting, model: Any) -> Outcome:
    from retro_mcore.checkpoint.conversion.names import local_name

    batch = make_batch(setting, shape_of(setting))
    logits = model(**batch.model_inputs()).float()
    width = shape_of(setting).vocabulary
    loss = torch.nn.functional.cross_entropy(
        logits[..., :width].flatten(0, 1), batch.labels.flatten()
    )
    loss.backward()
    gradients = {
        local_name(name): parameter.grad.float()
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }
    return Outcome(loss.item(), logits.detach(), gradients)


def _compare(
    findings: Findings,
    name: str,
    found: Outcome,
    reference: Outcome,
    logits: float,
    gradients: float,
) -> None:
    findings.at_most(f"{name}, logits", distance(found.logits, reference.logits), logits)
    findings.equal(
        f"{name}, parameters with a gradient", len(found.gradients), len(reference.gradients)
    )
    whole = _joined(reference.gradients)
    findings.at_most(f"{name}, all gradients", distance(_joined(found.gradients), whole), gradients)
    # Of a small gradient, against a tenth of the root mean square of all.
    floor = 0.1 * float(whole.norm()) * whole.numel() ** -0.5
    worst, parameter = max(
        (distance(value, expected, floor * expected.numel() ** 0.5), key)
        for key, expected in reference.gradients.items()
        if (value := found.gradients.get(key)) is not None
    )
    findings.at_most(f"{name}, worst gradient ({parameter})", worst, 4 * gradients)
    findings.figure(f"{name}, loss - fp32", found.loss - reference.loss)


def distance(found: Tensor, expected: Tensor, floor: float = 0.0) -> float:
    """Norm of the difference ÷ norm of the expected values, or `floor` if that is larger."""
    return float((found - expected).norm() / expected.norm().clamp_min(floor))


def _joined(gradients: dict[str, Tensor]) -> Tensor:
    return torch.cat([gradients[name].flatten() for name in sorted(gradients)])
