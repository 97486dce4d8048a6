"""What only the database knows is gone with its documents."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.mark.slow
def test_removed_facts_are_forgotten(tmp_path: Path) -> None:
    from benchmarks.planted_facts import Size, run

    found = run(tmp_path, Size())
    assert found.before.mean > 2  # of 2.77 nats that a code holds
    assert -0.1 < found.after.mean < 0.1  # as without neighbors; -0.002 when measured
    assert found.again.mean == pytest.approx(found.after.mean, abs=1e-3)
    assert found.top_credit >= 0.95
