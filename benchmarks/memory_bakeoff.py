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
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.memory_bakeoff_context import InContext
from benchmarks.memory_bakeoff_knn import Datastore, States, joined, read_states, tuned
from benchmarks.quickstart_seeds import FIRST_SEED, call, prepare, replaced
from retro_mcore.cli.flags import parse_options
from retro_mcore.cli.pretrain_retro import PretrainRetroOptions
from retro_mcore.data.tokenizers.base import Tokenizer
from retro_mcore.data.tokenizers.loading import load_project_tokenizer
from retro_mcore.data.tokens.splits import num_retrieved_documents
from retro_mcore.data.tokens.token_file import open_token_files
from retro_mcore.evaluation.perplexity import measure_perplexity, read_samples
from retro_mcore.platform import setup_device
from retro_mcore.project.config import ProjectConfig, ProjectSettings, Split
from retro_mcore.project.paths import ProjectPaths
from retro_mcore.retrieval.retriever import Retriever
from retro_mcore.samples.batch import RetroBatch
from retro_mcore.samples.retro_dataset import RetroDataset, build_retro_datasets
from retro_mcore.training.loop.trainer import Trainer
from retro_mcore.training.setup.load_model import load_model_from_checkpoint
from retro_mcore.training.setup.plan import make_plan

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY / "examples" / "quickstart"))

from run import LAPTOP, SMOKE, Layout, Size, all_stages  # noqa: E402

BATCH = 4
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


