"""What only the database knows is gone with its documents."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.mark.slow
def test_removed_facts_are_forgotten(tmp_path: Path) -> None:
    from benchmarks.planted_facts import Size, run

    found = run(tmp_path, Size())
    assert found.before > 2  # of 2.77 nats that a code holds
    # No better than without neighbors. Codes of other names may mislead: 0.48 nats when measured.
    assert -1 < found.after < 0.1
    assert found.again == pytest.approx(found.after, abs=1e-3)
