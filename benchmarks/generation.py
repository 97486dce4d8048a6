"""Generation with a cache, beside recomputing the window for each token; growth; live retrieval.

    python -m benchmarks.generation                     # CPU, about three minutes
    python -m benchmarks.generation --device cuda --dtype bfloat16 --windows 2048 4096 \\
        --hidden-size 2048 --num-layers 24

Times are processor seconds on CPU and synchronised wall seconds on CUDA; the retrieval's share is
wall time.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from benchmarks.small_project import build_project
from retro_mcore.cli.command import run_command
from retro_mcore.retrieval.background import BackgroundRetrieval
from retro_mcore.retrieval.neighbors import CompletedChunk, RetrievedNeighbors
from retro_mcore.retrieval.retriever import Retriever


@dataclass
class Options:
    """Measure cached decoding against recomputation, its growth, and the cost of retrieval."""

    windows: list[int] = field(default_factory=lambda: [512, 2048])
    """Lengths at which both ways are compared; the last one is also how far a text grows."""
    hidden_size: int = 512
    """Width; heads have 64 channels."""
    num_layers: int = 12
    """Decoder layers; every third one from 3 on cross-attends."""
    vocab_size: int = 8192
    """Rows of the output layer; at least 1000."""
    chunk_length: int = 64
    """M, in tokens."""
    neighbors: int = 2
    """K, neighbors per chunk."""
    new_tokens: int = 64
    """Tokens that are decoded with the cache for the comparison."""
    recomputed_tokens: int = 2
    """Tokens that are decoded by recomputation."""
    growth_rounds: int = 2
    """Texts that are grown from 64 tokens to the longest window."""
    retrieval_tokens: int = 320
    """Tokens that are generated with live retrieval; 0 leaves that out."""
    lead: int = 24
    """Tokens before a chunk's end at which its search begins, with prefetch."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Where."""
    threads: int = 1
    """Of the model, on CPU."""
    work_dir: str | None = None
    """Keeps the project that is searched; by default it is made anew."""
    json: str | None = None
    """Also write the figures into this file."""


@dataclass
class Figures:
    """What was measured; seconds per token.

    Attributes:
        recomputed: By window: the whole window for each token.
        cached: By window: at its end, with the cache.
        growth: With the cache, the mean of every 64 tokens from 64 on.
        share: Of waiting for neighbors in the time of generation, by kind of retrieval.
    """

    recomputed: dict[int, float] = field(default_factory=dict)
    cached: dict[int, float] = field(default_factory=dict)
    growth: list[float] = field(default_factory=list)
    share: dict[str, float] = field(default_factory=dict)

    def ratio(self, window: int) -> float:
        """How many times faster the cache is."""
        return self.recomputed[window] / self.cached[window]

    @property
    def flatness(self) -> float:
        """The slowest 64 tokens beside the fastest."""
        return max(self.growth) / min(self.growth)


class RandomNeighbors:
    """Neighbors without a search."""

    def __init__(self, options: Options) -> None:
        self._shape = (options.neighbors, 2 * options.chunk_length)
        self._random = np.random.default_rng(0)

    def neighbors_of(self, chunks: Sequence[CompletedChunk]) -> RetrievedNeighbors:
        """As many as asked for."""
        tokens = self._random.integers(1, 1000, (len(chunks), *self._shape))
        return RetrievedNeighbors(tokens, np.zeros(tokens.shape, bool))


def measure(options: Options) -> Figures:
    """Run everything."""
    from retro_mcore.platform import setup_device

    torch.set_num_threads(options.threads)
    setup_device(options.device)
    figures = Figures()
    longest = max(options.windows)
    model = build_model(options, longest)
    with torch.no_grad():
        for window in options.windows:
            figures.recomputed[window] = recompute(model, options, window)
            figures.cached[window] = decode(model, options, window)
        figures.growth = grow(model, options, longest)
    if options.retrieval_tokens:
        figures.share = retrieval_share(options)
    return figures


def build_model(options: Options, longest: int, vocab_size: int | None = None) -> Any:
    """A model with random weights."""
    from retro_mcore import RetroConfig, RetroModel, get_retro_decoder_block_spec
    from retro_mcore.training.setup.initialize import initialize_parallel, set_seeds

    initialize_parallel()
    set_seeds(1)
    dtype = getattr(torch, options.dtype)
    config = RetroConfig(
        num_layers=options.num_layers,
        hidden_size=options.hidden_size,
        num_attention_heads=options.hidden_size // 64,
        retro_chunk_length=options.chunk_length,
        retro_num_neighbors=options.neighbors,
        retro_decoder_layers=list(range(3, options.num_layers + 1, 3)),
        params_dtype=dtype,
        bf16=dtype == torch.bfloat16,
    )
    model = RetroModel(
        config=config,
        transformer_layer_spec=get_retro_decoder_block_spec(config),
        vocab_size=vocab_size or options.vocab_size,
        max_sequence_length=longest,
        position_embedding_type="rope",
    )
    return model.to(options.device).eval()


def timer(options: Options) -> Callable[[], float]:
    """The clock of the device."""
    if options.device == "cpu":
        return time.process_time

    def synchronised() -> float:
        torch.cuda.synchronize()
        return time.perf_counter()

    return synchronised


