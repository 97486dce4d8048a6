"""Directories for transformers: written from every kind of checkpoint, and read back."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from retro_mcore.checkpoint.conversion import retro_config
from retro_mcore.checkpoint.conversion.model_fields import MODEL_FIELDS
from retro_mcore.errors import CheckpointError, ConfigurationError
from tests.unit.checkpoint.test_convert_checkpoint import built, convert, save_torch_format, state
from tests.unit.checkpoint.test_upstream import load_case
from tests.unit.huggingface.models import (
    SMALL,
    inputs_of,
    mostly_slow,
    our_logits,
    our_model,
    their_logits,
)
from tests.unit.huggingface.test_against_megatron import CASES, TOGETHER
from tests.unit.training.small import small_trainer


def loaded(directory, **options):
    from transformers import AutoModelForCausalLM

    import retro_mcore.huggingface  # noqa: F401 (registers the model)

    return AutoModelForCausalLM.from_pretrained(directory, **options).eval()


@pytest.mark.parametrize("name", ["l6_k1", pytest.param("ragged", marks=pytest.mark.slow)])
def test_megatrons_retro(megatron, tmp_path, name):
    """Numbers that megatron-core 0.15.3 wrote, and bit for bit the same weights after all."""
    case = load_case(name)
    save_torch_format(tmp_path / "theirs", case)
    convert(tmp_path / "theirs", tmp_path / "hf", target="huggingface", max_shard_size="20KB")
    assert len(list((tmp_path / "hf").glob("model-*.safetensors"))) > 2
    inputs, stored = case["inputs"], case["config"]
    shape = (
        len(inputs["tokens"]),
        -1,
        stored["num_neighbors"],
        inputs["context_input_ids"].size(-1),
    )
    given = {
        "input_ids": inputs["tokens"],
        "retrieved_input_ids": inputs["context_input_ids"].reshape(shape),
    }
    logits = their_logits(loaded(tmp_path / "hf"), given)
    torch.testing.assert_close(logits, case["outputs"]["logits"], atol=1e-5, rtol=0)
    convert(tmp_path / "hf", tmp_path / "back", target="megatron-torch")
    file = tmp_path / "back" / "release" / "mp_rank_00" / "model_optim_rng.pt"
    back = torch.load(file, weights_only=False)["model"]
    assert back.keys() == case["state_dict"].keys()
    for key, tensor in case["state_dict"].items():
        assert torch.equal(back[key], tensor), key


@pytest.mark.slow
def test_instructretro(megatron, tmp_path):
    origin = {"retro_origin": "legacy"}
    small_trainer(save=str(tmp_path / "ours"), train_iters=1, **origin).train()
    convert(tmp_path / "ours", tmp_path / "theirs", target="instructretro", **origin)
    convert(tmp_path / "theirs", tmp_path / "hf", target="huggingface")
    assert loaded(tmp_path / "hf").config.retro_chunk_alignment == "right"
    convert(tmp_path / "hf", tmp_path / "again", target="instructretro", **origin)
    files = [next((tmp_path / name).rglob("*.pt")) for name in ("theirs", "again")]
    before, after = (torch.load(file, weights_only=False)["model"] for file in files)
    assert _flat(before).keys() == _flat(after).keys()
    assert all(torch.equal(_flat(after)[name], value) for name, value in _flat(before).items())


def _flat(tree, prefix=""):
    flat = {}
    for name, value in tree.items():
        inner = (
            _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
        )
        flat.update(inner)
    return flat


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags",
    [
        {"swiglu": True, "disable_bias_linear": True, "normalization": "RMSNorm", "bf16": True,
         "num_query_groups": 2, "qk_layernorm": True, "untie_embeddings_and_output_weights": True},
        {"retro_deepnorm": True, "retro_encoder_hidden_size": 16},
        {"no_retrieval": True, "retro_decoder_layers": None},
        {**TOGETHER["qwen2_moe"], "moe_aux_loss_coeff": 0.01, "moe_layer_freq": [1, 0]},
        {**TOGETHER["gemma"], "bf16": True, "num_layers": 4},
    ],
)  # fmt: skip
def test_a_run_of_ours(megatron, tmp_path, flags):
    """A trained checkpoint, there and back by the command."""
    small_trainer(save=str(tmp_path / "0"), train_iters=1, **flags).train()
    convert(tmp_path / "0", tmp_path / "1", target="huggingface")
    convert(tmp_path / "1", tmp_path / "2")
    (model, arguments), (back, read) = built(tmp_path / "0"), built(tmp_path / "2")
    resolved = ("kv_channels", "num_query_groups", "ffn_hidden_size", "max_position_embeddings")
    for name, value in vars(arguments).items():
        if value is not None and name not in resolved:
            assert vars(read)[name] == value, name
    wanted, found = state(model), state(back)
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert {w.dtype for w in found.values()} == {w.dtype for w in wanted.values()}
    theirs = loaded(tmp_path / "1", dtype=torch.float32)
    inputs = {"input_ids": torch.randint(90, (2, 32))}
    if not flags.get("no_retrieval"):
        inputs["retrieved_input_ids"] = inputs_of(model)["retrieved_input_ids"]
    found = their_logits(theirs, inputs)
    torch.testing.assert_close(found, our_logits(model.float(), inputs), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "option",
    mostly_slow(CASES, "num_query_groups", "retro_origin", "retro_deepnorm", "no_retrieval"),
)
def test_every_option_comes_back(megatron, tmp_path, option):
    """The same options, and bit for bit the same weights."""
    from retro_mcore.checkpoint.conversion.formats import open_checkpoint

    ours = exported(tmp_path, CASES[option], dtype=torch.float32)
    checkpoint, wanted = open_checkpoint(tmp_path), state(ours)
    assert checkpoint.weights.keys() == wanted.keys()
    for name, weight in checkpoint.weights.items():
        assert torch.equal(weight.load(), wanted[name].float())
    for name, value in vars(_arguments(CASES[option])).items():
        if value is not None and name != "group_query_attention":
            assert checkpoint.flags.get(name) == value, name


@pytest.mark.parametrize("family", mostly_slow(TOGETHER, "olmo2", "qwen2_moe"))
def test_families_come_back(megatron, tmp_path, family):
    """Options and weights, and the saved model computes the same."""
    from retro_mcore.checkpoint.conversion.formats import open_checkpoint

    ours = exported(tmp_path, TOGETHER[family], dtype=torch.float32)
    checkpoint, wanted = open_checkpoint(tmp_path), state(ours)
    assert checkpoint.weights.keys() == wanted.keys()
    for name, weight in checkpoint.weights.items():
        assert torch.equal(weight.load(), wanted[name].float())
    for name, value in vars(_arguments(TOGETHER[family])).items():
        if value is not None and name != "group_query_attention":
            assert checkpoint.flags.get(name) == value, name
    theirs, inputs = loaded(tmp_path), inputs_of(ours)
    for given in (inputs, {"input_ids": inputs["input_ids"]}):
        found, wanted = their_logits(theirs, given), our_logits(ours.float(), given)
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)


def exported(path: Path, options, dtype=torch.float64, **how):
    """A small model of random weights, written for transformers."""
    from argparse import Namespace

    from retro_mcore.checkpoint.conversion.formats import Checkpoint
    from retro_mcore.checkpoint.conversion.weights import Weight
    from retro_mcore.training.setup.huggingface_export import (
        HuggingFaceOptions,
        write_huggingface,
    )

    ours = our_model(**options)
    weights = {name: Weight.of(value.to(dtype)) for name, value in state(ours).items()}
    flags = {**vars(_arguments(options))}
    checkpoint = Checkpoint(path, "retro-mcore", flags, weights, {"args": Namespace()})
    write_huggingface(path, checkpoint, flags, HuggingFaceOptions(**how))
    return ours


def _arguments(options):
    from retro_mcore.model.options import ModelArguments

    return ModelArguments(**{**SMALL, **options})


ROPE = {"position_embedding_type": "rope"}
LLAMA = {"swiglu": True, "disable_bias_linear": True, "normalization": "RMSNorm", **ROPE}
EXPERTS = {"num_experts": 4, "moe_ffn_hidden_size": 24}
ALL_HEADS = {"qk_layernorm": True, "qk_layernorm_over": "all_heads"}
FAMILIES = {
    "gpt2": {"openai_gelu": True},
    "gpt2 without biases": {"disable_bias_linear": True, "squared_relu": True,
                            "apply_layernorm_1p": True},
    "llama": {"num_query_groups": 2, "kv_channels": 12, **LLAMA},
    "llama with biases": {**LLAMA, "disable_bias_linear": False},
    "llama 3.1": {"use_rope_scaling": True, "kv_channels": 32, **LLAMA},
    "llama linear": {"rotary_seq_len_interpolation_factor": 2.0, **LLAMA},
    "mistral": {"sliding_window": 40, **LLAMA},
    "qwen2": {"add_qkv_bias": True, "untie_embeddings_and_output_weights": True, **LLAMA},
    "qwen2 window": {"add_qkv_bias": True, "sliding_window": 40, **LLAMA},
    "qwen3": {"qk_layernorm": True, "num_query_groups": 1, "kv_channels": 16, **LLAMA},
    "mixtral": {**EXPERTS, **LLAMA},
    "mixtral window": {**EXPERTS, "sliding_window": 40, "moe_router_topk": 3, **LLAMA},
    "qwen3_moe": {**EXPERTS, "qk_layernorm": True, "moe_layer_freq": [2], **LLAMA},
    "qwen2_moe": {**EXPERTS, "add_qkv_bias": True, "moe_router_pre_softmax": True,
                  "moe_shared_expert_intermediate_size": 40, "moe_shared_expert_gate": True,
                  **LLAMA},
    "olmoe": {**EXPERTS, **ALL_HEADS, "moe_router_pre_softmax": True, **LLAMA},
    "olmoe normed": {**EXPERTS, **ALL_HEADS, "num_query_groups": 2, "moe_router_topk": 3, **LLAMA},
    # InstructRetro's own.
    "stablelm": {**LLAMA, "normalization": "LayerNorm", "apply_layernorm_1p": True,
                 "rotary_percent": 0.5, "untie_embeddings_and_output_weights": True,
                 "retro_origin": "legacy"},
    "gpt_neox": {"rotary_percent": 0.5, "rotary_base": 500, **ROPE},
    "gpt_neox of a GPT": {"no_retrieval": True, "retro_decoder_layers": None, **ROPE},
}  # fmt: skip


@pytest.mark.parametrize("name", mostly_slow(FAMILIES, "gpt2", "stablelm", "qwen3"))
def test_the_decoder_alone(megatron, tmp_path, name):
    ours = exported(tmp_path, FAMILIES[name], decoder_only=True)
    # Its grouped products of experts have no float64.
    how = {"experts_implementation": "eager"} if "num_experts" in FAMILIES[name] else {}
    theirs = loaded(tmp_path, dtype=torch.float64, **how)
    assert theirs.config.model_type == name.split()[0]
    inputs = {"input_ids": torch.randint(90, (2, 32))}
    with torch.no_grad():
        found = theirs(**inputs).logits
    # Their norms and rotary angles compute in float32.
    torch.testing.assert_close(found, our_logits(ours, inputs), atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"retro_deepnorm": True}, "retro_deepnorm True"),
        ({"retro_mup_base_hidden_size": 16}, "retro_mup_base_hidden_size 16"),
        ({"retro_origin": "mcore-0.15"}, "decoder ends without a norm"),
        ({"rotary_interleaved": True, **ROPE}, "rotary_interleaved True"),
        ({"num_query_groups": 2}, "num_query_groups 2"),
        ({"rotary_percent": 0.5, "no_rope_layers": [1], **LLAMA}, r"rotary_percent 0\.5"),
        ({"qk_layernorm": True}, "qk_layernorm True"),
        ({"normalization": "RMSNorm"}, "normalization RMSNorm, swiglu False.* in one model"),
        ({"sliding_window": 40}, "sliding_window 40"),
        (EXPERTS, "num_experts 4"),
        ({**LLAMA, **EXPERTS, "moe_layer_freq": [2]}, "dense layers beside"),
        ({**LLAMA, **EXPERTS, "moe_router_pre_softmax": True}, "moe_router_pre_softmax"),
        ({**LLAMA, **EXPERTS, "moe_router_score_function": "sigmoid"}, "sigmoid"),
        ({**LLAMA, **EXPERTS, "add_qkv_bias": True}, "without a gated shared expert"),
        ({**LLAMA, **EXPERTS, "qk_layernorm": True, "sliding_window": 40}, "sliding_window 40"),
        ({**LLAMA, **ALL_HEADS}, "qk_layernorm_over all_heads"),
        ({**LLAMA, **EXPERTS, **ALL_HEADS, "moe_layer_freq": [2]}, "dense layers beside"),
        ({**LLAMA, **EXPERTS, **ALL_HEADS, "sliding_window": 40}, "sliding_window 40"),
        ({**LLAMA, **EXPERTS, **ALL_HEADS, "kv_channels": 16}, "kv_channels 16"),
    ],
)
def test_a_decoder_of_no_family_is_refused(options, message):
    from retro_mcore.checkpoint.conversion.families_out import family_of

    with pytest.raises(ConfigurationError, match=message):
        family_of(vars(_arguments(options)))


@pytest.mark.slow
def test_the_weights_may_be_those_of_a_gpt_to_begin_with(megatron, tmp_path):
    """--load-gpt reads the decoder that another run wrote."""
    exported(tmp_path / "1", FAMILIES["llama"], decoder_only=True)
    convert(tmp_path / "1", tmp_path / "2")
    convert(tmp_path / "2", tmp_path / "3", target="huggingface", decoder_only=True)
    names = [tmp_path / name / "model.safetensors" for name in ("1", "3")]
    from safetensors.torch import load_file

    before, after = map(load_file, names)
    assert before.keys() == after.keys()
    # (The first are in float64, which nothing here keeps.)
    assert all(torch.equal(after[name], value.float()) for name, value in before.items())


def edited(directory: Path, **changes):
    file = directory / "config.json"
    values = {**json.loads(file.read_text()), **changes}
    file.write_text(json.dumps({k: v for k, v in values.items() if v != "absent"}))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_size": 64}, "hidden_size 64 in its config.json.*hidden_size 32"),
        ({"retro_encoder_num_layers": 3}, "no tensor .*encoder.layers.2"),
        ({"num_layers": 3}, "unknown tensors .*layers.3"),
        ({"norm_epsilon": "absent"}, "does not say norm_epsilon"),
        ({"moe_router_topk": "absent"}, "does not say moe_router_topk"),
        ({"sublayer_norms": "both"}, "no tensor .*self_attn_post_norm"),
        ({"num_experts": 4}, "no tensor .*mlp.router"),
        ({"router_scaling": 2.0}, "settings that our model does not have: router_scaling"),
        ({"retro_mask_padding": False}, "otherwise than the paper: retro_mask_padding False"),
        ({"num_attention_heads": "four"}, "num_attention_heads 'four'"),
    ],
)
def test_a_directory_that_was_changed_is_refused(megatron, tmp_path, change, message):
    from retro_mcore.checkpoint.conversion.formats import open_checkpoint

    exported(tmp_path, {})
    edited(tmp_path, **change)
    with pytest.raises((CheckpointError, ConfigurationError), match=message):
        open_checkpoint(tmp_path)


def test_a_directory_of_an_earlier_release_has_the_defaults(tmp_path):
    """It states none of the later options."""
    from retro_mcore.checkpoint.conversion.retro_config import LATER, flags_of_retro_config
    from tests.unit.huggingface.test_model import small_config

    values = small_config(tokenizer_vocab_size=90).to_dict()
    for number in range(len(LATER)):
        earlier = {
            name: values[name] for name in values if name not in set().union(*LATER[number:])
        }
        assert flags_of_retro_config(tmp_path, earlier) == flags_of_retro_config(tmp_path, values)


def test_options_of_another_target_are_refused(megatron, tmp_path):
    with pytest.raises(ConfigurationError, match="--decoder-only: given with --target megatron"):
        convert(tmp_path, tmp_path / "2", target="megatron", decoder_only=True)
    with pytest.raises(ConfigurationError, match="--max-shard-size: 'much'"):
        convert(tmp_path, tmp_path / "2", target="huggingface", max_shard_size="much")
    exported(tmp_path / "hf", {})
    with pytest.raises(CheckpointError, match="holds a checkpoint"):
        convert(tmp_path / "hf", tmp_path / "hf", target="huggingface")


def test_one_tensor_is_in_memory_at_a_time(tmp_path):
    """However large the shards are: a weight is loaded when it is written, and dropped."""
    import weakref

    from safetensors.torch import load_file

    from retro_mcore.checkpoint.conversion.safetensors_files import write_safetensors
    from retro_mcore.checkpoint.conversion.weights import Weight

    alive: list[weakref.ref] = []

    def load(number):
        assert sum(reference() is not None for reference in alive) <= 1
        tensor = torch.full((3, 5), number, dtype=torch.bfloat16)
        alive.append(weakref.ref(tensor))
        return tensor

    weights = {str(n): Weight((3, 5), torch.bfloat16, lambda n=n: load(n)) for n in range(7)}
    write_safetensors(tmp_path, weights, 100)
    files = sorted(tmp_path.glob("*.safetensors"))
    assert len(files) == 3
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 7 * 30
    for number, name in enumerate(weights):
        stored = load_file(tmp_path / index["weight_map"][name])[name]
        assert torch.equal(stored, torch.full((3, 5), number, dtype=torch.bfloat16))


def test_our_own_format_is_written_one_tensor_at_a_time(tmp_path):
    import weakref
    from argparse import Namespace

    from retro_mcore.checkpoint.conversion.weights import Weight
    from retro_mcore.checkpoint.torch_dist import read_torch_dist, write_torch_dist

    alive: list[weakref.ref] = []

    def load(number):
        assert sum(reference() is not None for reference in alive) <= 1
        tensor = torch.full((3, 5), number, dtype=torch.bfloat16)
        alive.append(weakref.ref(tensor))
        return tensor

    weights = {f"decoder.layers.{n}.x.weight": Weight((3, 5), torch.bfloat16, lambda n=n: load(n))
               for n in range(7)}  # fmt: skip
    write_torch_dist(tmp_path / "ours", {"args": Namespace()}, weights)
    assert len(alive) == 7
    _, read = read_torch_dist(tmp_path / "ours")
    for number, name in enumerate(weights):
        assert torch.equal(read[name].load(), torch.full((3, 5), number, dtype=torch.bfloat16))


def test_its_configuration_has_every_option():
    known = {name for name in MODEL_FIELDS if name not in retro_config.TRANSLATED}
    assert known == set(retro_config.names_there())


@pytest.mark.parametrize("own_rule", [False, True])
def test_an_exported_tokenizer_begins_texts_as_the_project_does(tmp_path, own_rule):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from tokenizers.processors import TemplateProcessing

    from retro_mcore.training.setup.huggingface_export import _begin_with_bos

    tokenizer = Tokenizer(models.WordLevel({"<s>": 0, "</s>": 1, "a": 2, "b": 3}, "a"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    if own_rule:
        tokenizer.post_processor = TemplateProcessing("$A </s>", None, [("</s>", 1)])
    file = tmp_path / "tokenizer.json"
    tokenizer.save(str(file))
    _begin_with_bos(file, "<s>", 0)
    ids = Tokenizer.from_file(str(file)).encode("a b").ids
    assert ids == ([2, 3, 1] if own_rule else [0, 2, 3])


@pytest.mark.parametrize(
    ("config", "generation", "ends"),
    [
        ({"eos_token_id": 5}, {"eos_token_id": [7, 5, 7]}, [7, 5]),
        ({"eos_token_id": [1, 2]}, None, [1, 2]),
        ({"eos_token_id": 2}, None, []),  # a family's default
        ({"eos_token_id": 2}, {"eos_token_id": 9}, [9]),
        ({"eos_token_id": [1, 2]}, {}, []),
    ],
)
def test_the_ends_of_a_text_are_those_of_transformers_generate(tmp_path, config, generation, ends):
    from retro_mcore.checkpoint.conversion.huggingface_files import end_tokens

    if generation is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(generation))
    assert end_tokens(tmp_path, config) == ends


def test_ends_of_a_text_are_kept_by_every_conversion(megatron, tmp_path):
    """Also through a retro-fitted model's training run, and in both forms for transformers."""
    from retro_mcore.checkpoint.arguments import read_arguments
    from retro_mcore.checkpoint.conversion.formats import open_checkpoint
    from retro_mcore.checkpoint.tracker import tracked_checkpoint
    from tests.unit.checkpoint.test_huggingface import flags_of, make_model
    from tests.unit.training.small import NO_DROPOUT

    make_model("llama", tmp_path / "instruct")
    file = tmp_path / "instruct" / "generation_config.json"
    file.write_text(json.dumps({"eos_token_id": [7, 5]}))
    run = {**flags_of("llama"), **NO_DROPOUT, "load_gpt": str(tmp_path / "instruct")}
    small_trainer(save=str(tmp_path / "run"), train_iters=2, exit_interval=1, **run).train()
    resumed = {"load": str(tmp_path / "run"), "save": str(tmp_path / "resumed")}
    small_trainer(train_iters=2, **resumed, **run).train()
    for name in ("run", "resumed"):
        assert read_arguments(tracked_checkpoint(tmp_path / name))["end_tokens"] == [7, 5]
    convert(tmp_path / "resumed", tmp_path / "hf", target="huggingface")
    convert(tmp_path / "instruct", tmp_path / "decoder", target="huggingface", decoder_only=True)
    for name in ("hf", "decoder"):
        assert loaded(tmp_path / name).generation_config.eos_token_id == [7, 5]
    convert(tmp_path / "hf", tmp_path / "ours")
    assert open_checkpoint(tmp_path / "ours").flags["end_tokens"] == [7, 5]


