"""Checkpoints on disk, from one format to another and back."""

from __future__ import annotations

import pickle
import re
import shutil
import subprocess
import sys
from argparse import Namespace
from dataclasses import fields, replace
from fractions import Fraction
from pathlib import Path

import pytest
import torch
import yaml

from retro_mcore.checkpoint.checksums import CHECKSUMS_FILE
from retro_mcore.errors import CheckpointError, ConfigurationError, ProjectError, flag_of
from retro_mcore.model.options import CHANGED_DEFAULTS, ModelOptions
from retro_mcore.project.lock import directory_lock
from tests.unit.checkpoint.bridge_checkpoint import give_bridges_configuration
from tests.unit.checkpoint.test_upstream import load_case, run_case
from tests.unit.data.projects import built_project
from tests.unit.training.small import CHUNK_LENGTH, VOCABULARY, small_trainer

#: What Megatron-LM's arguments say of the stored case.
MEGATRON_ARGUMENTS = {
    "group_query_attention": False,
    "num_query_groups": 1,
    "seq_length": 32,
    "position_embedding_type": "learned_absolute",
    "normalization": "LayerNorm",
    "norm_epsilon": 1e-5,
    "apply_layernorm_1p": False,
    "swiglu": False,
    "add_bias_linear": True,
    "hidden_dropout": 0.0,
    "attention_dropout": 0.0,
    "retro_add_retriever": True,
    "retro_encoder_hidden_dropout": 0.0,
    "retro_encoder_attention_dropout": 0.0,
    "tokenizer_type": "GPTSentencePieceTokenizer",
}


@pytest.fixture(scope="module")
def one_step(megatron, tmp_path_factory):
    """A checkpoint after one step; copy it before it is changed."""
    path = tmp_path_factory.mktemp("one_step") / "ours"
    small_trainer(save=str(path), train_iters=1).train()
    return path


def convert(load, save, **options):
    from retro_mcore.cli.convert_checkpoint import ConvertCheckpointOptions, convert_checkpoint

    return convert_checkpoint(ConvertCheckpointOptions(load=str(load), save=str(save), **options))


def megatron_args(case, **changes):
    stored = case["config"]
    sizes = {
        "num_layers": stored["num_layers"],
        "hidden_size": stored["hidden_size"],
        "num_attention_heads": stored["num_attention_heads"],
        "retro_num_neighbors": stored["num_neighbors"],
        "retro_num_retrieved_chunks": stored["num_retrieved_chunks"],
        "retro_encoder_num_layers": stored["encoder_num_layers"],
        "retro_chunk_length": stored["chunk_length"],
    }
    return Namespace(**{**MEGATRON_ARGUMENTS, **sizes, **changes})


def save_torch_format(path: Path, case, name: str = "release", **changes):
    """The stored case as Megatron-LM saved it on one rank."""
    file = path / name / "mp_rank_00" / "model_optim_rng.pt"
    file.parent.mkdir(parents=True)
    torch.save(
        {
            "args": megatron_args(case, **changes),
            "checkpoint_version": 3.0,
            "iteration": 0,
            "model": case["state_dict"],
        },
        file,
    )
    (path / "latest_checkpointed_iteration.txt").write_text(name)


def built(directory):
    from retro_mcore.training.setup.load_model import load_model_from_checkpoint

    return load_model_from_checkpoint(directory)


def state(model) -> dict:
    return {n: v for n, v in model.state_dict().items() if isinstance(v, torch.Tensor)}


def test_upstream_to_ours_computes_the_same(megatron, tmp_path):
    case = load_case("l6_k1")
    save_torch_format(tmp_path / "theirs", case)
    result = convert(tmp_path / "theirs", tmp_path / "ours")
    assert result.source == "megatron"
    model, arguments = built(tmp_path / "ours")
    assert arguments.retro_origin == "mcore-0.15"
    logits = run_case(model, case["inputs"])
    torch.testing.assert_close(logits, case["outputs"]["logits"], atol=1e-5, rtol=0)


