"""--retro-matching-start: a GPT reads its neighbors before it is trained to."""

from __future__ import annotations

import logging

import pytest
import torch

from retro_mcore.errors import ConfigurationError
from tests.unit.checkpoint.test_huggingface import LLAMA_CONFIG, flags_of
from tests.unit.training.small import (
    CHUNK_LENGTH,
    NO_DROPOUT,
    VOCABULARY,
    RandomSamples,
    small_trainer,
)
from tests.unit.training.test_retrofit import model_of

MATCHING = {
    "retro_matching_start": True,
    "retro_encoder_input": "raw",
    "retro_cross_attention_keys": "previous",
    "retro_encoder_num_layers": 1,
    "retro_decoder_layers": [1, 2],
}


class CopiedSamples(RandomSamples):
    """Each chunk's first neighbor is that chunk, and the one that follows it."""

    def __getitem__(self, index):
        item = super().__getitem__(index)
        for chunk in range(len(item["neighbor_tokens"]) - 1):
            start = chunk * CHUNK_LENGTH
            item["neighbor_tokens"][chunk, 0] = item["text"][start : start + 2 * CHUNK_LENGTH]
            item["neighbor_mask"][chunk, 0] = False
        return item


def trainer(path, samples=CopiedSamples, **changes):
    import transformers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        **{**LLAMA_CONFIG, "hidden_size": 128}, rope_theta=5000.0, vocab_size=VOCABULARY
    )
    model = transformers.LlamaForCausalLM(config)
    with torch.no_grad():  # a trained model's output is not as flat as random weights make it
        model.lm_head.weight.mul_(10)
    model.save_pretrained(path / "llama")
    sizes = {**flags_of("llama"), "hidden_size": 128, "num_query_groups": None}
    flags = {**sizes, **NO_DROPOUT, **MATCHING, "load_gpt": str(path / "llama")}
    return small_trainer(samples(24), **{**flags, "train_iters": 1, **changes})


def batches_of(samples, size):
    from retro_mcore.training.loop.sample_reader import (
        MicroBatchSampler,
        NumberedSamples,
        read_batches,
    )

    sampler = MicroBatchSampler(0, len(samples), size, 0, 1)
    return read_batches(NumberedSamples(samples), sampler, 0, torch.device("cpu"))


def mean_loss(trainer, samples):
    from retro_mcore.training.loop.scoring import total_loss

    loss, tokens = total_loss(trainer._parts.stages, batches_of(samples, 2))
    return loss / tokens


def test_neighbors_help_before_training(megatron, tmp_path, caplog):
    caplog.set_level(logging.INFO, logger="retro_mcore")
    started = trainer(tmp_path)
    with_copies = mean_loss(started, CopiedSamples(8))
    with_others = mean_loss(started, RandomSamples(8))
    # The text is random: a copy of what follows is all that can lower its loss. By how much other
    # neighbors raise it is noise of the fit, which differs between kernels (.23, .41).
    assert with_copies < with_others - 0.1
    assert "matching start: queries explain" in caplog.text


def test_windows_need_not_divide_by_neighbors(megatron, tmp_path):
    from retro_mcore.training.setup import matching_start

    model = model_of(trainer(tmp_path))
    sums = matching_start._Sums(model, torch.device("cpu"))
    batch = next(iter(batches_of(CopiedSamples(1), 1)))
    sums.add(batch)
    whole = float(sums.encoded.trace())
    assert sums.count == batch.tokens.numel()
    for part in model.modules():
        if hasattr(part, "config"):
            part.config.retro_num_neighbors = 3
    again = matching_start._Sums(model, torch.device("cpu"))
    again.add(batch)
    assert again.count == sums.count
    assert float(again.encoded.trace()) == pytest.approx(whole, rel=1e-6)


def test_the_encoder_is_the_decoders_beginning(megatron, tmp_path):
    model = model_of(trainer(tmp_path, train_iters=1))
    encoder = dict(model.neighbor_encoder.layers[0].named_parameters())
    decoder = dict(model.decoder.layers[0].named_parameters())
    shared = [name for name in encoder if "cross_att" not in name]
    assert len(shared) > 4
    assert all(torch.equal(encoder[name], decoder[name]) for name in shared)
    assert not encoder["cross_attention.linear_proj.weight"].any()


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_training_goes_on_from_these_weights(megatron, tmp_path, precision):
    """In bf16 the optimizer has weights of its own, which it copies back."""
    rates = {"lr": 1e-30, "min_lr": 0.0, "weight_decay": 0.0}  # none at all is refused
    started = trainer(tmp_path, bf16=precision == "bf16", **rates)
    attention = model_of(started).module if precision == "bf16" else model_of(started)
    weights = attention.decoder.layers[1].cross_attention.state_dict()
    before = {name: weight.clone() for name, weight in weights.items() if weight is not None}
    started.train()
    assert before
    for name, weight in before.items():
        torch.testing.assert_close(weights[name], weight, atol=1e-20, rtol=0)


def test_a_resumed_run_is_not_fitted_again(megatron, tmp_path, caplog):
    saved = str(tmp_path / "run")
    first = trainer(tmp_path, save=saved, load=saved, train_iters=2, exit_interval=1)
    first.train()
    caplog.clear()
    caplog.set_level(logging.INFO, logger="retro_mcore")
    second = trainer(tmp_path, save=saved, load=saved, train_iters=2)
    assert "matching start" not in caplog.text
    wanted, found = (
        model_of(one).decoder.layers[0].cross_attention.linear_q.weight for one in (first, second)
    )
    assert torch.equal(found, wanted)


@pytest.mark.parametrize(
    "option",
    [
        {"retro_encoder_input": "normed"},
        {"retro_cross_attention_keys": "own"},
        {"retro_cross_attention_keys": "mixed"},
        {"retro_cross_attention_positions": "rotary"},
        {"retro_encoder_hidden_size": 16},
        {"retro_encoder_ffn_hidden_size": 16},
        {"retro_encoder_num_attention_heads": 2},
        {"no_retrieval": True},
    ],
)
def test_what_cannot_match_is_refused(megatron, tmp_path, option):
    (name,) = option
    with pytest.raises(ConfigurationError, match=f"--{name.replace('_', '-')}"):
        trainer(tmp_path, **option)
