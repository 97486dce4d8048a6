"""Five ways to use a memory, at equal parameters, tokens and text: perplexity, time and memory.

    python -m benchmarks.memory_bakeoff                    # half an hour on two cores
    python -m benchmarks.memory_bakeoff --seeds 3
    python -m benchmarks.memory_bakeoff --smoke            # tries the path, in two minutes

Text, tokens and flags are the quickstart's, and the folder is that of benchmarks/quickstart_seeds,
whose Retro and GPT are used where they are trained already.

- GPT: no memory.
- Retro (Borgeaud et al. 2022): neighbors are read by an encoder and chunked cross-attention.
- kNN-LM (Khandelwal et al. 2020): the GPT, with the tokens that followed its nearest hidden states
  in the training documents. Share and temperature are chosen on the valid documents.
- text in context: a GPT trained with each chunk's nearest neighbor as text after the chunk.
- Retro++ (Wang et al. 2023): Retro with the nearest neighbor also in the decoder's context, as
  there. The paper has it in front of the prompt; here it stands after each chunk.

Perplexity is that of the test documents. Costs are processor seconds of one thread: training is
measured over a few iterations of each model and multiplied. Scoring includes the search of
neighbors, or of states. "store" is what has to be built of the training documents beforehand, and
its memory; for the index of chunks it is the size of its files.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.memory_bakeoff_context import InContext
from benchmarks.memory_bakeoff_knn import Datastore, States, joined, read_states, tuned
from benchmarks.memory_bakeoff_trial import BATCH, Trial, index_bytes, seconds
from benchmarks.quickstart_seeds import FIRST_SEED, call, prepare, replaced
from retro_mcore.evaluation.perplexity import read_samples
from retro_mcore.platform import setup_device
from retro_mcore.project.config import Split
from retro_mcore.training.setup.load_model import load_model_from_checkpoint

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY / "examples" / "quickstart"))

from run import LAPTOP, SMOKE, Layout, Size, all_stages  # noqa: E402

#: Lists of the datastore's index and those visited, for the quickstart's and for the tiny text.
LISTS, PROBES, SMOKE_LISTS = 1024, 16, 4


@dataclass(frozen=True)
class Row:
    """A model's figures; seconds are those of a processor.

    Attributes:
        perplexity: Of the test documents.
        training: Seconds to train it.
        scoring: Seconds to score the test documents.
        store_seconds: Seconds to build what it searches; None: not measured here.
        store_bytes: Size of what it searches.
    """

    model: str
    parameters: int
    perplexity: float
    training: float
    scoring: float
    store_seconds: float | None = 0.0
    store_bytes: int = 0


def figures(trial: Trial, name: str, folder: Path, own: list[str], samples: Any, kind: str) -> Row:
    """A trained model's figures."""
    latest = folder / "latest_checkpointed_iteration.txt"
    if not latest.is_file() or int(latest.read_text()) < trial.iterations:
        trial.trained(own, samples("train"), folder)
    model, _ = load_model_from_checkpoint(folder)
    scoring, perplexity = trial.scored(model, samples("test"), kind)
    training = trial.training_cost(own, samples("train"))
    size = sum(parameter.numel() for parameter in model.parameters())
    row = Row(name, size, perplexity, training, scoring)
    print(row, flush=True)
    return row


def measure(trial: Trial) -> list[Row]:
    """All five."""
    retro, gpt = trial.size.retro.split(), trial.size.gpt.split()
    encoded = [*retro, "--retro-num-retrieved-chunks", "1"]

    def in_context(name: Split) -> InContext:
        return InContext(trial.split(name))

    def with_encoder(name: Split) -> InContext:
        return InContext(trial.split(name), encoded=True)

    plain = figures(trial, "GPT", trial.folder / "gpt", gpt, trial.split, "none")
    nearest = knn(trial, plain)
    reading = [
        figures(trial, "Retro", trial.folder / "checkpoints", retro, trial.split, "real"),
        figures(trial, "text in context", trial.folder / "context", gpt, in_context, "none"),
        figures(trial, "Retro++", trial.folder / "retro_plus", encoded, with_encoder, "real"),
    ]
    searched, size = trial.search_seconds(), index_bytes(trial.project_dir)
    reading = [
        replace(row, scoring=row.scoring + searched, store_seconds=None, store_bytes=size)
        for row in reading
    ]
    return [plain, reading[0], nearest, *reading[1:]]


