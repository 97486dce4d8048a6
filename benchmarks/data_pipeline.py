"""The data pipeline beside the retired one, on the same corpus, in one run.

    python -m benchmarks.data_pipeline --folder /scratch/bench --json data.json

Every measurement is a process of its own. Ratios are of processor seconds where nothing else is
said, so that other work on the machine counts little. See benchmarks/README.md.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from benchmarks.documentation import Corpus, fetch, make_project
from retro_mcore.cli.command import run_command
from tests.parity import environment

Part = Literal["build", "query", "dataset", "embed", "memory", "parallel", "whole"]
PARTS: tuple[Part, ...] = ("build", "query", "dataset", "embed", "memory", "parallel", "whole")


#: What is measured on two cores: the worker's stages of each.
_PARALLEL = {
    "build_db": ["build"],
    "build_index": ["index_embed", "index_train", "index_add", "index_merge"],
    "query_neighbors": ["query"],
}


@dataclass
class Options:
    """Measure the data pipeline beside the retired one's, 0.15.3."""

    folder: Path
    """Where corpus and projects lie; what is there is taken, and nothing else is touched."""
    chunks: list[int] = field(default_factory=lambda: [50_000, 200_000])
    """Sizes of the database; the first is that of all parts but "memory"."""
    samples: int = 4096
    """Training samples, of 32 chunks each; few would show what opening a file takes."""
    parts: list[Part] = field(default_factory=lambda: list(PARTS))
    """What to measure; each takes minutes."""
    rounds: int = 3
    """Measurements of each side, in turn; their median counts."""
    documents: Path | None = None
    """JSON lines in place of the packages' texts; needs the next two."""
    vocab_file: Path | None = None
    """GPT-2's vocab.json."""
    merge_file: Path | None = None
    """GPT-2's merges.txt."""
    json: Path | None = None
    """Write all measurements here."""


@dataclass
class Row:
    """One line of the table: ours and the retired one's in the same unit, and what is wanted."""

    part: str
    what: str
    unit: str
    ours: float
    retired: float | None
    ratio: float
    wanted: str
    reached: bool


class Bench:
    """Runs stages on a project of each side."""

    def __init__(self, options: Options) -> None:
        self.options = options
        own = options.documents, options.vocab_file, options.merge_file
        self.corpus = Corpus(*own) if all(own) else fetch(options.folder)  # type: ignore[arg-type]
        self.rows: list[Row] = []
        self.measurements: list[dict[str, Any]] = []

    def project(self, side: str, chunks: int) -> Path:
        """A project with tokens and nothing more; both sides have the same."""
        source = make_project(
            self.corpus, self.options.folder / f"tokens-{chunks}", chunks, self.options.samples
        )
        target = self.options.folder / f"{side}-{chunks}"
        if not target.exists():
            shutil.copytree(source, target)
        return target

    def fresh(self, side: str, chunks: int) -> Path:
        """The same, emptied of whatever was built."""
        shutil.rmtree(self.options.folder / f"{side}-{chunks}", ignore_errors=True)
        return self.project(side, chunks)

    def run(
        self, side: str, stage: str, project: Path, processes: int = 1, cores: int | None = None
    ) -> dict[str, Any]:
        """What a stage says of itself, on so many processes and cores (default: all)."""
        module = f"benchmarks.{'retired' if side == 'retired' else 'pipeline'}_worker"
        launcher = [sys.executable, "-m", module]
        if processes > 1:
            launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
            launcher += ["--nproc-per-node", str(processes), "-m", module]
        variables = environment.variables() if side == "retired" else {**os.environ}
        variables |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
        usable = sorted(os.sched_getaffinity(0))[:cores]
        process = subprocess.run(
            [*launcher, stage, str(project)],
            cwd=environment.ROOT,
            env={**variables, "HF_HUB_OFFLINE": "1"},
            capture_output=True,
            text=True,
            check=False,
            preexec_fn=lambda: os.sched_setaffinity(0, usable),
        )
        if process.returncode:
            raise RuntimeError(f"{side} {stage} failed:\n{process.stderr[-4000:]}")
        result: dict[str, Any] = json.loads(process.stdout.splitlines()[-1])
        self.measurements.append(
            {"side": side, "stage": stage, "project": project.name, "n": processes, **result}
        )
        return result

    def add(
        self, part: str, what: str, unit: str, ours: float, other: float | None, least: float
    ) -> None:
        """A row whose ratio should be at least `least`, ours ÷ the other."""
        ratio = ours / other if other else ours
        row = Row(part, what, unit, ours, other, ratio, f"≥ {least:g}", ratio >= least)
        self.rows.append(row)
        print(row, file=sys.stderr, flush=True)


