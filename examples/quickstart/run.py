"""From text to a trained Retro model, beside a GPT of its size, and a generated paragraph.

    python examples/quickstart/run.py                      # documentation of Transformers' models
    python examples/quickstart/run.py --input my.jsonl     # or a folder of .txt files
    python examples/quickstart/run.py --nproc 2            # two processes, tensor parallel

Each command is printed as you would type it, and run. Where there are two cores, the GPT is trained
and evaluated beside Retro's training, and its output is printed afterwards. Everything is written
below --output. Run again, the commands find what is finished there and reuse it.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from compare import Model, curves_as_text, draw, perplexities_as_text
from stages import Beside, Stage, cores, run_stage, show

#: The prompt is the beginning of the last document, which is a held-out one: so many chunks of it.
PROMPT_CHUNKS = 1.5


@dataclass(frozen=True)
class Size:
    """How large a run is: the flags of the commands that have a choice.

    Attributes:
        model: Flags of both models; `retro` and `gpt` are those of one.
        index: Flags of build_index for the corpus that is made here; for others, none.
    """

    chunk_length: int
    make_corpus: str
    preprocess_corpus: str
    index: str
    model: str
    retro: str
    gpt: str
    generate: str


# Two and a half to five minutes on two cores; most of it trains the two models. Their settings were
# chosen on the valid documents. What is reported is measured on the test documents.
LAPTOP = Size(
    chunk_length=16,
    make_corpus="--max-documents 300",
    preprocess_corpus="--vocab-size 1024 --seq-length 256 --split 90,5,5 --train-samples 1600 "
    "--global-batch-size 4 --eval-interval 400 --eval-iters 40",
    index="--index IVF256,Flat --nprobe 8",
    model="--num-layers 4 --hidden-size 128 --num-attention-heads 4 "
    "--position-embedding-type rope --normalization RMSNorm --disable-bias-linear "
    "--hidden-dropout 0 --attention-dropout 0 --init-method-std 0.06 --micro-batch-size 4 "
    "--lr 4e-3 --min-lr 4e-4 --lr-decay-style cosine --lr-warmup-fraction 0.05 --adam-beta2 0.95 "
    "--log-interval 20",
    retro="--retro-decoder-layers 3 --retro-num-neighbors 1 --retro-encoder-num-layers 1 "
    "--retro-encoder-hidden-dropout 0 --retro-encoder-attention-dropout 0 "
    "--retro-cross-attention-positions rotary",
    gpt="--no-retrieval --ffn-hidden-size 832",
    generate="--max-new-tokens 96 --temperature 0.5 --top-k 40",
)

# The same path in a minute or two; its models have seen too little to be of any use.
SMOKE = Size(
    chunk_length=16,
    make_corpus="--max-documents 12",
    preprocess_corpus="--vocab-size 400 --seq-length 64 --split 70,15,15 --train-samples 16 "
    "--global-batch-size 4 --eval-interval 4 --eval-iters 1",
    index="",
    model="--num-layers 2 --hidden-size 32 --num-attention-heads 2 "
    "--position-embedding-type rope --micro-batch-size 4 --lr 1e-3 --log-interval 1 "
    "--num-workers 0",
    retro="--retro-decoder-layers 2 --retro-encoder-num-layers 1",
    gpt="--no-retrieval",
    generate="--max-new-tokens 20 --temperature 0.7 --top-k 40",
)


@dataclass(frozen=True)
class Layout:
    """Where a run writes."""

    root: Path

    @property
    def corpus(self) -> Path:
        return self.root / "corpus.jsonl"

    @property
    def project(self) -> Path:
        return self.root / "project"

    @property
    def checkpoints(self) -> Path:
        return self.root / "checkpoints"

    @property
    def gpt(self) -> Path:
        return self.root / "gpt"

    @property
    def logs(self) -> Path:
        return self.root / "logs"

    @property
    def prompt(self) -> Path:
        return self.root / "prompt.txt"

    @property
    def plot(self) -> Path:
        return self.root / "retro_against_gpt.png"

    @property
    def page(self) -> Path:
        return self.root / "generated.html"


def all_stages(size: Size, source: Path, layout: Layout, nproc: int) -> list[Stage]:
    """The commands in order: four up to neighbors, two trainings, two evaluations, a text."""
    project = ["--project-dir", str(layout.project)]
    tensor_parallel = ["--tensor-model-parallel-size", str(nproc)] if nproc > 1 else []
    chunks = ["--retro-chunk-length", str(size.chunk_length)]
    index = size.index.split() if source == layout.corpus else []
    model, prompt = size.model.split(), ["--prompt-file", str(layout.prompt)]
    shown = ["--show-neighbors", "--html", str(layout.page)]

    def trained(folder: Path) -> list[str]:
        return [*project, "--load", str(folder), *tensor_parallel]

    retro = [*trained(layout.checkpoints), "--save", str(layout.checkpoints), *model]
    gpt = [*trained(layout.gpt), "--save", str(layout.gpt), *model]
    test = ["--split", "test"]
    return [
        Stage(
            "preprocess_corpus",
            "preprocess_corpus",
            [*project, "--input", str(source), *chunks, *size.preprocess_corpus.split()],
        ),
        Stage("build_db", "build_db", project),
        Stage("build_index", "build_index", [*project, "--embedder", "lexical", *index]),
        Stage("query_neighbors", "query_neighbors", project),
        Stage("pretrain_retro", "pretrain_retro", [*retro, *size.retro.split()]),
        Stage(
            "pretrain_retro, GPT",
            "pretrain_retro",
            [*gpt, *size.gpt.split()],
            log=layout.logs / "pretrain_gpt.log",
        ),
        Stage(
            "evaluate_perplexity",
            "evaluate_perplexity",
            [*trained(layout.checkpoints), *test],
        ),
        Stage(
            "evaluate_perplexity, GPT",
            "evaluate_perplexity",
            [*trained(layout.gpt), *test],
            log=layout.logs / "evaluate_gpt.log",
        ),
        Stage(
            "generate",
            "generate",
            [*trained(layout.checkpoints), *prompt, *shown, *size.generate.split()],
        ),
    ]


def write_prompt(source: Path, layout: Layout, num_tokens: int) -> None:
    """The first tokens of the corpus's last document, as text."""
    from retro_mcore.data.corpus.documents import read_documents
    from retro_mcore.data.tokenizers.loading import load_project_tokenizer
    from retro_mcore.project import ProjectConfig, ProjectPaths

    config = ProjectConfig.load(layout.project)
    tokenizer = load_project_tokenizer(config, ProjectPaths(layout.project))
    *_, last = read_documents(source)
    tokens = tokenizer.tokenize(last.text)[:num_tokens]
    layout.prompt.write_text(tokenizer.detokenize(tokens) + "\n", encoding="utf-8")


