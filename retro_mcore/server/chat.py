"""OpenAI-compatible chat: requests and responses, on top of completions.

Fields beyond OpenAI's are those of completions. Only text is supported: fields of tools, images,
audio and other formats are rejected by name, unless their value has no effect.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictInt, StrictStr, model_validator

from retro_mcore.inference.texts import GeneratedText
from retro_mcore.server.completions import (
    Answer,
    CompletionRequest,
    Number,
    Stop,
    StreamOptions,
    without_unsupported,
)

#: Unsupported OpenAI fields, with values that have no effect and are accepted.
_UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "audio": (None,),
    "function_call": (None, "none", "auto"),
    "functions": (None, []),
    "metadata": (None, {}),
    "modalities": (None, ["text"]),
    "parallel_tool_calls": (None, True, False),
    "prediction": (None,),
    "prompt_cache_key": (None,),
    "reasoning_effort": (None, "none"),
    "response_format": (None, {"type": "text"}),
    "safety_identifier": (None,),
    "service_tier": (None, "auto", "default"),
    "store": (None, False),
    "tool_choice": (None, "none", "auto"),
    "tools": (None, []),
    "verbosity": (None, "medium"),
    "web_search_options": (None,),
}
_ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
_MESSAGE_KEYS = ("role", "content")
#: Keys of a message that have no effect if they are empty.
_EMPTY_KEYS = ("audio", "annotations", "function_call", "name", "refusal", "tool_calls")


class ChatRequest(BaseModel):
    """Body of a chat request."""

    model_config = ConfigDict(extra="forbid")

    model: StrictStr | None = None
    messages: list[dict[str, Any]] = Field(min_length=1)
    """The conversation: role (system, developer, user, assistant) and content (text) of each."""
    max_completion_tokens: StrictInt | None = Field(None, ge=1, lt=2**31)
    """Maximum number of new tokens. Default: as many as the window and the server allow."""
    max_tokens: StrictInt | None = Field(None, ge=1, lt=2**31)
    """Older name of max_completion_tokens."""
    min_tokens: StrictInt = Field(0, ge=0, lt=2**31)
    temperature: Number = Field(1.0, ge=0)
    top_p: Number = Field(1.0, ge=0, le=1)
    top_k: StrictInt = Field(0, ge=-1)
    """Sample from the k most likely tokens only; 0 and -1 allow all tokens."""
    frequency_penalty: Number = Field(0.0, ge=-2, le=2)
    presence_penalty: Number = Field(0.0, ge=-2, le=2)
    logit_bias: dict[StrictStr, Annotated[Number, Field(ge=-100, le=100)]] = {}
    n: StrictInt = Field(1, ge=1, le=128)
    seed: StrictInt | None = Field(None, ge=-(2**63), lt=2**63)
    stop: Stop | list[Stop] | None = None
    """Texts that end the reply, at most 64. Checked after each token."""
    stop_token_ids: list[StrictInt] = []
    logprobs: StrictBool = False
    top_logprobs: StrictInt | None = Field(None, ge=0, le=20)
    stream: StrictBool = False
    stream_options: StreamOptions | None = None
    user: StrictStr | None = None
    """Identifier of the client's user. Accepted as in OpenAI's API, but has no effect."""
    neighbors: list[StrictStr] | None = None
    """Texts to use instead of retrieved neighbors."""
    neighbor_credit: StrictBool = False
    """Also return the nats by which each neighbor lowers the loss of each new token."""
    retrieve: StrictBool = True
    """Retrieve neighbors. False: use only the neighbors given in the request, if any."""
    two_chunks: StrictBool | None = None
    """Make the prompt the first chunk, the reply the second. Default: the server's setting."""

    @model_validator(mode="before")
    @classmethod
    def _refuse_unsupported(cls, values: Any) -> Any:
        return without_unsupported(values, _UNSUPPORTED, cls.model_fields)

    @model_validator(mode="after")
    def _check(self) -> ChatRequest:
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs")
        given = {self.max_tokens, self.max_completion_tokens} - {None}
        if len(given) > 1:
            raise ValueError("max_tokens and max_completion_tokens differ")
        self.messages = [_message(number, each) for number, each in enumerate(self.messages)]
        return self

    @property
    def most_tokens(self) -> int | None:
        """Maximum number of new tokens, if the request says it."""
        return self.max_completion_tokens or self.max_tokens

    def completion(self, prompt: list[int], max_tokens: int) -> dict[str, Any]:
        """Fields of the completion request for the prompt that the messages are written as."""
        shared = CompletionRequest.model_fields.keys() - {"prompt", "max_tokens", "logprobs"}
        values = {name: value for name, value in self if name in shared}
        values |= {"prompt": prompt, "max_tokens": max_tokens}
        if self.logprobs:
            values["logprobs"] = self.top_logprobs or 0
        return values


