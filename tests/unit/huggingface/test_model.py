"""RetroForCausalLM as transformers' users know a model."""

from __future__ import annotations

import pytest
import torch

from tests.unit.huggingface.models import SMALL, inputs_of, mostly_slow, their_logits
from tests.unit.model.builders import VOCABULARY


def small_config(**options):
    from retro_mcore.huggingface import RetroConfig

    names = ("padded_vocab_size", "vocab_size", "tokenizer_type", "tokenizer_fingerprint")
    values = {name: value for name, value in SMALL.items() if name not in names}
    return RetroConfig(**{**values, "vocab_size": VOCABULARY, "pad_token_id": 3, **options})


def small_model(**options):
    from retro_mcore.huggingface import RetroForCausalLM

    torch.manual_seed(0)
    return RetroForCausalLM(small_config(**options)).double().eval()


def sample(length=32, batch_size=2, **options):
    from retro_mcore.model.config import RetroConfig

    names = ("vocab_size", "padded_vocab_size", "seq_length", "max_position_embeddings",
             "tokenizer_type", "tokenizer_fingerprint")  # fmt: skip
    values = {name: value for name, value in SMALL.items() if name not in names}
    config = RetroConfig(**values, **options)
    return inputs_of(type("Model", (), {"config": config}), length, batch_size)


@pytest.mark.parametrize("alignment", ["left", "right"])
@pytest.mark.parametrize("positions", mostly_slow(["rope", "learned_absolute"], "rope"))
def test_padding_changes_nothing(megatron, alignment, positions):
    """Texts of several lengths beside one another, padded at either end."""
    model = small_model(position_embedding_type=positions, retro_chunk_alignment=alignment)
    for lengths in ((21, 32), (32, 3), (16, 8)):
        longest = max(lengths)
        most = -(-longest // 8) if alignment == "right" else longest // 8
        retrieved = torch.full((2, most, 2, 16), -1)
        rows, alone = [], []
        for row, length in enumerate(lengths):
            text = sample(length, 1, retro_chunk_alignment=alignment)
            alone.append(their_logits(model, text)[0])
            rows.append(text["input_ids"][0])
            retrieved[row, : text["retrieved_input_ids"].size(1)] = text["retrieved_input_ids"][0]
        for left in (True, False):
            tokens, mask = torch.zeros(2, 2, longest, dtype=torch.long)
            for row, text in enumerate(rows):
                place = slice(longest - len(text), None) if left else slice(0, len(text))
                tokens[row, place], mask[row, place] = text, 1
            inputs = {"input_ids": tokens, "attention_mask": mask, "retrieved_input_ids": retrieved}
            found = their_logits(model, inputs)
            for row, wanted in enumerate(alone):
                torch.testing.assert_close(found[row][mask[row] > 0], wanted, atol=1e-10, rtol=0)


def test_eager_attention_is_the_same(megatron):
    model, inputs = small_model(position_embedding_type="rope", num_query_groups=2), sample()
    wanted = their_logits(model, inputs)
    model.set_attn_implementation("eager")
    assert model.config._attn_implementation == "eager"
    torch.testing.assert_close(their_logits(model, inputs), wanted, atol=1e-10, rtol=0)


def test_packed_texts_do_not_see_one_another(megatron):
    """A mask of four dimensions, as our instruction tuning has it; positions start anew."""
    model = small_model(position_embedding_type="rope")
    tokens = sample()["input_ids"][:1]
    segments = torch.tensor([[0] * 20 + [1] * 12])
    mask = (segments[:, :, None] == segments[:, None]).tril()[:, None]
    positions = torch.tensor([[*range(20), *range(12)]])
    inputs = {"input_ids": tokens, "attention_mask": mask, "position_ids": positions}
    found = their_logits(model, inputs)
    wanted = their_logits(model, {"input_ids": tokens[:, 20:]})
    torch.testing.assert_close(found[:, 20:], wanted, atol=1e-10, rtol=0)


def test_labels_are_shifted_and_masked(megatron):
    model, inputs = small_model(), sample()
    labels = inputs["input_ids"].clone()
    labels[:, :7] = -100
    output = model(**inputs, labels=labels)
    losses = torch.nn.functional.cross_entropy(
        output.logits[:, :-1].transpose(1, 2), labels[:, 1:], reduction="none"
    )
    wanted = losses[labels[:, 1:] >= 0].mean()
    torch.testing.assert_close(output.loss.double(), wanted, atol=1e-5, rtol=0)
    as_tuple = model(**inputs, labels=labels, return_dict=False, use_cache=False)
    assert torch.equal(as_tuple[0], output.loss)
    assert torch.equal(as_tuple[1], output.logits)


def test_rows_of_padding_have_no_probability_in_evaluation(megatron):
    model = small_model(tokenizer_vocab_size=90)
    inputs = sample()
    logits = model(**inputs).logits
    assert logits.softmax(-1)[..., 90:].sum() == 0
    assert model.train()(**inputs).logits[..., 90:].min() > -1e3
    model.eval().resize_token_embeddings(92)
    inputs = {name: tokens.clamp(max=89) for name, tokens in inputs.items()}
    assert model(**inputs).logits.softmax(-1)[..., 90:].sum() > 0


def test_logits_to_keep_and_hidden_states(megatron):
    model, inputs = small_model(), sample()
    whole = model(**inputs, output_hidden_states=True)
    assert len(whole.hidden_states) == 5
    last = model(**inputs, logits_to_keep=2).logits
    torch.testing.assert_close(last, whole.logits[:, -2:])
    embedded = model.get_input_embeddings()(inputs.pop("input_ids"))
    torch.testing.assert_close(model(inputs_embeds=embedded, **inputs).logits, whole.logits)


@pytest.mark.parametrize("reentrant", [pytest.param(True, marks=pytest.mark.slow), False])
def test_gradient_checkpointing_gives_the_same_gradients(megatron, reentrant):
    inputs, gradients = sample(), []
    for recomputes in (False, True):
        model = small_model(position_embedding_type="rope").train()
        if recomputes:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        if reentrant:
            model.enable_input_require_grads()
        model(**inputs, labels=inputs["input_ids"]).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    for name, wanted in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], wanted, atol=1e-12, rtol=0)


