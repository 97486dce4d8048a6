"""Instruction samples: which tokens are learned, what is cut, what is packed, who sees whom."""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

import numpy as np
import pytest

from retro_mcore.data.instruction.dataset import InstructionDataset, blended_order
from retro_mcore.data.instruction.examples import InstructionExample, Turn
from retro_mcore.data.instruction.packing import in_steps, pack
from retro_mcore.data.instruction.samples import InstructionFormat, encode_example
from retro_mcore.data.tokenizers.loading import GPTSentencePieceTokenizer, train_sentencepiece
from retro_mcore.errors import ConfigurationError, CorpusError
from tests.unit.data.projects import documents

#: Tokens of a row that holds a few examples.
LONG = 512


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "sentencepiece.model"
    train_sentencepiece(documents(), 500, path)
    return GPTSentencePieceTokenizer(path)


def qa(number: int = 0, passages: int = 3, words: int = 6) -> InstructionExample:
    texts = [f"title: T{i}, source: {'passage ' * words}{number}.{i}" for i in range(passages)]
    return InstructionExample(
        "nq", f"record {number}", f"What is {number}?", (f"it is {number}",), tuple(texts)
    )


CHAT = InstructionExample(
    "chat",
    "record 0",
    turns=(
        Turn("user", "First question?"),
        Turn("assistant", "First reply."),
        Turn("user", "Second question?"),
        Turn("assistant", "Second reply."),
    ),
)


def learned(encoded: Any, tokenizer: Any) -> str:
    return tokenizer.detokenize(encoded.tokens[encoded.trained & (encoded.tokens != tokenizer.eod)])


def test_the_answer_and_the_end_are_learned_and_nothing_else(tokenizer):
    encoded = encode_example(qa(), InstructionFormat(256), tokenizer)
    assert learned(encoded, tokenizer) == " it is 0"
    assert encoded.tokens[-1] == tokenizer.eod
    assert encoded.trained[-1]
    text = tokenizer.detokenize(encoded.tokens[:-1])
    assert "passage 0.0\n\nUser: What is 0?" in text.replace("passage  ", "passage ")
    everything = encode_example(qa(), InstructionFormat(256, loss_on="everything"), tokenizer)
    assert everything.trained.all()


def test_a_chat_learns_its_last_reply_or_every_reply(tokenizer):
    last = encode_example(CHAT, InstructionFormat(256), tokenizer)
    assert learned(last, tokenizer) == " Second reply."
    both = encode_example(CHAT, InstructionFormat(256, loss_on="answers"), tokenizer)
    assert learned(both, tokenizer) == " First reply. Second reply."
    assert (both.tokens[both.trained] == tokenizer.eod).sum() == 2


@pytest.mark.parametrize("sequence_length", [96, 128, 160, 400])
def test_what_does_not_fit_is_taken_from_the_passages_first(tokenizer, sequence_length):
    format = InstructionFormat(sequence_length, num_context_passages=3)
    encoded = encode_example(qa(words=60), format, tokenizer)
    assert len(encoded.tokens) <= sequence_length + 1
    assert learned(encoded, tokenizer) == " it is 0"
    assert "What is 0? Answer the above question" in tokenizer.detokenize(encoded.tokens)


def test_a_long_chat_loses_its_oldest_turns(tokenizer):
    turns = tuple(
        turn
        for number in range(20)
        for turn in (Turn("user", f"Question {number}?"), Turn("assistant", f"Reply {number}."))
    )
    for loss_on in ("last-answer", "answers"):
        chat = InstructionExample("chat", "record 0", turns=turns)
        encoded = encode_example(chat, InstructionFormat(160, loss_on=loss_on), tokenizer)
        text = tokenizer.detokenize(encoded.tokens[encoded.tokens != tokenizer.eod])
        assert len(encoded.tokens) <= 161
        assert "Question 19?" in text
        assert text.startswith("System: This is a chat")
        assert "Question 0?" not in text


def test_an_answer_that_was_cut_does_not_teach_to_stop(tokenizer):
    example = InstructionExample("nq", "record 0", "Why?", ("because " * 200,))
    encoded = encode_example(example, InstructionFormat(128), tokenizer)
    assert len(encoded.tokens) == 129
    assert encoded.tokens[-1] != tokenizer.eod
    assert "Why? Answer the above" in tokenizer.detokenize(encoded.tokens)


