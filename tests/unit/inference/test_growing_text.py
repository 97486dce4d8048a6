"""New tokens to new text: nothing torn, nothing of a stop string."""

import random

import pytest

from retro_mcore.inference.growing_text import (
    SafeStream,
    find_stop,
    held_back,
    new_text,
    prompt_text,
)
from retro_mcore.inference.texts import GeneratedText


class Bytes:
    """A tokenizer whose tokens are the bytes of UTF-8."""

    def detokenize(self, tokens):
        return bytes(tokens).decode("utf-8", errors="replace")


TEXT = "Grüße, 熊! \N{BEAR FACE}\n end"


@pytest.mark.parametrize("cut", range(0, 16, 3))
def test_pieces_join_to_the_text_and_are_whole_characters(cut):
    tokens = list(TEXT.encode())
    cut = len(TEXT[:cut].encode())
    stream = SafeStream(Bytes(), tokens[:cut])
    pieces = [stream.add(token) for token in tokens[cut:]]
    assert "".join(pieces) + stream.finish() == bytes(tokens[cut:]).decode()
    assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in pieces)
    text = GeneratedText(tokens, cut)
    assert new_text(Bytes(), text) == bytes(tokens[cut:]).decode()


@pytest.mark.parametrize("text", ["日本 go", "🙂🙂 ok", "e\u0301🙂x", "a\ufffd本", "\ufffd\ufffdé"])
def test_a_prompt_that_ends_inside_a_character_leaves_it_to_the_answer(text):
    """Clients of the server send tokens cut at any place."""
    tokens = list(text.encode())
    for cut in range(1, len(tokens)):
        begun = len(bytes(tokens[:cut]).decode(errors="ignore"))
        stream = SafeStream(Bytes(), tokens[:cut])
        pieces = [*map(stream.add, tokens[cut:]), stream.finish()]
        answer = "".join(pieces)
        assert answer == new_text(Bytes(), GeneratedText(tokens, cut))
        assert prompt_text(Bytes(), tokens, cut) + answer == text
        # Half of a replacement character looks like a whole one.
        assert answer == text[begun:] or text[begun] == "\ufffd"
    cut = tokens[: len(text[0].encode()) - 1]
    assert prompt_text(Bytes(), cut, len(cut)) == Bytes().detokenize(cut)  # nothing follows


@pytest.fixture(scope="module", params=["byte level", "byte fallback", "SentencePiece"])
def real_tokenizer(request, tmp_path_factory):
    from retro_mcore.data.tokenizers.loading import build_tokenizer, train_sentencepiece
    from tests.unit.data.tokenizer_shapes import TEXTS, begins_with, byte_fallback, byte_level, save

    folder = tmp_path_factory.mktemp("tokenizer")
    if request.param == "SentencePiece":
        train_sentencepiece(TEXTS * 3, 330, folder / "a.model")
        return build_tokenizer("GPTSentencePieceTokenizer", folder / "a.model")
    make = byte_level if request.param == "byte level" else byte_fallback
    save(folder, begins_with(make(["<s>", "</s>"]), "<s>"))
    return build_tokenizer("HuggingFaceTokenizer", folder)


@pytest.mark.parametrize("text", ["日本語の 文 go", "🙂🙂👩‍👩‍👧 ok", "The quick 本 fox 🙂."])
def test_prompt_and_answer_of_real_tokens_join_to_the_text(real_tokenizer, text):
    tokens = real_tokenizer.with_bos(real_tokenizer.tokenize(text))
    for cut in range(1, len(tokens)):
        answer = new_text(real_tokenizer, GeneratedText(tokens, cut))
        assert prompt_text(real_tokenizer, tokens, cut) + answer == text


def test_an_incomplete_character_at_the_end_is_shown_as_such():
    tokens = list("aé".encode())[:-1]
    assert new_text(Bytes(), GeneratedText([65, *tokens], 1)) == "a\N{REPLACEMENT CHARACTER}"


def test_nothing_of_a_stop_string_is_shown_however_it_arrives():
    generator = random.Random(3)
    stops = ["###", "end.", "# e"]
    for _ in range(200):
        text = "".join(generator.choice(["#", " ", "e", "n", "d", "."]) for _ in range(30))
        place = find_stop(text, stops)
        stream, shown = SafeStream(Bytes(), [], stops), ""
        for token in text.encode():
            shown += stream.add(token)
            assert place is None or len(shown) <= place
        shown += stream.finish()
        assert shown == (text if place is None else text[:place])


def test_held_back_is_the_longest_possible_beginning():
    assert held_back("some #", ["###"]) == 1
    assert held_back("some ##", ["###", "# x"]) == 2
    assert held_back("some", ["###"]) == 0
    assert held_back("x", []) == 0


def test_stop_strings_do_not_count_before_the_least_length():
    stream = SafeStream(Bytes(), [], ["ab"], min_new_tokens=5)
    assert "".join(map(stream.add, b"abcdefab")) + stream.finish() == "abcdef"


def test_a_short_stop_string_beside_a_long_one_does_not_count_before_the_least_length_either():
    stops = ["ab", "a long stop string"]
    stream = SafeStream(Bytes(), [], stops, min_new_tokens=5)
    assert "".join(map(stream.add, b"abcdefab")) + stream.finish() == "abcdef"
    assert find_stop("abcdefab", stops, searched=2) == 6
    assert find_stop("abcdefab", stops, searched=1) == 0
