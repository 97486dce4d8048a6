"""`generate`: continue prompts with a trained model and neighbors that are retrieved live."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from retro_mcore.cli.command import run_command
from retro_mcore.cli.generation_options import (
    GenerationModelOptions,
    check_generation_flags,
    load_generation_model,
)
from retro_mcore.cli.tables.continuation import StreamPrinter, print_continuation
from retro_mcore.distributed import get_rank, raise_together
from retro_mcore.errors import ConfigurationError
from retro_mcore.evaluation.results import require_writable
from retro_mcore.inference.prompt_files import prompts_of_flags
from retro_mcore.inference.sampling import SamplingOptions

if TYPE_CHECKING:
    from retro_mcore.session.continuation import Continuation


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
    """Instead of --prompt: a text file that is one prompt, or a .jsonl or .json file with
    {"prompt": …} and perhaps {"neighbors": […]} in each line."""
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
    """Print each chunk with the neighbors that the model read while it wrote the chunk: distance,
    source document, and nats per token by which the neighbor lowered the loss. Tokens copied from
    them are marked."""
    html: str | None = None
    """Also write the texts, chunk by chunk beside their neighbors, into this HTML file, with the
    gain by each neighbor for each token."""


def generate(options: GenerateOptions) -> list[Continuation]:
    """Continue every prompt, print it on rank 0, and return the results in order.

    Raises:
        RetroError: a flag, the project or the checkpoint is at fault.
    """
    check_generation_flags(options, neighbors_given=options.neighbors is not None)
    if options.micro_batch_size < 1:
        found = str(options.micro_batch_size)
        raise ConfigurationError("--micro-batch-size", found, "Give at least 1")
    prompts = prompts_of_flags(options.prompt, options.prompt_file, options.neighbors)
    sampling = SamplingOptions(options.temperature, options.top_k, options.top_p, options.seed)
    loaded = load_generation_model(options)
    with raise_together():
        if get_rank() == 0:
            _require_writable(options)
    from retro_mcore.inference.requests import GenerationRequest, StoppingOptions
    from retro_mcore.session.continuation import (
        check_prompts,
        continue_prompts,
        write_continuations,
    )
    from retro_mcore.session.continuation_page import write_page

    stop = tuple(options.stop or ())
    stopping = StoppingOptions(
        options.max_new_tokens, options.min_new_tokens, tuple(options.stop_token_ids or ()), stop
    )
    like = GenerationRequest(
        sampling=sampling,
        stopping=stopping,
        top_logprobs=options.logprobs,
        neighbor_credit=options.show_neighbors or options.html is not None,
    )
    requests = check_prompts(loaded, prompts, like)
    printer = None
    if len(prompts) == 1 and get_rank() == 0:
        text = prompts[0].text
        printer = StreamPrinter(loaded.tokenizer, text, stop, options.min_new_tokens)
    results = []
    for result in continue_prompts(
        loaded,
        prompts,
        requests,
        micro_batch_size=options.micro_batch_size,
        on_token=None if printer is None else printer.add,
    ):
        results.append(result)
        if get_rank() == 0:
            logprobs = options.logprobs is not None
            print_continuation(result, loaded, printer, logprobs, options.show_neighbors)
    if options.output is not None and get_rank() == 0:
        write_continuations(Path(options.output), results, loaded)
    if options.html is not None and get_rank() == 0:
        write_page(Path(options.html), results, loaded)
        print(f"page: {Path(options.html).resolve().as_uri()}", flush=True)
    return results


def _require_writable(options: GenerateOptions) -> None:
    if options.output is not None:
        require_writable(Path(options.output))
    if options.html is not None:
        require_writable(Path(options.html), "--html")
        if options.output is not None and Path(options.html) == Path(options.output):
            raise ConfigurationError(
                f"--html {options.html}", "the file of --output too", "Name another file"
            )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    return run_command(GenerateOptions, generate, argv)


if __name__ == "__main__":
    sys.exit(main())