def test_the_encoder_reads_the_passages_that_the_decoder_does_not(tokenizer):
    format = InstructionFormat(256, num_encoder_passages=2, chunk_length=16, retrieved_length=32)
    example = qa()
    for reuse_top, expected in ((False, example.passages[1:]), (True, example.passages[:2])):
        changed = InstructionFormat(**{**vars(format), "reuse_top": reuse_top})
        encoded = encode_example(example, changed, tokenizer)
        for row, text in enumerate(expected):
            ids = encoded.passages[row][~encoded.passage_mask[row]]
            assert text.startswith(tokenizer.detokenize(ids))
    missing = encode_example(qa(passages=2), format, tokenizer)
    assert missing.passage_mask[1].all()
    assert not missing.passage_mask[0].all()


def dataset(tokenizer: Any, count: int = 7, num_samples: int = 20, **options: Any) -> Any:
    format = InstructionFormat(
        options.pop("sequence_length", 256),
        num_context_passages=0,
        num_encoder_passages=options.pop("num_encoder_passages", 0),
        chunk_length=16,
        retrieved_length=32,
    )
    return InstructionDataset(
        [[qa(number) for number in range(count)]], [1.0], num_samples, format, tokenizer, **options
    )


def test_every_example_is_read_once_an_epoch(tokenizer):
    rows = [bytes(dataset(tokenizer)[index]["text"]) for index in range(14)]
    assert len(set(rows[:7])) == len(set(rows[7:])) == 7
    assert rows[:7] != rows[7:]
    again = dataset(tokenizer)
    assert bytes(again[9]["text"]) == rows[9]  # in any order


def test_datasets_are_blended_by_weight():
    datasets, samples = blended_order([3.0, 1.0], 400)
    assert np.bincount(datasets).tolist() == [300, 100]
    assert samples[datasets == 1].tolist() == list(range(100))
    with pytest.raises(ConfigurationError, match="weights"):
        blended_order([1.0, 0.0], 4)


def test_packing_keeps_every_token_and_no_example_twice(tokenizer):
    plain = dataset(tokenizer, sequence_length=LONG)
    packed = dataset(tokenizer, pack=True, num_samples=6, sequence_length=LONG)
    seen = []
    for row in (packed[index] for index in range(len(packed))):
        assert row["text"].shape == (LONG + 1,)
        segments = row.get("segments", np.zeros(LONG, np.int64))
        for number in range(segments.max() + 1):
            seen.append(row["text"][:LONG][segments == number])
    assert len(seen) > 10
    for index, tokens in enumerate(seen):
        expected = plain[index]["text"]
        assert np.array_equal(tokens, expected[: len(tokens)])
        assert (expected[len(tokens) - 1 :] == tokenizer.eod).all()


def test_packing_learns_what_padding_learns(tokenizer):
    plain = dataset(tokenizer, sequence_length=LONG)
    packed = dataset(tokenizer, pack=True, num_samples=6, sequence_length=LONG)
    targets = [row["text"][1:][row["loss_mask"] == 1] for row in (packed[i] for i in range(6))]
    apart = [row["text"][1:][row["loss_mask"] == 1] for row in (plain[i] for i in range(20))]
    joined = np.concatenate(targets)
    assert np.array_equal(joined, np.concatenate(apart)[: len(joined)])


@pytest.mark.parametrize(("step", "num_open"), [(1, 1), (1, 4), (16, 3)])
def test_examples_are_packed_by_best_fit_into_the_open_samples(step, num_open):
    room = 101
    sizes = np.random.default_rng(1).integers(1, room + 1, 200).tolist()
    packed = pack(sizes, len(sizes), room, step, num_open)
    of_example = {place: number for number, places in enumerate(packed) for place in places}
    assert sorted(of_example) == list(range(len(sizes)))  # each once, none left out
    used, last = [0] * len(packed), 0
    for place, number in sorted(of_example.items()):
        last = max(last, number)
        opened = range(max(0, last - num_open + 1), last + 1)
        assert number in opened
        assert used[number] + sizes[place] <= room
        assert not any(used[number] < used[n] <= room - sizes[place] for n in opened)
        used[number] += in_steps(sizes[place], step)
    if num_open == 1:  # next fit
        assert [place for places in packed for place in places] == sorted(of_example)
    # A longer run begins with the samples of a shorter one.
    assert pack(sizes, 40, room, step, num_open) == packed[:40]


