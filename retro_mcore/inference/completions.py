"""OpenAI's completions in our terms: what a client may ask, and what it is answered.

Fields beyond OpenAI's: top_k, min_tokens, stop_token_ids, neighbors, retrieve, two_chunks. A field
that is not supported is refused by its name, unless its value asks for nothing.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Sequence
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictInt, StrictStr, model_validator

from retro_mcore.inference.growing_text import GrowingText, new_text, prompt_text
from retro_mcore.inference.requests import GenerationRequest, StoppingOptions
from retro_mcore.inference.sampling import SamplingOptions
from retro_mcore.inference.texts import GeneratedText, TokenLogprobs

#: OpenAI's fields that we do not have, with the values that ask for nothing.
_UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "best_of": (None, 1),
    "frequency_penalty": (None, 0),
    "presence_penalty": (None, 0),
    "logit_bias": (None, {}),
    "suffix": (None, ""),
}
_FINISH_REASONS = {"eod": "stop", "stop": "stop", "length": "length", "dropped": "stop"}


class StreamOptions(BaseModel):
    """What a stream tells besides the text."""

    model_config = ConfigDict(extra="forbid")

    include_usage: StrictBool = False


class CompletionRequest(BaseModel):
    """The body of a request for completions."""

    model_config = ConfigDict(extra="forbid")

    model: StrictStr | None = None
    prompt: StrictStr | list[StrictStr] | list[StrictInt] | list[list[StrictInt]]
    max_tokens: StrictInt = Field(16, ge=0)
    min_tokens: StrictInt = Field(0, ge=0)
    temperature: float = Field(1.0, ge=0, allow_inf_nan=False)
    top_p: float = Field(1.0, ge=0, le=1)
    top_k: StrictInt = Field(0, ge=0)
    n: StrictInt = Field(1, ge=1, le=128)
    seed: StrictInt | None = Field(None, ge=0, lt=2**63)
    stop: StrictStr | list[StrictStr] | None = None
    stop_token_ids: list[StrictInt] = []
    logprobs: StrictInt | None = Field(None, ge=0, le=20)
    echo: StrictBool = False
    stream: StrictBool = False
    stream_options: StreamOptions | None = None
    user: StrictStr | None = None
    """Names the client's user; it changes nothing, as at OpenAI."""
    neighbors: list[StrictStr] | list[list[StrictStr]] | None = None
    """Texts to read as neighbors instead of retrieved ones: for all prompts, or a list for each."""
    retrieve: StrictBool = True
    """False: no neighbors, but for those given."""
    two_chunks: StrictBool | None = None
    """The prompt is the first chunk, the answer the second; None: as the server was started."""

    @model_validator(mode="before")
    @classmethod
    def _refuse_unsupported(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        for field, harmless in _UNSUPPORTED.items():
            if field in values and values[field] not in harmless:
                raise ValueError(f"{field} is not supported")
        return {key: value for key, value in values.items() if key not in _UNSUPPORTED}

    @model_validator(mode="after")
    def _check(self) -> CompletionRequest:
        if self.prompt == []:
            raise ValueError("prompt is empty")
        if self.max_tokens == 0 and not (self.echo and self.logprobs is not None):
            raise ValueError("max_tokens is 0, which needs echo and logprobs")
        if self.min_tokens > self.max_tokens:
            raise ValueError("min_tokens is more than max_tokens")
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options needs stream")
        lists = self.neighbors if self._for_each_prompt else None
        if lists is not None and len(lists) != len(self.prompts):
            raise ValueError(f"neighbors has {len(lists)} lists for {len(self.prompts)} prompts")
        return self

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
        """What to generate for one prompt: `n` texts, without neighbors yet."""
        seed = secrets.randbits(62) if self.seed is None else self.seed
        stopping = StoppingOptions(
            self.max_tokens, self.min_tokens, tuple(self.stop_token_ids), self.stop_strings
        )
        return [
            GenerationRequest(
                tokens=tokens,
                sampling=SamplingOptions(self.temperature, self.top_k, self.top_p, seed + number),
                stopping=stopping,
                top_logprobs=self.logprobs,
                prompt_logprobs=self.echo and self.logprobs is not None,
            )
            for number in range(self.n)
        ]


#: What a message about a mistake may begin with.
FIELDS = {*CompletionRequest.model_fields, *_UNSUPPORTED}


class Answer:
    """Builds the objects of one answer, whole or as a stream's chunks.

    Args:
        request: What was asked.
        model_name: The name of the model that is served.
        tokenizer: Its tokenizer.
        retriever: Describes neighbors by source and text; None without live retrieval.
        chunk_length: The model's.
    """

    def __init__(
        self,
        request: CompletionRequest,
        model_name: str,
        tokenizer: Any,
        retriever: Any,
        chunk_length: int,
    ) -> None:
        self._request, self._tokenizer, self._retriever = request, tokenizer, retriever
        self._chunk_length = chunk_length
        self._head = {
            "id": f"cmpl-{secrets.token_hex(12)}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": model_name,
        }

    def whole(self, texts: Sequence[GeneratedText]) -> dict[str, Any]:
        """The answer to a request without `stream`."""
        choices = [self._choice(index, text) for index, text in enumerate(texts)]
        return {**self._head, "choices": choices, "usage": self.usage(texts)}

    def piece(
        self,
        index: int,
        piece: str,
        text: GeneratedText | None = None,
        logprobs: dict[str, Any] | None = None,
        neighbors: list[dict[str, Any]] | None = None,
    ) -> dict[str, Any]:
        """A chunk of a stream; with `text` the last one of its choice."""
        reason = None if text is None else _FINISH_REASONS[text.finish_reason or "length"]
        choice = {"index": index, "text": piece, "logprobs": logprobs, "finish_reason": reason}
        if neighbors:
            choice["neighbors"] = neighbors
        return {**self._head, "choices": [choice]}

    def last(self, texts: Sequence[GeneratedText]) -> dict[str, Any]:
        """The chunk of a stream that tells the usage."""
        return {**self._head, "choices": [], "usage": self.usage(texts)}

    def usage(self, texts: Sequence[GeneratedText]) -> dict[str, int]:
        """Tokens read and written."""
        read = sum(text.prompt_length for text in texts[:: self._request.n])
        written = sum(len(text.new_tokens) for text in texts)
        return {
            "prompt_tokens": read,
            "completion_tokens": written,
            "total_tokens": read + written,
        }

    def _choice(self, index: int, text: GeneratedText) -> dict[str, Any]:
        prompt = self.prompt_of(text) if self._request.echo else ""
        choice = self.piece(index, prompt + new_text(self._tokenizer, text), text)["choices"][0]
        if self._request.logprobs is not None:
            choice["logprobs"] = self._all_logprobs(text)
        choice["neighbors"] = self.neighbors(text)
        return choice

    def prompt_of(self, text: GeneratedText) -> str:
        """The prompt as text, for `echo`."""
        return prompt_text(self._tokenizer, text.tokens, text.prompt_length)

    def _all_logprobs(self, text: GeneratedText) -> dict[str, Any]:
        if not self._request.echo:
            return self.logprobs(text.logprobs, text.tokens[: text.prompt_length], 0)
        # The first token follows nothing.
        first = TokenLogprobs(text.tokens[0], float("nan"), [])
        entries = [first, *text.prompt_logprobs, *text.logprobs]
        result = self.logprobs(entries, [], 0)
        result["token_logprobs"][0] = result["top_logprobs"][0] = None
        return result

    def logprobs(
        self, entries: Sequence[TokenLogprobs], before: Sequence[int], offset: int
    ) -> dict[str, Any]:
        """Log-probabilities in OpenAI's shape.

        Args:
            entries: Of consecutive tokens.
            before: The tokens that precede.
            offset: The place of the first one in the text of the choice.
        """
        growing, offsets = GrowingText(self._tokenizer, before), []
        for entry in entries:
            offsets.append(offset + len(growing.text))
            growing.add(entry.token)
        name = self._tokenizer.detokenize
        return {
            "tokens": [name([entry.token]) for entry in entries],
            "token_logprobs": [entry.logprob for entry in entries],
            "top_logprobs": [
                {name([token]): value for token, value in entry.top} for entry in entries
            ],
            "text_offset": offsets,
        }

    def neighbors(self, text: GeneratedText, first: int = 0) -> list[dict[str, Any]]:
        """The chunks with neighbors from number `first` on: the query, and what was read with it.

        Neighbors that were searched have a source, a distance and a continuation.
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
            for number in range(first, len(text.neighbors))
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
    """An error in OpenAI's shape."""
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


#: The event that ends a stream.
DONE: Literal["[DONE]"] = "[DONE]"