def test_a_gate_that_megatron_core_did_not_read_is_left_out(tmp_path):
    """Its arguments have one, which only the older code applies."""
    from retro_mcore.checkpoint.conversion.formats import open_checkpoint

    for gate, notes in ((1, 0), (0.0, 1)):
        save_torch_format(tmp_path / str(gate), load_case("l6_k1"), retro_attention_gate=gate)
        checkpoint = open_checkpoint(tmp_path / str(gate))
        assert checkpoint.flags["retro_attention_gate"] == 1
        assert len(checkpoint.notes) == notes
        assert all("retro_attention_gate 0.0 is left out" in note for note in checkpoint.notes)


@pytest.mark.parametrize("target", ["megatron", "megatron-torch", "instructretro"])
@pytest.mark.parametrize("name", ["l6_k1", "ragged"])
def test_there_and_back_is_lossless(megatron, tmp_path, target, name):
    case = load_case(name)
    save_torch_format(tmp_path / "theirs", case)
    size = {} if target == "megatron" else {"target_tensor_parallel_size": 2}
    origin = {"retro_origin": "legacy"} if target == "instructretro" else {}
    convert(tmp_path / "theirs", tmp_path / "ours")
    convert(tmp_path / "ours", tmp_path / "there", target=target, **size, **origin)
    convert(tmp_path / "there", tmp_path / "back")
    convert(tmp_path / "back", tmp_path / "theirs again", target="megatron-torch",
            retro_origin="mcore-0.15")  # fmt: skip
    file = tmp_path / "theirs again" / "release" / "mp_rank_00" / "model_optim_rng.pt"
    back = torch.load(file, weights_only=False)
    assert back["model"].keys() == case["state_dict"].keys()
    for key, tensor in case["state_dict"].items():
        assert torch.equal(back["model"][key], tensor), key
    for key, value in vars(megatron_args(case)).items():
        assert getattr(back["args"], key) == value, key


def test_a_directory_that_another_run_writes_into_is_refused(megatron, tmp_path):
    save_torch_format(tmp_path / "theirs", load_case("l6_k1"))
    lock = directory_lock(tmp_path / "ours", "pretrain_retro")
    with lock, pytest.raises(ProjectError, match="another run works on it: pretrain_retro"):
        convert(tmp_path / "theirs", tmp_path / "ours")
    convert(tmp_path / "theirs", tmp_path / "ours")


def test_token_ids_without_an_embedding_are_refused(megatron, tmp_path):
    """The conversion was made, and the first text with such a token ended it."""
    small_trainer(
        save=str(tmp_path / "ours"), train_iters=1, make_vocab_size_divisible_by=1
    ).train()
    named = {"vocab_size": VOCABULARY + 1}, {"project_dir": str(built_project())}
    for given, who in zip(named, ("--vocab-size", "the tokenizer of"), strict=True):
        message = rf"has {VOCABULARY} embedding rows, and {who} .*needs (500|{VOCABULARY + 1})"
        with pytest.raises(CheckpointError, match=message):
            convert(tmp_path / "ours", tmp_path / "theirs", **given)
    convert(tmp_path / "ours", tmp_path / "theirs", vocab_size=VOCABULARY)


