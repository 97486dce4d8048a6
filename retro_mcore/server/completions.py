"""OpenAI-compatible completions: requests and responses.

Fields beyond OpenAI's: top_k, min_tokens, stop_token_ids, neighbors, neighbor_credit, retrieve,
two_chunks. An unsupported field is rejected by name, unless its value has no effect. Null means a
field's default.
"""

from __future__ import annotations

import re
import secrets
import time
from collections.abc import Container, Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    Strict,
    StrictBool,
    StrictInt,
    StrictStr,
    model_validator,
)

from retro_mcore.data.tokenizers.base import Tokenizer
from retro_mcore.inference.requests import GenerationRequest, StoppingOptions
from retro_mcore.inference.sampling import LogitAdjustments, SamplingOptions
from retro_mcore.inference.texts import GeneratedText
from retro_mcore.server.choices import ChoiceText

#: Unsupported OpenAI fields, with values that have no effect and are accepted.
_UNSUPPORTED: dict[str, tuple[Any, ...]] = {"suffix": (None, "")}
_FINISH_REASONS = {"eod": "stop", "stop": "stop", "length": "length", "dropped": "stop"}
_TOKEN_ID = re.compile(r"[0-9]{1,19}")

#: Limited because one thread searches all new text of all clients for stop strings.
_MOST_STOPS, _LONGEST_STOP = 64, 1000

Stop = Annotated[str, Strict(), Field(max_length=_LONGEST_STOP)]
Number = Annotated[float, Strict(), Field(allow_inf_nan=False)]


def _without_nulls(values: Any) -> Any:
    """Drop null fields, which mean the default."""
    if not isinstance(values, dict):
        return values
    return {key: value for key, value in values.items() if value is not None}


def without_unsupported(
    values: Any, unsupported: Mapping[str, tuple[Any, ...]], fields: Container[str]
) -> Any:
    """Drop unsupported fields whose values have no effect, and null fields.

    Args:
        values: The body of a request.
        unsupported: Unsupported fields, with the values that have no effect.
        fields: Supported fields.

    Raises:
        ValueError: an unsupported field has an effect.
    """
    if not isinstance(values, dict):
        return values
    for field, harmless in unsupported.items():
        if field in values and values[field] not in harmless:
            raise ValueError(f"{field} is not supported")
    return {
        key: value
        for key, value in values.items()
        if key not in unsupported and (value is not None or key not in fields)
    }


class StreamOptions(BaseModel):
    """Options of a stream."""

    model_config = ConfigDict(extra="forbid")

    include_usage: StrictBool = False
    include_obfuscation: StrictBool = False
    """Has no effect: pieces are never padded to hide their lengths."""

    _given = model_validator(mode="before")(_without_nulls)


