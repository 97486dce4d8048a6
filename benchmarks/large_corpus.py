"""A whole pipeline over a large corpus: time, peak memory, disk and recall of each stage.

    python -m benchmarks.large_corpus --chunks 100000                    # minutes
    python -m benchmarks.large_corpus --chunks 5000000 --folder /data/large --kills 12
    python -m benchmarks.large_corpus --chunks 100000 --kills 6 --compare  # and again without kills

The text is real and recombined: each document takes lines of three documents of Python's and
Transformers' documentation. A stage that is killed, at random, is started again. `--compare` runs
everything a second time without kills and compares all files. `plan_scale`'s disk is shown beside
what was written. See benchmarks/README.md.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY / "examples" / "quickstart"))

from make_corpus import models_documentation, python_documentation  # noqa: E402

from retro_mcore.cli.command import run_command  # noqa: E402
from retro_mcore.project.markers import checksum  # noqa: E402

#: Characters of a chunk of 64 tokens, of this text, with `_VOCABULARY`.
_CHARACTERS, _CHUNK, _VOCABULARY = 208, 64, 4096
_CHUNKS_PER_DOCUMENT = 18
_STAGES = ("preprocess_corpus", "build_db", "build_index", "query_neighbors")


@dataclass
class Options:
    """Run a whole pipeline over a large corpus, and measure it."""

    chunks: int = 100_000
    """Chunks of the corpus, about."""
    folder: Path = Path("large_corpus")
    """Where to write. What is finished there is reused."""
    embedder: str = "static"
    """Embedder of the chunks."""
    index: str = "auto"
    """Faiss factory string, or auto."""
    index_memory: str | None = None
    """Memory that the index may take, such as 2G (default: three quarters of the machine's)."""
    recall: float = 0.95
    """Target of recall@2 for auto."""
    kills: int = 0
    """Kills at random moments, at most; each stage has its share."""
    seed: int = 0
    """Seed for the moments of the kills."""
    compare: bool = False
    """Run again without kills, and compare all files."""
    planned_from: Path | None = None
    """Project of a smaller corpus of this text, which the plan is measured with (default: the one
    that is built)."""
    json: Path | None = None
    """Write the results here."""


@dataclass
class Stage:
    """What one stage took, over all its starts.

    Attributes:
        name: Its command.
        seconds: Wall clock.
        cpu_seconds: Of the starts that were not killed, with all their children.
        peak_mib: Most resident memory of any process.
        disk_mib: What the project grew by.
        kills: How often it was killed.
    """

    name: str
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    peak_mib: float = 0.0
    disk_mib: float = 0.0
    kills: int = 0


@dataclass
class Killer:
    """Decides when a stage is killed."""

    left: int
    random: random.Random = field(default_factory=random.Random)

    def seconds(self) -> float | None:
        """How long the next start may run; None: to its end."""
        if self.left < 1 or self.random.random() < 0.25:
            return None
        return 4 + self.random.expovariate(1 / 30)


def recombined(chunks: int) -> Iterator[str]:
    """Documents of lines of three real ones each."""
    pick = random.Random(0)
    sources = [
        [line for line in document.text.splitlines(keepends=True) if len(line) > 40]
        for document in (*python_documentation(), *models_documentation())
    ]
    sources = [lines for lines in sources if len(lines) > 20]
    length = _CHARACTERS * _CHUNKS_PER_DOCUMENT
    for _ in range(max(1, chunks // _CHUNKS_PER_DOCUMENT)):
        three, parts, size = pick.sample(sources, 3), list[str](), 0
        while size < length:
            parts.append(pick.choice(pick.choice(three)))
            size += len(parts[-1])
        yield "".join(parts)


def write_corpus(path: Path, chunks: int) -> None:
    """The corpus as JSONL, unless it is there."""
    if path.is_file():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    with temporary.open("w", encoding="utf-8") as file:
        for text in recombined(chunks):
            file.write(json.dumps({"text": text}) + "\n")
    temporary.replace(path)


def flags_of(stage: str, options: Options, corpus: Path) -> list[str]:
    """The stage's flags, without the project."""
    if stage == "preprocess_corpus":
        return [
            *("--input", str(corpus), "--vocab-size", str(_VOCABULARY), "--split", "99,1,0"),
            *("--seq-length", "2048", "--train-samples", "1024", "--global-batch-size", "8"),
        ]
    if stage == "build_index":
        index = ["--index", options.index, "--index-recall", str(options.recall)]
        index += ["--index-memory", options.index_memory] if options.index_memory else []
        return ["--embedder", options.embedder, "--device", "cpu", *index]
    return ["--device", "cpu"] if stage == "query_neighbors" else []


def start(command: list[str], log: Path, limit: float | None) -> tuple[bool, float, float, float]:
    """Run a command, at most `limit` seconds.

    Returns:
        Whether it ended by itself, its seconds, processor seconds and peak memory in MiB.

    Raises:
        SystemExit: it failed.
    """
    begun = time.monotonic()
    with log.open("a", encoding="utf-8") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, preexec_fn=os.setpgrp
        )
    ended = False
    while True:
        pid, status, usage = os.wait4(process.pid, os.WNOHANG)
        if pid:
            ended = True
            break
        if limit is not None and time.monotonic() - begun > limit:
            os.killpg(process.pid, signal.SIGKILL)
            _, status, usage = os.wait4(process.pid, 0)
            break
        time.sleep(0.05)
    if ended and status:
        sys.stderr.write(log.read_text(encoding="utf-8")[-4000:])
        raise SystemExit(os.waitstatus_to_exitcode(status))
    cpu = usage.ru_utime + usage.ru_stime
    return ended, time.monotonic() - begun, cpu, usage.ru_maxrss / 1024


def run_pipeline(options: Options, place: Path, corpus: Path, kills: int) -> list[Stage]:
    """All stages, each until it has ended by itself."""
    place.mkdir(parents=True, exist_ok=True)
    project, moments = place / "project", random.Random(options.seed)
    stages = []
    for number, name in enumerate(_STAGES):
        share = kills * (number + 1) // len(_STAGES) - kills * number // len(_STAGES)
        stage, before, killer = Stage(name), disk_of(project), Killer(share, moments)
        script = str(REPOSITORY / "tools" / f"{name}.py")
        command = [sys.executable, script, "--project-dir", str(project)]
        command += flags_of(name, options, corpus)
        ended = False
        while not ended:
            ended, seconds, cpu, peak = start(command, place / "log.txt", killer.seconds())
            stage.seconds += seconds
            stage.cpu_seconds += cpu
            stage.peak_mib = max(stage.peak_mib, peak)
            if not ended:
                stage.kills += 1
                killer.left -= 1
        stage.disk_mib = (disk_of(project) - before) / 2**20
        stages.append(stage)
        print(
            f"| {name} | {stage.seconds:.0f} | {stage.cpu_seconds:.0f} | {stage.peak_mib:.0f} | "
            f"{stage.disk_mib:.0f} | {stage.kills} |",
            flush=True,
        )
    return stages


def disk_of(folder: Path) -> int:
    """Bytes of all files below a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def digests(project: Path) -> dict[str, str]:
    """Digests of what training reads: tokens, database, index and neighbors."""
    found = {}
    for part in ("data", "db", "index", "query"):
        for path in sorted((project / part).rglob("*")):
            if path.is_file() and path.suffix != ".lock" and "cache" not in path.parts:
                found[str(path.relative_to(project))] = checksum(path)
    return found


def reports(project: Path) -> dict[str, Any]:
    """What build_index and query_neighbors counted."""
    names = ("build_index", "query_neighbors")
    files = {name: project / "stages" / f"{name}.json" for name in names}
    return {name: json.loads(path.read_text("utf-8")) for name, path in files.items()}


def planned(options: Options, project: Path, sample: Path, place: Path) -> dict[str, Any]:
    """The plan of this database by `plan_scale --measure`, with the chunks of a sample."""
    from retro_mcore.project.paths import ProjectPaths
    from retro_mcore.project.records import stage_report

    counts = stage_report(ProjectPaths(project), "preprocess_corpus")
    tokens, documents = counts["tokens"], counts["documents"]
    tokens -= counts.get("padding_tokens", 0)
    script, path = str(REPOSITORY / "tools" / "plan_scale.py"), place / "plan.json"
    flags = ["--tokens", str(tokens), "--document-tokens", str(tokens / documents)]
    flags += ["--vocab-size", str(_VOCABULARY), "--gpus-per-node", "0", "--cores-per-node", "1"]
    flags += ["--project-dir", str(sample), "--measure", "--device", "cpu", "--json", str(path)]
    flags += ["--index-memory", options.index_memory] if options.index_memory else []
    subprocess.run(
        [sys.executable, script, *flags], check=True, stdout=subprocess.DEVNULL, text=True
    )
    plan: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return plan


def main_with(options: Options) -> dict[str, Any]:
    """Run, print and return all measurements."""
    corpus, place = options.folder / "corpus.jsonl", options.folder / "killed"
    write_corpus(corpus, options.chunks)
    print("| stage | seconds | CPU seconds | peak MiB | MiB written | kills |")
    print("|---|---|---|---|---|---|")
    stages = run_pipeline(options, place, corpus, options.kills)
    result: dict[str, Any] = {"stages": [asdict(stage) for stage in stages]}
    result["reports"] = reports(place / "project")
    sample = options.planned_from or place / "project"
    result["plan"] = planned(options, place / "project", sample, place)
    seconds = {stage["name"]: 3600 * stage["hours"] for stage in result["plan"]["plan"]["stages"]}
    result["planned_seconds"] = seconds
    print(f"seconds of a core: {json.dumps({k: round(v) for k, v in seconds.items()})}")
    disk = sum(stage.disk_mib for stage in stages)
    print(f"disk: {disk:.0f} MiB, planned {result['plan']['plan']['disk'] / 2**20:.0f} MiB")
    if options.compare:
        again = options.folder / "straight"
        shutil.rmtree(again, ignore_errors=True)
        run_pipeline(options, again, corpus, 0)
        first, second = digests(place / "project"), digests(again / "project")
        differing = [name for name in first | second if first.get(name) != second.get(name)]
        result["files"], result["differing"] = len(first | second), differing
        print(f"{len(first | second)} files, {len(differing)} differ {differing[:5]}")
    if options.json:
        options.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return result


if __name__ == "__main__":
    sys.exit(run_command(Options, main_with))
