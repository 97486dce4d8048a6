"""The harness' requests as tasks really put them: too long, empty, contradictory.

One such request among thousands must neither end the run nor be scored as another one. Windows and
counts are those of the harness' own Hugging Face model.
"""

from __future__ import annotations

import logging
from types import SimpleNamespace

import pytest

from retro_mcore.errors import ConfigurationError
from tests.unit.evaluation.loaded import BOS, EOD, loaded_model
from tests.unit.inference.small import small_model

pytest.importorskip("lm_eval", reason="lm_eval, an optional package, is not installed")
pytestmark = pytest.mark.usefixtures("megatron")

WINDOW = 64
#: Sums in another order.
CLOSE = {"rel": 1e-5}


@pytest.fixture
def harness_model(monkeypatch, caplog):
    from retro_mcore import session
    from retro_mcore.evaluation.lm_eval import RetroLM

    caplog.set_level(logging.WARNING)
    weights = small_model()

    def make(retro_neighbors="none", **arguments):
        loaded = loaded_model(retro_neighbors == "live", weights)
        monkeypatch.setattr(session, "load_model", lambda *args, **kwargs: loaded)
        return RetroLM(
            "project", "model", retro_neighbors=retro_neighbors, device="cpu", **arguments
        )

    return make


def requests(*args):
    return [SimpleNamespace(args=values) for values in args]


def text(length, start=0):
    return "".join(chr(97 + (start + i * i) % 23) for i in range(length))


def scored(model, context, continuation):
    """One pair of tokens, alone."""
    return model._scorer.score([(context, continuation)], "")[0][0]


def test_a_context_that_is_too_long_loses_its_beginning_and_that_is_said(harness_model, caplog):
    model = harness_model()
    context, continuation = text(100), text(9, 5)
    tokens = model.tok_encode(context + continuation)
    asked = requests((context, continuation), (text(20), continuation), (text(80), text(3)))
    found = model.loglikelihood(asked)
    cut = tokens[-(WINDOW + 1) :]
    assert found[0][0] == pytest.approx(scored(model, cut[:-9], cut[-9:]), **CLOSE)
    assert "2 of 3 requests: more than the window of 64" in caplog.text
    assert caplog.text.count("more than the window") == 1


def test_every_token_of_a_continuation_longer_than_the_window_is_scored(harness_model, caplog):
    model = harness_model()
    context, continuation = text(30), text(150, 3)
    ((likelihood, _),) = model.loglikelihood(requests((context, continuation)))
    tokens, before = model.tok_encode(context + continuation), 30
    pieces = [(tokens[:start], tokens[start : start + 32]) for start in range(before, 180, 32)]
    assert sum(len(piece) for _, piece in pieces) == 150
    expected = sum(scored(model, *piece) for piece in pieces)
    assert likelihood == pytest.approx(expected, **CLOSE)
    assert "1 of 1 requests: a continuation longer than the window" in caplog.text


@pytest.mark.parametrize("add_bos_token", [None, True, False])
@pytest.mark.parametrize("context", ["", "  ", "é", "abc"])
def test_a_text_without_context_is_scored_from_its_first_token_on(
    harness_model, context, add_bos_token
):
    model = harness_model(add_bos_token=add_bos_token)
    bos = add_bos_token is True
    ((likelihood, _),) = model.loglikelihood(requests((context, "hello")))
    ids = model.tok_encode(context, add_special_tokens=False)
    if context.strip():
        before = [*([BOS] if bos else []), *ids] or [EOD]
        expected = scored(model, before, model.tok_encode("hello", add_special_tokens=False))
    else:  # spaces go with the continuation, as in the harness
        whole = model.tok_encode(context + "hello", add_special_tokens=False)
        expected = scored(model, [BOS if bos else EOD], whole)
    assert likelihood == pytest.approx(expected, **CLOSE)
    (rolling,) = model.loglikelihood_rolling(requests(("hello",)))
    whole = model.tok_encode("hello", add_special_tokens=False)
    assert rolling == pytest.approx(scored(model, [BOS if bos else EOD], whole), **CLOSE)


def test_an_empty_continuation_and_an_empty_text_end_no_run(harness_model, caplog):
    model = harness_model()
    found = model.loglikelihood(requests(("abc", ""), ("", ""), ("abc", "d")))
    assert found[:2] == [(0.0, True)] * 2
    assert found[2][0] < 0
    assert "2 of 3 requests: no continuation" in caplog.text
    assert model.loglikelihood_rolling(requests(("",))) == [0.0]


