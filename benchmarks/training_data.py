"""The quickstart's project for benchmarks of training: real text, its neighbors found."""

from __future__ import annotations

import dataclasses
import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType

REPOSITORY = Path(__file__).resolve().parents[1]
DATA_STAGES = ("preprocess_corpus", "build_db", "build_index", "query_neighbors")


def quickstart() -> ModuleType:
    """examples/quickstart/run.py as a module."""
    path = REPOSITORY / "examples" / "quickstart" / "run.py"
    spec = importlib.util.spec_from_file_location("quickstart_run", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def make_project(folder: Path, smoke: bool, train_epochs: int | None = None) -> Path:
    """The project below `folder`, as far as it is not there; returns its directory.

    Args:
        folder: Where to make it.
        smoke: The quickstart's smallest size.
        train_epochs: Times that the text is read, in place of the quickstart's.

    Raises:
        RuntimeError: a stage failed; it has said why.
    """
    run = quickstart()
    size, layout = (run.SMOKE if smoke else run.LAPTOP), run.Layout(folder)
    if train_epochs is not None:
        epochs = re.sub(
            r"--train-epochs \d+", f"--train-epochs {train_epochs}", size.preprocess_corpus
        )
        size = dataclasses.replace(size, preprocess_corpus=epochs)
    if code := run.make_corpus(layout, size.make_corpus):
        raise RuntimeError(f"make_corpus stopped with exit code {code}")
    for name, flags in run.stages(size, layout.corpus, layout, 1):
        if name in DATA_STAGES and (code := run.run_stage(name, flags, 1)):
            raise RuntimeError(f"{name} stopped with exit code {code}")
    return layout.project


def model_flags(smoke: bool) -> list[str]:
    """The quickstart's flags of model and training."""
    run = quickstart()
    size = run.SMOKE if smoke else run.LAPTOP
    return size.pretrain_retro.split()
