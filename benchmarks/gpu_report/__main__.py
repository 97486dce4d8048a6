"""Check and measure this package on a GPU.

    python -m benchmarks.gpu_report --output report --retired DIR  # nine minutes on an H100
    python -m benchmarks.gpu_report --device cpu --small           # does the script work?

Run it again to go on where the time limit stopped it. See benchmarks/README.md.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from benchmarks.gpu_report import record
from benchmarks.gpu_report.machine import describe_apart
from benchmarks.gpu_report.options import Options, Setting
from benchmarks.gpu_report.runner import NOT_RUN, Runner
from benchmarks.gpu_report.sections import SECTIONS, Section
from benchmarks.gpu_report.table import markdown
from benchmarks.gpu_report.worker import save
from retro_mcore.cli.command import run_command
from retro_mcore.errors import ConfigurationError


def report(options: Options) -> dict[str, Any]:
    """Run the sections and write the report; returns the results by section.

    Raises:
        ConfigurationError: an unknown section, no CUDA device, or results that were made with
            something else.
    """
    sections = _chosen(options.sections)
    setting = _setting(options)
    _check_device(options.device)
    runner = Runner(options.output, setting, options.time_limit)
    machine = describe_apart(options.device)
    record.check_same(options.output, setting, machine, runner.replaced(sections, options.repeat))
    record.write(options.output, setting, machine)
    results = runner.run(sections, options.repeat)
    # With the results of earlier calls, which were made with the same.
    found = {name: runner.result(name) for name in SECTIONS}
    shown = {
        name: result
        for name, result in found.items()
        if name in sections or result["status"] != NOT_RUN
    }
    save(options.output, "report", {"machine": machine, "sections": shown})
    page = markdown(machine, shown)
    (options.output / "report.md").write_text(page, encoding="utf-8")
    print(page)
    return results


def exit_code(results: dict[str, Any]) -> int:
    """0: no check failed; 1: a section failed; 3: the time limit left some out."""
    statuses = {result["status"] for result in results.values()}
    if "failed" in statuses:
        return 1
    return 3 if NOT_RUN in statuses else 0


def _chosen(names: Sequence[str]) -> dict[str, Section]:
    unknown = [name for name in names if name not in SECTIONS]
    if unknown:
        raise ConfigurationError("--sections", ", ".join(unknown), f"Known: {', '.join(SECTIONS)}")
    return {name: section for name, section in SECTIONS.items() if not names or name in names}


def _setting(options: Options) -> Setting:
    retired = options.retired
    if retired is not None and not (retired / "megatron" / "core").is_dir():
        raise ConfigurationError(
            "--retired", f"{retired} has no megatron/core", "pip install --no-deps --target it"
        )
    where = None if retired is None else str(retired.absolute())
    return Setting(options.device, options.small, where)


def _check_device(device: str) -> None:
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigurationError("--device", "cuda, and there is none here", "Use --device cpu")


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    results: dict[str, Any] = {}

    def gpu_report(options: Options) -> None:
        results.update(report(options))

    return run_command(Options, gpu_report, argv) or exit_code(results)


if __name__ == "__main__":
    sys.exit(main())
