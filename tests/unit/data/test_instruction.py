"""Instruction examples out of the files that people have, and the prompts made of them."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from retro_mcore.data.instruction.blend import parse_blend
from retro_mcore.data.instruction.examples import InstructionExample, Turn, read_examples
from retro_mcore.data.instruction.prompts import SYSTEM_CONTEXT, SYSTEM_RETRO, write_prompt
from retro_mcore.errors import ConfigurationError, CorpusError
from tests.unit.data import any_json

PASSAGES = ("title: Nile, source: A river.", "title: Egypt, source: A country.")


def read(tmp_path: Any, records: Any, **options: Any) -> list[InstructionExample]:
    file = tmp_path / "examples.json"
    file.write_text(records if isinstance(records, str) else json.dumps(records), encoding="utf-8")
    return read_examples([file], "nq", **options)


def question(dataset: str) -> InstructionExample:
    return InstructionExample(dataset, "here", "Which river?", ("the Nile",), PASSAGES)


@pytest.mark.parametrize(
    ("answers", "expected"),
    [
        ({"answers": ["a", "b"]}, ("a", "b")),
        ({"answers": [{"text": " a ", "answer_start": 3}]}, ("a",)),
        ({"answer": "a"}, ("a",)),
        ({"answer": ["a"]}, ("a",)),
        ({"answer": 7}, ("7",)),
        ({}, ()),
    ],
)
def test_every_form_of_answer(tmp_path, answers, expected):
    (example,) = read(tmp_path, [{"question": "q", **answers}])
    assert example.answers == expected


@pytest.mark.parametrize(
    ("record", "kind", "expected"),
    [
        ({"sub-paragraphs": ["T", "text"]}, "annotated", "title: T, source: text"),
        ({"sub-paragraphs": "text"}, "annotated", "title: , source: text"),
        ({"sub_paragraph": "text"}, "annotated", "title: , source: text"),
        ({}, "annotated", "title: , source: "),
        ({"ctxs": [{"title": "T", "text": "x"}]}, "retrieved", "title: T, source: x"),
        ({"bert_pretrain_corpus_neighbours": ["x"]}, "bert_pretrain_corpus", "source: x"),
    ],
)
def test_every_form_of_passage(tmp_path, record, kind, expected):
    (example,) = read(tmp_path, [{"question": "q", **record}], passages=kind)
    assert example.passages == (expected,)


def test_multiple_choice_and_long_answers(tmp_path):
    records = [
        {"question": "q", "qa_type": "multi_choice_qa", "multichoice_options": ["x", "y"]},
        {"question": "long", "longform_answer": "because"},
    ]
    first, second = read(tmp_path, records)
    assert first.question == "q\nChoose one based on the following options: (A) x (B) y"
    assert first.choices == ("x", "y")
    assert second.answers == ()
    (only,) = read(tmp_path, records, longform_answer=True)
    assert only.answers == ("because",)


def test_json_lines_of_chats(tmp_path):
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello"},
    ]
    (chat,) = read(tmp_path, json.dumps({"messages": messages}) + "\n\n")
    assert chat.turns[-1] == Turn("assistant", "Hello")
    prompt = write_prompt(chat, num_passages=0)
    assert prompt.text == "System: Be brief.\n\nUser: Hi\n\nAssistant:"


@pytest.mark.parametrize(
    ("records", "named"),
    [
        ("[{", "examples.json:1: is not JSON"),
        ('{"question": "q"}\n{oops', "examples.json:2: is not JSON"),
        ([3], "record 0: is a int"),
        ([{"question": "q"}, {"answer": "a"}], "record 1: has no question"),
        ([{"question": "q", "qa_type": "multi_choice_qa"}], "has no list 'multichoice_options'"),
        ([{"messages": [{"role": "bot", "content": "x"}]}], "message 0 is"),
        ([{"messages": [{"role": "assistant", "content": "x"}]}], "user and assistant in turn"),
        ([{"messages": []}], "user and assistant in turn"),
    ],
)
def test_a_bad_record_is_named(tmp_path, records, named):
    with pytest.raises(CorpusError, match=named.replace("[", r"\[")):
        read(tmp_path, records)


def test_passages_that_are_asked_for_and_missing(tmp_path):
    with pytest.raises(CorpusError, match="has no list 'ctxs'"):
        read(tmp_path, [{"question": "q"}], passages="retrieved")
    with pytest.raises(CorpusError, match="lacks 'text'"):
        read(tmp_path, [{"question": "q", "ctxs": [{"title": "T"}]}], passages="retrieved")


CONTEXT = "title: Nile, source: A river.\n\n"


@pytest.mark.parametrize(
    ("dataset", "options", "expected"),
    [
        (
            "nq",
            {},
            f"{SYSTEM_RETRO}{CONTEXT}User: Which river? Answer the above question with a short "
            "phrase.\n\nAssistant: The answer is",
        ),
        (
            "BoolQ",
            {},
            f"{SYSTEM_RETRO}{CONTEXT}User: Which river? Answer the above question with True or "
            "False.\n\nAssistant:",
        ),
        (
            "eli5",
            {"num_passages": 0},
            f"{SYSTEM_RETRO}User: Which river? Answer the above question with a long complete "
            "answer.\n\nAssistant:",
        ),
        ("quac", {}, f"{SYSTEM_RETRO}{CONTEXT}Which river?"),
        ("open_inst", {}, f"{SYSTEM_RETRO}Which river?"),
        (
            "nq",
            {"prompt_format": "reformat_prompt"},
            f"{SYSTEM_CONTEXT}{CONTEXT}User: Answer the following question with a short span. "
            "Which river?\n\nAssistant: The answer is",
        ),
        (
            "race",
            {"prompt_format": "reformat_prompt"},
            f"{SYSTEM_CONTEXT}{CONTEXT}User: Answer the following question by selecting one of the "
            "provided options. Which river?\n\nAssistant:",
        ),
        (
            "nq",
            {"prompt_format": "reformat_prompt", "template_id": 7},
            f"{SYSTEM_CONTEXT}User: Context: {CONTEXT}Question: Which river?\n\n"
            "Assistant: The answer is",
        ),
        (
            "nq",
            {"prompt_format": "reformat_prompt_short", "num_passages": 2},
            f"{CONTEXT}title: Egypt, source: A country.\n\nQuestion: Which river? "
            "Answer: The answer is",
        ),
    ],
)
def test_prompts_are_the_words_that_the_checkpoints_know(dataset, options, expected):
    assert write_prompt(question(dataset), **options).text == expected


@pytest.mark.parametrize(
    "options",
    [
        {"prompt_format": "other"},
        {"template_id": 8, "prompt_format": "reformat_prompt"},
        {"template_id": 1},
    ],
)
def test_formats_that_do_not_exist_are_refused(options):
    with pytest.raises(ConfigurationError, match=r"--prompt-format|--template-id"):
        write_prompt(question("nq"), **options)


def test_a_blend_of_names_and_files(tmp_path):
    (tmp_path / "nq").mkdir()
    for name in ("nq_QA_train2.json", "nq_QA_train1.json", "nq_QA_dev.json"):
        (tmp_path / "nq" / name).write_text("[]")
    (tmp_path / "chats.jsonl").write_text("")
    nq, chats = parse_blend(["0.75", "nq", "0.25", "chats.jsonl"], tmp_path)
    assert (nq.name, nq.weight, chats.name, chats.weight) == ("nq", 0.75, "chats", 0.25)
    assert [file.name for file in nq.train_files] == ["nq_QA_train1.json", "nq_QA_train2.json"]
    assert [file.name for file in nq.valid_files] == ["nq_QA_dev.json"]
    assert parse_blend(["nq"], tmp_path)[0].weight == 1.0


@pytest.mark.parametrize(
    "entries", [["1.0", "nq", "0.5"], ["x", "nq", "y", "z"], ["0", "a", "1", "b"], []]
)
def test_a_blend_that_is_no_blend_is_refused(tmp_path, entries):
    with pytest.raises(ConfigurationError, match="--data-path"):
        parse_blend(entries, tmp_path)


def test_a_dataset_that_is_not_there_is_named(tmp_path):
    with pytest.raises(CorpusError, match=r"holds no nq_QA_train\*\.json"):
        parse_blend(["nq"], tmp_path)


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\u0085", "\u000c", "\u001e"])
def test_only_a_line_feed_ends_a_line(tmp_path, separator):
    """Answers copied from web pages hold other ends of lines: they were "invalid JSON"."""
    asked = [{"question": f"a{separator}b", "answers": [f"c{separator}d"]}] * 2
    lines = "\r\n".join(json.dumps(record, ensure_ascii=False) for record in asked)
    found = read(tmp_path, f"\ufeff{lines}")
    assert [example.question for example in found] == [f"a{separator}b"] * 2


@pytest.mark.parametrize(
    ("record", "found"),
    [
        ({"answers": [None]}, "an answer is None"),
        ({"answers": {"a": 1}}, "an answer is {'a': 1}"),
        ({"answers": [{"text": None}]}, "an answer is None"),
        ({"answers": [["a"]]}, r"an answer is \['a'\]"),
        ({"answers": float("nan")}, "an answer is nan"),
        ({"sub-paragraphs": {"a": 1}}, "a passage is {'a': 1}"),
        ({"sub-paragraphs": ["T", ["x"]]}, r"a passage is \['x'\]"),
        ({"question": "\ud83d"}, "holds half of a surrogate pair"),
        ({"question": None}, "has no question"),
        ({"qa_type": "multi_choice_qa", "multichoice_options": [None]}, "an option is None"),
    ],
)
def test_values_of_the_wrong_type_are_named(tmp_path, record, found):
    """They stood in prompts as `None` and `{'a': 1}`."""
    with pytest.raises(CorpusError, match=rf"examples\.json, record 1: {found}"):
        read(tmp_path, [{"question": "q"}, {"question": "q", **record}])


def test_passages_that_are_null_are_empty(tmp_path):
    record = {"question": "q", "ctxs": [{"title": None, "text": "x"}], "sub-paragraphs": None}
    assert read(tmp_path, [record], passages="retrieved")[0].passages == ("title: , source: x",)
    assert read(tmp_path, [record])[0].passages == ("title: , source: ",)


@pytest.mark.parametrize(
    ("data", "found"),
    [
        (b'{"question": "a"}\n' + b"[" * 100_000, ":2: is not JSON .nested too deeply"),
        (b"[" * 100_000, ":1: is not JSON .nested too deeply"),
        (b'{"question": "a"}\n{"n": ' + b"7" * 5000 + b"}", ":2: .*thousands of digits"),
        (b'[\n{"question": "\xff"}]', ":2: is not JSON .not UTF-8"),
        (b'{"question": "a"}\n{"question": "\xff"}', ":2: is not JSON .not UTF-8"),
        (b'[{"question": "a"},\n{]', ":2: is not JSON"),
        (b'{"question": "a"}\n{"question": "b", "question": "c"}', ":2: has the key question more"),
        (b'[{"question": "a", "answers": [], "answers": []}]', ":1: has the key answers more"),
    ],
)
def test_the_line_is_named(tmp_path, data, found):
    (tmp_path / "examples.json").write_bytes(data)
    with pytest.raises(CorpusError, match=rf"examples\.json{found}"):
        read_examples([tmp_path / "examples.json"], "nq")


_QUESTIONS = any_json.records(
    [
        *("question", "answers", "answer", "longform_answer", "sub-paragraphs", "ctxs"),
        *("bert_pretrain_corpus_neighbours", "multichoice_options", "messages"),
    ]
).map(lambda record: {"question": "q", "qa_type": "multi_choice_qa", **record})
_MESSAGE = st.fixed_dictionaries(
    {"role": st.sampled_from(["system", "user", "assistant"]) | any_json.values},
    optional={"content": st.text(max_size=3) | any_json.values},
)
_CHATS = st.fixed_dictionaries(
    {"messages": st.lists(_MESSAGE, max_size=3) | any_json.values},
    optional={"ctxs": any_json.values},
)


@pytest.fixture(scope="module")
def scratch(tmp_path_factory):
    return tmp_path_factory.mktemp("any")


@any_json.few
@given(
    data=any_json.files(_QUESTIONS | _CHATS),
    passages=st.sampled_from(["annotated", "retrieved", "bert_pretrain_corpus"]),
    longform=st.booleans(),
)
def test_any_file_is_examples_or_one_error(scratch, data, passages, longform):
    path = scratch / "any.json"
    path.write_bytes(data)
    found = any_json.outcome(lambda: read_examples([path], "nq", passages, longform), CorpusError)
    if isinstance(found, CorpusError):
        assert found.subject.startswith((f"{path}:", f"{path}, record "))
        assert "\n" not in str(found)
        return
    for example in found:
        text = write_prompt(example, num_passages=2).text + "".join(example.answers)
        assert "None" not in text
        text.encode()


@pytest.mark.parametrize("weight", ["nan", "inf", "0", "-1", "1e400", "x", ""])
def test_weights_of_a_blend_that_cannot_work(tmp_path, weight):
    (tmp_path / "a.json").write_text("[]")
    with pytest.raises(ConfigurationError, match="--data-path: "):
        parse_blend([weight, str(tmp_path / "a.json"), "1", str(tmp_path / "a.json")])
