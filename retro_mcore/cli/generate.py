"""`generate`: continue prompts with a trained model and neighbors that are retrieved live."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from retro_mcore.cli.command import run_command
from retro_mcore.data.tokenizers import Tokenizer, load_project_tokenizer
from retro_mcore.distributed import get_rank, initialize, raise_together
from retro_mcore.errors import ConfigurationError
from retro_mcore.inference.retriever import Retriever
from retro_mcore.inference.sampling import SamplingOptions
from retro_mcore.platform import distributed_backend, setup_device
from retro_mcore.project import ProjectConfig, ProjectPaths

if TYPE_CHECKING:
    from retro_mcore.inference.generation import GeneratedText


@dataclass(kw_only=True)
class GenerateOptions:
    """Continue prompts with a trained model and neighbors that are retrieved live.

    The text streams to the terminal as it grows; several prompts are printed as they are done.
    """

    project_dir: str
    """Project directory: its tokenizer, database and index."""
    load: str
    """Directory of the checkpoint, as pretrain_retro was given with --save."""
    prompt: str | None = None
    """The text to continue."""
    prompt_file: str | None = None
    """Instead of --prompt: a text file that is one prompt, or a .jsonl file with {"prompt": …}
    in each line."""
    max_new_tokens: int = 64
    """Tokens to add, unless the text ends before."""
    temperature: float = 1.0
    """Divides the logits; 0 takes the most likely token."""
    top_k: int = 0
    """Draw from the k most likely tokens; 0: from all."""
    top_p: float = 0.0
    """Draw from the most likely tokens that make up this much probability; 0: from all."""
    seed: int = 1234
    """Seed of the draws; prompt i draws with seed + i."""
    micro_batch_size: int = 8
    """Prompts that are continued together."""
    retro_neighbors: Literal["live", "none"] = "live"
    """live: retrieve the neighbors of each chunk from the project's index as soon as the chunk is
    complete. none: retrieval off."""
    show_neighbors: bool = False
    """Print what was retrieved, with distances and source documents."""
    tensor_model_parallel_size: int = 1
    """Ranks that share one model."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: CUDA where there is one, else the CPU."""


@dataclass(frozen=True)
class Continuation:
    """One prompt's result.

    Attributes:
        prompt: The prompt as given.
        text: What the model added.
        generated: Tokens, neighbors and why it stopped.
    """

    prompt: str
    text: str
    generated: GeneratedText


def generate(options: GenerateOptions) -> list[Continuation]:
    """Continue every prompt, print it on rank 0, and return the results in order.

    Raises:
        RetroError: a flag, the project or the checkpoint is at fault.
    """
    device = setup_device(options.device)
    # Only now: megatron is imported after the device is chosen.
    from retro_mcore.evaluation.perplexity import check_tokenizer
    from retro_mcore.inference import generation
    from retro_mcore.training.checkpointing import load_model_from_checkpoint
    from retro_mcore.training.options import ParallelOptions

    initialize(distributed_backend())
    with raise_together():
        prompts = _read_prompts(options)
        sampling = SamplingOptions(options.temperature, options.top_k, options.top_p, options.seed)
        project = ProjectConfig.load(options.project_dir)
        tokenizer = load_project_tokenizer(project, ProjectPaths(options.project_dir))
    parallel = ParallelOptions(
        device=options.device, tensor_model_parallel_size=options.tensor_model_parallel_size
    )
    model, arguments = load_model_from_checkpoint(options.load, parallel)
    with raise_together():
        check_tokenizer(arguments, project, options.project_dir)
        _refuse_other_chunks(options, arguments.retro_chunk_length, project.retro_gpt_chunk_length)
        retriever = None
        if options.retro_neighbors == "live":
            retriever = Retriever(
                options.project_dir,
                arguments.retro_num_neighbors,
                arguments.retro_num_retrieved_chunks,
                device.type,
            )
    results = []
    for start in range(0, len(prompts), options.micro_batch_size):
        batch = prompts[start : start + options.micro_batch_size]
        stream = TextStream(tokenizer, batch[0]) if len(prompts) == 1 and get_rank() == 0 else None
        texts = generation.generate(
            model,
            tokenizer,
            tokenizer.tokenize_batch(batch),
            max_new_tokens=options.max_new_tokens,
            sampling=replace(sampling, seed=sampling.seed + start),
            neighbors=retriever,
            on_token=None if stream is None else stream.add,
        )
        for prompt, text in zip(batch, texts, strict=True):
            results.append(Continuation(prompt, _new_text(tokenizer, text), text))
            if get_rank() == 0:
                _print_result(results[-1], retriever if options.show_neighbors else None, stream)
    return results


