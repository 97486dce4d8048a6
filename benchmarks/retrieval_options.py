"""Which options of retrieval pay: the quickstart's Retro with one thing changed at a time.

    python -m benchmarks.retrieval_options                            # an hour on one core
    python -m benchmarks.retrieval_options --only "2 neighbors" --seeds 2
    python -m benchmarks.retrieval_options --smoke                    # tries the path

Each model is trained from scratch on the same tokens, and scored on the valid documents, with its
neighbors and with none: settings are chosen there. The folder is that of
benchmarks/quickstart_seeds. Seconds are those of the processor, one thread, for the whole training.
A model that is finished in the folder is not trained again.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TypeVar

import torch

from benchmarks.memory_bakeoff_trial import Trial, count
from benchmarks.quickstart_seeds import FIRST_SEED, call, prepare
from retro_mcore.model.chunked_cross_attention import ChunkedCrossAttention
from retro_mcore.model.neighbor_encoder import NeighborEncoder
from retro_mcore.platform import setup_device
from retro_mcore.training.setup.load_model import load_model_from_checkpoint

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY / "examples" / "quickstart"))

from run import LAPTOP, SMOKE, Layout, Size, all_stages  # noqa: E402

Part = TypeVar("Part", bound=torch.nn.Module)


def _parts(model: torch.nn.Module, kind: type[Part]) -> Iterator[Part]:
    return (part for part in model.modules() if isinstance(part, kind))


def start_at_zero(model: torch.nn.Module) -> None:
    """Cross-attention that adds nothing at first, as a gate that starts at 0 (Alayrac et al. 2022,
    section 2.2)."""
    for attention in _parts(model, ChunkedCrossAttention):
        torch.nn.init.zeros_(attention.linear_proj.weight)


def cut_embedding_gradient(model: torch.nn.Module) -> None:
    """Neighbors do not train the embedding that they share with the text."""
    for encoder in _parts(model, NeighborEncoder):
        encoder.register_forward_pre_hook(lambda _, args: (args[0].detach(), *args[1:]))


def divide_by_deviation(model: torch.nn.Module) -> None:
    """What enters the encoder ÷ the standard deviation of initial weights."""
    for encoder in _parts(model, NeighborEncoder):
        scale = 1 / encoder.config.init_method_std
        encoder.register_forward_pre_hook(lambda _, args, scale=scale: (args[0] * scale, *args[1:]))


def norm_encoded(model: torch.nn.Module) -> None:
    """The encoder's output is scaled to a mean square of 1, its input is not."""
    for encoder in _parts(model, NeighborEncoder):
        encoder.register_forward_hook(
            lambda part, _, output: torch.nn.functional.rms_norm(
                output, output.shape[-1:], eps=part.config.layernorm_epsilon
            )
        )


@dataclass(frozen=True)
class Change:
    """What differs from the quickstart's Retro.

    Attributes:
        flags: Flags of the training with other values; None: without the flag.
        chunk_length: Tokens of a chunk, in a project of its own.
        index: Flags of build_index with other values, in a project of its own.
        query: Flags of query_neighbors, in a project of its own.
        adapt: What is done to the model before it is trained, and when it is loaded if it `stays`.
    """

    flags: dict[str, str | None] = field(default_factory=dict)
    chunk_length: int | None = None
    index: dict[str, str | None] = field(default_factory=dict)
    query: str = ""
    adapt: Callable[[torch.nn.Module], None] | None = None
    stays: bool = False

    @property
    def project(self) -> str:
        """Name of the project's folder."""
        words = [f"chunks_of_{self.chunk_length}"] if self.chunk_length else []
        words += [*filter(None, self.index.values()), *self.query.replace("-", "").split()]
        return "_".join(["project", *words])


RAW: dict[str, str | None] = {"--retro-encoder-input": "raw"}
MINILM: dict[str, str | None] = {
    "--embedder": "minilm",
    "--embed-precision": "fp32",
    "--embed-batch-tokens": "1024",
}
CHANGES = {
    "quickstart": Change(),
    "keys of their own": Change({"--retro-cross-attention-keys": "own"}),
    "keys of the token before": Change({"--retro-cross-attention-keys": "previous"}),
    "encoder of width 64": Change({"--retro-encoder-hidden-size": "64"}),
    "encoder of 2 layers": Change({"--retro-encoder-num-layers": "2"}),
    "cross-attention in layer 2": Change({"--retro-decoder-layers": "2"}),
    "cross-attention in layers 2, 4": Change({"--retro-decoder-layers": "2 4"}),
    "cross-attention in layers 2, 3, 4": Change({"--retro-decoder-layers": "2 3 4"}),
    "2 neighbors": Change({"--retro-num-neighbors": "2"}),
    "4 neighbors": Change({"--retro-num-neighbors": "4"}),
    "without continuation": Change({"--retro-num-retrieved-chunks": "1"}),
    "no relative positions": Change({"--retro-cross-attention-positions": "none"}),
    "encoder's dropout of 0.1": Change(
        {"--retro-encoder-hidden-dropout": "0.1", "--retro-encoder-attention-dropout": "0.1"}
    ),
    "initial weights of 0.02": Change({"--init-method-std": "0.02"}),
    "learning rate of 2e-3": Change({"--lr": "2e-3", "--min-lr": "2e-4"}),
    "5% of neighbors' tokens replaced": Change({"--retro-replace-tokens": "0.05"}),
    "10% of chunks without neighbors": Change({"--retro-drop-chunks": "0.1"}),
    "cross-attention starts at 0": Change(adapt=start_at_zero),
    "no gradient to the embedding": Change(adapt=cut_embedding_gradient),
    "raw input": Change(RAW),
    "raw input, keys of their own": Change({**RAW, "--retro-cross-attention-keys": "own"}),
    "raw input, encoder of width 64": Change({**RAW, "--retro-encoder-hidden-size": "64"}),
    "raw input ÷ initial deviation": Change(RAW, adapt=divide_by_deviation, stays=True),
    "raw input, normed output": Change(RAW, adapt=norm_encoded, stays=True),
    "chunks of 8": Change(chunk_length=8),
    "chunks of 32": Change(chunk_length=32),
    "embedder minilm": Change(index=MINILM),
    "embedder minilm, bf16": Change(index={**MINILM, "--embed-precision": "bf16"}),
    "embedder minilm, int8": Change(index={**MINILM, "--embed-precision": "int8"}),
    "embedder static": Change(index={"--embedder": "static"}),
    "re-ranked by BM25": Change(query="--rerank bm25"),
    "the defaults of retrieval": Change(
        {
            "--retro-encoder-num-layers": None,
            "--retro-encoder-hidden-dropout": None,
            "--retro-encoder-attention-dropout": None,
            "--retro-cross-attention-positions": None,
            "--retro-num-neighbors": None,
        }
    ),
}


