"""Faiss itself: import, number of threads, error messages."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from threading import Barrier
from types import ModuleType
from typing import Any

import torch

from retro_mcore import launcher
from retro_mcore.errors import MissingDependencyError
from retro_mcore.host import usable_cores


@cache
def faiss_library() -> ModuleType:
    """The module `faiss`, configured so that results do not depend on the number of rows per call.

    Flat distances always come from matrix products. (For small calls Faiss would use other code,
    which rounds differently.) The k best always come from a heap, which keeps the lower id of two
    at the same distance. (Faiss's reservoir for large k may keep either.)
    """
    try:
        import faiss
    except ImportError as error:
        raise MissingDependencyError(
            "faiss", "not installed", "Install retro-mcore[cpu] or [gpu]"
        ) from error
    faiss.cvar.distance_compute_blas_threshold = 1
    faiss.cvar.distance_compute_min_k_reservoir = 1 << 30
    return faiss


def share_of_cores() -> int:
    """This process's share of the cores that it may run on."""
    return max(1, usable_cores() // launcher.local_world_size())


@contextmanager
def faiss_threads(count: int) -> Iterator[ModuleType]:
    """Faiss with `count` threads in calls from this thread."""
    faiss = faiss_library()
    before = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(count)
    try:
        yield faiss
    finally:
        faiss.omp_set_num_threads(before)


@cache
def worker_threads() -> ThreadPoolExecutor:
    """Threads that call Faiss in parallel, each with one thread inside Faiss and PyTorch.

    Rounding of matrix products depends on how they are divided among threads. Calls of fixed size
    on one thread each give the same bytes on any number of cores.
    """
    faiss, count = faiss_library(), share_of_cores()
    others = _in_new_thread(torch.get_num_threads)
    pool, started = ThreadPoolExecutor(count, "faiss", _use_one_thread, (faiss,)), Barrier(count)
    try:
        list(pool.map(lambda _: started.wait(), range(count)))
    except BaseException:  # the system gives no more threads
        started.abort()
        pool.shutdown(wait=False)
        raise
    _in_new_thread(torch.set_num_threads, others)  # PyTorch sets it for threads that begin later
    return pool


def _use_one_thread(faiss: ModuleType) -> None:
    faiss.omp_set_num_threads(1)
    torch.get_num_threads()  # a thread that has never asked takes the number of all others later
    torch.set_num_threads(1)


def _in_new_thread(function: Callable[..., Any], *arguments: Any) -> Any:
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(function, *arguments).result()


def message_of(error: Exception) -> str:
    """Faiss's error message without its source locations."""
    message = str(error) or type(error).__name__
    return message.splitlines()[0].split("Error: ")[-1].strip()
