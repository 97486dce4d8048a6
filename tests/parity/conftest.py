"""The retired release's answers, computed once a session."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from tests.parity import environment
from tests.parity.cases import CASES


@pytest.fixture(scope="session")
def retired(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """What megatron-core 0.15.3 answered to every case, by name.

    Raises:
        MissingDependencyError: there is no network to install the release from, the first time.
    """
    folder = tmp_path_factory.mktemp("parity")
    torch.save([dataclasses.asdict(case) for case in CASES], folder / "cases.pt")
    script = environment.ROOT / "tests" / "parity" / "oracle.py"
    environment.run([str(script), str(folder / "cases.pt"), str(folder / "results.pt")])
    return torch.load(folder / "results.pt", weights_only=True)