def test_ours_goes_through_every_format(megatron, tmp_path):
    """A trained model of the trainer's own, SwiGLU and rotary, tensor parallel in the middle."""
    flags = {"swiglu": True, "disable_bias_linear": True, "normalization": "RMSNorm"}
    small_trainer(save=str(tmp_path / "0"), train_iters=1, num_query_groups=2, **flags).train()
    wanted = state(built(tmp_path / "0")[0])
    convert(tmp_path / "0", tmp_path / "1", target="instructretro",
            target_tensor_parallel_size=2, retro_origin="legacy")  # fmt: skip
    result = convert(tmp_path / "1", tmp_path / "2", retro_origin="mcore-0.15")
    assert result.source == "instructretro"
    origin = {"retro_origin": "mcore-0.15"}
    convert(tmp_path / "2", tmp_path / "3", target="megatron", **origin)
    convert(tmp_path / "3", tmp_path / "4")
    found = state(built(tmp_path / "4")[0])
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_names_of_instructretro(one_step, tmp_path):
    """Written out by hand from the branch's modules: one layer of each kind."""
    from retro_mcore.checkpoint.torch_format import read_torch_format

    convert(one_step, tmp_path / "theirs", target="instructretro", retro_origin="legacy")
    file = tmp_path / "theirs" / "iter_0000001" / "mp_rank_00" / "model_optim_rng.pt"
    model = torch.load(file, weights_only=False)["model"]["language_model"]
    assert model.keys() == {"embedding", "encoder"}
    assert model["embedding"]["word_embeddings"].keys() == {"weight"}
    plain = ["input_norm", "self_attention.query_key_value", "self_attention.dense",
             "post_attention_norm", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h"]  # fmt: skip
    retro = [*plain, "inter_attention.query", "inter_attention.key_value",
             "inter_attention.dense", "post_inter_attention_norm"]  # fmt: skip
    wanted = {f"layers.0.{name}" for name in plain} | {f"layers.1.{name}" for name in retro}
    wanted |= {f"layers.1.retriever.layers.0.{name}" for name in retro}
    wanted |= {f"layers.1.retriever.layers.1.{name}" for name in plain}
    wanted |= {"final_norm"}
    assert model["encoder"].keys() == {f"{n}.{kind}" for n in wanted for kind in ("weight", "bias")}
    common, _, older = read_torch_format(file.parents[1])
    assert older
    assert common["args"].retro_encoder_layers == 2


def test_older_spelling_of_norms(megatron, tmp_path):
    from retro_mcore.checkpoint.conversion.names import from_legacy_name

    crossing = {"decoder.layers.5"}
    for old, new in {
        "encoder.layers.5.post_attention_layernorm.weight": "pre_cross_attn_layernorm",
        "transformer.layers.4.post_attention_layernorm.weight": "pre_mlp_layernorm",
        "encoder.layers.4.attention.dense.weight": "self_attention.linear_proj",
    }.items():
        assert from_legacy_name(old, crossing).endswith(f"{new}.weight")


class Executes:
    """Unpickled without care, it writes a file."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return (exec, (f"open({self.path!r}, 'w').close()",))


@pytest.mark.parametrize("where", ["args", "model", "deep"])
def test_a_pickle_that_runs_code_is_refused(megatron, tmp_path, where):
    case, trap = load_case("l6_k1"), tmp_path / "trap"
    save_torch_format(tmp_path / "theirs", case)
    file = tmp_path / "theirs" / "release" / "mp_rank_00" / "model_optim_rng.pt"
    content = torch.load(file, weights_only=False)
    harmful = Executes(trap)
    if where == "args":
        content["args"].exit_signal_handler = harmful
    elif where == "model":
        content["model"]["decoder.layers.0.input_layernorm.weight"] = harmful
    else:
        content["optimizer"] = [{"state": (harmful,)}]
    torch.save(content, file)
    with pytest.raises(CheckpointError, match=r"holds (builtins|__builtin__)\.exec"):
        convert(tmp_path / "theirs", tmp_path / "ours")
    assert not trap.exists()
    assert not (tmp_path / "ours").exists()


@pytest.mark.parametrize("file", [".metadata", "common.pt"])
def test_a_torch_dist_checkpoint_that_runs_code_is_refused(one_step, tmp_path, file):
    trap = tmp_path / "trap"
    shutil.copytree(one_step, tmp_path / "ours")
    (path,) = (tmp_path / "ours").glob("iter_*")
    if file == ".metadata":
        (path / file).write_bytes(pickle.dumps({"state_dict_metadata": Executes(trap)}))
    else:
        torch.save({"args": Namespace(no_retrieval=False, model=Executes(trap))}, path / file)
        (path / CHECKSUMS_FILE).unlink()  # whoever sends a trap leaves none that would tell
    with pytest.raises(CheckpointError, match=r"holds (builtins|__builtin__)\.exec"):
        convert(tmp_path / "ours", tmp_path / "there", target="megatron")
    assert not trap.exists()


def test_values_of_megatron_that_are_not_needed_are_not_read(megatron, tmp_path):
    """Enumerations in the arguments, and random states."""
    import numpy as np
    from megatron.core.enums import ModelType

    case = load_case("l6_k1")
    save_torch_format(tmp_path / "theirs", case, model_type=ModelType.encoder_or_decoder)
    file = tmp_path / "theirs" / "release" / "mp_rank_00" / "model_optim_rng.pt"
    content = torch.load(file, weights_only=False)
    content["rng_state"] = [{"np_rng_state": np.random.get_state()}]  # noqa: NPY002
    torch.save(content, file)
    result = convert(tmp_path / "theirs", tmp_path / "ours")
    assert result.num_parameters > 0


def test_another_class_is_refused_by_name(megatron, tmp_path):
    save_torch_format(tmp_path / "theirs", load_case("l6_k1"), rate=Fraction(1, 3))
    with pytest.raises(CheckpointError, match=r"holds fractions\.Fraction, which could run code"):
        convert(tmp_path / "theirs", tmp_path / "ours")
    make_plain(tmp_path / "theirs" / "release" / "mp_rank_00" / "model_optim_rng.pt")
    convert(tmp_path / "theirs", tmp_path / "ours")


def make_plain(file):
    """As docs/migration.md says: the script there is run."""
    text = (Path(__file__).parents[3] / "docs" / "migration.md").read_text(encoding="utf-8")
    (script,) = (part for part in re.findall(r"```python\n(.*?)```", text, re.S) if "PLAIN" in part)
    subprocess.run([sys.executable, "-c", script, str(file)], check=True)


def test_what_is_missing_is_told(megatron, tmp_path):
    case = load_case("l6_k1")
    save_torch_format(tmp_path / "theirs", case, retro_chunk_length=None)
    with pytest.raises(CheckpointError, match="does not say retro_chunk_length"):
        convert(tmp_path / "theirs", tmp_path / "ours")
    chunk_length = case["config"]["chunk_length"]
    convert(tmp_path / "theirs", tmp_path / "ours", retro_chunk_length=chunk_length)
    with pytest.raises(CheckpointError, match="holds a checkpoint"):
        convert(tmp_path / "theirs", tmp_path / "ours", retro_chunk_length=chunk_length)
    file = tmp_path / "theirs" / "release" / "mp_rank_00"
    file.rename(file.with_name("mp_rank_01"))
    with pytest.raises(CheckpointError, match="no file of tensor parallel rank 0"):
        convert(tmp_path / "theirs", tmp_path / "other")


def test_an_implementation_that_computes_otherwise_is_refused(megatron, tmp_path):
    for name, flags, found in (
        ("layers", {"retro_origin": "mcore-0.15"}, r"and this model in \[2\]"),
        ("deepnorm", {"retro_deepnorm": True}, "cannot represent retro_deepnorm True"),
    ):
        small_trainer(save=str(tmp_path / name), train_iters=1, **flags).train()
        with pytest.raises(ConfigurationError, match=found):
            convert(tmp_path / name, tmp_path / "theirs", target="megatron")
    layers = {"num_layers": 6, "retro_decoder_layers": None}
    small_trainer(save=str(tmp_path / "ours"), train_iters=1, **layers).train()
    with pytest.raises(ConfigurationError, match="was trained as the paper describes"):
        convert(tmp_path / "ours", tmp_path / "theirs", target="megatron")
    with pytest.raises(ConfigurationError, match="load into any layout"):
        convert(tmp_path / "ours", tmp_path / "theirs", target_tensor_parallel_size=2)


def test_vocabulary_is_padded_for_the_ranks(megatron, tmp_path):
    small_trainer(
        save=str(tmp_path / "ours"), train_iters=1, make_vocab_size_divisible_by=1
    ).train()
    origin = {"retro_origin": "legacy"}
    convert(tmp_path / "ours", tmp_path / "2", target="instructretro",
            target_tensor_parallel_size=8, **origin)  # fmt: skip
    convert(tmp_path / "2", tmp_path / "back")
    wanted, found = (state(built(tmp_path / name)[0]) for name in ("ours", "back"))
    name = "embedding.word_embeddings.weight"
    assert found[name].size(0) == 104  # VOCABULARY in multiples of 8
    assert torch.equal(found[name][:VOCABULARY], wanted[name])
    assert built(tmp_path / "back")[1].retro_chunk_length == CHUNK_LENGTH


def save_as_megatron_lm(path: Path, model, arguments, **changes):
    """A model of ours as Megatron-LM's trainer saves it, with our providers in it."""
    from retro_mcore.training.setup.retrofit import resolved_flags

    flags = resolved_flags(arguments)
    mine = ("no_retrieval", "tokenizer_fingerprint", "disable_bias_linear")
    args = {name: value for name, value in flags.items() if name not in mine}
    args |= {"add_bias_linear": True, "retro_add_retriever": True, "bias_gelu_fusion": False}
    args |= {"retro_origin": arguments.retro_origin, **changes}
    file = path / "iter_0000002" / "mp_rank_00" / "model_optim_rng.pt"
    file.parent.mkdir(parents=True)
    state = {"args": Namespace(**args), "checkpoint_version": 3.0, "iteration": 2}
    torch.save({**state, "model": model.state_dict()}, file)
    (path / "latest_checkpointed_iteration.txt").write_text("2")


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"retro_origin": "mcore-0.5"},
        {"retro_origin": "mcore-0.15"},
        {"retro_cross_attention_positions": "rotary", "retro_encoder_hidden_size": 16,
         "retro_encoder_num_attention_heads": 2},
    ],
    ids=lambda options: options.get("retro_origin", "paper" if not options else "own sizes"),
)  # fmt: skip
def test_a_model_that_megatron_lm_trained_computes_the_same(megatron, tmp_path, options):
    """With our providers: the origin is what its arguments say, and no guess by its norms."""
    small_trainer(save=str(tmp_path / "run"), train_iters=1, **options).train()
    model, arguments = built(tmp_path / "run")
    save_as_megatron_lm(tmp_path / "theirs", model, arguments)
    result = convert(tmp_path / "theirs", tmp_path / "ours")
    assert result.source == "megatron"
    again, found = built(tmp_path / "ours")
    assert found.retro_origin == options.get("retro_origin")
    assert found.retro_cross_attention_positions == arguments.retro_cross_attention_positions
    of_origin = ("chunk_alignment", "encoder_positions", "mask_padding", "encoder_residual",
                 "final_layernorm", "chunk_length")  # fmt: skip
    for name in (f"retro_{name}" for name in of_origin):
        assert getattr(again.config, name) == getattr(model.config, name), name
    wanted = state(model)
    assert all(torch.equal(value, wanted[name]) for name, value in state(again).items())


