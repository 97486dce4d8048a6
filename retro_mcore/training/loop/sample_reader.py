"""Read a project's samples in order, from any position, divided among data parallel ranks.

The order is the project's, in which neighbors were queried. So a position in the data is one
number: the number of samples consumed so far.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from retro_mcore.data.tokenizers.base import Tokenizer
from retro_mcore.errors import (
    ConfigurationError,
    ProjectError,
    TokenizerError,
    flag_of,
    raise_problems,
)
from retro_mcore.model.option_traits import stated
from retro_mcore.project.config import ProjectConfig
from retro_mcore.samples.batch import RetroBatch, collate
from retro_mcore.training.loop.batch_sizes import BatchSizes
from retro_mcore.training.loop.stopping import ignore_stop_signals
from retro_mcore.training.options.pretrain import DataOptions


class Samples(Protocol):
    """A split of a project: `samples[i]` is an item for `collate`, without the sample's id."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Mapping[str, Any]: ...


@runtime_checkable
class SamplesOfText(Protocol):
    """Samples whose text can be read without its neighbors."""

    def text_item(self, index: int) -> Mapping[str, Any]:
        """The sample's item without the entries of its neighbors."""


@runtime_checkable
class SamplesInOrder(Protocol):
    """Samples with a digest of their order."""

    def order_digest(self, count: int) -> str:
        """Digest of the identity and order of the first `count` samples."""


class NumberedSamples(Dataset):
    """Samples that include their own number.

    Args:
        samples: The samples.
        retrieval: False omits the neighbors of `SamplesOfText`.
    """

    def __init__(self, samples: Samples, retrieval: bool = True) -> None:
        self.samples = samples
        self.retrieval = retrieval

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not self.retrieval and isinstance(self.samples, SamplesOfText):
            return {**self.samples.text_item(index), "sample_id": index}
        return {**self.samples[index], "sample_id": index}


class MicroBatchSampler(Sampler[list[int]]):
    """Indexes of this rank's micro batches: consecutive samples, assigned to ranks in turn.

    Args:
        start: First sample.
        stop: Sample after the last. A remainder too small for a micro batch on every rank is
            dropped, unless `keep_rest`.
        micro_batch_size: B.
        rank: This data parallel rank.
        world_size: Number of data parallel ranks.
        keep_rest: Also yield the remainder; some ranks may then get fewer or smaller batches.
    """

    def __init__(
        self,
        start: int,
        stop: int,
        micro_batch_size: int,
        rank: int,
        world_size: int,
        keep_rest: bool = False,
    ) -> None:
        self.start, self.stop, self.micro_batch_size = start, stop, micro_batch_size
        self.rank, self.world_size, self.keep_rest = rank, world_size, keep_rest

    def __iter__(self) -> Iterator[list[int]]:
        stride = self.micro_batch_size * self.world_size
        for first in range(self.start, self.stop, stride):
            if first + stride > self.stop and not self.keep_rest:
                return
            mine = first + self.rank * self.micro_batch_size
            batch = list(range(mine, min(mine + self.micro_batch_size, self.stop)))
            if batch:
                yield batch

    def __len__(self) -> int:
        return sum(1 for _ in self)


def read_batches(
    dataset: Dataset, sampler: MicroBatchSampler, num_workers: int, device: torch.device
) -> Iterator[RetroBatch]:
    """Yield micro batches on `device`, prefetched by `num_workers` processes."""
    loader = DataLoader(
        dataset,
        batch_sampler=sampler,
        num_workers=num_workers,
        collate_fn=collate,
        worker_init_fn=ignore_stop_signals,
        pin_memory=device.type == "cuda",
        # The loader gets its own generator. The global one drives dropout,
        # which must not depend on where a run was interrupted.
        generator=torch.Generator(),
    )
    for batch in loader:
        yield batch.to(device)


def project_flags(config: ProjectConfig) -> dict[str, Any]:
    """Flags that the project determines, with their values."""
    return {name: getattr(config, key) for name, key in stated("project", DataOptions).items()}


def check_data_options(options: DataOptions, config: ProjectConfig) -> None:
    """Reject flags that contradict the project.

    Raises:
        ConfigurationError: names the flag, its value and the project's value.
        SeveralErrors: several flags contradict it; names all of them.
    """
    asked = {name: getattr(options, name) for name in project_flags(config)}
    raise_problems(
        [
            ConfigurationError(
                flag_of(name),
                f"{asked[name]}, but config.json of {options.project_dir} says {of_project}",
                "Leave the flag out, or change the project with set_samples, or make another",
            )
            for name, of_project in project_flags(config).items()
            if asked[name] is not None and asked[name] != of_project
        ]
    )