@pytest.mark.parametrize(
    "settings",
    [
        {"until": [""]},
        {"until": ""},
        {"until": None},
        {"until": ["", None]},
        {"max_gen_toks": 6, "until": []},
        {"temperature": None},
        {"temperature": None, "do_sample": None},
        {"temperature": 0.7, "do_sample": False},
        {"temperature": 0, "do_sample": True},
        {"temperature": "0.0"},
        {"do_sample": True, "top_p": 0},
        {"do_sample": True, "top_k": 1, "temperature": 2.0},
        {"num_beams": 1, "repetition_penalty": 1.0, "min_p": None},
        {"max_new_tokens": "6", "max_gen_toks": None},
    ],
    ids=str,
)
def test_settings_that_ask_for_greedy_answers_give_them(harness_model, settings):
    model = harness_model()
    (plain,) = model.generate_until(requests((text(9), {"max_gen_toks": 6})))
    (found,) = model.generate_until(requests((text(9), {"max_gen_toks": 6, **settings})))
    assert found == plain


def test_contradictions_and_cuts_are_said_once_with_their_number(harness_model, caplog):
    model = harness_model()
    settings = {"max_gen_toks": 2, "do_sample": False, "temperature": 0.5}
    model.generate_until(
        requests(
            (text(9), settings), (text(8), settings), (text(70), {}), ("", {"max_gen_toks": 2})
        )
    )
    assert "2 of 4 requests: do_sample: false, but a temperature" in caplog.text
    assert "1 of 4 requests: context and answer are more than the window" in caplog.text
    assert "1 of 4 requests: more than half of the window asked for" in caplog.text


def test_texts_longer_than_the_training_samples_are_counted(harness_model, caplog):
    model = harness_model()
    model._loaded.arguments.seq_length = 32
    model.loglikelihood(requests((text(30), text(3)), (text(29), text(4)), (text(40), text(20))))
    assert "1 of 3 requests: longer than the 32 tokens of the training samples" in caplog.text
    caplog.clear()
    model.generate_until(requests((text(28), {"max_gen_toks": 4}), (text(28), {"max_gen_toks": 5})))
    assert "1 of 2 requests: longer than the 32 tokens of the training samples" in caplog.text


def test_no_tokens_asked_for_is_an_empty_answer(harness_model):
    model = harness_model()
    answers = model.generate_until(
        requests((text(9), {"max_gen_toks": 0}), (text(9), {"max_gen_toks": 3}))
    )
    assert answers[0] == ""
    assert len(answers[1]) == 3


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"max_gen_toks": -1}, "max_gen_toks"),
        ({"max_gen_toks": 1.5}, "max_gen_toks"),
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"top_p": 1.5, "do_sample": True}, "top_p"),
        ({"do_sample": "perhaps"}, "do_sample"),
        ({"until": 5}, "until"),
        ({"until": ["x", 5]}, "until"),
        ({"num_beams": 4}, "num_beams"),
        ({"repetition_penalty": 1.3}, "repetition_penalty"),
        ({"something": 1}, "something"),
    ],
    ids=str,
)
def test_what_cannot_be_done_is_refused_by_name_before_anything_is_answered(
    harness_model, monkeypatch, settings, name
):
    model = harness_model()
    monkeypatch.setattr(model, "_generate", None)
    with pytest.raises(ConfigurationError, match=name):
        model.generate_until(requests((text(9), {}), (text(9), settings)))


def test_arguments_that_the_model_does_not_know_are_refused_by_name(harness_model):
    with pytest.raises(ConfigurationError, match="dtype"):
        harness_model(dtype="bfloat16")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("add_bos_token", "no"),
        ("max_gen_toks", "all"),
        ("max_gen_toks", -1),
        ("max_length", 0.5),
        ("seed", "x"),
        ("retro_attention_gate", "open"),
        ("batch_size", "auto"),
    ],
)
def test_arguments_of_another_type_are_refused_by_name(harness_model, name, value):
    """The harness passes on as text what it cannot read; "no" counted as true."""
    with pytest.raises(ConfigurationError, match=name):
        harness_model(**{name: value})


@pytest.mark.parametrize("retro_neighbors", ["none", "live"])
def test_answers_and_likelihoods_do_not_depend_on_the_batch(harness_model, retro_neighbors):
    asked = requests(
        *((text(5 + 7 * i, i), {"max_gen_toks": 5, "do_sample": True}) for i in range(5)),
        *((text(9), {"max_gen_toks": 5, "do_sample": True}) for _ in range(2)),
        (text(9), {"max_gen_toks": 5}),
    )
    pairs = requests(*((text(4 + 30 * i, i), text(2 + 20 * i, 9)) for i in range(4)))
    answers, likelihoods = [], []
    for batch_size in (1, 3, 8):
        model = harness_model(retro_neighbors, batch_size=batch_size)
        answers.append(model.generate_until(asked))
        likelihoods.append([value for value, _ in model.loglikelihood(pairs)])
    assert answers[0] == answers[1] == answers[2]
    assert answers[0][5] != answers[0][6]  # the same request again is another draw
    assert likelihoods[1] == pytest.approx(likelihoods[0], **CLOSE)
    assert likelihoods[2] == pytest.approx(likelihoods[0], **CLOSE)
