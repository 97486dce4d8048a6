"""The loss over a split."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from retro_mcore.errors import TokenizerError
from tests.unit.training.small import (
    NO_DROPOUT,
    VOCABULARY,
    RandomSamples,
    small_project,
    small_trainer,
)

pytestmark = pytest.mark.usefixtures("megatron")


@pytest.mark.parametrize("neighbors", ["real", "none"])
def test_the_loss_is_the_mean_over_all_tokens_whatever_the_batches(neighbors):
    from retro_mcore.evaluation.perplexity import measure_perplexity
    from retro_mcore.samples.batch import collate

    model = small_trainer(**NO_DROPOUT)._parts.stages[0].module
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
    from retro_mcore.training.setup.fits_project import check_tokenizer
    from retro_mcore.training.setup.plan import make_plan
    from tests.unit.training.small import small_options

    (tmp_path / "a.model").write_bytes(b"one")
    project = small_project(retro_gpt_tokenizer_model="a.model")
    options = small_options(project_dir=str(tmp_path))
    arguments = make_plan(options, project, VOCABULARY).arguments
    check_tokenizer(arguments, project, str(tmp_path))
    (tmp_path / "a.model").write_bytes(b"two")
    with pytest.raises(TokenizerError, match="was trained with GPTSentencePieceTokenizer"):
        check_tokenizer(arguments, project, str(tmp_path))
