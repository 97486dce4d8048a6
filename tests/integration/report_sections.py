"""Sections for the tests of the GPU report's runner."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.gpu_report.findings import Skipped


def passes(setting, findings):
    findings.figure("process", os.getpid())
    findings.figure("variable", os.environ.get("OF_THE_SECTION"))
    findings.at_most("small", 1.0, 2.0)
    findings.aim("speed", 3.0, at_most=2.0)
    with findings.part("the rest"):
        raise Skipped("nothing to do")


def fails(setting, findings):
    findings.figure("before", 1)
    findings.at_most("not a number", float("nan"), 2.0)


def raises(setting, findings):
    raise ValueError("two\nlines")


def crashes(setting, findings):
    os._exit(77)


def is_skipped(setting, findings):
    raise Skipped("no such device")


def is_slow(setting, findings):
    time.sleep(600)


def leaves_processes(setting, findings):
    """As torchrun leaves ranks: one in a session of its own, and one that lost its parent."""
    code = "import subprocess, sys, time; print(subprocess.Popen([sys.executable, '-c', "
    code += "'import time; time.sleep(600)'], start_new_session=True).pid, flush=True); "
    launched = [
        subprocess.Popen(
            [sys.executable, "-c", code + last], stdout=subprocess.PIPE, start_new_session=True
        )
        for last in ("time.sleep(600)", "sys.exit()")
    ]
    ranks = [int(each.stdout.readline()) for each in launched]
    launched[1].wait()
    pids = json.dumps([launched[0].pid, *ranks])
    path = Path(os.environ["PROCESSES"])
    (path.parent / "temporary").write_text(pids, encoding="utf-8")
    (path.parent / "temporary").replace(path)
    if ending := os.environ["ENDING"]:
        getattr(sys.modules[__name__], ending)(setting, findings)
