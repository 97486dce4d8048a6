"""--load-gpt: from checkpoints that GPTModels saved under several layouts, into several layouts."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

import pytest
import torch

from tests.processes import run_ranks
from tests.unit.checkpoint.test_huggingface import VOCABULARY, arguments, load, logits

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

FLAGS = {
    "num_layers": 4,
    "retro_decoder_layers": [2, 3],
    "num_query_groups": 2,
    "swiglu": True,
    "normalization": "RMSNorm",
    "disable_bias_linear": True,
    "ffn_hidden_size": 48,
}
MODELS = {
    "tied, rotary": {},
    "untied, learned": {
        "untie_embeddings_and_output_weights": True,
        "position_embedding_type": "learned_absolute",
    },
}
LAYOUTS = {
    "TP2": {"tensor_model_parallel_size": 2},
    "PP2": {"pipeline_model_parallel_size": 2},
    "PP2 x VPP2": {
        "pipeline_model_parallel_size": 2,
        "num_virtual_stages_per_pipeline_rank": 2,
    },
}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A folder of checkpoints, and what differed when two ranks loaded them."""
    folder = tmp_path_factory.mktemp("gpt")
    return folder, run_ranks(2, save_and_load, str(folder))


@pytest.mark.parametrize("form", ["torch", "torch_dist"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("model", MODELS)
def test_retrieval_off_equals_the_gpt(megatron, run, model, layout, form):
    folder, _ = run
    flags = {**FLAGS, **MODELS[model]}
    gpt, _ = load(folder / model / "serial", **flags, no_retrieval=True)
    retro, report = load(folder / model / layout / form, **flags)
    assert report.taken == len(list(gpt.parameters()))
    torch.testing.assert_close(logits(retro), logits(gpt), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("layout", [{}, {"use_distributed_optimizer": True, "bf16": True}])
def test_a_matching_start_is_the_same_on_all_data_parallel_ranks(tmp_path, layout):
    """And that of one process, which reads the same first samples."""
    (wanted,) = run_ranks(1, matched, str(tmp_path / "one"), layout)
    layout = {**layout, "load_gpt": str(tmp_path / "one_0" / "llama")}
    for found in run_ranks(2, matched, str(tmp_path / "two"), layout):
        assert found.keys() == wanted.keys()
        for name, weight in wanted.items():
            torch.testing.assert_close(found[name], weight, atol=1e-5, rtol=1e-4)


def matched(folder, layout):
    """Weights of the cross-attentions before and after a step without a learning rate."""
    from tests.unit.training.test_matching_start import model_of, trainer

    folder = f"{folder}_{torch.distributed.get_rank()}"
    Path(folder).mkdir()
    started = trainer(Path(folder), **layout, lr=1e-30, min_lr=0.0, weight_decay=0.0)
    model = model_of(started)
    layers = getattr(model, "module", model).decoder.layers
    before = [weights_of(layer) for layer in layers[:2]]
    started.train()
    for layer, kept in zip(layers, before, strict=False):
        for name, weight in weights_of(layer).items():
            torch.testing.assert_close(weight, kept[name], atol=1e-20, rtol=0)
    return {f"{number}.{name}": w for number, one in enumerate(before) for name, w in one.items()}


def weights_of(layer):
    named = layer.cross_attention.named_parameters()
    return {name: weight.detach().float().clone() for name, weight in named}


def test_into_every_layout(run):
    _, ranks = run
    for differing in ranks:
        assert differing == []


def save_and_load(folder: str) -> list[str]:
    differing = []
    for model, changes in MODELS.items():
        flags = {**FLAGS, **changes}
        weights = serial_weights(Path(folder) / model / "serial", flags)
        for layout, sizes in LAYOUTS.items():
            chunks = build(sizes, weights, no_retrieval=True, **flags)
            save(Path(folder) / model / layout, chunks, arguments(**flags), sizes)
        for layout, sizes in LAYOUTS.items():
            for source in LAYOUTS:
                for form in ("torch", "torch_dist"):
                    path = Path(folder) / model / source / form
                    found = differences(path, sizes, weights, flags)
                    differing += [f"{model}, {source} {form} into {layout}: {n}" for n in found]
    return differing


def build(sizes, weights=None, **flags):
    """This rank's chunks, with whole weights if given (which another test slices otherwise)."""
    from retro_mcore.checkpoint.conversion.model_weights import put_weights
    from retro_mcore.checkpoint.conversion.weights import Weight
    from retro_mcore.training.options.pretrain import ParallelOptions
    from retro_mcore.training.setup.build import build_model_stages
    from retro_mcore.training.setup.initialize import initialize_parallel, set_seeds

    layout = ParallelOptions(device="cpu", **sizes)
    initialize_parallel(
        layout.tensor_model_parallel_size,
        layout.pipeline_model_parallel_size,
        layout.num_virtual_stages_per_pipeline_rank,
    )
    set_seeds(1234)
    chunks = build_model_stages(arguments(**flags), layout)
    if weights is not None:
        put_weights(chunks, {name: Weight.of(tensor) for name, tensor in weights.items()})
    return chunks


def serial_weights(path: Path, flags) -> dict[str, torch.Tensor]:
    """Random weights of the whole GPT, which rank 0 also writes."""
    from retro_mcore.checkpoint.conversion.targets import megatron_arguments, write_checkpoint
    from retro_mcore.checkpoint.conversion.weights import Weight
    from retro_mcore.platform import leave_model_parallel, setup_device
    from retro_mcore.training.setup.retrofit import resolved_flags

    setup_device("cpu")
    leave_model_parallel()
    (model,) = build({}, no_retrieval=True, **flags)
    generator = torch.Generator().manual_seed(8)
    weights = {
        name: torch.randn(tensor.shape, generator=generator) * 0.3
        for name, tensor in model.named_parameters()
    }
    resolved = resolved_flags(arguments(**flags, no_retrieval=True))
    if torch.distributed.get_rank() == 0:
        args = megatron_arguments(resolved, 1)
        lazy = {name: Weight.of(tensor) for name, tensor in weights.items()}
        write_checkpoint(path, "megatron-torch", args, resolved, lazy)
    torch.distributed.barrier()
    return weights


def save(path: Path, chunks, model_arguments, sizes) -> None:
    """As Megatron-LM does, in both of its formats."""
    from megatron.core import dist_checkpointing, parallel_state

    from retro_mcore.checkpoint.conversion.targets import megatron_arguments
    from retro_mcore.training.setup.retrofit import resolved_flags

    resolved = {**resolved_flags(model_arguments), "no_retrieval": True}
    args = megatron_arguments(resolved, sizes.get("tensor_model_parallel_size", 1))
    tensor = parallel_state.get_tensor_model_parallel_rank()
    pipeline = parallel_state.get_pipeline_model_parallel_rank()
    rank = f"mp_rank_{tensor:02d}"
    if sizes.get("pipeline_model_parallel_size", 1) > 1:
        rank += f"_{pipeline:03d}"
    keys = ["model"] if len(chunks) == 1 else [f"model{index}" for index in range(len(chunks))]
    file = path / "torch" / "iter_0000005" / rank / "model_optim_rng.pt"
    file.parent.mkdir(parents=True)
    states = {k: chunk.state_dict_for_save_checkpoint() for k, chunk in zip(keys, chunks)}  # noqa: B905
    torch.save({"args": args, "checkpoint_version": 3.0, "iteration": 5, **states}, file)
    (path / "torch" / "latest_checkpointed_iteration.txt").write_text("5")
    # A bare directory, without arguments: the shapes say what they can.
    bare = path / "torch_dist"
    bare.mkdir(parents=True, exist_ok=True)
    torch.distributed.barrier()
    state = {k: chunk.sharded_state_dict() for k, chunk in zip(keys, chunks)}  # noqa: B905
    dist_checkpointing.save({**state, "args": Namespace()}, str(bare))


def differences(path: Path, sizes, weights, flags) -> list[str]:
    """Parameters of a Retro that loaded the checkpoint, other than those of the whole weights."""
    from retro_mcore.checkpoint.conversion.gpt import load_gpt
    from retro_mcore.checkpoint.conversion.model_weights import gather_weights
    from retro_mcore.training.setup.retrofit import resolved_flags

    chunks = build(sizes, **flags)
    before = gather_weights(chunks)
    report = load_gpt(chunks, str(path), resolved_flags(arguments(**flags)), VOCABULARY)
    after = gather_weights(chunks)
    assert set(report.fresh) == after.keys() - weights.keys()
    wanted = {**before, **weights}
    return [name for name in after if not torch.equal(after[name], wanted[name])]