def rate(results: list[dict[str, Any]]) -> float:
    """Chunks per processor second, the median."""
    return statistics.median(result["chunks"] / result["cpu_seconds"] for result in results)


def measure_build(bench: Bench) -> None:
    """build_db beside the retired one, and beside the library calls alone."""
    for chunks in bench.options.chunks:
        found: dict[str, list] = {side: [] for side in ("build", "bare", "retired", "retired fast")}
        for _ in range(bench.options.rounds):
            project = bench.fresh("ours", chunks)
            found["build"].append(bench.run("ours", "build", project))
            found["bare"].append(bench.run("ours", "bare", project))
            found["retired"].append(bench.run("retired", "build", bench.fresh("retired", chunks)))
            other = bench.fresh("retired", chunks)
            found["retired fast"].append(bench.run("retired", "build_fast", other))
        ours, unit = rate(found["build"]), "chunks per CPU second"
        what = f"build_db, {found['build'][0]['chunks']} chunks"
        bench.add("build", what, unit, ours, rate(found["retired"]), 5)
        fast = f"{what}, the retired one with a fast BERT tokenizer"
        bench.add("build", fast, unit, ours, rate(found["retired fast"]), 1)
        bench.add("build", f"{what} ÷ library calls alone", unit, ours, rate(found["bare"]), 0.7)


def measure_query(bench: Bench) -> None:
    """Around embedding and search: the texts, then filter, mapping and saving."""
    chunks = bench.options.chunks[0]
    projects = _with_database(bench, chunks)
    found: dict[str, list[dict]] = {side: [] for side in projects}
    for _ in range(bench.options.rounds):
        for side, project in projects.items():
            shutil.rmtree(project / "query", ignore_errors=True)
            found[side].append(bench.run(side, "fill", project))
    for what, seconds, least in (
        ("text", "text_seconds", 2),
        ("filter, map, save", "rest_seconds", 50),
    ):
        ours, theirs = (
            statistics.median(result["chunks"] / result[seconds] for result in found[side])
            for side in ("ours", "retired")
        )
        bench.add("query", what, "chunks per CPU second", ours, theirs, least)


def _with_database(bench: Bench, chunks: int) -> dict[str, Path]:
    """Both sides' projects with the database and the same candidates."""
    projects = {side: bench.project(side, chunks) for side in ("ours", "retired")}
    bench.run("ours", "build", projects["ours"])
    if not (projects["retired"] / "db" / "merged").exists():
        bench.run("retired", "build_fast", projects["retired"])
    bench.run("ours", "candidates", projects["ours"])
    shutil.copy(projects["ours"] / "candidates.npy", projects["retired"])
    return projects


def measure_dataset(bench: Bench) -> None:
    """Random samples with their neighbors."""
    projects = _with_database(bench, bench.options.chunks[0])
    found: dict[str, list[dict]] = {side: [] for side in projects}
    for side, project in projects.items():
        if not (project / "query" / "train_filled").exists():
            bench.run(side, "fill", project)
    for _ in range(bench.options.rounds):
        for side, project in projects.items():
            found[side].append(bench.run(side, "dataset", project))
    ours, theirs = (statistics.median(r["retro"] for r in found[side]) for side in projects)
    bench.add("dataset", "random samples", "per CPU second", ours, theirs, 40)
    bare = statistics.median(result["gpt"] for result in found["ours"])
    bench.add("dataset", "random samples ÷ bare GPT samples", "per CPU second", ours, bare, 0)


def measure_embed(bench: Bench) -> None:
    """The same model on the same chunks."""
    projects = _with_database(bench, bench.options.chunks[0])
    found: dict[str, list[dict]] = {side: [] for side in projects}
    for _ in range(bench.options.rounds):
        for side, project in projects.items():
            found[side].append(bench.run(side, "embed", project))
            texts = projects["ours"] / "embedded_texts.json"
            shutil.copy(texts, projects["retired"] / texts.name) if side == "ours" else None
    ours, theirs = rate(found["ours"]), rate(found["retired"])
    bench.add("embed", "MiniLM", "chunks per CPU second", ours, theirs, 1.5)


