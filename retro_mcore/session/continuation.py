"""Continuing prompts with a loaded model: texts in, texts with their neighbors out."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from retro_mcore.distributed import get_rank
from retro_mcore.errors import RetroError, raise_problems
from retro_mcore.inference.generation import GeneratedText, TokenCallback, continue_checked
from retro_mcore.inference.growing_text import new_text
from retro_mcore.inference.prompt_files import Prompt
from retro_mcore.inference.requests import GenerationRequest, check_request, require_new_tokens
from retro_mcore.json_text import json_line
from retro_mcore.project.atomic import atomic_write
from retro_mcore.retrieval.neighbors import SameNeighbors
from retro_mcore.session.generation import GenerationModel
from retro_mcore.session.loading import warn_beyond_training

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Continuation:
    """A continued prompt.

    Attributes:
        prompt: The prompt as given.
        text: What the model added.
        generated: Tokens, neighbors, log-probabilities and why it stopped.
        neighbors_cut: Number of given neighbors that are longer than the model reads; None if none
            were given with the prompt.
    """

    prompt: str
    text: str
    generated: GeneratedText
    neighbors_cut: int | None = None


def check_prompts(
    loaded: GenerationModel, prompts: Sequence[Prompt], like: GenerationRequest
) -> list[GenerationRequest]:
    """Reject prompts that cannot be continued, all of them in one error.

    Texts that may become longer than the training samples, and given neighbors that are longer
    than the model reads, are logged as warnings.

    Args:
        loaded: The model.
        prompts: The prompts.
        like: When and how each is continued; prompt i draws with its seed + i.

    Returns:
        The prompts' requests.

    Raises:
        RetroError: naming the prompts, with file and line.
    """
    problems: list[RetroError] = []
    tokens = loaded.tokenize([prompt.text for prompt in prompts])
    like = replace(like, neighbors=loaded.search, two_chunks=loaded.two_chunks)
    requests = like.for_prompts(tokens)
    for number, prompt in enumerate(prompts):
        try:
            if prompt.neighbors is not None:
                given = loaded.given(prompt.neighbors)
                requests[number] = replace(requests[number], neighbors=given)
            check_request(requests[number], loaded.model, loaded.tokenizer, loaded.window)
        except RetroError as error:
            problems.append(prompt.problem(error))
    raise_problems(problems)
    require_new_tokens(like)
    longest = max(map(len, tokens)) + like.stopping.max_new_tokens
    warn_beyond_training(loaded.arguments, longest, "prompts and answers")
    _report_cut_neighbors(loaded, prompts, requests)
    return requests


def _report_cut_neighbors(
    loaded: GenerationModel, prompts: Sequence[Prompt], requests: Sequence[GenerationRequest]
) -> None:
    given = sum(len(prompt.neighbors) for prompt in prompts if prompt.neighbors is not None)
    cut = sum(_num_cut(request) or 0 for request in requests)
    if cut and get_rank() == 0:
        message = f"{cut} of {given} given neighbors are cut to the"
        message = f"{message} {loaded.retrieved_length} tokens that the model reads of each"
        _LOG.warning("%s", message)


def _num_cut(request: GenerationRequest) -> int | None:
    """How many given neighbors are longer than the model reads; None if none were given."""
    source = request.neighbors
    return source.num_cut if isinstance(source, SameNeighbors) else None


def continue_prompts(
    loaded: GenerationModel,
    prompts: Sequence[Prompt],
    requests: Sequence[GenerationRequest],
    micro_batch_size: int = 8,
    on_token: TokenCallback | None = None,
) -> Iterator[Continuation]:
    """Continue prompts in batches, and yield each as its batch is done; all ranks iterate.

    Args:
        loaded: The model.
        prompts: The prompts.
        requests: What `check_prompts` returned for them.
        micro_batch_size: Prompts that are continued together.
        on_token: Called with a prompt's place in its batch and each new token.

    Raises:
        RetroError: a source of neighbors failed, or the logits are not numbers.
    """
    for start in range(0, len(prompts), micro_batch_size):
        places = slice(start, start + micro_batch_size)
        batch = requests[places]
        texts = continue_checked(loaded.model, loaded.tokenizer, batch, on_token=on_token)
        for prompt, request, text in zip(prompts[places], batch, texts, strict=True):
            added = new_text(loaded.tokenizer, text)
            yield Continuation(prompt.text, added, text, _num_cut(request))


def write_continuations(
    path: Path, results: Sequence[Continuation], loaded: GenerationModel
) -> None:
    """Write a .jsonl file with one object per prompt; call it on one rank."""
    with atomic_write(path) as file:
        lines = [json_line(_record(result, loaded)) for result in results]
        file.write_text("".join(line + "\n" for line in lines), encoding="utf-8")


def _record(result: Continuation, loaded: GenerationModel) -> dict[str, Any]:
    text = result.generated
    record: dict[str, Any] = {
        "prompt": result.prompt,
        "text": result.text,
        "finish_reason": text.finish_reason,
        "tokens": text.new_tokens,
    }
    if text.logprobs:
        record["logprobs"] = [entry._asdict() for entry in text.logprobs]
    if result.neighbors_cut is not None:
        record["neighbors_cut"] = result.neighbors_cut
    if loaded.retriever is not None and all(found.ids is not None for found in text.neighbors):
        record["neighbors"] = [
            [vars(one) for one in loaded.retriever.describe(found)[0]] for found in text.neighbors
        ]
    return record
