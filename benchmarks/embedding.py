"""Embedders and precisions: chunks per CPU second, and how far neighbors stay those of MiniLM fp32.

    python -m benchmarks.embedding --chunks 1000
    python -m benchmarks.embedding --choices static minilm:int8 lexical --json embedding.json
    python -m benchmarks.embedding --padding

Chunks are pieces of Python's own documentation (`examples/quickstart/make_corpus.py`) of about 64
tokens. All choices embed the same chunks in turns on one thread; the first choice is the reference.
overlap@2 is the share of each chunk's two nearest other chunks, by exact search, that it shares
with the reference, computed from vectors as they are stored (fp16). Choices that this machine
lacks are listed with the reason.

`--padding` embeds nothing: it shows which share of MiniLM's tokens is padding, by batch and by
number of chunks that are sorted by length together (those of a file of embeddings, or 4,096).

How well a Retro learns from an embedder's neighbors, benchmarks/retrieval_options.py measures.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import cast

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).parents[1] / "examples" / "quickstart"))

import numpy as np
import torch
from make_corpus import python_documentation

from retro_mcore.errors import RetroError
from retro_mcore.host import processor_features
from retro_mcore.retrieval.embedders import build_embedder
from retro_mcore.retrieval.embedders.base import (
    BATCH_SIZE,
    CPU_BATCH_TOKENS,
    GPU_BATCH_TOKENS,
    Embedder,
    batches_of_size,
    batches_of_tokens,
)
from retro_mcore.retrieval.embedders.lexical import LexicalEmbedder, count_texts, weights_of
from retro_mcore.retrieval.embedders.precision import Precision

#: Characters of about 64 tokens.
CHARACTERS = 260
#: Embedder, precision, and tokens per batch, or 0: 16 texts.
CHOICES = (
    "minilm:fp32", "minilm:fp32:1024", "minilm:fp32:8192", "minilm:bf16", "minilm:int8",
    "minilm:int8:8192", "static", "lexical",
)  # fmt: skip
SHOWN = ("amx_bf16", "avx512_bf16", "avx512_vnni", "avx_vnni", "avx512f", "avx2")


@dataclass
class Result:
    """The measurements of one choice.

    Attributes:
        seconds: Processor time of each round.
        rate: Chunks per second of the median round.
        ratio: Rate ÷ the reference's.
        overlap: overlap@2 with the reference.
        refused: Why it cannot run here; empty if it can.
    """

    seconds: list[float] = field(default_factory=list)
    rate: float = 0.0
    ratio: float = 0.0
    overlap: float = 0.0
    refused: str = ""


def chunks(count: int) -> list[str]:
    """Distinct pieces of text, evenly spaced over the documentation."""
    starts = [
        document.text[start : start + CHARACTERS]
        for document in python_documentation()
        for start in range(0, len(document.text) - CHARACTERS + 1, CHARACTERS)
    ]
    pieces = list(dict.fromkeys(starts))
    rows = np.linspace(0, len(pieces) - 1, min(count, len(pieces))).astype(int)
    return [pieces[row] for row in rows]


def share_of_padding(lengths: list[int], together: int, tokens: int) -> float:
    """Padding ÷ all tokens that the model computes.

    Args:
        lengths: Tokens of each chunk.
        together: Chunks that are sorted by length together.
        tokens: Tokens of a batch; 0: 16 chunks.
    """
    computed = 0
    for first in range(0, len(lengths), together):
        some = lengths[first : first + together]
        by_size = batches_of_size(some, BATCH_SIZE)
        for rows in batches_of_tokens(some, tokens) if tokens else by_size:
            computed += len(rows) * max(some[row] for row in rows)
    return 1 - sum(lengths) / computed


def show_padding(texts: list[str]) -> None:
    """Print the share of padding as a table."""
    embedder = build_embedder(device="cpu")
    counted = embedder.count_tokens(texts)
    assert counted is not None
    lengths = np.minimum(counted, embedder.max_tokens or counted.max()).tolist()
    print(f"{len(texts)} chunks of {np.mean(lengths):.1f} tokens ± {np.std(lengths):.1f}")
    print("| sorted together | 16 chunks | 1,024 tokens | 16,384 tokens |\n|---|---|---|---|")
    for together in sorted({min(each, len(texts)) for each in (1000, 4096, len(texts))}):
        shares = [
            share_of_padding(lengths, together, tokens)
            for tokens in (0, CPU_BATCH_TOKENS, GPU_BATCH_TOKENS)
        ]
        print(f"| {together} | " + " | ".join(f"{share:.1%}" for share in shares) + " |")


def load(choice: str, texts: list[str]) -> Embedder:
    """The embedder of NAME, NAME:PRECISION or NAME:PRECISION:TOKENS."""
    given = choice.split(":")
    name, given_precision, tokens = given + ["fp32", "0"][len(given) - 1 :]
    precision = cast(Precision, given_precision)
    if name == "lexical":
        return LexicalEmbedder(weights_of(count_texts(texts)))
    return build_embedder(name, device="cpu", precision=precision, batch_tokens=int(tokens) or None)


def nearest(vectors: np.ndarray, count: int = 2) -> np.ndarray:
    """The nearest other rows by L2 distance, [rows, count]."""
    stored = vectors.astype(np.float16).astype(np.float32)
    lengths = (stored**2).sum(1)
    distances = lengths - 2 * stored @ stored.T
    np.fill_diagonal(distances, np.inf)
    return np.argsort(distances, axis=1)[:, :count]


def overlap(first: np.ndarray, second: np.ndarray) -> float:
    """Share of neighbors that two searches have in common."""
    pairs = zip(first, second, strict=True)
    return float(np.mean([len(set(a) & set(b)) for a, b in pairs])) / first.shape[1]


def measure(choices: list[str], texts: list[str], rounds: int) -> dict[str, Result]:
    """Embed the texts with every choice, in turns."""
    results = {choice: Result() for choice in choices}
    embedders: dict[str, Embedder] = {}
    for choice in choices:
        try:
            embedders[choice] = load(choice, texts)
            embedders[choice].embed(texts[:32])
        except RetroError as error:
            results[choice].refused = str(error)
    near: dict[str, np.ndarray] = {}
    for _ in range(rounds):
        for choice, embedder in embedders.items():
            start = time.process_time()
            vectors = embedder.embed(texts)
            results[choice].seconds.append(time.process_time() - start)
            near[choice] = nearest(vectors)
    reference = choices[0]
    for choice, found in near.items():
        result = results[choice]
        result.rate = len(texts) / statistics.median(result.seconds)
        result.ratio = result.rate / results[reference].rate
        result.overlap = overlap(near[reference], found)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--chunks", type=int, help="default: 1000; with --padding all")
    parser.add_argument("--padding", action="store_true", help="show the share of padding")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--choices", nargs="+", default=list(CHOICES))
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.padding:
        show_padding(chunks(options.chunks or sys.maxsize))
        return
    texts = chunks(options.chunks or 1000)
    results = measure(options.choices, texts, options.rounds)
    has = [name for name in SHOWN if name in processor_features()]
    print(f"{len(texts)} chunks, processor with {', '.join(has) or 'none'} of {', '.join(SHOWN)}")
    print("| choice | chunks per CPU second | ratio | overlap@2 |\n|---|---|---|---|")
    for choice, one in results.items():
        if one.refused:
            print(f"| {choice} | {one.refused} | | |")
        else:
            print(f"| {choice} | {one.rate:.1f} | {one.ratio:.2f} | {one.overlap:.3f} |")
    found = {choice: asdict(one) for choice, one in results.items()}
    if options.json:
        options.json.write_text(json.dumps({"features": has, "choices": found}, indent=4))


if __name__ == "__main__":
    main()
