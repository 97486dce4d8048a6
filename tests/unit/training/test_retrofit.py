"""--load-gpt in the trainer: where a run starts, and that it resumes from its own checkpoints."""

from __future__ import annotations

import re
import shlex
import shutil
from dataclasses import fields
from pathlib import Path

import pytest
import torch

from retro_mcore.cli.flags import parse_options
from retro_mcore.cli.pretrain_retro import PretrainRetroOptions, main
from retro_mcore.errors import CheckpointError
from retro_mcore.model.options import ModelOptions
from retro_mcore.training.options.from_checkpoint import model_options_of_gpt
from tests.unit.checkpoint.test_huggingface import LLAMA_CONFIG, flags_of, logits
from tests.unit.data.projects import built_project
from tests.unit.training.small import NO_DROPOUT, VOCABULARY, small_trainer


def make_llama(path):
    """Of the small project's vocabulary."""
    import transformers

    config = transformers.LlamaConfig(
        **LLAMA_CONFIG, num_key_value_heads=2, rope_theta=5000.0, vocab_size=VOCABULARY
    )
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config).eval()
    model.save_pretrained(path)
    return model


def trainer(path, **changes):
    flags = {**flags_of("llama"), **NO_DROPOUT, "load_gpt": str(path), "train_iters": 2}
    return small_trainer(**{**flags, **changes})


def model_of(trainer):
    return trainer._parts.stages[0].module


def test_a_run_starts_from_the_gpt_and_resumes_from_itself(megatron, tmp_path, capsys):
    from tests.unit.checkpoint.test_huggingface import tokens_of_test

    theirs = make_llama(tmp_path / "llama")
    saved = str(tmp_path / "run")
    first = trainer(tmp_path / "llama", save=saved, load=saved, exit_interval=1)
    tokens = tokens_of_test() % VOCABULARY
    with torch.no_grad():
        wanted = theirs(tokens).logits
        positions = torch.arange(tokens.size(1)).expand_as(tokens)
        found = model_of(first).eval()(tokens, positions, None)[..., :VOCABULARY]
    torch.testing.assert_close(found, wanted, atol=2e-5, rtol=1e-5)
    first.train()
    told = capsys.readouterr().out
    assert "all 21 weights taken" in told
    assert "of retrieval start fresh" in told
    # The learning rate is high: a run that started again would be seen.
    trained = logits(model_of(first).eval())
    second = trainer(tmp_path / "llama", save=saved, load=saved)
    assert torch.equal(logits(model_of(second).eval()), trained)
    second.train()
    assert "weights taken" not in capsys.readouterr().out


def _move(llama):
    llama.rename(llama.with_name("elsewhere"))
    return llama.with_name("elsewhere")


def _other_weights(llama):
    import safetensors.torch

    file = llama / "model.safetensors"
    weights = {name: value + 1 for name, value in safetensors.torch.load_file(file).items()}
    safetensors.torch.save_file(weights, file, {"format": "pt"})
    return llama


def _other_settings(llama):
    text = (llama / "config.json").read_text(encoding="utf-8")
    (llama / "config.json").write_text(text.replace("5000.0", "500000.0"), encoding="utf-8")
    return llama


def _delete(llama):
    shutil.rmtree(llama)
    return llama


@pytest.mark.parametrize(
    ("change", "same"),
    [(_move, True), (_delete, True), (_other_weights, False), (_other_settings, False)],
)
def test_a_run_is_not_resumed_in_the_name_of_another_gpt(megatron, tmp_path, change, same):
    """Somebody tries several GPTs, and leaves --save of the last one in the command."""
    make_llama(tmp_path / "llama")
    saved = {"save": str(tmp_path / "run"), "load": str(tmp_path / "run")}
    trainer(tmp_path / "llama", **saved, exit_interval=1).train()
    now = change(tmp_path / "llama")
    for iterations in (2, 3):  # the record is passed on
        if same:
            trainer(now, **saved, train_iters=iterations, no_load_optim=True).train()
            continue
        with pytest.raises(CheckpointError, match="started from another GPT \\(llama\\)"):
            trainer(now, **saved, train_iters=iterations, no_load_optim=True)


