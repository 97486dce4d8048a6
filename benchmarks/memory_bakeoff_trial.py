"""The models of one seed for benchmarks/memory_bakeoff: training, scoring, and their cost."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.memory_bakeoff_context import InContext
from retro_mcore.cli.flags import parse_options
from retro_mcore.cli.pretrain_retro import PretrainRetroOptions
from retro_mcore.data.tokenizers.base import Tokenizer
from retro_mcore.data.tokenizers.loading import load_project_tokenizer
from retro_mcore.data.tokens.splits import num_retrieved_documents
from retro_mcore.data.tokens.token_file import open_token_files
from retro_mcore.evaluation.perplexity import measure_perplexity
from retro_mcore.project.config import ProjectConfig, ProjectSettings, Split
from retro_mcore.project.paths import ProjectPaths
from retro_mcore.retrieval.retriever import Retriever
from retro_mcore.samples.batch import RetroBatch
from retro_mcore.samples.neighbor_noise import NeighborNoise
from retro_mcore.samples.retro_dataset import RetroDataset, build_retro_datasets
from retro_mcore.training.loop.trainer import Trainer
from retro_mcore.training.setup.plan import make_plan

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY / "examples" / "quickstart"))

from run import Size  # noqa: E402

BATCH = 4


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
        noise = NeighborNoise.from_options(options, self.seed)
        return build_retro_datasets(self.project_dir, neighbors, chunks, noise)

    def split(self, name: Split) -> RetroDataset:
        """The samples of a split."""
        dataset = self.datasets[name]
        assert dataset is not None
        return dataset

    def trained(
        self,
        own: list[str],
        samples: Any,
        folder: Path | None,
        iterations: int | None = None,
        adapt: Callable[[torch.nn.Module], None] | None = None,
    ) -> float:
        """Train a model.

        Args:
            own: Its flags.
            samples: A RetroDataset, or InContext.
            folder: Where to save it; None: nowhere.
            iterations: Steps; None: all.
            adapt: What is done to the model before.

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
        if adapt is not None:
            (model,) = trainer._parts.stages
            adapt(model)
        return seconds(trainer.train)[0]

    def training_cost(self, own: list[str], samples: Any) -> float:
        """Seconds of a whole training, from a few iterations."""
        timed = min(self.timed, self.iterations)
        return self.trained(own, samples, None, timed) * self.iterations / timed

    def scored(
        self, model: Any, samples: Any, kind: Any, split: Split = "test"
    ) -> tuple[float, float]:
        """Processor seconds and perplexity of held-out documents."""
        size = self.tokenizer.vocab_size
        spent, found = seconds(
            lambda: measure_perplexity(
                model,
                samples,
                split,
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
