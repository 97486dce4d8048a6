"""Sections for the tests of the GPU report's runner."""

from __future__ import annotations

import os
import time

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