def number_of_iterations(
    options: DataOptions, config: ProjectConfig, sizes: BatchSizes
) -> tuple[int, int]:
    """Number of iterations and samples that the options request, within the project's samples.

    Raises:
        ConfigurationError: more samples are requested than the project has neighbors for.
    """
    available, batch = config.retro_gpt_train_samples, config.retro_gpt_global_batch_size
    asked = options.train_iters * batch if options.train_iters else options.train_samples
    if asked is not None and asked > available:
        raise ConfigurationError(
            "--train-iters" if options.train_iters else "--train-samples",
            f"needs {asked} samples, but config.json of {options.project_dir} has {available}",
            f"Train on at most {available // batch} iterations of {batch} samples, or give "
            "the project more: set_samples --train-samples, or a new project",
        )
    iterations, samples = sizes.iterations(available if asked is None else asked)
    if iterations == 0:
        smallest = sizes.sizes[0]
        raise ConfigurationError(
            "--train-samples",
            f"{asked or available}, less than one batch",
            f"At least {smallest}",
        )
    return iterations, samples


def require_split(datasets: Mapping[Any, Any], split: str, project_dir: str) -> Any:
    """The dataset of `split`.

    Raises:
        ProjectError: the project has no neighbors (or no documents) for that split.
    """
    dataset = datasets.get(split)
    if dataset is None or len(dataset) == 0:
        raise ProjectError(
            project_dir,
            f"has no samples with neighbors in its {split} split",
            "Run query_neighbors.py on it, with a --split that gives this part some documents",
        )
    return dataset


def tokenizer_fingerprint(config: ProjectConfig, project_dir: str | Path) -> str:
    """SHA-256 of the tokenizer's type and files, independent of the project's location.

    Raises:
        TokenizerError: a file is missing.
    """
    digest = hashlib.sha256(str(config.retro_gpt_tokenizer_type).encode())
    names: Sequence[str | None] = (
        config.retro_gpt_tokenizer_model,
        config.retro_gpt_vocab_file,
        config.retro_gpt_merge_file,
    )
    for name in names:
        if name is None:
            continue
        path = Path(project_dir) / name
        if not path.exists():
            raise TokenizerError(path, "no such file, but config.json names it", "Restore it")
        files = sorted(path.rglob("*")) if path.is_dir() else [path]
        for file in files:
            if file.is_file():
                digest.update(file.name.encode() + file.read_bytes())
    return digest.hexdigest()


#: Checkpoint argument with the BOS and EOD of the documents that it was trained on.
DOCUMENT_TOKENS = "document_tokens"


def document_tokens(tokenizer: Tokenizer) -> dict[str, int | None]:
    """Tokens that end (`eod`) and begin (`bos`, may be None) a project's documents.

    The tokenizer's files, and so the fingerprint, do not determine them.
    """
    return {"eod": tokenizer.eod, "bos": next(iter(tokenizer.beginning), None)}


def check_document_tokens(
    saved: Mapping[str, Any], here: Mapping[str, int | None] | None, project_dir: str | Path
) -> str | None:
    """Reject a project whose documents end differently from those that a model was trained on.

    Args:
        saved: The arguments of the model's checkpoint; older ones do not record these tokens.
        here: `document_tokens` of the project.
        project_dir: The project.

    Returns:
        A warning if the documents begin differently, else None.

    Raises:
        TokenizerError: the documents end differently. Names both tokens.
    """
    before = saved.get(DOCUMENT_TOKENS)
    if not isinstance(before, Mapping) or here is None or before == here:
        return None
    if before.get("eod") != here["eod"]:
        raise TokenizerError(
            f"tokenizer of {project_dir}",
            f"documents end with token {here['eod']}, and those that the model was trained on with "
            f"token {before.get('eod')}",
            f"Use a project that was preprocessed with --eod-token {before.get('eod')}",
        )
    began, begin = (_beginning(each.get("bos")) for each in (before, here))
    return (
        f"warning: documents and prompts of {project_dir} begin {begin}, those that the model was "
        f"trained on began {began}: see preprocess_corpus --add-bos-token"
    )


def _beginning(bos: int | None) -> str:
    return "without BOS" if bos is None else f"with BOS ({bos})"
