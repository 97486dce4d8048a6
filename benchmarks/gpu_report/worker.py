"""Run sections in this process: `python -m benchmarks.gpu_report.worker REQUEST`.

After a section that raised, the process ends, since an error of CUDA spoils all that follows. The
runner then starts another one for the rest.
"""

from __future__ import annotations

import gc
import json
import sys
import time
import traceback
from importlib import import_module
from pathlib import Path
from typing import Any

from benchmarks.gpu_report.findings import Findings, Skipped
from benchmarks.gpu_report.options import Setting

#: File that names the section in progress.
RUNNING = "running"
#: Exit code of a process that ends after a section that raised.
RAISED = 4


def run_section(target: str, setting: Setting) -> dict[str, Any]:
    """Run one section and return its result, also of one that raises."""
    module, function = target.split(":")
    findings, started = Findings(), time.perf_counter()
    result: dict[str, Any] = {}
    try:
        getattr(import_module(module), function)(setting, findings)
    except Skipped as reason:
        findings.skipped["all"] = str(reason)
    except Exception as error:
        text = " ".join(str(error).split())
        result = {
            "status": "failed",
            "error": f"{type(error).__name__}: {text}"[:1000],
            "traceback": traceback.format_exc()[-6000:],
        }
    seconds = round(time.perf_counter() - started, 2)
    return {**findings.as_json(), "seconds": seconds, **result}


def save(folder: Path, name: str, result: dict[str, Any]) -> None:
    """Write the result of a section, whole or not at all."""
    temporary = folder / f".{name}.json"
    temporary.write_text(json.dumps(result, indent=1, default=str) + "\n", encoding="utf-8")
    temporary.replace(folder / f"{name}.json")


def _release() -> None:
    gc.collect()
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def main(request: str) -> int:
    """Run the sections of a request; returns the exit code."""
    asked = json.loads(request)
    folder, setting = Path(asked["folder"]), Setting(**asked["setting"])
    for name, target in asked["sections"].items():
        (folder / RUNNING).write_text(name, encoding="utf-8")
        result = run_section(target, setting)
        save(folder, name, result)
        if "error" in result:
            return RAISED
        _release()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
