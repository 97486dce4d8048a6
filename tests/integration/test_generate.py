"""The command `generate` on a small trained model and its project."""

from __future__ import annotations

import json

import pytest

from retro_mcore.cli.generate import GenerateOptions, generate, main, read_prompt_file
from retro_mcore.errors import ConfigurationError
from tests.unit.data.projects import built_project, documents

PROMPT = documents()[0][:120]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    from retro_mcore.cli.pretrain_retro import PretrainRetroOptions, pretrain_retro

    folder = str(tmp_path_factory.mktemp("checkpoints"))
    pretrain_retro(
        PretrainRetroOptions(
            project_dir=str(built_project()),
            save=folder,
            num_layers=2,
            hidden_size=32,
            num_attention_heads=2,
            retro_decoder_layers=[2],
            retro_encoder_num_layers=1,
            position_embedding_type="rope",
            init_method_std=0.2,
            micro_batch_size=2,
            lr=1e-3,
            num_workers=0,
            device="cpu",
        )
    )
    return folder


@pytest.fixture
def options(checkpoints):
    def make(**changes):
        values = {
            "project_dir": str(built_project()),
            "load": checkpoints,
            "prompt": PROMPT if "prompt_file" not in changes else None,
            "max_new_tokens": 8,
            "device": "cpu",
        }
        return GenerateOptions(**{**values, **changes})

    return make


def test_the_text_streams_whole_and_its_neighbors_follow(options, capsys):
    (result,) = generate(options(show_neighbors=True, seed=3))
    output = capsys.readouterr().out
    assert output.startswith(f"{PROMPT}{result.text}\n")
    # A chunk that the last token completes is used by no further token.
    assert len(result.generated.neighbors) == (len(result.generated.tokens) - 1) // 16
    assert output.count("distance ") == 2 * len(result.generated.neighbors)
    assert "of corpus_text_document" in output


def test_live_neighbors_change_the_text_and_none_shows_none(options, capsys):
    (live,) = generate(options(temperature=0.0, max_new_tokens=16))
    (off,) = generate(options(temperature=0.0, max_new_tokens=16, retro_neighbors="none"))
    assert live.generated.neighbors
    assert not off.generated.neighbors
    assert live.text != off.text
    assert "distance" not in capsys.readouterr().out


def test_prompts_of_a_file_are_continued_as_if_alone_in_any_batches(options, tmp_path, capsys):
    prompts = [PROMPT, PROMPT[:30], "Some other text"]
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))
    together = generate(options(prompt_file=str(path), temperature=0.7))
    output = capsys.readouterr().out
    by_two = generate(options(prompt_file=str(path), temperature=0.7, micro_batch_size=2))
    assert [result.prompt for result in together] == prompts
    assert [result.text for result in together] == [result.text for result in by_two]
    (alone,) = generate(options(prompt=prompts[1], temperature=0.7, seed=1234 + 1))
    assert together[1].text == alone.text
    assert all(f"{result.prompt}{result.text}\n" in output for result in together)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt": None}, "--prompt and --prompt-file: neither given"),
        ({"prompt": PROMPT, "prompt_file": "x"}, "--prompt and --prompt-file: both given"),
        ({"prompt": ""}, "--prompt: empty"),
        ({"top_p": 2.0}, "--top-p: 2.0"),
        ({"micro_batch_size": 0}, "--micro-batch-size: 0"),
        ({"max_new_tokens": 1000}, "--max-new-tokens: 1000 after the .* window of 64"),
    ],
)
def test_impossible_options_are_refused_by_name(options, changes, message):
    with pytest.raises(ConfigurationError, match=message):
        generate(options(**changes))


def test_a_mistake_is_one_line_and_exit_code_2(checkpoints, tmp_path, capsys):
    flags = ["--project-dir", str(tmp_path), "--load", checkpoints, "--prompt", "x"]
    assert main([*flags, "--device", "cpu"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert "not a project directory" in error
    assert error.count("\n") == 1


def test_a_text_file_is_one_prompt(tmp_path):
    path = tmp_path / "prompt.txt"
    path.write_text("Two\n\nparagraphs.\n", encoding="utf-8")
    assert read_prompt_file(path) == ["Two\n\nparagraphs."]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.txt", "\n", "no prompt"),
        ("a.jsonl", '{"prompt": "x"}\n{"prompt": \n', r"a\.jsonl:2: invalid JSON"),
        ("a.jsonl", '{"text": "x"}\n', r"a\.jsonl:1: no text under the key 'prompt'"),
        ("a.jsonl", "\n", "no prompt"),
    ],
)
def test_a_malformed_prompt_file_is_refused(tmp_path, name, text, message):
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigurationError, match=message):
        read_prompt_file(path)