@dataclass(frozen=True)
class Row:
    """A model's figures; perplexities of the valid documents, seconds of a processor."""

    change: str
    seed: int
    parameters: int
    training: float
    real: float
    none: float


def changed(flags: list[str], changes: dict[str, str | None]) -> list[str]:
    """The flags with other values.

    >>> changed(["--a", "1", "2", "--b", "--c", "3"], {"--a": "4", "--c": None, "--d": "5"})
    ['--a', '4', '--b', '--d', '5']
    """
    values: dict[str, list[str]] = {}
    for word in flags:
        if word.startswith("--"):
            values[word] = []
        else:
            values[list(values)[-1]].append(word)
    for flag, value in changes.items():
        if value is None:
            values.pop(flag, None)
        else:
            values[flag] = value.split()
    return [word for flag, words in values.items() for word in (flag, *words)]


def find_neighbors(size: Size, layout: Layout, change: Change) -> Path:
    """The change's project, up to neighbors."""
    prepare(size, layout)
    project = layout.root / change.project
    if not project.exists():
        if change.chunk_length:
            size = replace(size, chunk_length=change.chunk_length)
        beginning = project.with_name(f"{project.name}_begun")
        shutil.rmtree(beginning, ignore_errors=True)
        for stage in all_stages(size, layout.corpus, Layout(beginning), 1)[:4]:
            flags = stage.flags
            if stage.command == "build_index":
                flags = changed(flags, change.index)
            if stage.command == "query_neighbors":
                flags = [*flags, *change.query.split()]
            call(stage.command, flags)
        (beginning / "project").rename(project)
        beginning.rmdir()
    return project


def measure(size: Size, layout: Layout, name: str, seed: int, smoke: bool) -> Row:
    """Train and score a model, unless that is done."""
    change = CHANGES[name]
    folder = layout.root / f"seed_{seed}" / "options" / name.replace(" ", "_")
    result = folder / "row.json"
    if result.is_file():
        return Row(**json.loads(result.read_text(encoding="utf-8")))
    project = find_neighbors(size, layout, change)
    call("set_samples", ["--project-dir", str(project), "--seed", str(seed)])
    own = changed([*size.model.split(), *size.retro.split()], change.flags)
    trial = Trial(replace(size, model="", retro=" ".join(own)), project, folder, seed, 0, smoke)
    shutil.rmtree(folder, ignore_errors=True)
    training = trial.trained(own, trial.split("train"), folder, adapt=change.adapt)
    model, _ = load_model_from_checkpoint(folder)
    if change.adapt is not None and change.stays:
        change.adapt(model)
    samples = trial.split("valid")
    real, none = (trial.scored(model, samples, kind, "valid")[1] for kind in ("real", "none"))
    row = Row(name, seed, count(model), training, real, none)
    result.write_text(json.dumps(asdict(row)) + "\n", encoding="utf-8")
    print(row, flush=True)
    return row


def show(rows: list[Row]) -> None:
    """A row per change: means over seeds, and perplexity ÷ that of the quickstart's Retro."""
    base = {row.seed: row for row in rows if row.change == "quickstart"}
    print(f"\n{'change':34} {'parameters':>10} {'CPU s':>6} {'real':>8} {'none':>8}  real ÷ before")
    for name in dict.fromkeys(row.change for row in rows):
        own = [row for row in rows if row.change == name]
        mean = {key: statistics.mean(getattr(row, key) for row in own) for key in ("real", "none")}
        spent = statistics.mean(row.training for row in own)
        ratios = ", ".join(f"{row.real / base[row.seed].real:.3f}" for row in own)
        print(
            f"{name:34} {own[0].parameters:10,} {spent:6.0f} {mean['real']:8.3f} "
            f"{mean['none']:8.3f}  {ratios}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=Path("quickstart_seeds"))
    parser.add_argument("--seeds", type=int, default=1, help="number of seeds")
    parser.add_argument("--only", nargs="+", choices=list(CHANGES), default=list(CHANGES))
    parser.add_argument("--smoke", action="store_true", help="tiny models that only try the path")
    parser.add_argument("--json", type=Path, help="file to write the rows to")
    options = parser.parse_args()
    size, layout = SMOKE if options.smoke else LAPTOP, Layout(options.folder)
    setup_device("cpu")
    torch.set_num_threads(1)
    names = list(dict.fromkeys(["quickstart", *options.only]))
    seeds = range(FIRST_SEED, FIRST_SEED + options.seeds)
    rows = [measure(size, layout, name, seed, options.smoke) for seed in seeds for name in names]
    show(rows)
    if options.json:
        text = json.dumps([asdict(row) for row in rows], indent=2)
        options.json.write_text(f"{text}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
