"""What instruction tuning cuts to fit the window is counted.

Whoever tunes on long documents would otherwise learn from prompts without their passages, or to
write answers that never end, and not know it.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from retro_mcore.data.instruction.cuts import CUTS, InstructionCuts, count_cuts, cuts_of
from retro_mcore.data.instruction.dataset import InstructionDataset
from retro_mcore.data.instruction.examples import InstructionExample, Turn
from retro_mcore.data.instruction.samples import InstructionFormat, encode_example

PASSAGE, TURN, ANSWER = 0x4E00, 0x5000, "\u3042"
LENGTHS = st.integers(1, 60)


class Characters:
    """A token for each character."""

    eod = 0

    def tokenize(self, text):
        return [ord(letter) for letter in text]

    def detokenize(self, ids):
        return "".join(map(chr, ids))


@st.composite
def questions(draw):
    passages = [chr(PASSAGE + i) * n for i, n in enumerate(draw(st.lists(LENGTHS, max_size=4)))]
    question, answer = "q" * draw(LENGTHS), ANSWER * draw(LENGTHS)
    return InstructionExample("open", "record 0", question, (answer,), tuple(passages))


@st.composite
def chats(draw):
    lengths = draw(
        st.lists(LENGTHS, min_size=2, max_size=8).filter(lambda some: len(some) % 2 == 0)
    )
    system = [Turn("system", "s")] if draw(st.booleans()) else []
    turns = [
        Turn("user" if i % 2 == 0 else "assistant", chr(TURN + i) * n)
        for i, n in enumerate(lengths)
    ]
    passages = [chr(PASSAGE + i) * n for i, n in enumerate(draw(st.lists(LENGTHS, max_size=3)))]
    return InstructionExample("chat", "record 0", passages=tuple(passages), turns=(*system, *turns))


def formats():
    return st.builds(
        InstructionFormat,
        st.integers(5, 40).map(lambda chunks: 8 * chunks),
        prompt_format=st.just("reformat_prompt_short"),
        num_context_passages=st.integers(0, 3),
        num_encoder_passages=st.integers(0, 2),
        chunk_length=st.just(8),
        retrieved_length=st.sampled_from([16, 64]),
        loss_on=st.sampled_from(["last-answer", "answers", "everything"]),
        beginning=st.sampled_from([(), (7,)]),
    )


def text_of(encoded):
    return Characters().detokenize(encoded.tokens)


@settings(deadline=None, derandomize=True, max_examples=150)
@given(questions() | chats(), formats())
def test_something_is_counted_exactly_where_something_is_missing(example, format):
    counts = cuts_of(example, format, Characters())
    encoded = encode_example(example, format, Characters())
    whole = encode_example(
        example, replace(format, sequence_length=80_000, retrieved_length=1_000), Characters()
    )
    assert any(counts[key] for key in CUTS if key != "encoder_passages_cut") == (
        not np.array_equal(encoded.tokens, whole.tokens)
        or not np.array_equal(encoded.trained, whole.trained)
    )
    if format.num_encoder_passages:
        missing = (~encoded.passage_mask).sum() < (~whole.passage_mask).sum()
        assert counts["encoder_passages_cut"] == missing
    assert encoded.trained[1:].any()  # no example is left out


@settings(deadline=None, derandomize=True, max_examples=100)
@given(questions(), formats())
def test_passages_and_answers_are_counted_as_they_stand(example, format):
    counts = cuts_of(example, format, Characters())
    text = text_of(encode_example(example, format, Characters()))
    shown = example.passages[: format.num_context_passages]
    kept = [text.count(passage[0]) for passage in shown]
    assert counts["passages_dropped"] == kept.count(0)
    whole = sum(n == len(passage) for n, passage in zip(kept, shown, strict=True))
    assert counts["passages_cut"] == len(shown) - kept.count(0) - whole
    learned = text.count(ANSWER) == len(example.answers[0]) and text.endswith("\0")
    assert counts["answers_cut"] == (not learned)
    question = f"Question: {example.question}? Answer: The answer is"
    assert counts["questions_cut"] == (question not in text)


@settings(deadline=None, derandomize=True, max_examples=100)
@given(chats(), formats())
def test_the_turns_of_a_chat_are_counted_as_they_stand(example, format):
    counts = cuts_of(example, format, Characters())
    encoded = encode_example(example, format, Characters())
    said = [turn for turn in example.turns if turn.role != "system"]
    missing = [turn.content[0] not in text_of(encoded) for turn in said]
    # The last question may be cut to nothing: that is a question cut, not a turn dropped.
    assert 0 <= sum(missing) - counts["turns_dropped"] <= counts["questions_cut"]
    if format.loss_on == "answers":
        learned = set(Characters().detokenize(encoded.tokens[encoded.trained]))
        unlearned = sum(
            turn.role == "assistant" and turn.content[0] not in learned for turn in said
        )
        assert counts["answers_not_learned"] == unlearned - counts["turns_dropped"] // 2


@pytest.mark.parametrize("pack", [False, True])
@pytest.mark.parametrize("num_samples", [3, 40])
def test_each_example_that_is_read_is_counted_once_by_any_number_of_ranks(pack, num_samples):
    datasets = [
        [
            InstructionExample("a", f"record {n}", "q" * n, (chr(name + n) + "a" * n,))
            for n in range(1, size)
        ]
        for name, size in ((0x6000, 8), (0x7000, 30))
    ]
    format = InstructionFormat(48, prompt_format="reformat_prompt_short")
    rows = InstructionDataset(datasets, [1.0, 3.0], num_samples, format, Characters(), pack=pack)
    read = [[*rows.examples_read(place)] for place in range(2)]
    shown = {int(token) for index in range(num_samples) for token in rows[index]["text"]}
    assert sum(map(len, read)) == sum(token > 0x6000 for token in shown)
    expected = InstructionCuts.of_ranks("train", "ab", [count_cuts(rows, Characters(), 2)])
    assert [counts["examples"] for counts in expected.by_dataset.values()] == [*map(len, read)]
    assert all(len(set(map(id, some))) == len(some) for some in read)
    ranks = [count_cuts(rows, Characters(), 2, rank, 3) for rank in range(3)]
    assert InstructionCuts.of_ranks("train", "ab", ranks) == expected
    if num_samples == 40 and not pack:
        assert expected.report["prompts_cut"] == expected.report["questions_cut"] > 0
        assert "of 29 examples of b: " in expected.warning