def make_corpus(layout: Layout, flags: str) -> int:
    """The documentation of Transformers' models; returns an exit code."""
    if layout.corpus.is_file():
        print(f"{layout.corpus} is there already")
        return 0
    script = os.path.relpath(Path(__file__).with_name("make_corpus.py"))
    command = [os.path.relpath(sys.executable), script, "--output", str(layout.corpus)]
    command += flags.split()
    show(command)
    return subprocess.run(command, check=False).returncode


def run(size: Size, layout: Layout, source: Path | None, nproc: int) -> int:
    """The whole chain; stops at the first command that fails, with its exit code."""
    if source is None:
        if code := make_corpus(layout, size.make_corpus):
            return code
        source = layout.corpus
    together, half = nproc == 1 and cores() > 1, max(1, cores() // 2)
    seconds: dict[str, float] = {}
    beside: Beside | None = None
    start = time.monotonic()
    stages = all_stages(size, source, layout, nproc)
    try:
        for stage in stages:
            if stage.command == "generate":
                write_prompt(source, layout, int(PROMPT_CHUNKS * size.chunk_length))
            if together and beside is None and stage.command == "pretrain_retro":
                beside = Beside([each for each in stages if each.log is not None], half)
            if beside is not None and stage.log is not None:
                code, seconds[stage.title] = beside.finish(stage)
            else:
                began = time.monotonic()
                shared = beside is not None and beside.is_running
                code = run_stage(stage, nproc, half if shared else None)
                seconds[stage.title] = time.monotonic() - began
            if code:
                return _stopped(stage, code)
    finally:
        if beside is not None:
            beside.stop()
    _summarize(seconds, time.monotonic() - start, layout)
    return 0


def _stopped(stage: Stage, code: int) -> int:
    print(f"{stage.title} stopped with exit code {code}", file=sys.stderr)
    return code


def _summarize(seconds: dict[str, float], total: float, layout: Layout) -> None:
    from retro_mcore.cli.output import print_summary

    rows: dict[str, object] = {name: f"{value:6.1f} s" for name, value in seconds.items()}
    rows["total"] = f"{total:6.1f} s"
    print_summary("quickstart", rows)
    models = [Model.read("Retro", layout.checkpoints), Model.read("GPT", layout.gpt)]
    print(curves_as_text(models))
    print(perplexities_as_text(models))
    draw(models, layout.plot)
    print(f"\nplot: {layout.plot.absolute().as_uri()}")
    print(f"what was retrieved for the paragraph: {layout.page.absolute().as_uri()}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--input", type=Path, help="a JSONL file with a text field, or a folder")
    parser.add_argument("--output", type=Path, default=Path("quickstart"), help="where to write")
    parser.add_argument("--nproc", type=int, default=1, help="processes for each command")
    parser.add_argument("--smoke", action="store_true", help="a tiny run that only tries the path")
    options = parser.parse_args()
    if options.nproc < 1:
        parser.error(f"--nproc {options.nproc}: must be at least 1")
    if options.nproc > 1:
        os.environ.setdefault(
            "OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // options.nproc))
        )
    size = SMOKE if options.smoke else LAPTOP
    try:
        return run(size, Layout(options.output), options.input, options.nproc)
    except KeyboardInterrupt:
        print("interrupted; run again to go on from here", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
