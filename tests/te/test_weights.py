"""Weights go into models of Transformer Engine's modules and out again bit for bit."""

from __future__ import annotations

import pytest
import torch

from tests.processes import join_megatron, run_ranks
from tests.te.engines import MARKS, constructing, model_of, pair, weights_of
from tests.unit.checkpoint.test_upstream import CASES as UPSTREAM
from tests.unit.checkpoint.test_upstream import load_case, upstream_config_fields
from tests.unit.huggingface.models import SMALL
from tests.unit.huggingface.test_against_megatron import CASES, TOGETHER

pytestmark = [*MARKS, pytest.mark.usefixtures("megatron")]

MODELS = {"plain": {}, **CASES, **TOGETHER}


def randomize(model):
    """Every weight anew, so that none is left as it was by chance."""
    with torch.no_grad():
        for weight in model.parameters():
            weight.normal_()
    return model


def assert_equal(found, wanted):
    assert found.keys() == wanted.keys()
    for name, weight in wanted.items():
        assert torch.equal(found[name], weight), name


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("to_engine", [True, False], ids=["to the engine", "from the engine"])
def test_checkpoints_are_loaded_by_the_other(name, to_engine, tmp_path):
    local, engine = pair(**MODELS[name])
    saved, loaded = (local, engine) if to_engine else (engine, local)
    save_weights(randomize(saved), tmp_path)
    load_weights(loaded, tmp_path)
    assert_equal(weights_of(loaded), weights_of(saved))


#: Layouts of two processes, and the models that they divide.
LAYOUTS = {
    "tensor and sequence parallel": (
        {"tensor_model_parallel_size": 2, "sequence_parallel": True},
        MODELS,
    ),
    "pipeline": ({"pipeline_model_parallel_size": 2}, ["plain", "num_experts"]),
    "expert parallel": ({"expert_model_parallel_size": 2}, ["num_experts", "qwen2_moe"]),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("to_engine", [True, False], ids=["to the engine", "from the engine"])
def test_checkpoints_are_resharded_by_the_other(layout, to_engine, tmp_path):
    """From one process to two of the other implementation, and back again."""
    stage, names = LAYOUTS[layout]
    models = {name: model_of(not to_engine, **MODELS[name]) for name in names}
    for name, model in models.items():
        (tmp_path / name / "two").mkdir(parents=True)
        save_weights(randomize(model), tmp_path / name / "one")
    failed = run_ranks(2, reshard, stage, list(names), to_engine, tmp_path)
    assert failed == [{}, {}]
    for name, model in models.items():
        wanted = {key: weight.clone() for key, weight in weights_of(model).items()}
        load_weights(randomize(model), tmp_path / name / "two")
        assert_equal(weights_of(model), wanted)


def save_weights(model, folder):
    from megatron.core import dist_checkpointing

    from retro_mcore.checkpoint.state import METADATA

    folder.mkdir(exist_ok=True)
    dist_checkpointing.save({"model": model.sharded_state_dict(metadata=METADATA)}, str(folder))


def load_weights(model, folder):
    from retro_mcore.checkpoint.loading import load_state
    from retro_mcore.checkpoint.state import METADATA

    state = load_state({"model": model.sharded_state_dict(metadata=METADATA)}, folder)
    model.load_state_dict(state["model"])


def reshard(stage, names, engine, folder):
    """Read what one process saved, and save it again; what fails on this rank, by model."""
    join_megatron(**{key: value for key, value in stage.items() if key.endswith("_size")})
    failed = {}
    for name in names:
        try:
            model = model_of(engine, stage, **MODELS[name])
            load_weights(model, folder / name / "one")
            save_weights(model, folder / name / "two")
        except Exception as error:
            failed[name] = repr(error)
    return failed


@pytest.mark.parametrize("name", MODELS)
def test_converted_checkpoints_are_loaded(name, tmp_path):
    """As `convert_checkpoint` writes them, from any source."""
    from retro_mcore.checkpoint.conversion.names import fused_name
    from retro_mcore.checkpoint.conversion.targets import _keeping_routed_norms
    from retro_mcore.checkpoint.conversion.weights import Weight
    from retro_mcore.checkpoint.loading import load_state
    from retro_mcore.checkpoint.state import METADATA
    from retro_mcore.checkpoint.torch_dist import write_torch_dist

    local, engine = pair(**MODELS[name])
    weights = {k: Weight.of(v) for k, v in weights_of(randomize(local)).items()}
    stored = _keeping_routed_norms(fused_name, weights)
    write_torch_dist(tmp_path / "new", {}, {stored(k): v for k, v in weights.items()})
    state = load_state({"model": engine.sharded_state_dict(metadata=METADATA)}, tmp_path / "new")
    engine.load_state_dict(state["model"])
    assert_equal(weights_of(engine), weights_of(local))


@pytest.mark.parametrize("name", MODELS)
def test_hugging_face(name):
    from retro_mcore.checkpoint.conversion.model_weights import gather_weights, put_weights
    from retro_mcore.checkpoint.conversion.names import local_name
    from retro_mcore.checkpoint.conversion.retro_names import to_retro_huggingface
    from retro_mcore.checkpoint.conversion.weights import Weight
    from retro_mcore.model.options import ModelArguments

    flags = vars(ModelArguments(**{**SMALL, **MODELS[name]}))
    local, engine = pair(**MODELS[name])
    wanted = weights_of(randomize(local))
    put_weights([engine], {key: Weight.of(value) for key, value in wanted.items()})
    out = {local_name(k): Weight.of(v) for k, v in gather_weights([engine]).items()}
    assert_equal({k: v.load() for k, v in out.items()}, wanted)
    theirs = to_retro_huggingface({k: Weight.of(v) for k, v in wanted.items()}, flags)
    found = to_retro_huggingface(out, flags)
    assert_equal({k: v.load() for k, v in found.items()}, {k: v.load() for k, v in theirs.items()})


@pytest.mark.parametrize("name", UPSTREAM)
def test_weights_of_the_retired_retro(name):
    from retro_mcore import RetroConfig, RetroModel, get_retro_decoder_block_spec
    from retro_mcore.checkpoint.conversion import upstream

    case = load_case(name)
    stored, weights = case["config"], case["state_dict"]
    config = RetroConfig.from_upstream("mcore-0.15", **upstream_config_fields(stored))
    with constructing():
        model = RetroModel(
            config,
            get_retro_decoder_block_spec(config, use_transformer_engine=True),
            vocab_size=stored["vocab_size"],
            max_sequence_length=weights["embedding.position_embeddings.weight"].size(0),
            share_embeddings_and_output_weights=not stored["untie"],
        )
    upstream.load_state_dict(model, weights)
    from retro_mcore.checkpoint.conversion.names import local_name

    found = {local_name(key): value for key, value in upstream.export_state_dict(model).items()}
    wanted = {
        local_name(key): value
        for key, value in weights.items()
        if isinstance(value, torch.Tensor) and not key.endswith("_extra_state")
    }
    assert_equal(found, wanted)