#: Possible prefixes of a validation message.
CHAT_FIELDS = {*ChatRequest.model_fields, *_UNSUPPORTED}


def _message(number: int, message: Mapping[str, Any]) -> dict[str, str]:
    """A message as role and text.

    Raises:
        ValueError: it is none, or holds more than text.
    """
    role = message.get("role")
    if not isinstance(role, str) or role not in _ROLES:
        raise ValueError(
            f"messages[{number}] has role {str(role)[:40]!r}; supported are {', '.join(_ROLES)}"
        )
    for key, value in message.items():
        if key not in _MESSAGE_KEYS and not (key in _EMPTY_KEYS and value in (None, "", [], {})):
            raise ValueError(f"messages[{number}] has {key[:40]!r}, which is not supported")
    return {"role": _ROLES[role], "content": _content(number, message.get("content"))}


def _content(number: int, content: Any) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, list) or not content:
        raise ValueError(f"messages[{number}] has no content: expected a text")
    texts = []
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind != "text" or not isinstance(part.get("text"), str):
            raise ValueError(
                f"messages[{number}] has a part of type {str(kind)[:40]!r}; only text is supported"
            )
        texts.append(part["text"])
    return "\n".join(texts)


class ChatAnswer(Answer):
    """Builds the objects of one chat response."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._head["id"] = f"chatcmpl-{secrets.token_hex(12)}"
        self._head["object"] = (
            "chat.completion.chunk" if self._request.stream else "chat.completion"
        )
        self._begun: set[int] = set()
        self._sources: dict[int, dict[str, None]] = {}

    def shape_piece(self, choice: dict[str, Any]) -> dict[str, Any]:
        """A choice of a stream chunk; the first one of each choice names the role."""
        text, index = choice.pop("text"), choice["index"]
        delta = {} if not text and index in self._begun else {"content": text}
        if index not in self._begun:
            delta["role"] = "assistant"
            self._begun.add(index)
        sources = self._sources.setdefault(index, {})
        sources |= dict.fromkeys(_sources(choice))
        shaped = {"index": index, "delta": delta, **choice, "logprobs": _logprobs(choice)}
        if choice["finish_reason"] is not None:
            shaped["sources"] = list(sources)
        return shaped

    def shape_choice(self, choice: dict[str, Any]) -> dict[str, Any]:
        """A whole choice."""
        message = {"role": "assistant", "content": choice.pop("text"), "refusal": None}
        return {
            **choice,
            "message": message,
            "logprobs": _logprobs(choice),
            "sources": list(dict.fromkeys(_sources(choice))),
        }

    def piece(self, index: int, piece: str, text: GeneratedText | None = None, *args: Any) -> Any:
        """A stream chunk, as OpenAI's with the usage last."""
        chunk = super().piece(index, piece, text, *args)
        options = self._request.stream_options
        return {**chunk, "usage": None} if options and options.include_usage else chunk


def _sources(choice: Mapping[str, Any]) -> list[str]:
    """Sources of the retrieved neighbors, in the order in which the model read them."""
    chunks = choice.get("neighbors") or []
    return [str(one["source"]) for chunk in chunks for one in chunk["neighbors"]]


def _logprobs(choice: Mapping[str, Any]) -> dict[str, Any] | None:
    """Log-probabilities of completions in the format of chats."""
    found = choice["logprobs"]
    if found is None:
        return None
    rows = zip(found["tokens"], found["token_logprobs"], found["top_logprobs"], strict=True)
    content = [
        {
            **_token(token, logprob),
            "top_logprobs": [_token(name, value) for name, value in (top or {}).items()],
        }
        for token, logprob, top in rows
    ]
    return {"content": content, "refusal": None}


def _token(text: str, logprob: float) -> dict[str, Any]:
    is_text = not text.startswith("token_id:")  # no whole character
    return {"token": text, "logprob": logprob, "bytes": list(text.encode()) if is_text else None}
