"""`generate`: continue prompts with a trained model and neighbors that are retrieved live."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from retro_mcore.cli.command import run_command
from retro_mcore.cli.generation_model import (
    GenerationModel,
    GenerationModelOptions,
    check_retrieval_flags,
    load_generation_model,
)
from retro_mcore.data.tokenizers.loading import Tokenizer
from retro_mcore.distributed import get_rank
from retro_mcore.errors import ConfigurationError, RetroError, raise_problems
from retro_mcore.inference.growing_text import SafeStream, new_text
from retro_mcore.inference.sampling import SamplingOptions
from retro_mcore.json_text import JsonError, has_surrogates, json_lines, parse_json
from retro_mcore.project.atomic import atomic_write
from retro_mcore.retrieval.retriever import Retriever

if TYPE_CHECKING:
    from retro_mcore.inference.generation import GeneratedText

_LOG = logging.getLogger(__name__)


@dataclass(kw_only=True)
class GenerateOptions(GenerationModelOptions):
    """Continue prompts with a trained model and neighbors that are retrieved live.

    The text streams to the terminal as it grows; several prompts are printed as they are done.
    """

    prompt: str | None = None
    """The text to continue."""
    neighbors: list[str] | None = None
    """With --prompt: texts that the model reads as the neighbors of every chunk, instead of
    retrieved ones."""
    prompt_file: str | None = None
    """Instead of --prompt: a text file that is one prompt, or a .jsonl file with {"prompt": …}
    and perhaps {"neighbors": […]} in each line."""
    output: str | None = None
    """Also write prompts, texts, neighbors and log-probabilities into this .jsonl file."""
    max_new_tokens: int = 64
    """Tokens to add, unless the text ends before."""
    min_new_tokens: int = 0
    """Tokens to add at least."""
    stop: list[str] | None = None
    """Strings that end a text."""
    stop_token_ids: list[int] | None = None
    """Tokens that end a text, besides the tokenizer's EOD."""
    temperature: float = 1.0
    """Divides the logits; 0 takes the most likely token."""
    top_k: int = 0
    """Draw from the k most likely tokens; 0: from all."""
    top_p: float = 1.0
    """Draw from the most likely tokens that make up this much probability; 1: from all, 0: take the
    most likely one."""
    seed: int = 1234
    """Seed of the draws; prompt i draws with seed + i."""
    logprobs: int | None = None
    """Print the log-probability of each new token, and of the n likeliest in its place."""
    micro_batch_size: int = 8
    """Prompts that are continued together."""
    show_neighbors: bool = False
    """Print what was retrieved, with distances and source documents."""


@dataclass(frozen=True)
class Prompt:
    """What to continue.

    Attributes:
        text: The prompt.
        neighbors: The texts to read instead of retrieved neighbors; None: as the options say.
        source: The file and line that it comes from, if any.
    """

    text: str
    neighbors: Sequence[str] | None = None
    source: str | None = field(default=None, compare=False)

    def problem(self, error: RetroError) -> RetroError:
        """An error of this prompt, with where it stands."""
        if self.source is None:
            return error
        return type(error)(f"{self.source}: {error.subject}", error.found, error.mend)


@dataclass(frozen=True)
class Continuation:
    """One prompt's result.

    Attributes:
        prompt: The prompt as given.
        text: What the model added.
        generated: Tokens, neighbors, log-probabilities and why it stopped.
        neighbors_cut: Of the neighbors that were given with the prompt, those that the model reads
            the beginning of; None if none were given.
    """

    prompt: str
    text: str
    generated: GeneratedText
    neighbors_cut: int | None = None


