"""--load-gpt in the trainer: where a run starts, and that it resumes from its own checkpoints."""

from __future__ import annotations

import pytest
import torch

from retro_mcore.errors import CheckpointError
from tests.unit.conversion.test_huggingface import LLAMA_CONFIG, flags_of, logits
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
    return trainer._parts.chunks[0].module


def test_a_run_starts_from_the_gpt_and_resumes_from_itself(megatron, tmp_path, capsys):
    from tests.unit.conversion.test_huggingface import tokens_of_test

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
    from retro_mcore.training.retrofit import _bos_notes
    from tests.unit.data.tokenizer_shapes import byte_level, save

    tokenizer = byte_level(["<s>", "</s>"])
    save(tmp_path / "gpt", tokenizer, tokenizer_config={"add_bos_token": habit})
    (tmp_path / "project").mkdir()
    ProjectSettings(add_bos=adds_bos).save(tmp_path / "project")
    notes = _bos_notes(str(tmp_path / "gpt"), str(tmp_path / "project"))
    assert ["--add-bos-token" in note for note in notes] == [True] * (habit != adds_bos)
    (tmp_path / "gpt" / "tokenizer_config.json").write_text("{")
    assert _bos_notes(str(tmp_path / "gpt"), str(tmp_path / "project")) == []
