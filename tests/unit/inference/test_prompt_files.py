"""Prompt files of `generate`, as other programs write them."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from retro_mcore.errors import ConfigurationError
from retro_mcore.inference.prompt_files import Prompt, read_prompt_file
from retro_mcore.json_text import json_line
from tests.unit.data import any_json


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\u0085", "\u000c", "\u001e", "\r"])
def test_only_a_line_feed_ends_a_line(tmp_path, separator):
    """A prompt with U+2028, from a web page, was "invalid JSON"."""
    path = tmp_path / "prompts.jsonl"
    prompts = [f"a{separator}b", "c"]
    lines = [json.dumps({"prompt": prompt}, ensure_ascii=False) for prompt in prompts]
    path.write_bytes("\ufeff".encode() + "\r\n".join(lines).encode())
    assert [prompt.text for prompt in read_prompt_file(path)] == prompts


def test_a_text_file_of_another_system(tmp_path):
    path = tmp_path / "prompt.txt"
    path.write_bytes(b"\xef\xbb\xbfTwo\r\n\r\nparagraphs.\r\n")
    assert read_prompt_file(path) == [Prompt("Two\n\nparagraphs.")]


@pytest.mark.parametrize(
    ("line", "found"),
    [
        (b'{"prompt": "a\\ud83d"}', "half of a surrogate pair"),
        (b'{"prompt": "a", "neighbors": ["\\ud83d"]}', "half of a surrogate pair"),
        (b"[" * 100_000, "invalid JSON .nested too deeply"),
        (b'{"prompt": "a", "n": ' + b"7" * 5000 + b"}", "invalid JSON .a number with thousands"),
        (b'{"prompt": "\xff"}', "invalid JSON .not UTF-8"),
        (b'{"prompt": null}', "no text under the key"),
        (b'["a"]', "no text under the key"),
        (b'{"prompt": "a", "prompt": "b"}', "invalid JSON .has the key prompt more than once"),
    ],
)
def test_the_line_is_named(tmp_path, line, found):
    path = tmp_path / "prompts.jsonl"
    path.write_bytes(b'{"prompt": "fine"}\n' + line + b"\n")
    with pytest.raises(ConfigurationError, match=rf"prompts\.jsonl:2: {found}"):
        read_prompt_file(path)


@pytest.fixture(scope="module")
def scratch(tmp_path_factory):
    return tmp_path_factory.mktemp("any")


@any_json.few
@given(
    data=any_json.files(any_json.records(["prompt", "neighbors"])) | st.binary(max_size=30),
    name=st.sampled_from(["any.jsonl", "any.txt"]),
)
def test_any_file_is_prompts_or_one_error(scratch, data, name):
    path = scratch / name
    path.write_bytes(data)
    found = any_json.outcome(lambda: read_prompt_file(path), ConfigurationError)
    if isinstance(found, ConfigurationError):
        assert found.subject.startswith(f"--prompt-file {path}")
        assert "\n" not in str(found)
    else:
        assert all(prompt.text.encode() for prompt in found)


@pytest.mark.parametrize("name", ["prompts.json", "prompts.JSONL"])
def test_other_names_of_json_lines(tmp_path, name):
    """The lines were one prompt, with their braces."""
    path = tmp_path / name
    path.write_text('{"prompt": "a"}\n{"prompt": "b"}\n')
    assert [prompt.text for prompt in read_prompt_file(path)] == ["a", "b"]


@pytest.mark.parametrize("name", ["prompts.ndjson", "prompts.csv", "prompts.jsonl.gz"])
def test_other_formats_are_refused(tmp_path, name):
    path = tmp_path / name
    path.write_text("prompt\na\n")
    with pytest.raises(ConfigurationError, match=r"file is not read as prompts\. Write JSON lines"):
        read_prompt_file(path)


def test_written_lines_hold_no_other_line_end():
    """Clients split with `str.splitlines`, which also cuts at U+2028."""
    value = {"text": "a\u2028b\u2029c\x85d\x0ce\x1cf\ré🙂", "of": ["\u2028"]}
    line = json_line(value)
    assert line.splitlines() == [line]
    assert "é🙂" in line
    assert json.loads(line) == value