def generate(options: GenerateOptions) -> list[Continuation]:
    """Continue every prompt, print it on rank 0, and return the results in order.

    Raises:
        RetroError: a flag, the project or the checkpoint is at fault.
    """
    check_retrieval_flags(options, neighbors_given=options.neighbors is not None)
    prompts = _read_prompts(options)
    sampling = SamplingOptions(options.temperature, options.top_k, options.top_p, options.seed)
    loaded = load_generation_model(options)
    _check_prompts(loaded, prompts, options)
    results: list[Continuation] = []
    for start in range(0, len(prompts), options.micro_batch_size):
        batch = prompts[start : start + options.micro_batch_size]
        streams = len(prompts) == 1 and get_rank() == 0
        printer = _Printer(loaded, batch[0].text, options) if streams else None
        shifted = replace(sampling, seed=sampling.seed + start)
        for prompt, text in zip(
            batch, _generate(loaded, batch, shifted, options, printer), strict=True
        ):
            cut = None if prompt.neighbors is None else loaded.given(prompt.neighbors).num_cut
            results.append(Continuation(prompt.text, new_text(loaded.tokenizer, text), text, cut))
            if get_rank() == 0:
                _print_result(results[-1], loaded, options, printer)
    if options.output is not None and get_rank() == 0:
        _write(Path(options.output), results, loaded)
    return results


def _check_prompts(
    loaded: GenerationModel, prompts: Sequence[Prompt], options: GenerateOptions
) -> None:
    """Refuse the prompts that cannot be continued before any is: all of them are told."""
    from retro_mcore.inference.requests import GenerationRequest, StoppingOptions, check_request
    from retro_mcore.session import warn_beyond_training

    stopping = StoppingOptions(
        options.max_new_tokens,
        options.min_new_tokens,
        tuple(options.stop_token_ids or ()),
        tuple(options.stop or ()),
    )
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
    longest = max(map(len, tokens)) + options.max_new_tokens
    warn_beyond_training(loaded.arguments, longest, "prompts and answers")
    _tell_cut_neighbors(loaded, prompts)


def _tell_cut_neighbors(loaded: GenerationModel, prompts: Sequence[Prompt]) -> None:
    given = [prompt.neighbors for prompt in prompts if prompt.neighbors is not None]
    cut = sum(loaded.given(texts).num_cut for texts in given)
    if cut and get_rank() == 0:
        message = f"{cut} of {sum(map(len, given))} given neighbors are cut to the"
        message = f"{message} {loaded.retrieved_length} tokens that the model reads of each"
        _LOG.warning("%s", message)


def _generate(
    loaded: GenerationModel,
    prompts: Sequence[Prompt],
    sampling: SamplingOptions,
    options: GenerateOptions,
    printer: _Printer | None,
) -> list[GeneratedText]:
    from retro_mcore.inference.generation import generate

    return generate(
        loaded.model,
        loaded.tokenizer,
        loaded.tokenize([prompt.text for prompt in prompts]),
        max_new_tokens=options.max_new_tokens,
        min_new_tokens=options.min_new_tokens,
        stop_tokens=options.stop_token_ids or (),
        stop_strings=options.stop or (),
        sampling=sampling,
        neighbors=[
            loaded.search if prompt.neighbors is None else loaded.given(prompt.neighbors)
            for prompt in prompts
        ],
        two_chunks=options.two_chunks,
        top_logprobs=options.logprobs,
        on_token=None if printer is None else printer.add,
    )


class _Printer:
    """Prints a text as it grows, from the prompt on."""

    def __init__(self, loaded: GenerationModel, prompt: str, options: GenerateOptions) -> None:
        tokens = loaded.tokenizer.tokenize(prompt)
        self._stream = SafeStream(
            loaded.tokenizer, tokens, options.stop or (), options.min_new_tokens
        )
        print(prompt, end="", flush=True)

    def add(self, prompt: int, token: int) -> None:
        """Print what `token` adds; a character of several tokens waits for its last one."""
        print(self._stream.add(token), end="", flush=True)

    def finish(self) -> None:
        """Print what still waits, and end the line."""
        print(self._stream.finish())


def _read_prompts(options: GenerateOptions) -> list[Prompt]:
    if (options.prompt is None) == (options.prompt_file is None):
        raise ConfigurationError(
            "--prompt and --prompt-file",
            "neither given" if options.prompt is None else "both given",
            "Give one of them",
        )
    if options.micro_batch_size < 1:
        raise ConfigurationError(
            "--micro-batch-size", str(options.micro_batch_size), "Give at least 1"
        )
    if options.prompt is not None:
        if not options.prompt:
            raise ConfigurationError("--prompt", "empty", "Give some text to continue")
        return [Prompt(options.prompt, options.neighbors)]
    if options.neighbors is not None:
        raise ConfigurationError(
            "--neighbors", "given with --prompt-file", "Write them into the file's lines"
        )
    return read_prompt_file(Path(str(options.prompt_file)))