def megatron_lm_arguments(path: Path, **changes) -> None:
    """Give a checkpoint of ours the arguments that Megatron-LM's trainer would have saved."""
    common = torch.load(path / "common.pt", weights_only=False)
    theirs = {**vars(common["args"]), "retro_add_retriever": True, "group_query_attention": False}
    for name in ("no_retrieval", "tokenizer_fingerprint", "document_tokens"):
        theirs.pop(name, None)
    torch.save({**common, "args": Namespace(**{**theirs, **changes})}, path / "common.pt")
    (path / CHECKSUMS_FILE).unlink()  # Megatron-LM writes none


@pytest.mark.parametrize("name", CHANGED_DEFAULTS)
@pytest.mark.parametrize("trainer", ["ours", "Megatron-LM's"])
def test_models_from_before_a_default_changed_keep_theirs(one_step, tmp_path, trainer, name):
    from retro_mcore.training import provider_options

    def _unstated(args):
        return provider_options._unstated(args, provider_options._saved(args))

    old, new = CHANGED_DEFAULTS[name]
    not_given = dict.fromkeys(CHANGED_DEFAULTS)
    shutil.copytree(one_step, tmp_path, dirs_exist_ok=True)
    (path,) = tmp_path.glob("iter_*")
    if trainer == "ours":
        (path / CHECKSUMS_FILE).unlink()
    else:
        megatron_lm_arguments(path)
    args = Namespace(load=str(tmp_path), retro_origin=None, **not_given)
    saved = torch.load(path / "common.pt", weights_only=False)
    for stated in (new, old):
        setattr(saved["args"], name, stated)
        torch.save(saved, path / "common.pt")
        assert getattr(built(tmp_path)[0].config, name) == _unstated(args)[name] == stated
    delattr(saved["args"], name)
    torch.save(saved, path / "common.pt")
    assert getattr(built(tmp_path)[0].config, name) == _unstated(args)[name] == old
    assert name not in _unstated(
        Namespace(load=None, retro_origin=None, **{**not_given, name: old})
    )
    assert _unstated(Namespace(load=None, retro_origin=None, **not_given))[name] == new
    assert _unstated(Namespace(load=None, retro_origin="legacy", **not_given))[name] == old


