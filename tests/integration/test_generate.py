"""The command `generate` on a small trained model and its project."""

from __future__ import annotations

import json

import pytest

from retro_mcore.cli.generate import GenerateOptions, generate, main
from retro_mcore.errors import ConfigurationError
from retro_mcore.inference.prompt_files import Prompt, read_prompt_file
from tests.integration.small_checkpoint import small_checkpoint
from tests.unit.cli.test_inspect_neighbors import Reader
from tests.unit.data.projects import built_project, documents

PROMPT = documents()[0][:120]


@pytest.fixture(scope="module")
def checkpoints():
    return small_checkpoint()


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


def test_given_neighbors_are_shown_with_the_share_of_copied_tokens(options, capsys):
    (result,) = generate(options(neighbors=["Other words.", "and"], show_neighbors=True))
    output = capsys.readouterr().out
    length, prompt = len(result.generated.tokens), result.generated.prompt_length
    assert output.count("are in a run copied from") == -(-length // 16) - prompt // 16
    assert output.count("neighbor 2: given") == len(result.generated.neighbors)
    assert "\x1b" not in output  # not a terminal


def test_the_page_holds_every_text_beside_its_neighbors(options, tmp_path, capsys):
    rows = [{"prompt": PROMPT}, {"prompt": "<b>&", "neighbors": ["<script>", "</mark>"]}]
    prompts, page = tmp_path / "prompts.jsonl", tmp_path / "a page.html"
    prompts.write_text("\n".join(map(json.dumps, rows)))
    results = generate(options(prompt_file=str(prompts), html=str(page), max_new_tokens=20))
    assert capsys.readouterr().out.endswith(f"page: {page.as_uri()}\n")
    read = Reader(page.read_text(encoding="utf-8"))
    assert read.found["h2"] == ["Text 1", "Text 2"]
    assert not {"script", "b"} & set(read.found)
    live, _ = results
    count = 2 * sum(len(result.generated.neighbors) for result in results)
    assert len(read.found[".neighbor"]) == count
    assert sum("distance " in about for about in read.found[".about"]) == 2 * len(
        live.generated.neighbors
    )
    texts = [result.generated for result in results]
    chunks = [max(-(-len(text.tokens) // 16), len(text.neighbors) + 1) for text in texts]
    assert len(read.found["section"]) == sum(chunks)
    first = "".join(read.found[".text"][0])
    assert live.prompt.startswith(first)
    assert not any("//" in value for value in read.attributes)


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


def test_given_neighbors_take_the_place_of_retrieved_ones(options, tmp_path, capsys):
    given = ["Some words to read.", "Other words."]
    (live,) = generate(options(temperature=0.0, max_new_tokens=16))
    (own,) = generate(options(temperature=0.0, max_new_tokens=16, neighbors=given))
    assert own.text != live.text
    (first, *_) = own.generated.neighbors
    assert len(own.generated.neighbors) == len(live.generated.neighbors)
    assert first.ids is None
    path = tmp_path / "prompts.jsonl"
    lines = [{"prompt": PROMPT, "neighbors": given}, {"prompt": PROMPT}]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    both = generate(options(prompt_file=str(path), temperature=0.0, max_new_tokens=16))
    assert [result.text for result in both] == [own.text, live.text]


def test_a_stop_string_is_never_shown(options, capsys):
    (free,) = generate(options(temperature=0.0, max_new_tokens=16))
    stop = free.text[6:9]
    capsys.readouterr()
    (result,) = generate(options(temperature=0.0, max_new_tokens=16, stop=[stop]))
    assert result.text == free.text[: free.text.index(stop)]
    assert capsys.readouterr().out == f"{PROMPT}{result.text}\n\n"


def test_results_are_written_with_neighbors_and_log_probabilities(options, tmp_path, capsys):
    path = tmp_path / "out" / "texts.jsonl"
    (result,) = generate(options(output=str(path), logprobs=1, temperature=0.0))
    (record,) = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert (record["prompt"], record["text"]) == (PROMPT, result.text)
    assert record["finish_reason"] == "length"
    assert [entry["token"] for entry in record["logprobs"]] == result.generated.new_tokens
    assert all(entry["top"][0][0] == entry["token"] for entry in record["logprobs"])  # greedy
    assert len(record["neighbors"][0]) == 2
    assert {"text", "distance", "document"} <= set(record["neighbors"][0][0])
    assert f"{result.generated.logprobs[0].logprob:.4f}" in capsys.readouterr().out


def test_two_chunks_search_with_the_prompt_once(options):
    (result,) = generate(options(two_chunks=True, max_new_tokens=20, retrieval_lead=5))
    assert len(result.generated.neighbors) == 1


def test_bos_comes_first(options):
    (plain,) = generate(options(max_new_tokens=1))
    (with_bos,) = generate(options(max_new_tokens=1, add_bos=True))
    prompt = plain.generated.tokens[: plain.generated.prompt_length]
    assert with_bos.generated.tokens[1 : with_bos.generated.prompt_length] == prompt


def test_searching_ahead_finds_neighbors_for_every_chunk(options):
    (result,) = generate(options(max_new_tokens=20, retrieval_lead=4, retrieval_interval=2))
    chunks = result.generated.neighbors
    assert len(chunks) == (len(result.generated.tokens) - 1) // 16
    assert (chunks[1].ids == chunks[0].ids).all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt": None}, "--prompt and --prompt-file: neither given"),
        ({"prompt": PROMPT, "prompt_file": "x"}, "--prompt and --prompt-file: both given"),
        ({"prompt": ""}, "--prompt: empty"),
        ({"top_p": 2.0}, "--top-p: 2.0"),
        ({"neighbors": ["a", "b", "c"]}, "neighbors: 3 texts, but the model reads 2"),
        ({"prompt": None, "prompt_file": "x", "neighbors": ["a"]}, "--neighbors: given with"),
        ({"retrieval_interval": 0}, "--retrieval-interval: 0"),
        ({"context_parallel_size": 2}, "--context-parallel-size: 2, but generation reads whole"),
        ({"retrieval_lead": 16}, "--retrieval-lead: 16 of the 16 tokens"),
        (
            {"retrieval_lead": 2, "retrieval_interval": 2, "retro_neighbors": "none"},
            "(?s)--retrieval-interval: 2 with --retro-neighbors none.*--retrieval-lead: 2 with",
        ),
        ({"retrieval_lead": 2, "neighbors": ["a"]}, "--retrieval-lead: 2 with --neighbors"),
        ({"micro_batch_size": 0}, "--micro-batch-size: 0"),
        ({"html": "x", "output": "x"}, "--html x: the file of --output"),
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
    assert read_prompt_file(path) == [Prompt("Two\n\nparagraphs.")]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.txt", "\n", "no prompt"),
        ("a.jsonl", '{"prompt": "x"}\n{"prompt": \n', r"a\.jsonl:2: invalid JSON"),
        ("a.jsonl", '{"text": "x"}\n', r"a\.jsonl:1: no text under the key 'prompt'"),
        ("a.jsonl", "\n", "no prompt"),
        ("a.jsonl", '{"prompt": "x", "neighbors": "y"}', "'neighbors' is not a list"),
    ],
)
def test_a_malformed_prompt_file_is_refused(tmp_path, name, text, message):
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigurationError, match=message):
        read_prompt_file(path)


def test_lines_of_a_prompt_file_end_with_a_line_feed_alone(tmp_path):
    # Texts from the web hold the other separators that Python takes for ends of lines.
    texts = ["a\u2028b", "c\x85d", "e\x0cf\x1cg", "h\ri", "\U0001f600"]
    lines = [json.dumps({"prompt": text}, ensure_ascii=False) for text in texts]
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + "\r\n".join(lines).encode())
    assert [prompt.text for prompt in read_prompt_file(path)] == texts


