"""The retired Retro's own numbers: `python tests/parity/oracle.py CASES RESULTS`.

Runs where megatron-core 0.15.3 shadows ours (environment.py), so from this package it may import
only what that release can carry: the CPU platform, process groups and the cases. Both files are
torch's; one process serves the whole grid, because importing megatron takes seconds.
"""

from __future__ import annotations

import sys
import traceback
from typing import Any

import torch

from tests.parity.cases import Case


def import_retired() -> Any:
    """The retired `megatron.core.models.retro`, usable without Transformer Engine.

    Its configuration asks for Transformer Engine's version without asking whether there is one.
    """
    import megatron.core
    from megatron.core.models import retro
    from megatron.core.models.retro import config

    if megatron.core.__version__ != "0.15.3":
        raise RuntimeError(f"megatron-core {megatron.core.__version__} is not the retired release")
    config.is_te_min_version = lambda *args, **kwargs: False
    return retro


def compile_nothing() -> None:
    """Refuse to compile extensions; call it before the release is imported.

    Its import compiles one that only inference needs, for up to a minute where there is CUDA's
    compiler. A process that is ended meanwhile leaves a lock, at which later ones wait for ever.
    """
    from torch.utils import cpp_extension

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("extensions are not compiled here")

    cpp_extension.load_inline = refuse


def build_retired_model(
    config_fields: dict[str, Any], model_arguments: dict[str, Any], final_layernorm: bool = False
) -> torch.nn.Module:
    """A retired RetroModel of its local spec.

    Args:
        final_layernorm: Restore the decoder's final norm, which the releases before 0.8 had.
    """
    retro = import_retired()
    config = retro.RetroConfig(
        retro_split_preprocessing="98,2,0",
        use_cpu_initialization=True,
        gradient_accumulation_fusion=False,
        **config_fields,
    )
    spec = retro.get_retro_decoder_block_spec(config, use_transformer_engine=False)
    if final_layernorm:
        from megatron.core.transformer.torch_norm import WrappedTorchNorm

        spec.layer_norm = WrappedTorchNorm
    return retro.RetroModel(config=config, transformer_layer_spec=spec, **model_arguments)


def randomize(model: torch.nn.Module, seed: int = 1) -> None:
    """Weights large enough for neighbors to show, and no bias or norm at its neutral value."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() > 1:
                parameter.copy_(noise * parameter.size(1) ** -0.5)
            elif "norm" in name and name.endswith("weight"):
                parameter.copy_(1.0 + 0.1 * noise)
            else:
                parameter.copy_(0.1 * noise)


def run_single(model: torch.nn.Module, inputs: dict[str, Any]) -> dict[str, Any]:
    """Token losses and the gradients of their mean, as training computes them."""
    losses = model(**inputs, attention_mask=None)
    losses.mean().backward()
    return {"losses": losses.detach(), "gradients": _take_gradients(model)}


def run_double(model: torch.nn.Module, inputs: dict[str, Any]) -> dict[str, Any]:
    """Logits and gradients in fp64; megatron's own loss would round to fp32, torch's does not."""
    model.double()
    text = {name: tensor for name, tensor in inputs.items() if name != "labels"}
    logits = model(**text, attention_mask=None)
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), inputs["labels"].flatten()).backward()
    return {"logits": logits.detach(), "gradients": _take_gradients(model)}


def dropout_rates(model: torch.nn.Module) -> dict[str, float]:
    """The rate of every layer's hidden dropout and of the embedding's and attentions', by module.

    Reads either implementation: megatron's attention holds a Dropout, ours the rate.
    """
    rates = {}
    for name, module in model.named_modules():
        if hasattr(module, "hidden_dropout"):
            rates[name] = module.hidden_dropout
        elif name.endswith("core_attention"):
            rates[name] = (
                module.dropout if hasattr(module, "dropout") else module.attention_dropout.p
            )
        elif name == "embedding":
            rates[name] = module.embedding_dropout.p
    return rates


def _take_gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    return gradients


def answer(case: Case) -> dict[str, Any]:
    """The retired model's weights, and its outputs in fp32 and fp64."""
    torch.manual_seed(0)
    model = build_retired_model(
        case.config_fields(), case.model_arguments(), final_layernorm=case.final_layernorm
    )
    model.train(not case.dropout)
    randomize(model)
    state = model.state_dict()
    inputs = case.inputs()
    return {
        "state_dict": {
            name: tensor.clone() for name, tensor in state.items() if torch.is_tensor(tensor)
        },
        "dropout_rates": dropout_rates(model),
        "fp32": run_single(model, inputs),
        "fp64": run_double(model, inputs),
    }


def main(cases_path: str, results_path: str) -> None:
    """Answer every case; one that fails is answered with its traceback."""
    from tests.processes import join_megatron

    compile_nothing()
    join_megatron()
    results = {}
    for fields in torch.load(cases_path, weights_only=True):
        case = Case(**fields)
        try:
            results[case.name] = answer(case)
        except Exception:
            results[case.name] = {"error": traceback.format_exc()}
    torch.save(results, results_path)


if __name__ == "__main__":
    main(*sys.argv[1:])
