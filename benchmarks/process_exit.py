"""How processes that have done their work end: exit codes with and without leaving process groups.

    python -m benchmarks.process_exit --runs 300

Each run is a process that joins a gloo group of its own, starts a collective on a tensor that takes
its time to go (it holds an object whose destructor sleeps), and ends as an interpreter does. "bare"
joins by torch.distributed alone: gloo's thread may then release the tensor while the interpreter
ends, which aborts the process (SIGABRT, -6). "ours" joins by `retro_mcore.distributed.initialize`,
which leaves the groups first; every exit code must be 0. "training" is one iteration of
`pretrain_retro` with no such object, on a small project that is made first.
"""

from __future__ import annotations

import argparse
import importlib
import os
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
import torch.distributed as dist

from retro_mcore.distributed import initialize
from retro_mcore.platform import use_cpu


class SlowToGo:
    """Holds the thread that releases it for a tenth of a second."""

    def __del__(self) -> None:
        for _ in range(5):
            time.sleep(0.02)


def start_collectives() -> None:
    """All-reduce two tensors whose last owner will be gloo's thread, most often."""
    for _ in range(2):
        tensor: Any = torch.ones(1 << 20)
        tensor.attribute = SlowToGo()
        dist.all_reduce(tensor, async_op=True)
        del tensor


def bare() -> None:
    """What any script with torch.distributed does."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    start_collectives()


def ours() -> None:
    """The same, in a group that is left in time."""
    initialize("gloo")
    start_collectives()


def training(project: Path) -> None:
    """One iteration of `pretrain_retro`."""
    from retro_mcore.cli.pretrain_retro import main

    sizes = "--num-layers 2 --hidden-size 32 --num-attention-heads 2 --retro-decoder-layers 2"
    run = "--train-iters 1 --micro-batch-size 1 --lr 1e-3 --num-workers 0"
    code = main(["--project-dir", str(project), *sizes.split(), *run.split()])
    if code:
        raise SystemExit(code)


def make_project(folder: Path) -> Path:
    """A few texts, searched."""
    from pydoc_data.topics import topics

    from retro_mcore.cli import commands as retro

    (folder / "texts").mkdir()
    for name in sorted(topics)[:20]:
        (folder / "texts" / f"{name}.txt").write_text(topics[name], encoding="utf-8")
    project = folder / "project"
    retro.preprocess_corpus(
        project_dir=str(project),
        input=[str(folder / "texts")],
        vocab_size=600,
        seq_length=64,
        retro_chunk_length=32,
        train_samples=2,
        global_batch_size=1,
        eval_iters=0,
    )
    retro.build_db(project_dir=str(project))
    retro.build_index(project_dir=str(project), embedder="lexical")
    retro.query_neighbors(project_dir=str(project))
    return project


def exit_code(work: Callable[[], object]) -> int:
    """Of a forked process that does the work, then ends as the interpreter does."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    quiet = os.open(os.devnull, os.O_WRONLY)
    os.dup2(quiet, 1)
    os.dup2(quiet, 2)
    work()
    sys.exit(0)


def main() -> None:
    """Count exit codes, and print them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=300, help="Processes of each kind.")
    parser.add_argument("--kinds", nargs="+", default=["bare", "ours", "training"])
    options = parser.parse_args()
    torch.set_num_threads(1)
    kinds: dict[str, Callable[[], object]] = {"bare": bare, "ours": ours}
    folder = Path(tempfile.mkdtemp())  # not a context: a child that ends would remove it
    if "training" in options.kinds:
        # In a process of its own: one with threads of gloo must not be forked.
        if exit_code(lambda: make_project(folder)):
            sys.exit("the project could not be made")
        use_cpu()
        importlib.import_module("retro_mcore.training.loop.trainer")  # once, not in each process
        kinds["training"] = lambda: training(folder / "project")
    for kind in options.kinds:
        codes = Counter(exit_code(kinds[kind]) for _ in range(options.runs))
        print(f"{kind}: " + ", ".join(f"{n} x {code}" for code, n in codes.items()), flush=True)
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()
