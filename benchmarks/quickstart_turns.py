"""Seconds from text to neighbors in the quickstart: this checkout and an older one, in turns.

    git worktree add ../before 2511648   # before documents could be aligned to chunks
    python -m benchmarks.quickstart_turns --before ../before

Each runs with this Python, until it starts to train. See benchmarks/README.md.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from benchmarks.all_knn import processor
from retro_mcore.cli.command import run_command

REPOSITORY = Path(__file__).resolve().parents[1]


@dataclass
class Options:
    """Compare two checkouts."""

    before: Path
    """Checkout of an older version."""
    rounds: int = 1
    """How often each runs."""


def seconds_to_neighbors(checkout: Path) -> float:
    """Run a checkout's quickstart until it trains, which ends it."""
    script = checkout.resolve() / "examples" / "quickstart" / "run.py"
    environment = {**os.environ, "PYTHONPATH": str(checkout.resolve())}
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, str(script), "--output", str(Path(folder, "run"))]
        begun, shown = time.monotonic(), ""
        process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=environment,
            cwd=checkout,
            start_new_session=True,
        )
        assert process.stdout is not None
        for line in process.stdout:
            shown += line
            if line.startswith("$ ") and "pretrain" in line:
                seconds = time.monotonic() - begun
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                return seconds
        sys.stderr.write(shown[-4000:])
        raise SystemExit(process.wait() or 1)


def run(options: Options) -> dict[str, list[float]]:
    """Measure and print."""
    taken: dict[str, list[float]] = {"before": [], "now": []}
    for _ in range(options.rounds):
        for name, checkout in (("before", options.before), ("now", REPOSITORY)):
            taken[name].append(seconds_to_neighbors(checkout))
            print(f"{name}: {taken[name][-1]:.1f} s", flush=True)
    before, now = (sorted(times)[len(times) // 2] for times in taken.values())
    print(f"{processor()}: now / before {now / before:.3f}")
    return taken


if __name__ == "__main__":
    sys.exit(run_command(Options, run))
