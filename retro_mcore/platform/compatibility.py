"""Differences between the releases of megatron-core from 0.16.1 to 0.19.2, and faults of all.

| function                   | releases         | what happens without it                          |
|----------------------------|------------------|--------------------------------------------------|
| `async_save_arguments`     | 0.17 and later   | async saving needs nvidia-resiliency-ext         |
| `results_through_a_file`   | 0.16.1 to 0.19.2 | a save runs the user's script again, or hangs    |
| `allow_norm_recomputation` | 0.16.1 to 0.19.2 | recomputing norms needs Transformer Engine       |
| `tokens_and_document_ids`  | 0.17 and later   | an item of the GPT dataset has one array more    |
| `takes_configurations`     | 0.18 and later   | Megatron-LM's `pretrain()` is called wrongly     |

`optimizer_state` has those of optimizers. docs/decisions/0020-megatrons-private-names.md lists all.
"""

from __future__ import annotations

import inspect
import pickle
import queue
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import IO, Any

import numpy as np
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.tensor_parallel import random
from megatron.core.transformer.transformer_config import TransformerConfig

import retro_mcore.platform.groups  # noqa: F401 (ends the threads of groups at exit)


def async_save_arguments() -> dict[str, Any]:
    """Arguments of `dist_checkpointing.save` for asynchronous saving by megatron itself.

    From 0.17 on it hands over to nvidia-resiliency-ext unless it is told not to.
    """
    arguments: dict[str, Any] = {"async_sharded_save": True}
    if "async_strategy" in inspect.signature(dist_checkpointing.save).parameters:
        arguments["async_strategy"] = "mcore"
    return arguments


@contextmanager
def results_through_a_file() -> Iterator[None]:
    """While a save is prepared, have its writers report through an unnamed file (0.16.1 to 0.19.2).

    Megatron starts a manager process for their queue, by spawning: that runs the user's script
    again unless it has a `__main__` guard, and outlives a killed run. An open file is inherited by
    the forked writer, holds results of any size, and disappears with the processes.
    """
    previous = filesystem_async._results_queue
    filesystem_async._results_queue = _FileQueue()
    try:
        yield
    finally:
        filesystem_async._results_queue = previous


class _FileQueue:
    """A queue for one value at a time, from a forked process (or this one) to this one."""

    def __init__(self) -> None:
        self._file: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 (closed with the queue)

    def put(self, value: object) -> None:
        pickle.dump(value, self._file)
        self._file.flush()

    def get_nowait(self) -> Any:
        self._file.seek(0)
        try:
            return pickle.load(self._file)  # written by this program, into a file without a name
        except EOFError:
            raise queue.Empty from None  # the writer died
        finally:  # a trainer saves more than once
            self._file.seek(0)
            self._file.truncate()


def allow_norm_recomputation() -> None:
    """Let megatron discard and recompute a norm's output (`recompute_modules` "layernorm") without
    Transformer Engine; idempotent.

    Its CheckpointWithoutOutput takes its own default, False, for an fp8 recipe, and then asks
    Transformer Engine; from 0.18 on it also compiles a C++ extension to hand a storage over.
    """
    if random.HAVE_TE or getattr(random.CheckpointWithoutOutput, "works_without_te", False):
        return
    original: Any = random.CheckpointWithoutOutput.__init__

    def __init__(self: Any, fp8: Any = None, *args: Any, **kwargs: Any) -> None:
        original(self, fp8 or None, *args, **kwargs)

    patched: Any = random.CheckpointWithoutOutput
    patched.__init__, patched.works_without_te = __init__, True
    if hasattr(random, "_get_share_storage"):
        random._get_share_storage = lambda: _copy_storage


def _copy_storage(output: Any, recomputed: Any) -> None:
    storage = recomputed.untyped_storage()
    output.untyped_storage().resize_(storage.size())
    output.untyped_storage().copy_(storage)


def config_value(config: TransformerConfig, field: str, absent: Any) -> Any:
    """The value of a field, or `absent` in releases that lack the field."""
    return getattr(config, field, absent)


def tokens_and_document_ids(dataset: Any, index: int) -> tuple[np.ndarray, np.ndarray]:
    """An item of a GPTDataset: tokens `[S+1]` and the ids of their documents.

    Later releases also return the documents' lengths.
    """
    tokens, document_ids = dataset._query_document_sample_shuffle_indices(index)[:2]
    return tokens, document_ids


def takes_configurations(pretrain: Callable[..., Any]) -> bool:
    """Whether Megatron-LM's `pretrain()` takes a container of configurations (0.18 and later)."""
    return "cfg_container" in inspect.signature(pretrain).parameters
