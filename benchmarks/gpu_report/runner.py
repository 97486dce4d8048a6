"""Run sections in processes of their own, within the time limit."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.gpu_report.options import Setting
from benchmarks.gpu_report.processes import end_all, ended_with_us
from benchmarks.gpu_report.sections import Section
from benchmarks.gpu_report.worker import RAISED, RUNNING, save

ROOT = Path(__file__).parents[2]
#: Status of a section that was not run, for lack of time.
NOT_RUN = "not run"
#: Variable in the environment of all processes of a runner.
_MARK = "RETRO_MCORE_GPU_REPORT"
#: What a scheduler, `timeout` or a closed terminal sends.
_ENDING = (signal.SIGTERM, signal.SIGHUP)


class Runner:
    """Runs sections and collects their results.

    Args:
        folder: Where results are.
        setting: What sections run with.
        time_limit: Seconds from now.
    """

    def __init__(self, folder: Path, setting: Setting, time_limit: float) -> None:
        self.folder, self.setting = folder, setting
        self._end = time.monotonic() + time_limit
        self._mark = uuid.uuid4().hex
        folder.mkdir(parents=True, exist_ok=True)

    def run(self, sections: Mapping[str, Section], repeat: bool = False) -> dict[str, Any]:
        """Run the sections without a result; returns all results by name."""
        for name in self.replaced(sections, repeat):
            self._path(name).unlink(missing_ok=True)
        pending = [section for section in sections.values() if not self._has_result(section.name)]
        with ended_with_us(_MARK, self._mark), _ended_by_signals():
            while pending and self._seconds_left() > 0:
                _, together = next(itertools.groupby(pending, lambda section: section.environment))
                self._run_process(list(together))
                pending = [section for section in pending if not self._has_result(section.name)]
        return {name: self.result(name) for name in sections}

    def replaced(self, names: Iterable[str], repeat: bool = False) -> list[str]:
        """Sections of `names` that run whether or not they have a result."""
        # The needs of a skipped one may be there now.
        return [name for name in names if repeat or self.result(name)["status"] == "skipped"]

    def result(self, name: str) -> dict[str, Any]:
        """The result of a section."""
        if not self._has_result(name):
            return {"status": NOT_RUN, "seconds": 0.0}
        return json.loads(self._path(name).read_text(encoding="utf-8"))

    def _run_process(self, sections: list[Section]) -> None:
        request = {
            "folder": str(self.folder.absolute()),
            "setting": asdict(self.setting),
            "sections": {section.name: section.target for section in sections},
        }
        (self.folder / RUNNING).write_text(sections[0].name, encoding="utf-8")
        log = self.folder / "log.txt"
        with log.open("a", encoding="utf-8") as output:
            process = subprocess.Popen(
                [sys.executable, "-m", "benchmarks.gpu_report.worker", json.dumps(request)],
                cwd=ROOT,
                env={**os.environ, **sections[0].environment, _MARK: self._mark},
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            try:
                ended = self._wait(process)
            finally:
                self._end_all(process)
        running = (self.folder / RUNNING).read_text(encoding="utf-8")
        if ended is None or process.returncode in (0, RAISED) or self._has_result(running):
            return  # ended in time, or its result is there
        save(self.folder, running, _crashed(process.returncode, log))

    def _wait(self, process: subprocess.Popen) -> int | None:
        """Wait for a process until the time limit; returns its exit code, None if it goes on."""
        try:
            return process.wait(max(self._seconds_left(), 0.1))
        except subprocess.TimeoutExpired:
            return None

    def _end_all(self, process: subprocess.Popen) -> None:
        """End a process and all that it started, also those that it left behind."""
        process.kill()
        left = end_all(_MARK, self._mark)
        if left:
            print(f"processes that cannot be ended: {left}", file=sys.stderr)
        else:
            process.wait()

    def _seconds_left(self) -> float:
        return self._end - time.monotonic()

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.json"

    def _has_result(self, name: str) -> bool:
        return self._path(name).is_file()


@contextmanager
def _ended_by_signals() -> Iterator[None]:
    """Let signals that end this process raise SystemExit, so that it ends what it started."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(number: int, frame: object) -> None:
        for each in _ENDING:
            signal.signal(each, signal.SIG_IGN)
        sys.exit(128 + number)

    before = {number: signal.getsignal(number) for number in _ENDING}
    # nohup has SIGHUP ignored, and wants it so.
    chosen = [number for number in _ENDING if before[number] != signal.SIG_IGN]
    try:
        for number in chosen:
            signal.signal(number, end)
        yield
    finally:
        for number in chosen:
            signal.signal(number, before[number])


def _crashed(code: int, log: Path) -> dict[str, Any]:
    """The result of a section whose process ended without one."""
    end = log.read_text(encoding="utf-8", errors="replace").strip()[-2000:]
    error = f"the process ended with exit code {code}: {' '.join(end.splitlines()[-1:])}"
    return {"status": "failed", "seconds": 0.0, "error": error[:1000], "traceback": end}
