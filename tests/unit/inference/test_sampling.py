"""Choosing the next token."""

import pytest
import torch

from retro_mcore.errors import CheckpointError, ConfigurationError
from retro_mcore.inference.sampling import (
    LogitAdjustments,
    SamplingOptions,
    next_token_probabilities,
    sample,
    token_logprobs,
)

PROBABILITIES = torch.tensor([[0.5, 0.3, 0.15, 0.05], [0.1, 0.2, 0.3, 0.4]], dtype=torch.float64)


def probabilities(**options: float) -> torch.Tensor:
    return next_token_probabilities(PROBABILITIES.log(), SamplingOptions(**options))


def test_without_filters_the_distribution_is_the_softmax():
    torch.testing.assert_close(probabilities(), PROBABILITIES)
    torch.testing.assert_close(probabilities(top_p=1.0, top_k=4), PROBABILITIES)


def test_temperature_sharpens_and_zero_is_greedy():
    squared = PROBABILITIES**2
    torch.testing.assert_close(
        probabilities(temperature=0.5), squared / squared.sum(-1, keepdim=True)
    )
    assert probabilities(temperature=0).tolist() == [[1, 0, 0, 0], [0, 0, 0, 1]]


def test_top_k_keeps_the_k_most_likely():
    expected = torch.tensor([[5 / 8, 3 / 8, 0, 0], [0, 0, 3 / 7, 4 / 7]], dtype=torch.float64)
    torch.testing.assert_close(probabilities(top_k=2), expected)


def test_top_k_keeps_exactly_k_of_equal_logits():
    kept = next_token_probabilities(torch.zeros(1, 6), SamplingOptions(top_k=2))
    assert (kept > 0).sum() == 2


def test_top_p_keeps_the_smallest_sufficient_set():
    expected = torch.tensor([[5 / 8, 3 / 8, 0, 0], [0, 2 / 9, 3 / 9, 4 / 9]], dtype=torch.float64)
    torch.testing.assert_close(probabilities(top_p=0.75), expected)
    assert probabilities(top_p=0.01).tolist() == [[1, 0, 0, 0], [0, 0, 0, 1]]


@pytest.mark.parametrize("setting", ["top_p", "temperature"])
@pytest.mark.parametrize("value", [0.0, 5e-324, 1e-320, 1e-300, 1e-9])
def test_towards_zero_only_the_most_likely_token_stays(setting: str, value: float):
    # OpenAI's clients send 0; Megatron's 0 was "all tokens".
    assert probabilities(**{setting: value}).tolist() == [[1, 0, 0, 0], [0, 0, 0, 1]]


def test_a_huge_temperature_makes_all_tokens_alike_but_those_that_are_excluded():
    logits = torch.tensor([[3.0, -torch.inf, -40.0]])
    found = next_token_probabilities(logits, SamplingOptions(temperature=1e308))
    torch.testing.assert_close(found, torch.tensor([[0.5, 0, 0.5]], dtype=torch.float64))


def test_adjustments_add_biases_and_take_penalties_by_count():
    logits = torch.zeros(5)
    adjustments = LogitAdjustments(0.5, 0.25, {1: 3.0, 4: -100.0})
    found = adjustments.apply(logits, [1, 1, 2])
    torch.testing.assert_close(
        found, torch.tensor([0, 3.0 - 1.25, -0.75, 0, -100], dtype=torch.float64)
    )
    assert torch.equal(logits, torch.zeros(5))
    assert LogitAdjustments().apply(logits, [1]) is logits


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_logits_that_are_no_numbers_are_refused(value: float):
    # A damaged checkpoint must not answer with whatever argmax makes of NaN.
    with pytest.raises(CheckpointError, match="not numbers"):
        token_logprobs(torch.tensor([[0.0, value]]), [0], 1)


def test_top_p_works_on_what_top_k_left():
    # After top-k 2 the first row is [5/8, 3/8]: 0.6 is reached by its first token alone.
    assert probabilities(top_k=2, top_p=0.6)[0].tolist() == [1, 0, 0, 0]


def test_masked_logits_are_never_drawn():
    logits = torch.tensor([[0.0, -torch.inf, 0.0]])
    options = SamplingOptions(seed=5)
    generators = options.generators(1)
    assert {sample(logits, options, generators)[0] for _ in range(50)} == {0, 2}


def test_frequencies_follow_the_distribution():
    options = SamplingOptions(seed=1)
    rows = PROBABILITIES[:1].log().expand(4000, -1)
    drawn = torch.tensor(sample(rows, options, options.generators(4000)))
    shares = torch.bincount(drawn, minlength=4) / 4000
    torch.testing.assert_close(shares.double(), PROBABILITIES[0], atol=0.03, rtol=0)


def test_a_prompt_draws_the_same_with_any_companions():
    logits = PROBABILITIES.log()
    together = SamplingOptions(seed=3).generators(2)
    alone = SamplingOptions(seed=4).generators(1)  # row 1 of the batch: seed 3 + 1
    for _ in range(20):
        pair = sample(logits, SamplingOptions(seed=3), together)
        assert sample(logits[1:], SamplingOptions(seed=4), alone) == pair[1:]


@pytest.mark.parametrize(
    ("flag", "value"),
    [("temperature", -1.0), ("temperature", float("nan")), ("top_k", -1), ("top_p", 1.5)],
)
def test_values_out_of_range_are_refused_by_name(flag: str, value: float):
    with pytest.raises(ConfigurationError, match=f"--{flag.replace('_', '-')}: {value}"):
        SamplingOptions(**{flag: value})