#: Options that show in no weight's shape, with another value than the default.
UNSEEN = {
    "softmax_scale": 0.5,
    "embedding_multiplier": 2.0,
    "no_rope_layers": [2],
    "sliding_window": 8,
    "window_attn_skip_freq": [1, 0],
    "retro_num_neighbors": 1,
    "retro_cross_attention_positions": "rotary",
}


def settled(load: Path, **given) -> Namespace:
    """Megatron-LM's arguments, with these options given, after its provider has seen them."""
    from retro_mcore.training import provider_flags, provider_options

    options = {field.name: field.default for field in fields(ModelOptions)}
    plain = {"retro_add_retriever": True, "ffn_hidden_size": 128, "window_size": None}
    args = Namespace(**{**options, **plain, "load": str(load), **given})
    provider_flags._given.clear()
    provider_flags._given.update({name: (flag_of(name), None) for name in given})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(provider_options, "check_arguments", lambda args: None)
        provider_options.settle_options(args)
    provider_flags._given.clear()
    return args


@pytest.mark.parametrize("trainer", ["ours", "Megatron-LM's"])
def test_megatron_lm_takes_or_compares_options_that_no_weight_shows(one_step, tmp_path, trainer):
    shutil.copytree(one_step, tmp_path, dirs_exist_ok=True)
    (path,) = tmp_path.glob("iter_*")
    states = dict(UNSEEN)
    if trainer == "ours":
        (path / CHECKSUMS_FILE).unlink()
    else:
        states["window_size"] = (states.pop("sliding_window") - 1, 0)
        megatron_lm_arguments(path, sliding_window=None)
    saved = torch.load(path / "common.pt", weights_only=False)
    saved["args"] = Namespace(**{**vars(saved["args"]), **states})
    torch.save(saved, path / "common.pt")
    taken = settled(tmp_path, use_checkpoint_args=True)
    assert {name: getattr(taken, name) for name in UNSEEN} == UNSEEN
    assert taken.window_size == (7, 0)
    assert hasattr(taken, "bias_gelu_fusion") == (trainer == "ours")  # which is exact
    given = {name: value for name, value in UNSEEN.items() if name != "softmax_scale"}
    layers = vars(saved["args"])["retro_decoder_layers"]
    for wrong in ({}, {"softmax_scale": 0.25, "use_checkpoint_args": True}):
        with pytest.raises(ConfigurationError, match=r"trained with 0\.5") as error:
            settled(tmp_path, retro_decoder_layers=layers, **given, **wrong)
        assert len(error.value.problems) == 1, error.value