def test_a_gpt_whose_own_training_went_on_is_still_the_same(megatron, tmp_path):
    """The tracker file of --load-gpt names a later checkpoint when the run is resumed."""
    gpt, saved = str(tmp_path / "gpt"), {name: str(tmp_path / "run") for name in ("save", "load")}
    twin = {"save": gpt, "load": gpt, "no_retrieval": True, **NO_DROPOUT}
    small_trainer(**twin, exit_interval=1).train()
    run = {"load_gpt": gpt, **saved, **NO_DROPOUT}
    small_trainer(**run, exit_interval=1).train()
    small_trainer(**twin).train()
    assert small_trainer(**run).has_loaded
    shutil.rmtree(next((tmp_path / "gpt").glob("iter_0*1")))
    with pytest.raises(CheckpointError, match="started from another GPT"):
        small_trainer(**run)


def test_a_frozen_decoder_stays_the_gpt_while_retrieval_learns(megatron, tmp_path):
    make_llama(tmp_path / "llama")
    saved = str(tmp_path / "run")
    flags = {"freeze_decoder": True, "save": saved, "load": saved}
    run = trainer(tmp_path / "llama", **flags, exit_interval=1)
    before = {name: value.clone() for name, value in model_of(run).named_parameters()}
    gpt = logits(model_of(run).eval())
    for _ in range(2):  # resumed from its own checkpoint, once
        run.train()
        after = dict(model_of(run).named_parameters())
        changed = {name for name in before if not torch.equal(after[name], before[name])}
        assert any("cross_attention" in name for name in changed)
        assert any(name.startswith("neighbor_encoder.") for name in changed)
        assert all("neighbor_encoder" in name or "cross_att" in name for name in changed)
        assert torch.equal(logits(model_of(run).eval()), gpt)
        run = trainer(tmp_path / "llama", **flags)


def test_the_twin_without_retrieval_takes_the_decoder_too(megatron, tmp_path):
    make_llama(tmp_path)
    report = trainer(tmp_path, no_retrieval=True)._decoder
    assert report.taken == 21
    assert report.fresh == []


def test_contradicting_flags_are_refused_before_training(megatron, tmp_path):
    make_llama(tmp_path)
    with pytest.raises(CheckpointError, match="--kv-channels is 16, expected 8"):
        trainer(tmp_path, kv_channels=16)
    with pytest.raises(CheckpointError, match="--retro-deepnorm is True, expected False"):
        trainer(tmp_path, retro_deepnorm=True)


def test_our_own_gpt_and_our_own_retro(megatron, tmp_path):
    """A twin that was trained here is a GPT to start from; a Retro is none."""
    gpt, retro = str(tmp_path / "gpt"), str(tmp_path / "retro")
    small_trainer(save=gpt, train_iters=1, no_retrieval=True, **NO_DROPOUT).train()
    start = small_trainer(load_gpt=gpt, save=retro, train_iters=1, **NO_DROPOUT)
    assert start._decoder.checkpoint.source == "retro-mcore"
    start.train()
    with pytest.raises(CheckpointError, match="is a Retro model already"):  # for --load
        small_trainer(load_gpt=retro, **NO_DROPOUT)


