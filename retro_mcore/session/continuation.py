"""Continuing prompts with a loaded model: texts in, texts with their neighbors out."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from retro_mcore.distributed import get_rank
from retro_mcore.errors import RetroError, raise_problems
from retro_mcore.inference.generation import GeneratedText, TokenCallback, generate
from retro_mcore.inference.growing_text import new_text
from retro_mcore.inference.prompt_files import Prompt
from retro_mcore.inference.requests import GenerationRequest, StoppingOptions, check_request
from retro_mcore.inference.sampling import SamplingOptions
from retro_mcore.project.atomic import atomic_write
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
    loaded: GenerationModel, prompts: Sequence[Prompt], stopping: StoppingOptions
) -> None:
    """Reject prompts that cannot be continued, all of them in one error.

    Texts that may become longer than the training samples, and given neighbors that are longer
    than the model reads, are logged as warnings.

    Raises:
        RetroError: naming the prompts, with file and line.
    """
    problems: list[RetroError] = []
    tokens = loaded.tokenize([prompt.text for prompt in prompts])
    for number, (prompt, ids) in enumerate(zip(prompts, tokens, strict=True)):
        try:
            source = loaded.search if prompt.neighbors is None else loaded.given(prompt.neighbors)
            request = GenerationRequest(
                tokens=ids, stopping=stopping, neighbors=source, number=number
            )
            check_request(request, loaded.model, loaded.tokenizer, loaded.window)
        except RetroError as error:
            problems.append(prompt.problem(error))
    raise_problems(problems)
    longest = max(map(len, tokens)) + stopping.max_new_tokens
    warn_beyond_training(loaded.arguments, longest, "prompts and answers")
    _report_cut_neighbors(loaded, prompts)


def _report_cut_neighbors(loaded: GenerationModel, prompts: Sequence[Prompt]) -> None:
    given = [prompt.neighbors for prompt in prompts if prompt.neighbors is not None]
    cut = sum(loaded.given(texts).num_cut for texts in given)
    if cut and get_rank() == 0:
        message = f"{cut} of {sum(map(len, given))} given neighbors are cut to the"
        message = f"{message} {loaded.retrieved_length} tokens that the model reads of each"
        _LOG.warning("%s", message)


def continue_prompts(
    loaded: GenerationModel,
    prompts: Sequence[Prompt],
    *,
    stopping: StoppingOptions,
    sampling: SamplingOptions,
    top_logprobs: int | None = None,
    micro_batch_size: int = 8,
    on_token: TokenCallback | None = None,
) -> Iterator[Continuation]:
    """Continue prompts in batches, and yield each as its batch is done; all ranks iterate.

    Args:
        loaded: The model.
        prompts: Prompts that `check_prompts` has accepted.
        stopping: When a text ends.
        sampling: How tokens are chosen; prompt i draws with seed + i.
        top_logprobs: Keep the log-probability of each new token (0), and of the n likeliest (n).
        micro_batch_size: Prompts that are continued together.
        on_token: Called with a prompt's place in its batch and each new token.

    Raises:
        RetroError: a source of neighbors failed, or the logits are not numbers.
    """
    for start in range(0, len(prompts), micro_batch_size):
        batch = prompts[start : start + micro_batch_size]
        given = [None if p.neighbors is None else loaded.given(p.neighbors) for p in batch]
        texts = generate(
            loaded.model,
            loaded.tokenizer,
            loaded.tokenize([prompt.text for prompt in batch]),
            max_new_tokens=stopping.max_new_tokens,
            min_new_tokens=stopping.min_new_tokens,
            stop_tokens=stopping.stop_tokens,
            stop_strings=stopping.stop_strings,
            sampling=replace(sampling, seed=sampling.seed + start),
            neighbors=[loaded.search if source is None else source for source in given],
            two_chunks=loaded.two_chunks,
            top_logprobs=top_logprobs,
            on_token=on_token,
        )
        for prompt, source, text in zip(batch, given, texts, strict=True):
            cut = None if source is None else source.num_cut
            yield Continuation(prompt.text, new_text(loaded.tokenizer, text), text, cut)


def write_continuations(
    path: Path, results: Sequence[Continuation], loaded: GenerationModel
) -> None:
    """Write a .jsonl file with one object per prompt; call it on one rank."""
    with atomic_write(path) as file:
        lines = [json.dumps(_record(result, loaded), ensure_ascii=False) for result in results]
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
