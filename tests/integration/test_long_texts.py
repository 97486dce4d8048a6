"""Texts longer than a model's training samples, in the commands that generate."""

from __future__ import annotations

import pytest

from retro_mcore.cli.evaluate_qa import EvaluateQaOptions, evaluate_qa
from retro_mcore.cli.generate import GenerateOptions, generate
from retro_mcore.cli.serve import ServeOptions, serve
from tests.integration.small_checkpoint import small_checkpoint
from tests.unit.data.projects import built_project, documents
from tests.unit.evaluation.questions import write_test_file


@pytest.fixture(scope="module")
def model():
    """Trained on samples of 64 tokens; it has 128 positions."""
    load = small_checkpoint(max_position_embeddings=128)
    return {"project_dir": str(built_project()), "load": load, "device": "cpu"}


WARNING = "warning: prompts and answers have up to {} tokens, but the model was trained on 64"


def test_generate_warns_once_with_both_numbers(model, capsys):
    options = {**model, "retro_neighbors": "none", "prompt": documents()[0][:40]}
    (short,) = generate(GenerateOptions(**options, max_new_tokens=8))
    length = short.generated.prompt_length
    generate(GenerateOptions(**options, max_new_tokens=64 - length))
    assert "warning" not in capsys.readouterr().err
    generate(GenerateOptions(**options, max_new_tokens=65 - length))
    assert capsys.readouterr().err.count(WARNING.format(65)) == 1


def test_evaluate_qa_warns_once_with_both_numbers(model, tmp_path, capsys):
    common = {**model, "sample_input_file": str(write_test_file(tmp_path)), "num_gen": 3}
    common |= {"prompt_format": "reformat_prompt_short", "ft_neighbours": 1, "micro_batch_size": 1}
    evaluate_qa(EvaluateQaOptions(**common, output=str(tmp_path / "a"), max_new_tokens=60))
    error = capsys.readouterr().err
    assert error.count(WARNING.format(128)) == 1


def test_serve_warns_of_what_clients_may_ask_for(model, monkeypatch, capsys):
    pytest.importorskip("uvicorn", reason="uvicorn, an optional package, is not installed")
    monkeypatch.setattr("retro_mcore.server.serving._listen", lambda *_: None)
    serve(ServeOptions(**model, max_length=64))
    assert "warning" not in capsys.readouterr().err
    serve(ServeOptions(**model))
    assert capsys.readouterr().err.count(WARNING.format(128)) == 1