def test_a_copied_tokenizer_declares_the_projects_tokens(tmp_path):
    """Those that --eod-token chose, whatever the original's files say."""
    from retro_mcore.training.setup.huggingface_export import _declare

    config, other = tmp_path / "tokenizer_config.json", tmp_path / "special_tokens_map.json"
    config.write_text(json.dumps({"eos_token": {"content": "</s>"}, "model_max_length": 9}))
    other.write_text(json.dumps({"eos_token": "</s>", "bos_token": "<s>"}))
    notes = _declare(tmp_path, {"eos_token": "<end>", "bos_token": "<s>"})
    assert notes == ["the tokenizer's eos_token </s> becomes <end>, the project's"]
    tokens = {"eos_token": "<end>", "bos_token": "<s>"}
    assert json.loads(config.read_text()) == {**tokens, "model_max_length": 9}
    assert json.loads(other.read_text()) == tokens
    before = config.read_bytes(), other.read_bytes()
    assert _declare(tmp_path, tokens) == []
    assert (config.read_bytes(), other.read_bytes()) == before


@pytest.mark.slow
def test_the_model_card_names_data_database_settings_and_perplexities(tmp_path):
    from argparse import Namespace

    from retro_mcore.checkpoint.conversion.formats import Checkpoint
    from retro_mcore.checkpoint.conversion.weights import Weight
    from retro_mcore.project.config import ProjectConfig
    from retro_mcore.retrieval.database import ChunkDatabase
    from retro_mcore.training.setup.model_card import model_card
    from tests.unit.data.projects import built_project

    project = built_project()
    records = [
        {"kind": "train", "iteration": 4, "loss": 2.0},
        {"kind": "valid", "iteration": 4, "loss": 1.0},
        {"kind": "valid", "iteration": 8, "loss": 0.5},  # after the checkpoint
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(each) + "\n" for each in records))
    args = Namespace(lr=1e-3, global_batch_size=4, train_iters=9)
    common = {"args": args, "iteration": 4, "consumed_samples": 16}
    weights = {"a": Weight.of(torch.zeros(6, 7))}
    checkpoint = Checkpoint(tmp_path / "iter_0000004", "retro-mcore", {}, weights, common)
    flags = vars(_arguments({}))
    text = model_card(checkpoint, flags, {"model_type": "retro"}, str(project))
    data = ", ".join(ProjectConfig.load(project).retro_gpt_data_path)
    chunks = f"{len(ChunkDatabase.open(str(project))):,}"
    rows = {
        "datasets": data, "chunks in the database": chunks, "learning rate": 0.001, "tokens": 512,
        "training, iteration 4": 7.39, "validation, iteration 4": 2.72, "parameters": 42,
        "neighbors per chunk": 2,
    }  # fmt: skip
    for name, value in rows.items():
        assert f"| {name} | {value} |" in text