def test_packing_in_several_open_samples_learns_the_same_examples_with_less_padding(tokenizer):
    examples = [[qa(n, words=1 + n * n) for n in range(9)], [CHAT]]
    format = InstructionFormat(LONG)

    def rows(num_open):
        made = InstructionDataset(
            examples, [2.0, 1.0], 12, format, tokenizer, pack=True, num_open=num_open
        )
        counts = dict(made.packing)
        read = [made[index] for index in range(len(made))]
        assert counts["packed_samples"] == len(read) == 12
        assert counts["packed_tokens"] + counts["padding_tokens"] == 12 * (LONG + 1)
        assert counts["packed_examples"] == sum(row["segments"].max() + 1 for row in read)
        # A row's last token may be a label alone, without a segment.
        with_segment = sum((row["segments"] >= 0).sum() for row in read)
        assert 0 <= counts["packed_tokens"] - with_segment <= 12
        return counts, read

    (next_fit, _), (best_fit, read) = rows(1), rows(8)
    assert best_fit["padding_tokens"] < next_fit["padding_tokens"]
    seen = Counter()
    for row in read:
        for number in range(row["segments"].max() + 1):
            text = tokenizer.detokenize(row["text"][:LONG][row["segments"] == number])
            seen.update(re.findall(r"What is (\d)|(First) question", text))
    num_read = best_fit["packed_examples"]
    assert seen.total() == num_read
    # Every third example is the chat; the last ones are in rows that a longer run has.
    assert seen.pop(("", "First")) == pytest.approx(num_read / 3, abs=3)
    assert len(seen) == 9


def test_every_chunk_has_its_own_example_s_passages(tokenizer):
    row = dataset(
        tokenizer, pack=True, num_samples=4, num_encoder_passages=2, sequence_length=LONG
    )[0]
    segments, owned = row["segments"], 0
    assert (row["neighbor_tokens"].shape, row["neighbor_mask"].shape) == ((LONG // 16, 2, 32),) * 2
    for chunk in range(LONG // 16):
        owner = int(segments[16 * chunk])
        readers = {int(segment) for segment in segments[16 * chunk + 15 :][:16]}
        if owner < 0 or readers - {owner, -1}:  # nobody of the next example may read them
            assert row["neighbor_mask"][chunk].all()
            continue
        text = tokenizer.detokenize(row["text"][:LONG][segments == owner])
        format = InstructionFormat(
            LONG, num_context_passages=0, num_encoder_passages=2, retrieved_length=32
        )
        expected = encode_example(qa(int(re.findall(r"What is (\d)", text)[0])), format, tokenizer)
        assert np.array_equal(row["neighbor_tokens"][chunk], expected.passages)
        assert np.array_equal(row["neighbor_mask"][chunk], expected.passage_mask)
        owned += 1
    assert 0 < owned < LONG // 16


def test_examples_without_answers_are_refused_at_once(tokenizer):
    example = InstructionExample("nq", "file, record 3", "Why?")
    with pytest.raises(CorpusError, match="record 3: has no answer"):
        InstructionDataset([[example]], [1.0], 1, InstructionFormat(64), tokenizer)
    with pytest.raises(CorpusError, match="no examples"):
        InstructionDataset([[]], [1.0], 1, InstructionFormat(64), tokenizer)


@pytest.mark.parametrize("loss_on", ["last-answer", "answers"])
@pytest.mark.parametrize("length", [48, 160, 400])
def test_examples_begin_with_bos_whatever_is_cut(tokenizer, loss_on, length):
    """Tuned models are asked with BOS where the project's documents begin with it."""
    for example in (qa(), CHAT):
        format = InstructionFormat(length, loss_on=loss_on, beginning=(7,))
        encoded = encode_example(example, format, tokenizer)
        assert encoded.tokens[0] == 7
        assert not encoded.trained[0]
        assert len(encoded.tokens) <= length + 1
        assert encoded.tokens[-1] == tokenizer.eod or length == 48