def test_load_balancing_losses_are_left_out_with_a_warning(megatron, monkeypatch):
    from retro_mcore.huggingface import modeling_retro

    said = []
    monkeypatch.setattr(modeling_retro.logger, "warning_once", said.append)
    experts = {"num_experts": 4, "disable_bias_linear": True}
    for kind, coefficient in (("aux_loss", 0.0), ("none", 0.1), ("aux_loss", 0.1)):
        balance = {"moe_router_load_balancing_type": kind, "moe_aux_loss_coeff": coefficient}
        model = small_model(**balance, **experts)
        model(**sample())
        assert said == []
        model.train()(**sample())
    assert len(said) == 1
    assert "moe_aux_loss_coeff 0.1" in said[0]


def test_every_dropout_is_applied(megatron):
    names = ["hidden_dropout", "attention_dropout"]
    names += [f"retro_encoder_{kind}_dropout" for kind in ("hidden", "attention")]
    names += ["retro_encoder_cross_attention_dropout"]
    inputs = sample()
    for name in names:
        model = small_model(**{name: 0.5})
        wanted = model(**inputs).logits
        assert torch.equal(model(**inputs).logits, wanted)
        model.train()
        assert not torch.equal(model(**inputs).logits, wanted), name


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"retrieved_input_ids": torch.zeros(2, 3, 2, 16)}, r"shape \[2, 3, 2, 16\], expected "),
        ({"retrieved_input_ids": torch.zeros(2, 4, 2, 15)}, r"expected \[2, 4, 2, 16\]"),
        ({"retrieved_input_ids": torch.zeros(2, 5, 2, 16)}, "that nothing attends to"),
        ({"attention_mask": torch.ones(2, 31)}, r"attention_mask has shape \[2, 31\]"),
        ({"attention_mask": torch.tensor([[1] * 9 + [0] + [1] * 22] * 2)}, "padding inside"),
        ({"retriever": lambda chunks: chunks, "retrieved_input_ids": None}, "retriever returned"),
        ({"output_attentions": True}, "output_attentions is not supported"),
        ({"inputs_embeds": torch.zeros(2, 32, 32)}, "either input_ids or inputs_embeds"),
    ],
)
def test_what_does_not_fit_is_refused(megatron, change, message):
    with pytest.raises(ValueError, match=message):
        small_model()(**{**sample(), **change})


def test_texts_beyond_the_model_are_refused(megatron):
    tokens = torch.zeros(1, 33, dtype=torch.long)
    model = small_model(max_position_embeddings=32)
    with pytest.raises(ValueError, match="33 tokens, and the model reads at most 32"):
        model(tokens)
    assert model(tokens[:, 1:]).logits.size(1) == 32
    with pytest.raises(ValueError, match=r"retro_origin is 'new', expected one of"):
        small_config(retro_origin="new")
    with pytest.raises(ValueError, match="no retrieval"):
        small_model(no_retrieval=True)(**sample())
    unknown = small_model(retro_origin="legacy", pad_token_id=None)
    with pytest.raises(ValueError, match=r"set config\.pad_token_id"):
        unknown(**sample())


@pytest.mark.slow
def test_initial_weights_are_those_of_our_model(megatron):
    """The same deviations, of DeepNorm and muP too."""
    from tests.unit.huggingface.models import pair

    for options in (
        {"hidden_size": 128},
        {"hidden_size": 128, "retro_deepnorm": True},
        {"hidden_size": 128, "retro_mup_base_hidden_size": 32},
        {"hidden_size": 128, "embedding_init_method_std": 0.5},
        {"hidden_size": 128, "init_method_xavier_uniform": True, "init_method_std": 0.02},
    ):
        _, trained = pair(**options)
        fresh = type(trained)(trained.config).double()
        for (name, ours), theirs in zip(
            trained.named_parameters(), fresh.parameters(), strict=True
        ):
            if ours.dim() == 2:
                ratio = theirs.std() / ours.std()
                assert 0.9 < ratio < 1.1, (options, name, ratio)