class CompletionRequest(BaseModel):
    """Body of a completion request."""

    model_config = ConfigDict(extra="forbid")

    model: StrictStr | None = None
    prompt: StrictStr | list[StrictStr] | list[StrictInt] | list[list[StrictInt]] = ""
    """A text or a list of token ids, or a list of either. Empty text: only the start token."""
    max_tokens: StrictInt = Field(16, ge=0, lt=2**31)
    min_tokens: StrictInt = Field(0, ge=0, lt=2**31)
    temperature: Number = Field(1.0, ge=0)
    top_p: Number = Field(1.0, ge=0, le=1)
    top_k: StrictInt = Field(0, ge=-1)
    """Sample from the k most likely tokens only; 0 and -1 allow all tokens."""
    frequency_penalty: Number = Field(0.0, ge=-2, le=2)
    presence_penalty: Number = Field(0.0, ge=-2, le=2)
    logit_bias: dict[StrictStr, Annotated[Number, Field(ge=-100, le=100)]] = {}
    """Bias added to the logit of each token, by token id."""
    n: StrictInt = Field(1, ge=1, le=128)
    best_of: StrictInt | None = Field(None, ge=1, le=128)
    """Number of texts to generate for each prompt; the n with the highest mean log-probability are
    returned. Default: n."""
    seed: StrictInt | None = Field(None, ge=-(2**63), lt=2**63)
    stop: Stop | list[Stop] | None = None
    """Texts that end the generation, at most 64. Checked after each token."""
    stop_token_ids: list[StrictInt] = []
    logprobs: StrictInt | None = Field(None, ge=0, le=20)
    echo: StrictBool = False
    stream: StrictBool = False
    stream_options: StreamOptions | None = None
    user: StrictStr | None = None
    """Identifier of the client's user. Accepted as in OpenAI's API, but has no effect."""
    neighbors: list[StrictStr] | list[list[StrictStr]] | None = None
    """Texts to use instead of retrieved neighbors: one list for all prompts, or one list each."""
    neighbor_credit: StrictBool = False
    """Also return the nats by which each neighbor lowers the loss of each new token. Costs one pass
    over the text for each neighbor, and one more."""
    retrieve: StrictBool = True
    """Retrieve neighbors. False: use only the neighbors given in the request, if any."""
    two_chunks: StrictBool | None = None
    """Make the prompt the first chunk, the answer the second. Default: the server's setting."""

    @model_validator(mode="before")
    @classmethod
    def _refuse_unsupported(cls, values: Any) -> Any:
        return without_unsupported(values, _UNSUPPORTED, cls.model_fields)

    @model_validator(mode="after")
    def _check(self) -> CompletionRequest:
        if self.prompt == []:
            raise ValueError("prompt is empty")
        if self.min_tokens > self.max_tokens:
            raise ValueError("min_tokens is more than max_tokens")
        if len(self.stop_strings) > _MOST_STOPS:
            raise ValueError(f"stop has {len(self.stop_strings)} texts, at most {_MOST_STOPS}")
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options needs stream")
        if self.num_texts < self.n:
            raise ValueError("best_of is less than n")
        if self.stream and self.num_texts > self.n:
            raise ValueError("best_of beyond n cannot be streamed")
        self._check_logit_bias()
        lists = self.neighbors if self._for_each_prompt else None
        if lists is not None and len(lists) != len(self.prompts):
            raise ValueError(f"neighbors has {len(lists)} lists for {len(self.prompts)} prompts")
        return self

    def _check_logit_bias(self) -> None:
        spelled: dict[int, str] = {}
        for token in self.logit_bias:
            if not _TOKEN_ID.fullmatch(token):
                raise ValueError(f"logit_bias has {token[:40]!r}, which is not a token id")
            other = spelled.setdefault(int(token), token)
            if other != token:
                raise ValueError(f"logit_bias has token {int(token)} twice: {other!r}, {token!r}")

    @property
    def num_texts(self) -> int:
        """Number of texts generated for each prompt."""
        return self.n if self.best_of is None else self.best_of

    @property
    def prompts(self) -> list[str] | list[list[int]]:
        """One entry per prompt."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if isinstance(self.prompt[0], int):
            return [self.prompt]  # type: ignore[list-item]
        return self.prompt  # type: ignore[return-value]

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """The strings that end a text."""
        if self.stop is None:
            return ()
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    @property
    def _for_each_prompt(self) -> bool:
        return bool(self.neighbors) and isinstance(self.neighbors[0], list)  # type: ignore[index]

    def neighbors_of(self, prompt: int) -> Sequence[str] | None:
        """The neighbors given for a prompt."""
        if self.neighbors is None:
            return None
        return self.neighbors[prompt] if self._for_each_prompt else self.neighbors  # type: ignore

    def generation_requests(self, tokens: Sequence[int]) -> list[GenerationRequest]:
        """Generation requests for one prompt: `num_texts` texts, without neighbors yet."""
        seed = secrets.randbits(62) if self.seed is None else self.seed
        stopping = StoppingOptions(
            self.max_tokens, self.min_tokens, tuple(self.stop_token_ids), self.stop_strings
        )
        biases = {int(token): value for token, value in self.logit_bias.items()}
        adjustments = LogitAdjustments(self.frequency_penalty, self.presence_penalty, biases)
        chosen_by_logprobs = self.num_texts > self.n
        return [
            GenerationRequest(
                tokens=tokens,
                sampling=SamplingOptions(
                    self.temperature, max(self.top_k, 0), self.top_p, (seed + number) % 2**64
                ),
                adjustments=adjustments,
                stopping=stopping,
                top_logprobs=self.logprobs or (0 if chosen_by_logprobs else self.logprobs),
                prompt_logprobs=self.echo and self.logprobs is not None,
                neighbor_credit=self.neighbor_credit,
            )
            for number in range(self.num_texts)
        ]


#: Possible prefixes of a validation message.
FIELDS = {*CompletionRequest.model_fields, *_UNSUPPORTED}


class Answer:
    """Builds the objects of one response, complete or as stream chunks.

    Args:
        request: The request.
        model_name: Name of the served model.
        tokenizer: The model's tokenizer.
        retriever: Describes neighbors by source and text; None without live retrieval.
        chunk_length: The model's chunk length.
        num_start_tokens: Number of tokens that the server added before each prompt.
        neighbors_cut: For each prompt, the number of given neighbors that were cut to fit; None if
            none were given.
    """

    def __init__(
        self,
        request: CompletionRequest,
        model_name: str,
        tokenizer: Tokenizer,
        retriever: Any,
        chunk_length: int,
        num_start_tokens: Sequence[int],
        neighbors_cut: Sequence[int | None],
    ) -> None:
        self._request, self._tokenizer, self._retriever = request, tokenizer, retriever
        self._chunk_length, self._num_start_tokens = chunk_length, num_start_tokens
        self._neighbors_cut = neighbors_cut
        self._head = {
            "id": f"cmpl-{secrets.token_hex(12)}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": model_name,
        }

    def whole(self, texts: Sequence[GeneratedText]) -> dict[str, Any]:
        """The response without streaming, from `num_texts` texts of each prompt."""
        size = self._request.num_texts
        choices: list[dict[str, Any]] = []
        for prompt, start in enumerate(range(0, len(texts), size)):
            for text in self._best(texts[start : start + size]):
                choice = self._choice(len(choices), prompt, text)
                choices.append(self.shape_choice(choice))
        return {**self._head, "choices": choices, "usage": self.usage(texts)}

    def _best(self, texts: Sequence[GeneratedText]) -> Sequence[GeneratedText]:
        if len(texts) == self._request.n:
            return texts
        best = sorted(texts, key=lambda text: text.mean_logprob, reverse=True)
        return best[: self._request.n]

    def choice_text(self, prompt: int, tokens: Sequence[int]) -> ChoiceText:
        """Start the text of a choice, before its first new token."""
        asked = self._request
        return ChoiceText(
            self._tokenizer,
            tokens,
            self._num_start_tokens[prompt],
            asked.echo,
            asked.stop_strings,
            asked.min_tokens,
        )

    def piece(
        self,
        index: int,
        piece: str,
        text: GeneratedText | None = None,
        logprobs: dict[str, Any] | None = None,
        neighbors: list[dict[str, Any]] | None = None,
    ) -> dict[str, Any]:
        """A stream chunk; with `text`, the last one of its choice."""
        choice = self._piece(index, piece, text, logprobs, neighbors)
        return {**self._head, "choices": [self.shape_piece(choice)]}

    def shape_piece(self, choice: dict[str, Any]) -> dict[str, Any]:
        """A choice of a stream chunk in the format of the response."""
        return choice

    def shape_choice(self, choice: dict[str, Any]) -> dict[str, Any]:
        """A whole choice in the format of the response."""
        return choice

    def _piece(
        self,
        index: int,
        piece: str,
        text: GeneratedText | None,
        logprobs: dict[str, Any] | None,
        neighbors: list[dict[str, Any]] | None = None,
    ) -> dict[str, Any]:
        reason = None if text is None else _FINISH_REASONS[text.finish_reason or "length"]
        choice = {"index": index, "text": piece, "logprobs": logprobs, "finish_reason": reason}
        if neighbors:
            choice["neighbors"] = neighbors
        cut = self._neighbors_cut[index // self._request.n]
        if text is not None and cut is not None:
            choice["neighbors_cut"] = cut
        if text is not None and self._request.neighbor_credit:
            choice["neighbor_credit"] = self._credit(index // self._request.n, text)
        return choice

    def last(self, texts: Sequence[GeneratedText]) -> dict[str, Any]:
        """The stream chunk with the usage."""
        return {**self._head, "choices": [], "usage": self.usage(texts)}

    def usage(self, texts: Sequence[GeneratedText]) -> dict[str, int]:
        """Numbers of prompt and completion tokens, including texts that are not returned."""
        read = sum(text.prompt_length for text in texts[:: self._request.num_texts])
        written = sum(len(text.new_tokens) for text in texts)
        return {
            "prompt_tokens": read,
            "completion_tokens": written,
            "total_tokens": read + written,
        }

    def _choice(self, index: int, prompt: int, text: GeneratedText) -> dict[str, Any]:
        growing = self.choice_text(prompt, text.tokens[: text.prompt_length])
        scored = self._request.logprobs is not None
        scores = text.logprobs if scored else [None] * len(text.new_tokens)
        for token, score in zip(text.new_tokens, scores, strict=True):
            growing.add(token, score)
        growing.finish()
        logprobs = None
        if scored:
            if self._request.echo:
                growing.score_prompt(text.prompt_logprobs)
            logprobs = growing.logprobs([*growing.take_prompt_tokens(), *growing.take_tokens(True)])
        choice = self._piece(index, growing.text, text, logprobs)
        choice["neighbors"] = self.neighbors(text)
        return choice

    def _credit(self, prompt: int, text: GeneratedText) -> dict[str, Any] | None:
        """Credit of the neighbors for each new token that is shown; None without neighbors.

        `chunk` is the number of the chunk whose neighbors the model read for the token, and `gain`
        has an entry for each of them, missing ones included.
        """
        if text.neighbor_credit is None:
            return None
        growing = self.choice_text(prompt, text.tokens[: text.prompt_length])
        for token in text.new_tokens:
            growing.add(token)
        growing.finish()
        placed = growing.take_tokens(ended=True)
        return {
            "tokens": [token.text for token in placed],
            "text_offset": [token.offset for token in placed],
            "chunk": [text.chunk_read_for(token.place, self._chunk_length) for token in placed],
            "gain": text.neighbor_credit[[token.place for token in placed]].tolist(),
        }

    def neighbors(
        self, text: GeneratedText, first: int = 0, end: int | None = None
    ) -> list[dict[str, Any]]:
        """Chunks from number `first` on with their neighbors: the query and the retrieved texts.

        Retrieved neighbors have a source, a distance and a continuation.
        """
        places = text.chunks(self._chunk_length)
        return [
            {
                "chunk": number,
                "text": self._tokenizer.detokenize(
                    text.tokens[places[number].start : places[number].stop]
                ),
                "neighbors": self._described(text, number),
            }
            for number in range(first, len(text.neighbors) if end is None else end)
        ]

    def _described(self, text: GeneratedText, number: int) -> list[dict[str, Any]]:
        found = text.neighbors[number]
        if found.ids is not None and self._retriever is not None:
            return [
                {**vars(one), "source": one.source} for one in self._retriever.describe(found)[0]
            ]
        rows = zip(found.tokens[0], found.mask[0], strict=True)
        return [
            {"text": self._tokenizer.detokenize(tokens[~mask].tolist()), "source": "given"}
            for tokens, mask in rows
            if not mask.all()
        ]


def error_body(
    message: str, kind: str, param: str | None = None, code: str | None = None
) -> dict[str, Any]:
    """An error in OpenAI's format."""
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


#: The event that ends a stream.
DONE: Literal["[DONE]"] = "[DONE]"