def test_megatron_lm_does_not_go_on_from_retro_without_retrieval_unnoticed(one_step):
    with pytest.raises(ConfigurationError, match="Add --retro-add-retriever, or --finetune"):
        settled(one_step, retro_add_retriever=False)
    settled(one_step, retro_add_retriever=False, finetune=True)


def test_a_checkpoint_of_megatron_lm_is_read(one_step, tmp_path, caplog):
    shutil.copytree(one_step, tmp_path, dirs_exist_ok=True)
    wanted, arguments = built(tmp_path)
    (path,) = tmp_path.glob("iter_*")
    megatron_lm_arguments(path)
    model, found = built(tmp_path)
    assert replace(found, tokenizer_fingerprint=arguments.tokenizer_fingerprint) == arguments
    assert all(torch.equal(value, state(wanted)[name]) for name, value in state(model).items())
    with pytest.raises(CheckpointError, match=r"was written by Megatron-LM .*Add --finetune"):
        small_trainer(load=str(tmp_path), train_iters=1)
    trainer = small_trainer(load=str(tmp_path), finetune=True, train_iters=1)
    assert "does not record its tokenizer's fingerprint" in caplog.text
    assert trainer.train().iteration == 1


def test_the_tokenizer_of_a_checkpoint_of_megatron_lm_is_compared(one_step, tmp_path):
    shutil.copytree(one_step, tmp_path, dirs_exist_ok=True)
    (path,) = tmp_path.glob("iter_*")
    megatron_lm_arguments(path, tokenizer_fingerprint="0" * 64)
    with pytest.raises(CheckpointError, match="was trained with tokenizer_fingerprint 000"):
        small_trainer(load=str(tmp_path), finetune=True, train_iters=1)


