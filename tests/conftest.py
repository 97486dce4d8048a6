"""Fixtures for every test."""

from __future__ import annotations

import os

# Small models: one thread a process is fastest, and tests run side by side.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest


@pytest.fixture(scope="session")
def megatron() -> None:
    """Real megatron-core on CPU in this process: one rank, no parallelism, random states seeded."""
    from tests.processes import join_megatron

    join_megatron()