@pytest.mark.parametrize(
    "line",
    [
        '{"prompt": "a\\ud83d"}',
        '{"prompt": "a", "neighbors": ["\\udc00"]}',
        "[" * 100_000,
        '{"prompt": "a", "n": ' + "9" * 5000 + "}",
        '{"prompt": NaN}',
        "[1]",
        '{"prompt": null}',
    ],
)
def test_a_line_that_holds_no_prompt_is_named(tmp_path, line):
    path = tmp_path / "a.jsonl"
    path.write_text('{"prompt": "x"}\n' + line + "\n", encoding="utf-8")
    with pytest.raises(ConfigurationError, match=r"a\.jsonl:2: "):
        read_prompt_file(path)


def test_all_prompts_that_cannot_be_continued_are_told_before_any_is(options, tmp_path, capsys):
    path = tmp_path / "a.jsonl"
    rows = [
        {"prompt": "fine"},
        {"prompt": "long " * 400},
        {"prompt": "fine", "neighbors": ["1", "2", "3"]},
    ]
    path.write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(ConfigurationError) as caught:
        generate(options(prompt_file=str(path), micro_batch_size=1))
    first, second = str(caught.value).split("\n")
    assert "a.jsonl:2: " in first
    assert "model's window of 64" in first
    assert "a.jsonl:3: neighbors: 3 texts" in second
    assert "fine" not in capsys.readouterr().out


def test_given_neighbors_that_the_model_does_not_read_whole_are_told(options, tmp_path, capsys):
    output = tmp_path / "texts.jsonl"
    given = {"neighbors": ["word " * 100, "short"], "output": str(output)}
    generate(options(**given, max_new_tokens=1))
    assert "1 of 2 given neighbors are cut to the 32 tokens" in capsys.readouterr().err
    assert json.loads(output.read_text())["neighbors_cut"] == 1
    generate(options(output=str(output), max_new_tokens=1))
    assert "neighbors_cut" not in json.loads(output.read_text())