def test_a_model_of_megatron_bridge_is_read(one_step, tmp_path):
    shutil.copytree(one_step, tmp_path, dirs_exist_ok=True)
    wanted, arguments = built(tmp_path)
    (path,) = tmp_path.glob("iter_*")
    give_bridges_configuration(path)
    model, found = built(tmp_path)
    assert found == arguments
    assert all(torch.equal(value, state(wanted)[name]) for name, value in state(model).items())
    with pytest.raises(CheckpointError, match=r"or Megatron-Bridge.*Add --finetune"):
        small_trainer(load=str(tmp_path), train_iters=1)
    for text, message in (("model: {}", "is not one of retro_mcore"), ("a: [", "cannot be read")):
        (path / "run_config.yaml").write_text(text)
        with pytest.raises(CheckpointError, match=message):
            built(tmp_path)


def test_a_gpt_of_megatron_bridges_own_is_converted_with_its_options(megatron, tmp_path):
    """Its recipes do not record what the model computes, as ours do."""
    mistral(tmp_path / "mistral", rms_norm_eps=1e-6)
    convert(tmp_path / "mistral", tmp_path / "theirs")
    wanted, arguments = built(tmp_path / "theirs")
    (path,) = (tmp_path / "theirs").glob("iter_*")
    give_bridges_configuration(path)
    provider = {"_target_": "megatron.bridge.models.gpt_provider.GPTModelProvider"}
    (path / "run_config.yaml").write_text(yaml.safe_dump({"model": provider}))
    with pytest.raises(CheckpointError, match=r"does not record.*--model-config FILE, a YAML file"):
        built(tmp_path / "theirs")
    missing = r"does not say num_attention_heads, norm_epsilon, .*--model-config FILE"
    with pytest.raises(CheckpointError, match=missing):
        convert(tmp_path / "theirs", tmp_path / "ours")
    names = ("num_attention_heads", "num_query_groups", "kv_channels", "norm_epsilon")
    names += ("rotary_percent", "seq_length")
    options = {name: getattr(arguments, name) for name in names}
    options = {name: value for name, value in options.items() if value is not None}
    (tmp_path / "model.yaml").write_text(yaml.safe_dump(options))
    file = str(tmp_path / "model.yaml")
    result = convert(tmp_path / "theirs", tmp_path / "ours", model_config=file)
    (note,) = result.notes
    assert "no arguments are recorded: took" in note
    assert "rotary_base 10000" in note
    assert "the activation SiLU" in note
    assert "norm_epsilon" not in note
    model, found = built(tmp_path / "ours")
    assert found.norm_epsilon == 1e-6
    assert all(torch.equal(value, state(wanted)[name]) for name, value in state(model).items())


