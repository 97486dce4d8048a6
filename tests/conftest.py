"""Fixtures for every test."""

from __future__ import annotations

import gc
import logging
import os
import random
import sys
import zlib
from collections.abc import Iterator

# Small models: one thread a process is fastest, and tests run side by side.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from importlib.metadata import version

import numpy as np
import pytest
import torch

from retro_mcore.logs import _Terminal
from retro_mcore.platform.cpu import disable_compilation

if not torch.cuda.is_available():
    disable_compilation()  # before a test module imports megatron: it would load the compiler


def pytest_report_header() -> str:
    """Which megatron-core the tests run on (`make test-versions` puts another one first)."""
    return f"megatron-core {version('megatron-core')}, torch {version('torch')}"


def pytest_collection_finish() -> None:
    """Collections of garbage need not visit the imported modules and the tests."""
    gc.freeze()


@pytest.fixture(scope="session")
def megatron() -> None:
    """Real megatron-core on CPU in this process: one rank, no parallelism, random states seeded."""
    from tests.processes import join_megatron

    join_megatron()


class _LastResort(logging.Handler):
    """Writes warnings to stderr where no command's handlers do, as Python does without pytest's."""

    def emit(self, record: logging.LogRecord) -> None:
        if not any(isinstance(handler, _Terminal) for handler in logging.root.handlers):
            print(record.getMessage(), file=sys.stderr)


@pytest.fixture(autouse=True)
def _warnings_are_shown() -> Iterator[None]:
    logger, handler = logging.getLogger("retro_mcore"), _LastResort(logging.WARNING)
    logger.addHandler(handler)
    yield
    logger.removeHandler(handler)


def pytest_fixture_setup(fixturedef: pytest.FixtureDef, request: pytest.FixtureRequest) -> None:
    """Random weights and draws of a fixture depend on its name, not on what ran before it."""
    _seed(f"{fixturedef.baseid}::{fixturedef.argname}::{getattr(request, 'param_index', 0)}")


def pytest_runtest_call(item: pytest.Item) -> None:
    """So do those of a test."""
    _seed(item.nodeid)


def _seed(name: str) -> None:
    seed = zlib.crc32(name.encode()) or 1
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002 (libraries below us draw from the global generator)
    if (torch := sys.modules.get("torch")) is not None:
        torch.manual_seed(seed)
    parallel_state = sys.modules.get("megatron.core.parallel_state")
    if parallel_state is not None and parallel_state.model_parallel_is_initialized():
        from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

        model_parallel_cuda_manual_seed(seed)


@pytest.fixture(autouse=True, scope="module")
def no_scale_of_other_tests():
    """Megatron keeps the scale of the experts' losses of a process's first use, and its shape."""
    experts = sys.modules.get("megatron.core.transformer.moe.moe_utils")
    if experts is not None:
        experts.MoEAuxLossAutoScaler.main_loss_backward_scale = None