def measure_memory(bench: Bench) -> None:
    """Peak memory of the largest database over the smallest."""
    first, last = bench.options.chunks[0], bench.options.chunks[-1]
    for stage in ("build", "fill"):
        peaks = []
        for chunks in (first, last):
            project = bench.fresh("ours", chunks)
            result = bench.run("ours", "build", project)
            if stage == "fill":
                bench.run("ours", "candidates", project)
                result = bench.run("ours", "fill", project)
            peaks.append(result["peak_mib"])
        what = f"{stage}: peak memory of {first} ÷ {last} chunks"
        bench.add("memory", what, "MiB", peaks[0], peaks[1], 1 / 1.2)


def measure_parallel(bench: Bench) -> None:
    """Two processes on two cores over one on one, by the wall clock."""
    chunks = bench.options.chunks[-1]
    seconds: dict[tuple[str, int], list[float]] = {}
    for processes in (1, 2) * bench.options.rounds:
        project = bench.fresh("ours", chunks)
        for name, stages in _PARALLEL.items():
            results = [bench.run("ours", s, project, processes, cores=processes) for s in stages]
            total = sum(result["seconds"] for result in results)
            seconds.setdefault((name, processes), []).append(total)
    for name in _PARALLEL:
        one, two = (statistics.median(seconds[name, processes]) for processes in (1, 2))
        what = f"{name}: two processes on two cores ÷ one on one"
        bench.add("parallel", what, "runs per second", 1 / two, 1 / one, 1.7)


def measure_whole(bench: Bench) -> None:
    """All stages with the lexical embedder: with the same index on both sides, and with ours."""
    chunks = bench.options.chunks[0]
    project, other = bench.fresh("ours", chunks), bench.fresh("retired", chunks)
    same = _seconds_of_stages(bench, project, "index_lists")
    shutil.copy(project / "searched_by_us.json", other)
    theirs = bench.run("retired", "whole", other)
    chosen = _seconds_of_stages(bench, bench.fresh("ours", chunks), "index")
    for what, stages in (("same index", same), ("index auto", chosen)):
        wall = sum(result["seconds"] for result in stages)
        bench.add("whole", f"all, {what}", "runs per second", 1 / wall, 1 / theirs["seconds"], 1)
    indexed = chosen[1]
    again = indexed["chunks"] / indexed["embedded"]
    retired = indexed["chunks"] / theirs["embedded_for_index"]
    bench.add("whole", "chunks per embedded text of build_index", "", again, None, 0.95)
    bench.add("whole", "the same, retired", "", retired, None, 0)
    what = f"recall@2 of {indexed['index']}"
    bench.add("whole", what, "", indexed["recall_at_2"], None, 0.95)


def _seconds_of_stages(bench: Bench, project: Path, index: str) -> list[dict[str, Any]]:
    return [bench.run("ours", stage, project) for stage in ("build", index, "query")]


def measure(options: Options) -> list[Row]:
    """Every part that is asked for; prints a Markdown table.

    Raises:
        MissingDependencyError: the corpus or the retired release cannot be downloaded.
    """
    bench = Bench(options)
    for part in options.parts:
        function: Callable[[Bench], None] = globals()[f"measure_{part}"]
        function(bench)
        if options.json is not None:
            content = {
                "options": dataclasses.asdict(options),
                "rows": list(map(dataclasses.asdict, bench.rows)),
                "measurements": bench.measurements,
            }
            options.json.write_text(json.dumps(content, indent=2, default=str) + "\n")
    print("| part | what | unit | ours | retired | ratio | wanted | reached |")
    print("|---|---|---|---|---|---|---|---|")
    for row in bench.rows:
        other = "" if row.retired is None else f"{row.retired:,.4g}"
        print(
            f"| {row.part} | {row.what} | {row.unit} | {row.ours:,.4g} | {other} | "
            f"{row.ratio:.2f} | {row.wanted} | {'yes' if row.reached else 'NO'} |"
        )
    return bench.rows


def main() -> int:
    """The command line."""
    return run_command(Options, measure)


if __name__ == "__main__":
    sys.exit(main())