def mistral(path, **changes):
    from tests.unit.checkpoint.test_huggingface import make_model

    return make_model("mistral", path, max_position_embeddings=256, **changes)


def test_a_sliding_window_goes_with_the_model(megatron, tmp_path):
    """Mistral's: our model computes it; Megatron's targets, which do not, refuse longer texts."""
    from retro_mcore.training.setup.build import number_of_positions

    mistral(tmp_path / "mistral", sliding_window=100)
    convert(tmp_path / "mistral", tmp_path / "ours")
    model, arguments = built(tmp_path / "ours")
    assert arguments.sliding_window == 100
    assert model.max_sequence_length == 256 == number_of_positions(arguments)
    assert model.config.window_size == (99, 0)
    convert(tmp_path / "ours", tmp_path / "again")  # and on
    assert built(tmp_path / "again")[1].sliding_window == 100
    for target in ("megatron", "megatron-torch", "instructretro"):
        with pytest.raises(ConfigurationError, match="attends to the last 100 tokens of 256"):
            convert(tmp_path / "mistral", tmp_path / "theirs", target=target)
    short = tmp_path / "short.yaml"
    short.write_text("seq_length: 64.0\n")
    convert(tmp_path / "mistral", tmp_path / "theirs", target="megatron", model_config=str(short))
    convert(tmp_path / "theirs", tmp_path / "back")
    assert built(tmp_path / "back")[1].sliding_window == 100


def test_a_window_is_taken_with_the_gpt(megatron, tmp_path):
    """--load-gpt from the model itself and from its conversions, with a window of some layers."""
    from tests.unit.checkpoint.test_huggingface import flags_of, make_model
    from tests.unit.training.small import small_plan

    layers = ["sliding_attention", "full_attention", "sliding_attention"]
    windows = {"use_sliding_window": True, "sliding_window": 9, "layer_types": layers}
    make_model("qwen2", tmp_path / "theirs", vocab_size=VOCABULARY, **windows)
    convert(tmp_path / "theirs", tmp_path / "ours")
    convert(tmp_path / "ours", tmp_path / "back", target="huggingface", decoder_only=True)
    for load in ("theirs", "ours", "back"):
        wanted = {**flags_of("qwen2"), "load_gpt": str(tmp_path / load)}
        arguments = small_plan(**wanted).arguments
        assert (arguments.sliding_window, arguments.window_attn_skip_freq) == (9, [1, 0, 1])
        for other in ({"sliding_window": 10}, {"window_attn_skip_freq": [2]}):
            with pytest.raises(CheckpointError, match=f"is .*{next(iter(other.values()))}.*, expe"):
                small_plan(**wanted, **other)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("num_attention_heads: x\n", "num_attention_heads"),
        ("rotary_base: [1]\n", "rotary_base"),
        ("swiglu: 3\n", "swiglu"),
        ("normalization: BatchNorm\n", "normalization"),
        ("a: {b\n", "not YAML"),
        ("5: 6\n", "not a mapping"),
        ("no_such: 1\n", "not model options"),
    ],
)
def test_a_wrong_model_config_is_one_line(megatron, tmp_path, text, named):
    save_torch_format(tmp_path / "theirs", load_case("l6_k1"))
    (tmp_path / "model.yaml").write_text(text)
    with pytest.raises(ConfigurationError, match=named):
        convert(tmp_path / "theirs", tmp_path / "o", model_config=str(tmp_path / "model.yaml"))
