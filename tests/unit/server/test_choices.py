"""The text of an answer and the places of its tokens: for clients that read log-probabilities."""

from __future__ import annotations

import random

import pytest

from retro_mcore.inference.growing_text import new_text
from retro_mcore.inference.texts import GeneratedText, TokenLogprobs
from retro_mcore.server.choices import ChoiceText

WORDS = ["<s>", "▁Hello", "▁world", "▁again", "▁", "!", "本", "ab", "c#", "#"]
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


class LlamaLike:
    """Pieces that carry their space in front, a space that the first one loses, and bytes."""

    def __init__(self):
        from tokenizers import Tokenizer, decoders, models

        vocabulary = {piece: number for number, piece in enumerate([*WORDS, *BYTES])}
        self._tokenizer = Tokenizer(models.BPE(vocabulary, [], byte_fallback=True))
        self._tokenizer.decoder = decoders.Sequence(
            [
                decoders.Replace("▁", " "),
                decoders.ByteFallback(),
                decoders.Fuse(),
                decoders.Strip(" ", 1, 0),
            ]
        )

    def detokenize(self, tokens):
        return self._tokenizer.decode(list(tokens), skip_special_tokens=False)


class Bytes:
    """Every token a byte of UTF-8."""

    def detokenize(self, tokens):
        return bytes(token % 256 for token in tokens).decode("utf-8", errors="replace")


def byte_ids(text: str) -> list[int]:
    return [len(WORDS) + byte for byte in text.encode()]


TEXTS = [
    [1, 2, 3],
    [1, *byte_ids(" 日本"), 2, *byte_ids("🙂"), 5],
    [*byte_ids("日")[:2], 1, *byte_ids("本")],
    [4, 1, 4, 2, *byte_ids("é")[:1]],
    [*byte_ids("日本🙂"), 7, 8, 9, 6],
]


def run(tokenizer, tokens, cut, **options):
    """What a stream shows: pieces of text with the tokens that come with each."""
    choice = ChoiceText(tokenizer, tokens[:cut], **options)
    pieces, told = [], []
    for token in tokens[cut:]:
        pieces.append(choice.add(token, TokenLogprobs(token, -1.0, [(token, -1.0)])))
        told.append(choice.take_tokens())
    pieces.append(choice.finish())
    told.append(choice.take_tokens(ended=True))
    return choice, pieces, told


@pytest.mark.parametrize("tokenizer", [LlamaLike(), Bytes()], ids=lambda one: type(one).__name__)
@pytest.mark.parametrize("echo", [False, True])
@pytest.mark.parametrize("tokens", TEXTS)
def test_tokens_are_slices_that_join_to_the_text_and_never_run_ahead_of_it(tokenizer, echo, tokens):
    for cut in range(1, len(tokens)):
        choice, pieces, told = run(tokenizer, tokens, cut, echo=echo)
        assert "".join(pieces) == choice.text
        if echo:
            assert choice.text == tokenizer.detokenize(tokens)
            choice.score_prompt([TokenLogprobs(token, -1.0, []) for token in tokens[1:cut]])
        before = choice.take_prompt_tokens()
        assert len(before) == (cut if echo else 0)
        placed = [*before, *(token for some in told for token in some)]
        assert len(placed) == len(tokens) - (0 if echo else cut)
        assert "".join(token.text for token in placed) == choice.text
        for token in placed:
            assert choice.text[token.offset :].startswith(token.text)
        shown = 0
        for piece, some in zip(pieces, told, strict=True):
            shown += len(piece)
            assert all(token.offset + len(token.text) <= shown for token in some)


@pytest.mark.parametrize("echo", [False, True])
def test_a_stop_string_cuts_text_and_tokens_alike(echo):
    generator = random.Random(5)
    for number in range(200):
        tokens = [generator.choice([1, 2, 5, 7, 8, 9]) for _ in range(12)]
        tokenizer, stops, least = LlamaLike(), ["c##", "#ab", "!"][: 1 + number % 3], number % 4
        choice, pieces, told = run(
            tokenizer, tokens, 2, echo=echo, stop_strings=stops, min_new_tokens=least
        )
        assert "".join(pieces) == choice.text
        if echo:
            choice.score_prompt([TokenLogprobs(token, -1.0, []) for token in tokens[1:2]])
        placed = [*choice.take_prompt_tokens(), *(token for some in told for token in some)]
        assert "".join(token.text for token in placed) == choice.text
        answer = choice.text[len(tokenizer.detokenize(tokens[:2])) :] if echo else choice.text
        if least < 2:
            whole = new_text(tokenizer, GeneratedText(tokens, 2))
            places = [place for stop in stops if (place := whole.find(stop)) >= 0]
            assert answer == whole[: min(places, default=None)]


def test_what_the_server_puts_before_a_text_is_not_shown():
    choice, _, _ = run(LlamaLike(), [0, 1, 2, 3], 2, num_start_tokens=1, echo=True)
    assert choice.text == " Hello world again"  # after <s>, which is a piece here, a space stays
    choice.score_prompt([TokenLogprobs(1, -1.0, [])])
    assert [token.text for token in choice.take_prompt_tokens()] == ["", " Hello"]


def test_alternatives_have_distinct_names_and_the_chosen_one_its_text():
    # A byte and a piece may write the same letter, and half of a character writes nothing yet.
    exclamation, half = len(WORDS) + ord("!"), byte_ids("日")[0]
    top = [(exclamation, -0.5), (5, -1.0), (half, -2.0), (2, -3.0)]
    choice = ChoiceText(LlamaLike(), [1])
    choice.add(5, TokenLogprobs(5, -1.0, top))
    choice.finish()
    answer = choice.logprobs(choice.take_tokens(ended=True))
    assert answer["tokens"] == ["!"]
    assert answer["top_logprobs"] == [
        {f"token_id:{exclamation}": -0.5, "!": -1.0, f"token_id:{half}": -2.0, " world": -3.0}
    ]