def text_of(options: Options, length: int, source: RandomNeighbors) -> Any:
    """A text of so many tokens, with neighbors for its chunks."""
    from retro_mcore.inference.texts import GeneratedText

    tokens = np.random.default_rng(1).integers(1, 1000, length).tolist()
    text = GeneratedText(tokens, length)
    give_neighbors(text, options, source)
    return text


def give_neighbors(text: Any, options: Options, source: RandomNeighbors) -> None:
    """For the chunks that have none yet."""
    for number in range(len(text.neighbors), len(text.tokens) // options.chunk_length):
        text.neighbors.append(source.neighbors_of([CompletedChunk(0, number, [])]))


def recompute(model: Any, options: Options, window: int) -> float:
    """Seconds per token when each costs a forward pass over the whole window, as the retired Retro
    generates (through our model, which is the faster one)."""
    from retro_mcore.inference.decoders import FullRecomputation

    decoder, clock = FullRecomputation(model, 0), timer(options)
    text = text_of(options, window, RandomNeighbors(options))
    times = []
    for _ in range(options.recomputed_tokens):
        start = clock()
        decoder.next_logits([text])
        times.append(clock() - start)
    return statistics.median(times)


def decode(model: Any, options: Options, window: int) -> float:
    """Seconds per token with the cache, over the last tokens of a window, their chunks' encoding
    included."""
    steps = step_times(model, options, window - options.new_tokens, window)
    return statistics.mean(steps)


def grow(model: Any, options: Options, longest: int) -> list[float]:
    """Seconds per token, of every 64 tokens from 64 on: the least disturbed of the rounds."""
    rounds = [step_times(model, options, 64, longest) for _ in range(options.growth_rounds)]
    return [
        min(statistics.mean(steps[first : first + 64]) for steps in rounds)
        for first in range(0, longest - 64, 64)
    ]


def step_times(model: Any, options: Options, first: int, last: int) -> list[float]:
    """Seconds of each step while a text grows from `first` to `last` tokens."""
    from retro_mcore.inference.decoders import CachedDecoder

    source, clock = RandomNeighbors(options), timer(options)
    decoder = CachedDecoder(model, 0, 1, last)
    text = text_of(options, first, source)
    decoder.next_logits([text])  # the prompt
    times = []
    for token in range(last - first):
        text.tokens.append(token + 1)
        give_neighbors(text, options, source)
        start = clock()
        decoder.next_logits([text])
        times.append(clock() - start)
    return times


def retrieval_share(options: Options) -> dict[str, float]:
    """The share of time in which generation waits for neighbors of the project's database."""
    folder = tempfile.TemporaryDirectory() if options.work_dir is None else None
    with folder or nullcontext(options.work_dir) as work_dir:
        project = build_project(Path(str(work_dir)), chunk_length=options.chunk_length)
        retriever = Retriever(project, options.neighbors, device=options.device)
        retriever.search_texts(["load the embedder and the index"])
        longest = options.retrieval_tokens + 64
        model = build_model(options, longest, vocab_size=retriever.tokenizer.vocab_size)
        return {
            name: share_of(model, options, BackgroundRetrieval(retriever, lead=lead), retriever)
            for name, lead in (("without prefetch", 0), ("with prefetch", options.lead))
        }


def share_of(
    model: Any, options: Options, search: BackgroundRetrieval, retriever: Retriever
) -> float:
    """Of one kind of retrieval."""
    from retro_mcore.inference.generation import generate
    from retro_mcore.inference.requests import GenerationRequest, StoppingOptions
    from retro_mcore.inference.sampling import SamplingOptions

    prompt = retriever.tokenizer.tokenize("The with statement is used to wrap the execution of")
    start = time.perf_counter()
    length = options.retrieval_tokens
    request = GenerationRequest(
        tokens=prompt,
        sampling=SamplingOptions(seed=1),
        stopping=StoppingOptions(max_new_tokens=length, min_new_tokens=length),
        neighbors=search,
    )
    generate(model, retriever.tokenizer, [request])
    seconds = time.perf_counter() - start
    search.close()
    return search.waited_seconds / seconds


def run(options: Options) -> Figures:
    """Measure and print."""
    figures = measure(options)
    unit = "CPU ms" if options.device == "cpu" else "ms"
    table = Table(title="Time per token", title_justify="left")
    for column in ("window", f"recomputed, {unit}", f"cached, {unit}", "tokens/s", "ratio"):
        table.add_column(column, justify="right")
    for window in options.windows:
        cached = figures.cached[window]
        table.add_row(
            str(window),
            f"{1000 * figures.recomputed[window]:.1f}",
            f"{1000 * cached:.2f}",
            f"{1 / cached:.1f}",
            f"{figures.ratio(window):.0f}",
        )
    console = Console(width=100)
    console.print(table)
    first, last = 1000 * figures.growth[0], 1000 * figures.growth[-1]
    console.print(
        f"growth from 64 to {max(options.windows)} tokens: {first:.2f} -> {last:.2f} {unit} per "
        f"token; slowest 64 tokens / fastest: {figures.flatness:.2f}"
    )
    for name, share in figures.share.items():
        console.print(f"live retrieval {name}: {share:.1%} of the time per token")
    if options.json is not None:
        Path(options.json).write_text(json.dumps(asdict(figures), indent=1), encoding="utf-8")
    return figures


if __name__ == "__main__":
    sys.exit(run_command(Options, run))