class TextStream:
    """Prints a text as it grows, from the prompt on."""

    def __init__(self, tokenizer: Tokenizer, prompt: str) -> None:
        self._tokenizer = tokenizer
        self._tokens: list[int] = tokenizer.tokenize(prompt)
        self._shown = len(tokenizer.detokenize(self._tokens))
        print(prompt, end="", flush=True)

    def add(self, prompt: int, token: int) -> None:
        """Print what `token` adds; a character of several tokens waits for its last one."""
        self._tokens.append(token)
        text = self._tokenizer.detokenize(self._tokens)
        if not text.endswith("\N{REPLACEMENT CHARACTER}"):
            self._print_rest(text)

    def finish(self) -> None:
        """Print what still waits, and end the line."""
        self._print_rest(self._tokenizer.detokenize(self._tokens))
        print()

    def _print_rest(self, text: str) -> None:
        print(text[self._shown :], end="", flush=True)
        self._shown = len(text)


def _read_prompts(options: GenerateOptions) -> list[str]:
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
        return [options.prompt]
    return read_prompt_file(Path(str(options.prompt_file)))


def read_prompt_file(path: Path) -> list[str]:
    """The prompts of a file: one per line of a .jsonl file, else the whole text is one.

    Raises:
        ConfigurationError: the file is missing, empty or malformed; names the line.
    """
    subject = f"--prompt-file {path}"
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError(subject, str(error), "Name a UTF-8 file") from error
    prompts = [text.rstrip("\n")]
    if path.suffix == ".jsonl":
        lines = enumerate(text.splitlines(), 1)
        prompts = [_prompt_of_line(f"{subject}:{n}", line) for n, line in lines if line.strip()]
    if not any(prompts):
        raise ConfigurationError(subject, "no prompt", "Write some text to continue")
    return prompts


def _prompt_of_line(subject: str, line: str) -> str:
    mend = 'Each line is an object {"prompt": "some text"}'
    try:
        value = json.loads(line)
    except ValueError as error:
        raise ConfigurationError(subject, f"invalid JSON ({error})", mend) from error
    prompt = value.get("prompt") if isinstance(value, dict) else None
    if not isinstance(prompt, str) or not prompt:
        raise ConfigurationError(subject, "no text under the key 'prompt'", mend)
    return prompt


def _refuse_other_chunks(options: GenerateOptions, of_model: int, of_project: int) -> None:
    if of_model != of_project:
        raise ConfigurationError(
            f"--load {options.load}",
            f"a model of chunk length {of_model}, but {options.project_dir} has {of_project}",
            "Use the project that the model was trained on",
        )


def _new_text(tokenizer: Tokenizer, text: GeneratedText) -> str:
    prompt = tokenizer.detokenize(text.tokens[: text.prompt_length])
    return tokenizer.detokenize(text.tokens)[len(prompt) :]


def _print_result(
    result: Continuation, retriever: Retriever | None, stream: TextStream | None
) -> None:
    """The text, unless it was streamed, and with a retriever what was retrieved."""
    if stream is None:
        print(result.prompt + result.text)
    else:
        stream.finish()
    if retriever is not None:
        print()
        for line in _neighbor_lines(retriever, result.generated):
            print(line)
    print(flush=True)


def _neighbor_lines(retriever: Retriever, text: GeneratedText) -> Iterator[str]:
    """What `--show-neighbors` prints: each chunk and what was retrieved for it."""
    if not text.neighbors:
        yield f"No neighbors: the text has no complete chunk of {retriever.chunk_length} tokens."
    for place, retrieved in enumerate(text.neighbors):
        chunk = text.tokens[place * retriever.chunk_length :][: retriever.chunk_length]
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
