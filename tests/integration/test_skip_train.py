"""`pretrain_retro --skip-train` tells the loss of a loaded model and changes nothing."""

from __future__ import annotations

from pathlib import Path

import pytest

from retro_mcore.cli.evaluate_perplexity import EvaluatePerplexityOptions, evaluate_perplexity
from retro_mcore.cli.pretrain_retro import PretrainRetroOptions, pretrain_retro
from retro_mcore.errors import CheckpointError, ConfigurationError
from tests.integration.small_checkpoint import small_checkpoint
from tests.unit.data.projects import built_project


def options(**changes):
    values = {
        "project_dir": str(built_project()),
        "load": small_checkpoint(),
        "skip_train": True,
        "num_layers": 2,
        "hidden_size": 32,
        "num_attention_heads": 2,
        "retro_decoder_layers": [2],
        "retro_encoder_num_layers": 1,
        "position_embedding_type": "rope",
        "init_method_std": 0.2,
        "micro_batch_size": 2,
        "lr": 1e-3,
        "num_workers": 0,
        "device": "cpu",
    }
    return PretrainRetroOptions(**{**values, **changes})


def test_the_losses_are_those_of_evaluate_perplexity(tmp_path):
    before = {path: path.stat().st_mtime_ns for path in Path(small_checkpoint()).rglob("*")}
    result = pretrain_retro(options())
    assert result.train_losses == []
    measured = evaluate_perplexity(
        EvaluatePerplexityOptions(
            project_dir=str(built_project()),
            load=small_checkpoint(),
            output=str(tmp_path / "perplexity.json"),
            split="both",
            retro_eval_neighbors=["real"],
            eval_iters=1,
            device="cpu",
        )
    )
    losses = [row.loss for row in measured.perplexities]
    assert [result.valid_losses[0][1], result.test_loss] == pytest.approx(losses, rel=1e-6)
    assert result.valid_losses[0][0] == result.iteration > 0
    assert before == {path: path.stat().st_mtime_ns for path in Path(small_checkpoint()).rglob("*")}


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"load": None}, ConfigurationError, "--skip-train: given without a model"),
        ({"save": "x"}, ConfigurationError, "--skip-train: given with --save"),
        ({"load": "nothing"}, CheckpointError, "--load nothing: holds no checkpoint"),
    ],
)
def test_without_a_model_there_is_nothing_to_evaluate(changes, error, message):
    with pytest.raises(error, match=message):
        pretrain_retro(options(**changes))
