"""Every entry point that loads a trained model checks it against its project in the same way."""

from __future__ import annotations

import json
import shutil

import pytest

from retro_mcore.errors import ConfigurationError, TokenizerError
from tests.integration.small_checkpoint import small_checkpoint
from tests.unit.data.projects import built_project


def generates(project, output, neighbors="none", gate=None):
    from retro_mcore.cli.generate import GenerateOptions, generate

    given = {"project_dir": str(project), "load": small_checkpoint(), "device": "cpu"}
    options = {"retro_neighbors": neighbors, "retro_attention_gate": gate, "max_new_tokens": 1}
    generate(GenerateOptions(**given, **options, prompt="word"))


def serves(project, output, neighbors="none", gate=None):
    pytest.importorskip("fastapi", reason="fastapi, an optional package, is not installed")
    from retro_mcore.cli.serve import ServeOptions, serve

    given = {"project_dir": str(project), "load": small_checkpoint(), "device": "cpu"}
    serve(ServeOptions(**given, retro_neighbors=neighbors, retro_attention_gate=gate))


def measures(project, output, neighbors="none", gate=None):
    from retro_mcore.cli.evaluate_perplexity import EvaluatePerplexityOptions, evaluate_perplexity

    given = {"project_dir": str(project), "load": small_checkpoint(), "device": "cpu"}
    asked = ["real" if neighbors == "live" else neighbors]
    options = {"retro_eval_neighbors": asked, "retro_attention_gate": gate, "eval_iters": 1}
    output = str(output / "perplexity.json")
    evaluate_perplexity(EvaluatePerplexityOptions(**given, **options, output=output))


def answers(project, output, neighbors="none", gate=None):
    from retro_mcore.cli.evaluate_qa import EvaluateQaOptions, evaluate_qa

    (output / "test.json").write_text(json.dumps([{"question": "Who?", "answers": ["Me"]}]))
    given = {"project_dir": str(project), "load": small_checkpoint(), "device": "cpu"}
    given |= {"sample_input_file": str(output / "test.json"), "output": str(output / "answers")}
    options = {"retro_neighbors": neighbors, "retro_attention_gate": gate, "ft_neighbours": 0}
    evaluate_qa(EvaluateQaOptions(**given, **options, max_new_tokens=1))


def is_measured_by_the_harness(project, output, neighbors="none", gate=None):
    pytest.importorskip("lm_eval", reason="lm_eval, an optional package, is not installed")
    from retro_mcore.evaluation.lm_eval import RetroLM

    options = {"retro_neighbors": neighbors, "retro_attention_gate": gate, "device": "cpu"}
    RetroLM(str(project), small_checkpoint(), **options)


def is_loaded(project, output, neighbors="none", gate=None):
    from retro_mcore.session import load_model

    load_model(
        project, small_checkpoint(), retrieval=neighbors == "live", retro_attention_gate=gate
    )


ENTRY_POINTS = [generates, serves, measures, answers, is_measured_by_the_harness, is_loaded]


@pytest.fixture
def project(tmp_path):
    """A project of its own, to be changed."""
    return shutil.copytree(built_project(), tmp_path / "project")


def change(path, **values):
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def another_tokenizer(project):
    (model,) = (project / "tokenizer").glob("*.model")
    model.write_bytes(model.read_bytes() + b" ")


def another_eod(project):
    change(project / "retro_mcore.json", eod_id=300)


def another_chunk_length(project):
    change(project / "config.json", retro_gpt_chunk_length=8)


def no_tokenizer(project):
    (model,) = (project / "tokenizer").glob("*.model")
    model.unlink()


FAULTS = [
    (no_tokenizer, TokenizerError, "sentencepiece.model: no such file, but config.json names it"),
    (another_tokenizer, TokenizerError, "the checkpoint was trained with GPTSentencePiece"),
    (another_eod, TokenizerError, "documents end with token 300"),
    (another_chunk_length, ConfigurationError, "retro_gpt_chunk_length: 8 in .* with 16"),
]


@pytest.mark.parametrize("use", ENTRY_POINTS)
@pytest.mark.parametrize(("spoil", "error", "message"), FAULTS)
def test_a_project_that_does_not_fit_is_refused(use, spoil, error, message, project, tmp_path):
    spoil(project)
    with pytest.raises(error, match=message):
        use(project, tmp_path)


@pytest.mark.parametrize("use", ENTRY_POINTS)
def test_the_gate_is_checked_and_then_in_force(use, tmp_path):
    with pytest.raises(ConfigurationError, match=r"retro.attention.gate: -1"):
        use(built_project(), tmp_path, gate=-1.0)
    with pytest.raises(ConfigurationError, match="so neighbors would change nothing"):
        use(built_project(), tmp_path, "live", gate=0.0)


@pytest.mark.usefixtures("megatron")
def test_the_gate_is_the_one_that_the_model_is_built_with():
    from retro_mcore.session import load_model

    for gate, expected in ((None, 1.0), (0.5, 0.5)):
        loaded = load_model(built_project(), small_checkpoint(), retro_attention_gate=gate)
        assert loaded.arguments.retro_attention_gate == expected
        assert loaded.model.config.retro_attention_gate == expected