def read_prompt_file(path: Path) -> list[Prompt]:
    """The prompts of a file: one per line of a .jsonl file, else the whole text is one.

    Raises:
        ConfigurationError: the file is missing, empty or malformed; names the line.
    """
    subject = f"--prompt-file {path}"
    try:
        if path.suffix == ".jsonl":
            lines = json_lines(path.read_bytes())
            prompts = [_prompt_of_line(f"{subject}:{n}", line) for n, line in lines]
        else:
            prompts = [Prompt(path.read_text(encoding="utf-8-sig").rstrip("\n"))]
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError(subject, str(error), "Name a UTF-8 file") from error
    if not any(prompt.text for prompt in prompts):
        raise ConfigurationError(subject, "no prompt", "Write some text to continue")
    return prompts


def _prompt_of_line(subject: str, line: bytes) -> Prompt:
    mend = 'Each line is an object {"prompt": "some text"}, perhaps with {"neighbors": ["text"]}'
    try:
        value = parse_json(line, allow_nan=True, unique_keys=True)
    except JsonError as error:
        raise ConfigurationError(subject, f"invalid JSON ({error.in_line})", mend) from error
    if has_surrogates(value):
        found = "half of a surrogate pair (such as \\ud83d), which is no character"
        raise ConfigurationError(subject, found, "Mend the text")
    prompt = value.get("prompt") if isinstance(value, dict) else None
    if not isinstance(prompt, str) or not prompt:
        raise ConfigurationError(subject, "no text under the key 'prompt'", mend)
    neighbors = value.get("neighbors")
    is_list = isinstance(neighbors, list) and all(isinstance(one, str) for one in neighbors)
    if neighbors is not None and not is_list:
        raise ConfigurationError(subject, "'neighbors' is not a list of texts", mend)
    return Prompt(prompt, neighbors, subject)


def _print_result(
    result: Continuation,
    loaded: GenerationModel,
    options: GenerateOptions,
    printer: _Printer | None,
) -> None:
    """The text, unless it was streamed, and what else the options ask for."""
    if printer is None:
        print(result.prompt + result.text)
    else:
        printer.finish()
    if options.logprobs is not None:
        print()
        for line in _logprob_lines(loaded.tokenizer, result.generated):
            print(line)
    if options.show_neighbors and loaded.retriever is not None:
        print()
        for line in _neighbor_lines(loaded.retriever, result.generated):
            print(line)
    print(flush=True)


def _logprob_lines(tokenizer: Tokenizer, text: GeneratedText) -> Iterator[str]:
    for entry in text.logprobs:
        top = "  ".join(
            f"{tokenizer.detokenize([token])!r} {value:.3f}" for token, value in entry.top
        )
        yield f"{entry.logprob:9.4f}  {tokenizer.detokenize([entry.token])!r}  {top}".rstrip()


def _write(path: Path, results: Sequence[Continuation], loaded: GenerationModel) -> None:
    """One JSON object per prompt."""
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


def _neighbor_lines(retriever: Retriever, text: GeneratedText) -> Iterator[str]:
    """What `--show-neighbors` prints: each chunk and what was retrieved for it."""
    if any(retrieved.ids is None for retrieved in text.neighbors):
        yield "The neighbors were given."
        return
    if not text.neighbors:
        yield f"No neighbors: the text has no complete chunk of {retriever.chunk_length} tokens."
    for place, retrieved in enumerate(text.neighbors):
        where = text.chunks(retriever.chunk_length)[place]
        chunk = text.tokens[where.start : where.stop]
        yield f"Chunk {place}: {_excerpt(retriever.tokenizer.detokenize(chunk))}"
        for neighbor in retriever.describe(retrieved)[0]:
            yield (
                f"  distance {neighbor.distance:.3f}, {neighbor.source}: {_excerpt(neighbor.text)}"
            )


def _excerpt(text: str, length: int = 160) -> str:
    words = " ".join(text.split())
    return words if len(words) <= length else words[: length - 1] + "…"


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    return run_command(GenerateOptions, generate, argv)


if __name__ == "__main__":
    sys.exit(main())