def knn(trial: Trial, gpt: Row) -> Row:
    """Figures of kNN-LM on the trained GPT."""
    model, _ = load_model_from_checkpoint(trial.folder / "gpt")
    size, lists = trial.tokenizer.vocab_size, SMOKE_LISTS if trial.smoke else LISTS
    building, store = seconds(
        lambda: Datastore(read_states(model, trial.windows(), size), lists, min(PROBES, lists))
    )

    def states(name: Split) -> States:
        dataset = trial.split(name)
        batches = read_samples(
            dataset,
            f"states of {name}",
            num_samples=len(dataset),
            micro_batch_size=BATCH,
            num_workers=0,
            device=torch.device("cpu"),
            retrieval=False,
        )
        return joined(read_states(model, batches, size))

    valid = states("valid")
    mixture = tuned(valid, *store.search(valid.keys))
    print(f"kNN-LM: {len(store):,} states, {mixture}")

    def score() -> float:
        test = states("test")
        return math.exp(mixture.losses(test, *store.search(test.keys)).mean())

    scoring, perplexity = seconds(score)
    stored = building, store.num_bytes
    row = Row("kNN-LM", gpt.parameters, perplexity, gpt.training, scoring, *stored)
    print(row, flush=True)
    return row


def prepare_seed(size: Size, layout: Layout, seed: int) -> Path:
    """Give the project a seed's samples, and train Retro and GPT; returns their folder."""
    place = Layout(layout.root / f"seed_{seed}")
    call("set_samples", ["--project-dir", str(layout.project), "--seed", str(seed)])
    for stage in all_stages(size, layout.corpus, place, 1)[4:6]:
        flags = replaced(stage.flags, "--project-dir", str(layout.project))
        call(stage.command, [*flags, "--seed", str(seed)])
    return place.root


def show(trials: list[list[Row]]) -> None:
    """A table of means, with standard deviations over seeds."""
    print(
        f"\n{'model':16} {'parameters':>10} {'perplexity':>16} {'training':>9} {'scoring':>8} "
        f"{'store':>8} {'store':>9}"
    )
    print(f"{'':16} {'':10} {'test':>16} {'CPU s':>9} {'CPU s':>8} {'CPU s':>8} {'MiB':>9}")
    for rows in zip(*trials, strict=True):
        found = [row.perplexity for row in rows]
        text = f"{statistics.mean(found):.3f}"
        if len(found) > 1:
            text += f" ± {statistics.stdev(found):.3f}"
        first = rows[0]
        training, scoring = (
            statistics.mean(getattr(row, name) for row in rows) for name in ("training", "scoring")
        )
        built = "" if first.store_seconds is None else f"{first.store_seconds:.0f}"
        print(
            f"{first.model:16} {first.parameters:10,} {text:>16} {training:9.0f} {scoring:8.1f} "
            f"{built:>8} {first.store_bytes / 2**20:9.0f}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=Path("quickstart_seeds"))
    parser.add_argument("--seeds", type=int, default=1, help="number of seeds")
    parser.add_argument("--timed", type=int, default=20, help="iterations that training is timed")
    parser.add_argument("--smoke", action="store_true", help="tiny models that only try the path")
    parser.add_argument("--json", type=Path, help="file to write the rows to")
    options = parser.parse_args()
    size, layout = SMOKE if options.smoke else LAPTOP, Layout(options.folder)
    prepare(size, layout)
    setup_device("cpu")
    torch.set_num_threads(1)
    trials = []
    for seed in range(FIRST_SEED, FIRST_SEED + options.seeds):
        folder = prepare_seed(size, layout, seed)
        trial = Trial(size, layout.project, folder, seed, options.timed, options.smoke)
        trials.append(measure(trial))
        show(trials)
    if options.json:
        rows = [[asdict(row) for row in rows] for rows in trials]
        options.json.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
