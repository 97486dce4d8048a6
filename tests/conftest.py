"""Fixtures for every test."""

from __future__ import annotations

import os

# Small models: one thread a process is fastest, and tests run side by side.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from importlib.metadata import version

import pytest


def pytest_report_header() -> str:
    """Which megatron-core the tests run on (`make test-versions` puts another one first)."""
    return f"megatron-core {version('megatron-core')}, torch {version('torch')}"


@pytest.fixture(scope="session")
def megatron() -> None:
    """Real megatron-core on CPU in this process: one rank, no parallelism, random states seeded."""
    from tests.processes import join_megatron

    join_megatron()
