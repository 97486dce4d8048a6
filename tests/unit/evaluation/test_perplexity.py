"""Shuffled neighbors, and the loss over a split."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from retro_mcore.errors import ConfigurationError, TokenizerError
from tests.unit.training.small import (
    NO_DROPOUT,
    VOCABULARY,
    RandomSamples,
    small_project,
    small_trainer,
)

pytestmark = pytest.mark.usefixtures("megatron")


@pytest.mark.parametrize(("num_samples", "chunks"), [(2, 1), (2, 4), (3, 5), (50, 8)])
def test_shuffling_gives_every_row_once_and_none_to_its_own_sample(num_samples, chunks):
    from retro_mcore.evaluation.perplexity import shuffled_rows

    donors = shuffled_rows(num_samples, chunks, seed=1)
    assert sorted(donors) == list(range(num_samples * chunks))
    assert not np.any(donors // chunks == np.arange(len(donors)) // chunks)
    assert np.array_equal(donors, shuffled_rows(num_samples, chunks, seed=1))


def test_shuffling_spreads_a_sample_over_many():
    from retro_mcore.evaluation.perplexity import shuffled_rows

    donors = shuffled_rows(50, 8, seed=1).reshape(50, 8) // 8
    assert np.mean([len(set(row)) for row in donors]) > 6


def test_one_sample_cannot_be_shuffled():
    from retro_mcore.evaluation.perplexity import shuffled_rows

    with pytest.raises(ConfigurationError, match="1 sample"):
        shuffled_rows(1, 4, seed=1)


@pytest.mark.parametrize("neighbors", ["real", "none"])
def test_the_loss_is_the_mean_over_all_tokens_whatever_the_batches(neighbors):
    from retro_mcore.evaluation.perplexity import measure_perplexity
    from retro_mcore.training.batch import collate

    model = small_trainer(**NO_DROPOUT)._parts.chunks[0].module
    samples = RandomSamples(5)
    measured = [
        measure_perplexity(model, samples, "valid", neighbors, num_samples=5, micro_batch_size=size)
        for size in (1, 2, 5)
    ]
    batch = collate([{**samples[index], "sample_id": index} for index in range(5)])
    inputs = batch.model_inputs()
    if neighbors == "none":
        inputs = {name: value for name, value in inputs.items() if "context" not in name}
    model.eval()
    with torch.no_grad():
        expected = model(**inputs, labels=batch.labels).mean().item()
    for result in measured:
        assert result.loss == pytest.approx(expected, rel=1e-6)
        assert result.perplexity == pytest.approx(np.exp(expected), rel=1e-6)
        assert result.num_tokens == batch.labels.numel()


def test_another_tokenizer_is_refused(tmp_path):
    from retro_mcore.evaluation.perplexity import check_tokenizer
    from retro_mcore.training.plan import make_plan
    from tests.unit.training.small import small_options

    (tmp_path / "a.model").write_bytes(b"one")
    project = small_project(retro_gpt_tokenizer_model="a.model")
    options = small_options(project_dir=str(tmp_path))
    arguments = make_plan(options, project, VOCABULARY).arguments
    check_tokenizer(arguments, project, str(tmp_path))
    (tmp_path / "a.model").write_bytes(b"two")
    with pytest.raises(TokenizerError, match="was trained with GPTSentencePieceTokenizer"):
        check_tokenizer(arguments, project, str(tmp_path))