@dataclass(frozen=True)
class Trial:
    """The models of one seed.

    Attributes:
        size: Flags.
        project_dir: The project, whose samples have this seed's order.
        folder: Where this seed's models are.
        seed: The seed.
        timed: Iterations over which training is timed.
        smoke: Whether the text is tiny.
    """

    size: Size
    project_dir: Path
    folder: Path
    seed: int
    timed: int
    smoke: bool

    @cached_property
    def project(self) -> ProjectConfig:
        return ProjectConfig.load(self.project_dir)

    @property
    def iterations(self) -> int:
        """Steps of a training."""
        return self.project.retro_gpt_train_samples // self.project.retro_gpt_global_batch_size

    @cached_property
    def tokenizer(self) -> Tokenizer:
        return load_project_tokenizer(self.project, ProjectPaths(self.project_dir))

    def options(self, own: list[str]) -> PretrainRetroOptions:
        """Options of pretrain_retro with a model's own flags."""
        flags = ["--project-dir", str(self.project_dir), "--seed", str(self.seed)]
        flags += [*self.size.model.split(), *own, "--num-workers", "0", "--device", "cpu"]
        return parse_options(PretrainRetroOptions, flags)

    @cached_property
    def datasets(self) -> dict[Split, RetroDataset | None]:
        options = self.options(self.size.retro.split())
        neighbors, chunks = options.retro_num_neighbors, options.retro_num_retrieved_chunks
        return build_retro_datasets(self.project_dir, neighbors, chunks)

    def split(self, name: Split) -> RetroDataset:
        """The samples of a split."""
        dataset = self.datasets[name]
        assert dataset is not None
        return dataset

    def trained(
        self, own: list[str], samples: Any, folder: Path | None, iterations: int | None = None
    ) -> float:
        """Train a model.

        Args:
            own: Its flags.
            samples: A RetroDataset, or InContext.
            folder: Where to save it; None: nowhere.
            iterations: Steps; None: all.

        Returns:
            Processor seconds.
        """
        project = self.project
        if iterations is not None:
            batch = project.retro_gpt_global_batch_size
            project = replace(project, retro_gpt_train_samples=iterations * batch)
        if isinstance(samples, InContext):
            lengths = samples.sample_length, samples.chunk_length
            project = replace(
                project, retro_gpt_seq_length=lengths[0], retro_gpt_chunk_length=lengths[1]
            )
        options = self.options(own)
        if folder is not None:
            options = replace(options, save=str(folder), load=str(folder), save_interval=100)
        vocabulary = self.tokenizer.vocab_size, self.tokenizer.used_vocab_size
        plan = make_plan(options, project, *vocabulary)
        trainer = Trainer(plan, samples, None, torch.device("cpu"))
        return seconds(trainer.train)[0]

    def training_cost(self, own: list[str], samples: Any) -> float:
        """Seconds of a whole training, from a few iterations."""
        timed = min(self.timed, self.iterations)
        return self.trained(own, samples, None, timed) * self.iterations / timed

    def scored(self, model: Any, samples: Any, kind: Any) -> tuple[float, float]:
        """Processor seconds and perplexity of the test documents."""
        size = self.tokenizer.vocab_size
        spent, found = seconds(
            lambda: measure_perplexity(
                model,
                samples,
                "test",
                kind,
                num_samples=len(samples),
                micro_batch_size=BATCH,
                vocab_size=size,
            )
        )
        return spent, found.perplexity

    def search_seconds(self) -> float:
        """Seconds to search the neighbors of all chunks of the test samples."""
        test = self.split("test")
        retriever = Retriever(self.project_dir, test.num_neighbors, 1, "cpu")
        chunks = [
            chunk.tolist()
            for number in range(len(test))
            for chunk in test.tokens(number)[:-1].reshape(test.chunks_per_sample, -1)
        ]
        retriever.search_tokens(chunks[:1])  # loads the index
        return seconds(lambda: retriever.search_tokens(chunks))[0]

    def row(self, name: str, folder: Path, own: list[str], samples: Any, kind: str) -> Row:
        """A trained model's figures."""
        latest = folder / "latest_checkpointed_iteration.txt"
        if not latest.is_file() or int(latest.read_text()) < self.iterations:
            self.trained(own, samples("train"), folder)
        model, _ = load_model_from_checkpoint(folder)
        scoring, perplexity = self.scored(model, samples("test"), kind)
        training = self.training_cost(own, samples("train"))
        row = Row(name, count(model), perplexity, training, scoring)
        print(row, flush=True)
        return row

    def measure(self) -> list[Row]:
        """All five."""
        retro, gpt = self.size.retro.split(), self.size.gpt.split()
        encoded = [*retro, "--retro-num-retrieved-chunks", "1"]

        def in_context(name: Split) -> InContext:
            return InContext(self.split(name))

        def with_encoder(name: Split) -> InContext:
            return InContext(self.split(name), encoded=True)

        plain = self.row("GPT", self.folder / "gpt", gpt, self.split, "none")
        nearest = self.knn(plain)
        reading = [
            self.row("Retro", self.folder / "checkpoints", retro, self.split, "real"),
            self.row("text in context", self.folder / "context", gpt, in_context, "none"),
            self.row("Retro++", self.folder / "retro_plus", encoded, with_encoder, "real"),
        ]
        searched, size = self.search_seconds(), index_bytes(self.project_dir)
        reading = [
            replace(row, scoring=row.scoring + searched, store_seconds=None, store_bytes=size)
            for row in reading
        ]
        return [plain, reading[0], nearest, *reading[1:]]

    def knn(self, gpt: Row) -> Row:
        """Figures of kNN-LM on the trained GPT."""
        model, _ = load_model_from_checkpoint(self.folder / "gpt")
        size, lists = self.tokenizer.vocab_size, SMOKE_LISTS if self.smoke else LISTS
        building, store = seconds(
            lambda: Datastore(read_states(model, self.windows(), size), lists, min(PROBES, lists))
        )

        def states(name: Split) -> States:
            dataset = self.split(name)
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

    def windows(self) -> Iterator[RetroBatch]:
        """The documents of the database as batches of samples, one after the other."""
        (file,) = open_token_files(self.project, ProjectPaths(self.project_dir))
        documents = num_retrieved_documents(self.project.retro_gpt_split, len(file.lengths))
        length, last = self.project.retro_gpt_seq_length, documents - 1
        end = int(file.starts[last] + file.lengths[last])
        samples = self.split("train").samples
        for start in range(0, end - length, BATCH * length):
            firsts = range(start, min(start + BATCH * length, end - length), length)
            text = [np.asarray(file.tokens[i : i + length + 1], np.int64) for i in firsts]
            masks = [samples.masks(each).get("loss_mask", np.ones(length)) for each in text]
            yield RetroBatch.from_text(
                torch.from_numpy(np.stack(text)),
                loss_mask=torch.from_numpy(np.stack(masks)).float(),
            )


def seconds(run: Callable[[], Any]) -> tuple[float, Any]:
    """Processor seconds of a call, and its result."""
    started = time.process_time()
    result = run()
    return time.process_time() - started, result


def count(model: torch.nn.Module) -> int:
    """Number of parameters."""
    return sum(parameter.numel() for parameter in model.parameters())


def index_bytes(project_dir: Path) -> int:
    """Size of the index of chunks, and of the chunks' places and tokens."""
    paths, settings = ProjectPaths(project_dir), ProjectSettings.load(project_dir)
    assert settings.index_string is not None
    files = [paths.added_index(settings.index_string), paths.merged_db("train")]
    files += paths.data.glob("*.bin")
    return sum(path.stat().st_size for path in files)


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
        trials.append(trial.measure())
        show(trials)
    if options.json:
        rows = [[asdict(row) for row in rows] for rows in trials]
        options.json.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