def test_a_projects_tokenizer_is_written(tmp_path, monkeypatch):
    """transformers reads it from the directory, and splits texts as the project does."""
    from types import SimpleNamespace

    from transformers import AutoTokenizer

    from retro_mcore.data.tokenizers.loading import build_tokenizer
    from retro_mcore.training.setup import huggingface_export
    from tests.unit.data.test_gguf_tokenizer import TEXTS
    from tests.unit.data.test_tokenizer_of_model import save_tokenizer

    save_tokenizer(tmp_path / "theirs")
    ours = build_tokenizer("HuggingFaceTokenizer", tmp_path / "theirs")
    project = SimpleNamespace(retro_gpt_tokenizer_model="theirs")
    monkeypatch.setattr(huggingface_export.ProjectConfig, "load", lambda directory: project)
    monkeypatch.setattr(huggingface_export, "load_project_tokenizer", lambda *rest: ours)
    (tmp_path / "hf").mkdir()
    write = huggingface_export._write_tokenizer
    assert write(tmp_path / "hf", SimpleNamespace(source="retro-mcore"), str(tmp_path)) == []
    read = AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert (read.eos_token_id, read.bos_token_id) == (ours.eod, ours.bos)
    for text in TEXTS[:3]:
        assert read.encode(text, add_special_tokens=False) == ours.tokenize(text)
