"""Directories of RetroForCausalLM in Megatron-Bridge (`make test-bridge`)."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from retro_mcore.checkpoint.conversion.retro_huggingface import read_retro_huggingface
from tests.bridge.marks import MARKS
from tests.forked_runs import output, start
from tests.unit.data.test_tokenizer_of_model import save_tokenizer
from tests.unit.huggingface.test_against_megatron import CASES, GATED, TOGETHER
from tests.unit.huggingface.test_conversion import exported, loaded

SCRIPT = Path(__file__).with_name("convert_on_cpu.py")

pytestmark = MARKS

#: Of every kind: each way of joining tensors, names that an option adds, and both precisions.
MODELS = {
    "gpt": CASES["no_retrieval"],
    "llama": {"num_query_groups": 2, "no_retrieval": True, "retro_decoder_layers": None, **GATED},
    "untied": CASES["untie_embeddings_and_output_weights"],
    "groups": CASES["num_query_groups"],
    "norms of queries and keys": CASES["qk_layernorm"],
    "biases of queries, keys and values": CASES["add_qkv_bias"],
    "encoder of its own size": CASES["retro_encoder_hidden_size"],
    "encoder of its own heads": CASES["retro_encoder_num_attention_heads"],
    "deepnorm": CASES["retro_deepnorm"],
    "megatron's": CASES["retro_origin"],
    "gemma": TOGETHER["gemma"],
    "olmo2": TOGETHER["olmo2"],
    "gpt_neox": TOGETHER["gpt_neox"],
    "bf16": {**GATED, "bf16": True},
}


def change(directory: Path, **tensors: torch.Tensor | None) -> None:
    """Set tensors of a directory, or take them out."""
    file = directory / "model.safetensors"
    state = {**load_file(file), **tensors}
    save_file({name: value for name, value in state.items() if value is not None}, file)


def refusals(folder: Path) -> dict[str, dict]:
    """Directories that are refused, with a changed layout."""
    for name, options in {
        "experts": CASES["num_experts"],
        "mup": CASES["retro_mup_base_hidden_size"],
        "rows": {"padded_vocab_size": 97},
        **{key: {} for key in ("stages", "parts", "options", "lacking", "unknown", "differing")},
    }.items():
        exported(folder / name, options, dtype=torch.float32)
    embedding = load_file(folder / "differing" / "model.safetensors")["model.embed_tokens.weight"]
    change(folder / "lacking", **{"model.layers.1.mlp.up_proj.bias": None})
    change(folder / "unknown", **{"model.layers.1.mlp.gate_proj.bias": torch.zeros(3)})
    change(folder / "differing", **{"lm_head.weight": embedding + 1})
    snapshot = folder / "hub" / "models--retro--small"
    shutil.copytree(folder / "stages", snapshot / "snapshots" / "0")
    (snapshot / "refs").mkdir()
    (snapshot / "refs" / "main").write_text("0")
    return {
        "stages": {"pipeline_model_parallel_size": 2},
        "parts": {"context_parallel_size": 2},
        "options": {"hidden_dropout": 0.5, "window_size": [31, 0]},
        "retro/small": {},
        "rows": {"tensor_model_parallel_size": 2},
        **{name: {} for name in ("experts", "mup", "lacking", "unknown", "differing")},
    }


@pytest.fixture(scope="module")
def converted(megatron, tmp_path_factory):
    folder = tmp_path_factory.mktemp("huggingface")
    for name, options in MODELS.items():
        options = dict(options)
        dtype = torch.bfloat16 if options.pop("bf16", False) else torch.float32
        exported(folder / name, options, dtype=dtype, max_shard_size="20KB")
    save_tokenizer(folder / "llama")
    exported(folder / "tied twice", {}, dtype=torch.float32)
    embedding = load_file(folder / "tied twice" / "model.safetensors")["model.embed_tokens.weight"]
    change(folder / "tied twice", **{"lm_head.weight": embedding.clone()})
    runs = [
        {"name": "one", "ranks": 1, "directories": [*MODELS, "tied twice"]},
        {"name": "two", "ranks": 2, "directories": [*MODELS, "tied twice"]},
        {"name": "refused", "ranks": 1, "refused": refusals(folder)},
    ]
    start(SCRIPT, runs, folder)
    return folder


def tensors(directory: Path) -> dict[str, torch.Tensor]:
    parts = [load_file(file) for file in directory.glob("*.safetensors")]
    return {name: tensor for part in parts for name, tensor in part.items()}


@pytest.mark.parametrize("ranks", [1, 2])
def test_weights_come_back_bit_for_bit(converted, ranks):
    """The script compares the loaded ones with what convert_checkpoint reads."""
    output(converted, {1: "one", 2: "two"}[ranks])
    for name in (*MODELS, "tied twice"):
        wanted, found = tensors(converted / name), tensors(converted / f"{name}.{ranks}")
        assert found.keys() == wanted.keys()
        for key, tensor in wanted.items():
            assert found[key].dtype == tensor.dtype
            assert torch.equal(found[key], tensor), (name, key)


def test_weights_are_written_in_the_dtype_that_config_json_states(converted):
    """A model in bf16, from a directory in fp32."""
    output(converted, "refused")
    found, before = tensors(converted / "gpt.as torch.bfloat16"), tensors(converted / "gpt")
    assert found.keys() == before.keys()
    for name, tensor in before.items():
        assert torch.equal(found[name], tensor.bfloat16().float())


def test_a_directory_with_a_tokenizer_is_written_whole(converted):
    output(converted, "one")
    directories = [converted / name for name in ("llama.1", "llama")]
    found, wanted = ({file.name for file in each.glob("*_retro.py")} for each in directories)
    assert found == wanted
    found, wanted = (read_retro_huggingface(each)[0] for each in directories)
    assert found == wanted
    found, wanted = map(loaded, directories)
    tokens = torch.randint(90, (2, 9))
    assert torch.equal(found(tokens).logits, wanted(tokens).logits)


@pytest.mark.parametrize(
    ("directory", "message"),
    [
        ("experts", "num_experts: 4 in Megatron-Bridge, whose losses do not"),
        ("mup", "retro_mup_base_hidden_size: 16 in Megatron-Bridge, whose optimizer"),
        ("rows", "model.tensor_model_parallel_size: 2, which does not divide the padded"),
        ("stages", "model.pipeline_model_parallel_size: 2, for a model that starts from"),
        ("parts", "model.context_parallel_size: 2 in Megatron-Bridge"),
        ("options", "model.hidden_dropout: 0.5, and the model was made with"),
        ("options", "model.window_size: [31, 0], and the model was made with None"),
        ("retro/small", "retro/small: is no directory"),
        ("adapters", "adapters: asked for"),
        ("quantized", "quantized weights: asked for"),
        ("fp8", "weights in fp8: asked for"),
        ("without a model", "RetroBridge: called before it has a model"),
        ("rounded", "bf16: its config.json says bfloat16, in which transformers would round"),
        ("lacking", "lacks model.layers.1.mlp.up_proj.bias"),
        ("unknown", "has an unknown model.layers.1.mlp.gate_proj.bias"),
        ("differing", "ties lm_head.weight to the embedding, and they differ"),
    ],
)
def test_what_bridge_cannot_hold_is_refused_by_name(converted, directory, message):
    output(converted, "refused")
    assert message in json.loads((converted / "refused.json").read_text())[directory]
