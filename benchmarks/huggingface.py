"""`RetroForCausalLM` beside our own generation, and the time and memory of conversions.

    python -m benchmarks.huggingface                    # CPU, one thread
    python -m benchmarks.huggingface --size 8b --work-dir /large/disk

Both models have the same random weights and generate the same number of tokens in turns, so other
load on the machine affects both. Each conversion runs in a process of its own; its peak memory is
the most that this process held, Python's modules included. The goal is at most 1.2 times the
largest file of weights plus 2 GB.
"""

from __future__ import annotations

import json
import re
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console
from rich.table import Table

from retro_mcore.cli.command import run_command

#: Settings of the random Llama that is converted, and the largest file of its weights.
SIZES: dict[str, tuple[dict[str, int], str]] = {
    "tiny": (
        {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4,
         "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 512},
        "200KB",
    ),
    "small": (
        {"hidden_size": 1024, "intermediate_size": 3584, "num_hidden_layers": 32,
         "num_attention_heads": 16, "num_key_value_heads": 4, "vocab_size": 16384},
        "150MB",
    ),
    "1b": (
        {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
         "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 32000},
        "500MB",
    ),
    "8b": (
        {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
         "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256},
        "5GB",
    ),
}  # fmt: skip
_BLOCK = 1 << 20  # bytes of KiB


@dataclass
class Options:
    """Measure generation in transformers against ours, and conversions."""

    hidden_size: int = 512
    """Width of the model that generates; heads have 64 channels."""
    num_layers: int = 12
    """Its decoder layers; every third one from 3 on cross-attends."""
    vocab_size: int = 8192
    """Rows of its output layer; at least 1000."""
    prompt_length: int = 64
    """Tokens of the prompt."""
    new_tokens: int = 128
    """Tokens to generate."""
    rounds: int = 3
    """How often each model generates; the fastest round counts."""
    generate: Literal["yes", "no"] = "yes"
    """Whether to measure generation."""
    size: Literal["none", "tiny", "small", "1b", "8b"] = "small"
    """Checkpoint to convert: 0.9 GB (small), 2.2 GB (1b) or 16 GB (8b) of weights. none: only
    generate."""
    conversions: Literal["both", "ours"] = "both"
    """To our format and back to transformers', or only to ours."""
    work_dir: str | None = None
    """Directory for checkpoints. Default: a temporary one. It needs twice the size."""
    json: str | None = None
    """File for the figures."""


@dataclass
class Conversion:
    """One conversion.

    Attributes:
        target: Format that is written.
        seconds: Wall time.
        peak_mb: Most resident memory of the process, in MB.
        imports_mb: The part of it that the process held after its imports, in MB.
        shard_mb: Largest file of the original's weights, in MB.
        weights_mb: All of the original's weights, in MB.
    """

    target: str
    seconds: float
    peak_mb: float
    imports_mb: float
    shard_mb: float
    weights_mb: float

    @property
    def goal_mb(self) -> float:
        """Memory that it should not exceed, in MB."""
        return 1.2 * self.shard_mb + 2e9 / _BLOCK


def run(options: Options) -> dict[str, Any]:
    """Measure and print."""
    console = Console(width=100)
    figures: dict[str, Any] = {}
    if options.generate == "yes":
        ours, theirs = generation(options)
        figures = {"ours": ours, "theirs": theirs}
        console.print(
            f"tokens per CPU second, one thread: ours {ours:.1f}, RetroForCausalLM {theirs:.1f} "
            f"({theirs / ours:.2f} of ours)"
        )
    conversions = [] if options.size == "none" else convert_all(options)
    if conversions:
        console.print(_table(conversions))
    figures["conversions"] = [{**asdict(each), "goal_mb": each.goal_mb} for each in conversions]
    if options.json is not None:
        Path(options.json).write_text(json.dumps(figures, indent=1), encoding="utf-8")
    return figures


def _table(conversions: list[Conversion]) -> Table:
    table = Table(title="Conversions", title_justify="left")
    for column in ("target", "s", "peak MB", "goal MB", "imports MB", "shard MB", "weights MB"):
        table.add_column(column, justify="right")
    for each in conversions:
        numbers = (each.seconds, each.peak_mb, each.goal_mb, each.imports_mb, each.shard_mb,
                   each.weights_mb)  # fmt: skip
        table.add_row(each.target, *(f"{number:.0f}" for number in numbers))
    return table


def generation(options: Options) -> tuple[float, float]:
    """Tokens per second of processor time: ours, and transformers'."""
    torch.set_num_threads(1)
    from retro_mcore.platform import setup_device

    setup_device("cpu")
    ours, theirs = models(options)
    best = {"ours": float("inf"), "theirs": float("inf")}
    for number in range(options.rounds + 1):  # the first warms up
        for name, generate in (("ours", ours), ("theirs", theirs)):
            start = time.process_time()
            generate()
            if number:
                best[name] = min(best[name], time.process_time() - start)
    return options.new_tokens / best["ours"], options.new_tokens / best["theirs"]


def models(options: Options) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """Functions that generate with each model."""
    from benchmarks.generation import Options as GenerationOptions
    from benchmarks.generation import RandomNeighbors, build_model
    from retro_mcore.inference.generation import generate
    from retro_mcore.inference.requests import GenerationRequest, StoppingOptions
    from retro_mcore.inference.sampling import SamplingOptions

    sizes = GenerationOptions(
        hidden_size=options.hidden_size,
        num_layers=options.num_layers,
        vocab_size=options.vocab_size,
    )
    length = options.prompt_length + options.new_tokens
    model = build_model(sizes, length)
    source = RandomNeighbors(sizes)
    prompt = torch.randint(1, 1000, (1, options.prompt_length))
    count = options.new_tokens
    request = GenerationRequest(
        tokens=prompt[0].tolist(),
        sampling=SamplingOptions(temperature=0),
        stopping=StoppingOptions(max_new_tokens=count, min_new_tokens=count),
        neighbors=source,
    )
    other = transformers_model(model, options, length)

    def retriever(chunks: torch.Tensor) -> Any:
        from retro_mcore.retrieval.neighbors import CompletedChunk

        found = source.neighbors_of([CompletedChunk(0, 0, each) for each in chunks.tolist()])
        return torch.from_numpy(found.tokens).masked_fill(torch.from_numpy(found.mask), -1)

    return (
        lambda: generate(model, _Vocabulary(options.vocab_size), [request]),
        lambda: other.generate(
            prompt, retriever=retriever, max_new_tokens=count, min_new_tokens=count,
            do_sample=False, eos_token_id=0, pad_token_id=0,
        ),
    )  # fmt: skip


@dataclass(frozen=True)
class _Vocabulary:
    vocab_size: int
    eod: int = 0


def transformers_model(model: Any, options: Options, length: int) -> Any:
    """The same model in transformers."""
    from retro_mcore.checkpoint.conversion.retro_names import to_retro_huggingface
    from retro_mcore.checkpoint.conversion.weights import Weight
    from retro_mcore.huggingface import RetroConfig, RetroForCausalLM

    config = model.config
    values = {
        "vocab_size": options.vocab_size,
        "num_layers": config.num_layers,
        "hidden_size": config.hidden_size,
        "num_attention_heads": config.num_attention_heads,
        "position_embedding_type": "rope",
        "max_position_embeddings": length,
        "retro_chunk_length": config.retro_chunk_length,
        "retro_num_neighbors": config.retro_num_neighbors,
        "retro_decoder_layers": list(config.retro_decoder_layers),
        "pad_token_id": 0,
    }
    other = RetroForCausalLM(RetroConfig(**values)).eval()
    weights = {
        name: Weight.of(value)
        for name, value in model.state_dict().items()
        if isinstance(value, torch.Tensor)
    }
    flags = {**values, "num_query_groups": None, "swiglu": False}
    state = {name: weight.load() for name, weight in to_retro_huggingface(weights, flags).items()}
    if other.config.tie_word_embeddings:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    other.load_state_dict(state)
    return other


def convert_all(options: Options) -> list[Conversion]:
    """Convert a random Llama to our format, and what was written back to transformers'."""
    folder = tempfile.TemporaryDirectory() if options.work_dir is None else None
    with folder or nullcontext(options.work_dir) as work_dir:
        here = Path(str(work_dir))
        size, shard = SIZES[options.size]
        write_random_llama(here / "original", size, shard)
        files = [file.stat().st_size for file in (here / "original").glob("*.safetensors")]
        sizes = (max(files) / _BLOCK, sum(files) / _BLOCK)
        found = [_conversion(here, "original", "ours", ["--target", "retro-mcore"], *sizes)]
        if options.conversions == "ours":
            return found
        # Only two of them lie on the disk at a time.
        for file in (here / "original").iterdir():
            file.unlink()
        flags = ["--target", "huggingface", "--decoder-only", "--max-shard-size", shard]
        found.append(_conversion(here, "ours", "back", flags, *sizes))
    return found


def write_random_llama(directory: Path, size: dict[str, int], shard: str) -> None:
    """Write a Llama with random weights in bf16, one tensor in memory at a time."""
    from functools import partial

    from transformers import LlamaConfig, LlamaForCausalLM

    from retro_mcore.checkpoint.conversion.safetensors_files import bytes_of, write_safetensors
    from retro_mcore.checkpoint.conversion.weights import Weight

    config = LlamaConfig(**size, max_position_embeddings=8192, dtype="bfloat16")
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    weights = {
        name: Weight(tuple(each.shape), torch.bfloat16, partial(_random, tuple(each.shape)))
        for name, each in model.state_dict().items()
    }
    directory.mkdir(parents=True)
    write_safetensors(directory, weights, bytes_of(shard))
    config.save_pretrained(directory)


def _random(shape: tuple[int, ...]) -> torch.Tensor:
    # The same block again and again: random numbers would take most of the time.
    block = torch.randn(min(4096, shape[-1])).bfloat16() * 0.02
    whole = torch.empty(shape, dtype=torch.bfloat16)
    return whole.copy_(block.repeat(-(-shape[-1] // len(block)))[: shape[-1]])


def _conversion(
    here: Path, source: str, target: str, flags: list[str], shard: float, weights: float
) -> Conversion:
    """Convert in a process of its own, and measure it."""
    arguments = ["--load", str(here / source), "--save", str(here / target), *flags]
    command = [sys.executable, "-m", "benchmarks.huggingface", "--converts", *arguments]
    out = subprocess.run(command, check=True, capture_output=True, text=True)
    seconds, peak, imports = json.loads(out.stdout.splitlines()[-1])
    return Conversion(flags[1], seconds, peak, imports, shard, weights)


def convert_here(arguments: list[str]) -> None:
    """Convert, and print the time in seconds, and the most memory and that of imports in MB."""
    from retro_mcore.cli.convert_checkpoint import main as convert
    from retro_mcore.training.setup import conversion  # noqa: F401 (its imports count before)

    before, start = _peak(), time.perf_counter()
    if convert(arguments):
        raise SystemExit(2)
    print(json.dumps([time.perf_counter() - start, _peak(), before]))


def _peak() -> float:
    status = Path("/proc/self/status")
    if status.is_file():  # getrusage counts what the parent held before it started this process
        kilobytes = re.search(r"VmHWM:\s+(\d+) kB", status.read_text(encoding="utf-8"))
        if kilobytes is not None:
            return int(kilobytes[1]) * 1024 / _BLOCK
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / _BLOCK


def main(argv: Sequence[str] | None = None) -> int:
    """Run it; returns the exit code."""
    given = list(sys.argv[1:] if argv is None else argv)
    if given[:1] == ["--converts"]:
        convert_here(given[1:])
        return 0
    return run_command(Options, run, given)


if __name__ == "__main__":
    sys.exit(main())
