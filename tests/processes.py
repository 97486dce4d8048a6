"""Run a function on several processes that talk over gloo, and collect what it returns."""

from __future__ import annotations

import multiprocessing
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing

import retro_mcore  # noqa: F401 (first: it lets megatron be imported without Triton)

#: Processes are forked from a server that imports torch and megatron once.
START_METHOD = "forkserver"
multiprocessing.set_forkserver_preload(["tests.preloaded"])


def join_megatron(seed: int = 1234, **parallel_sizes: Any) -> None:
    """Join megatron's process groups on CPU, with the parallel sizes given, and seed it.

    Args:
        seed: Of the random states.
        **parallel_sizes: As `parallel_state.initialize_model_parallel` takes them.
    """
    from retro_mcore.platform import use_cpu

    use_cpu()
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    from retro_mcore.distributed import initialize

    initialize("gloo")
    if not parallel_state.model_parallel_is_initialized():
        parallel_state.initialize_model_parallel(**parallel_sizes)
    torch.manual_seed(seed)
    model_parallel_cuda_manual_seed(seed)


def run_ranks(world_size: int, function: Callable[..., Any], *args: Any) -> list[Any]:
    """Call `function(*args)` on `world_size` new processes; return what each returned, by rank.

    The default process group (gloo) exists in each. An exception on any rank is raised here.

    Args:
        world_size: Number of processes.
        function: Importable at module level; its arguments and results are pickled.
    """
    with tempfile.TemporaryDirectory() as folder:
        torch.save(args, Path(folder) / "arguments.pt")  # a server takes few shared tensors
        torch.multiprocessing.start_processes(
            _rank_main,
            args=(world_size, folder, dict(os.environ), function),
            nprocs=world_size,
            start_method=START_METHOD,
        )
        return [
            torch.load(Path(folder) / f"result_{rank}.pt", weights_only=False)
            for rank in range(world_size)
        ]


def _rank_main(
    rank: int,
    world_size: int,
    folder: str,
    environment: dict[str, str],
    function: Callable[..., Any],
) -> None:
    os.environ.clear()  # the server's own is as old as the first call
    os.environ.update(environment, OMP_NUM_THREADS="1")
    multiprocessing.set_start_method(multiprocessing.get_all_start_methods()[0], force=True)
    torch.set_num_threads(1)
    store = torch.distributed.FileStore(f"{folder}/store", world_size)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=world_size)
    args = torch.load(Path(folder) / "arguments.pt", weights_only=False)
    try:
        torch.save(function(*args), Path(folder) / f"result_{rank}.pt")
        torch.distributed.barrier()
    finally:
        torch.distributed.destroy_process_group()