@pytest.mark.parametrize(("habit", "adds_bos"), [(True, False), (False, True), (True, True)])
def test_another_habit_of_bos_is_told(tmp_path, habit, adds_bos):
    """A GPT that was trained with BOS, and a project without, or the other way round."""
    from retro_mcore.project.config import ProjectSettings
    from retro_mcore.training.setup.retrofit import bos_notes
    from tests.unit.data.tokenizer_shapes import byte_level, save

    tokenizer = byte_level(["<s>", "</s>"])
    save(tmp_path / "gpt", tokenizer, tokenizer_config={"add_bos_token": habit})
    (tmp_path / "project").mkdir()
    ProjectSettings(add_bos=adds_bos).save(tmp_path / "project")
    notes = bos_notes(str(tmp_path / "gpt"), str(tmp_path / "project"))
    assert ["--add-bos-token" in note for note in notes] == [True] * (habit != adds_bos)
    (tmp_path / "gpt" / "tokenizer_config.json").write_text("{")
    assert bos_notes(str(tmp_path / "gpt"), str(tmp_path / "project")) == []


def test_what_a_gpt_is_needs_none_of_its_weights(megatron, tmp_path):
    """Every rank reads its flags, before there are ranks: none compares all files for that."""
    gpt = tmp_path / "gpt"
    small_trainer(no_retrieval=True, save=str(gpt), train_iters=1, **NO_DROPOUT).train()
    weights = next(gpt.glob("iter_*/__0_0.distcp"))
    content = weights.read_bytes()
    weights.write_bytes(content[: len(content) // 2] + bytes(len(content) - len(content) // 2))
    assert model_options_of_gpt(str(gpt))["num_layers"] > 0
    with pytest.raises(CheckpointError, match=r"__0_0\.distcp"):
        small_trainer(load_gpt=str(gpt), train_iters=1, **NO_DROPOUT)


ROOT = Path(__file__).parents[3]
#: Of six layers, the least that have cross-attention by default.
SIZES = {**LLAMA_CONFIG, "num_hidden_layers": 6, "vocab_size": 512, "pad_token_id": None}
LLAMA_3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
    "rope_theta": 500000.0,
}
MODELS = {
    "Llama-3-8B": (
        "llama",
        {"num_key_value_heads": 2, "rope_parameters": LLAMA_3, "rms_norm_eps": 1e-5},
    ),
    "Qwen3-8B": ("qwen3", {"num_key_value_heads": 2, "head_dim": 16, "rope_theta": 1000000.0}),
}


def save_model(path, family, **changes):
    import transformers

    sizes = {"vocab_size": 512} if family == "gpt2" else SIZES
    config = transformers.AutoConfig.for_model(family, **{**sizes, **changes})
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """With what the documents name: a project and two models."""
    folder = tmp_path_factory.mktemp("docs")
    (folder / "project").symlink_to(built_project())
    for name, (family, changes) in MODELS.items():
        save_model(folder / name, family, **changes)
    return folder


def commands(document: str) -> list[str]:
    """Those with --load-gpt in a document's blocks, joined to one line."""
    text = (ROOT / document).read_text(encoding="utf-8")
    blocks = re.findall(r"^```bash\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    return [line.partition("#")[0] for line in lines if "--load-gpt" in line]


@pytest.mark.parametrize(
    "command",
    [*commands("docs/training.md"), *commands("README.md")],
    ids=lambda command: re.search(r"--load-gpt (\S+)", command)[1],
)
def test_the_documented_command_is_all_that_is_needed(
    megatron, folder, tmp_path, monkeypatch, command, capsys
):
    """Small models of random weights stand for those that the documents name."""
    monkeypatch.chdir(tmp_path)
    for path in folder.iterdir():
        (tmp_path / path.name).symlink_to(path.resolve())
    written = command.replace("$P", "--project-dir /data/project").replace("/data", str(tmp_path))
    python, tool, *flags = shlex.split(written)
    assert (python, tool) == ("python", "tools/pretrain_retro.py")
    assert main([*flags, "--device", "cpu", "--num-workers", "0"]) == 0
    shown = capsys.readouterr().out
    assert "--dry-run" in flags or re.search(r"all \d+ weights taken, \d+ of retrieval", shown)
    if "--load" in flags:  # again: it is finished, and the GPT is not needed
        Path(flags[flags.index("--load-gpt") + 1]).unlink()
        assert main([*flags, "--device", "cpu", "--num-workers", "0"]) == 0
        assert "this training is already finished" in capsys.readouterr().out


def options_of(path, *flags):
    base = ["--project-dir", str(built_project()), "--micro-batch-size", "1", "--lr", "1e-4"]
    return parse_options(PretrainRetroOptions, [*base, "--load-gpt", str(path), *flags])


def test_the_model_is_the_checkpoints(megatron, folder):
    llama = options_of(folder / "Llama-3-8B")
    assert (llama.num_layers, llama.hidden_size, llama.num_query_groups) == (6, 32, 2)
    assert (llama.rotary_base, llama.use_rope_scaling, llama.rope_scaling_factor) == (
        500_000,
        True,
        8.0,
    )
    assert (llama.normalization, llama.norm_epsilon, llama.swiglu) == ("RMSNorm", 1e-5, True)
    assert llama.disable_bias_linear
    assert llama.untie_embeddings_and_output_weights
    assert llama.position_embedding_type == "rope"
    assert (llama.hidden_dropout, llama.attention_dropout) == (0.0, 0.0)
    qwen = options_of(folder / "Qwen3-8B")
    assert (qwen.qk_layernorm, qwen.kv_channels, qwen.rotary_base) == (True, 16, 1_000_000)


@pytest.mark.parametrize(
    ("family", "changes", "found"),
    [
        ("gpt2", {"n_embd": 32, "n_head": 4, "n_layer": 6, "n_positions": 96},
         {"hidden_dropout": 0.1, "openai_gelu": True, "max_position_embeddings": 96}),
        ("gpt2", {"n_embd": 32, "n_head": 4, "n_layer": 6, "resid_pdrop": 0.0, "attn_pdrop": 0.2},
         {"hidden_dropout": 0.0, "attention_dropout": 0.2, "max_position_embeddings": 1024}),
        ("mistral", {"num_key_value_heads": 1, "sliding_window": 77},
         {"sliding_window": 77, "num_query_groups": 1}),
        ("qwen2", {"num_key_value_heads": 4, "attention_dropout": 0.25},
         {"add_qkv_bias": True, "attention_dropout": 0.25, "sliding_window": None}),
        ("stablelm", {"num_key_value_heads": 4, "hidden_dropout": 0.05},
         {"normalization": "LayerNorm", "rotary_percent": 0.25, "hidden_dropout": 0.05}),
    ],
    ids=["gpt2", "gpt2 without dropout", "mistral", "qwen2", "stablelm"],
)  # fmt: skip
def test_what_differs_between_families_is_taken(megatron, tmp_path, family, changes, found):
    save_model(tmp_path, family, **changes)
    options = options_of(tmp_path)
    for name, value in found.items():
        assert getattr(options, name) == value, name


def test_dropout_alone_may_differ(megatron, folder):
    options = options_of(folder / "Llama-3-8B", "--hidden-dropout", "0.1")
    assert (options.hidden_dropout, options.attention_dropout) == (0.1, 0.0)
    assert make_plan_of(options).arguments.hidden_dropout == 0.1


def make_plan_of(options):
    from retro_mcore.project.config import ProjectConfig
    from retro_mcore.training.setup.plan import make_plan

    return make_plan(options, ProjectConfig.load(options.project_dir), 500)


def test_all_flags_that_disagree_are_named_at_once(megatron, folder, capsys):
    flags = ["--num-attention-heads", "3", "--rotary-base", "10000.0", "--norm-epsilon", "1e-6",
             "--no-swiglu", "--micro-batch-size", "0", "--num-query-groups", "1"]  # fmt: skip
    base = ["--project-dir", str(built_project()), "--lr", "1e-4", "--device", "cpu"]
    gpt = ["--load-gpt", str(folder / "Llama-3-8B")]
    assert main([*base, *gpt, *flags]) == 2
    shown = capsys.readouterr().err
    assert "--micro-batch-size: 0" in shown
    flags[flags.index("--micro-batch-size") + 1] = "1"
    assert main([*base, *gpt, *flags]) == 2
    shown = capsys.readouterr().err
    for told in (
        "--num-attention-heads is 3, expected 4",
        "--rotary-base is 10000, expected 500000",
        "--norm-epsilon is 1e-06, expected 1e-05",
        "--swiglu is False, expected True",
        "--num-query-groups is 1, expected 2",
    ):
        assert told in shown
    assert shown.count("\n") == 1


def test_the_python_function_takes_it_alone(megatron, folder):
    from retro_mcore.cli.commands import pretrain_retro

    run = pretrain_retro(
        project_dir=str(built_project()), load_gpt=str(folder / "Qwen3-8B"), micro_batch_size=1,
        lr=1e-4, dry_run=True,
    )  # fmt: skip
    assert run.plan.arguments.qk_layernorm


def test_every_row_of_the_vocabulary_comes_along(megatron, tmp_path):
    """Models have spare rows, which another padding of the tokenizer's vocabulary would drop."""
    save_model(tmp_path, "llama", num_key_value_heads=4, vocab_size=900)
    plan = make_plan_of(options_of(tmp_path, "--make-vocab-size-divisible-by", "4"))
    assert (plan.arguments.vocab_size, plan.arguments.padded_vocab_size) == (500, 900)
    parallel = ["--tensor-model-parallel-size", "2"]
    plan = make_plan_of(options_of(tmp_path, "--make-vocab-size-divisible-by", "4", *parallel))
    assert plan.arguments.padded_vocab_size == 904


@pytest.mark.parametrize("form", ["megatron", "megatron-torch", "retro-mcore"])
def test_from_megatrons_formats(megatron, tmp_path, form):
    """What its saved arguments say is taken, dropout too."""
    from retro_mcore.cli.commands import convert_checkpoint

    save_model(tmp_path / "gpt2", "gpt2", n_embd=32, n_head=4, n_layer=6, attn_pdrop=0.3,
               n_positions=96)  # fmt: skip
    convert_checkpoint(load=str(tmp_path / "gpt2"), save=str(tmp_path / "gpt"), target=form)
    from_theirs, from_converted = (options_of(tmp_path / name) for name in ("gpt2", "gpt"))
    assert from_converted.attention_dropout == 0.3
    same = {f.name for f in fields(ModelOptions)} - {
        "num_query_groups",
        "kv_channels",
        "ffn_hidden_size",
    }
    for name in same:
        assert getattr(from_converted, name) == getattr(from_theirs, name), name
    for options in (from_theirs, from_converted):
        arguments = make_plan_of(options).arguments
        assert arguments.max_position_embeddings == 96


def test_a_run_may_be_planned_before_its_gpt_is_there(megatron, tmp_path, folder, capsys):
    """And without a project, the vocabulary comes from the GPT."""
    base = ["--project-dir", str(tmp_path / "none"), "--lr", "1e-4", "--micro-batch-size", "1",
            "--seq-length", "64", "--global-batch-size", "2", "--train-samples", "8"]  # fmt: skip
    assert main([*base, "--load-gpt", str(folder / "Llama-3-8B"), "--dry-run"]) == 0
    assert "6 layers of 32, 4 heads, vocabulary 512" in capsys.readouterr().out
    sizes = ["--num-layers", "6", "--hidden-size", "32", "--num-attention-heads", "4",
             "--vocab-size", "512"]  # fmt: skip
    assert main([*base, *sizes, "--load-gpt", str(tmp_path / "later"), "--dry-run"]) == 0
    assert main([*base, *sizes, "--load-gpt", str(tmp_path / "later")]) == 2
    assert "no such directory" in capsys.readouterr().err
