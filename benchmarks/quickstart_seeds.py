"""The quickstart's two models over several seeds: held-out perplexities.

    python -m benchmarks.quickstart_seeds                  # half an hour on two cores
    python -m benchmarks.quickstart_seeds --seeds 1

The text is searched once. A seed decides the order of the samples and the initial weights; both
models have the quickstart's flags and see the same samples. Perplexity is that of the test
documents, which no setting was chosen on.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY / "examples" / "quickstart"))

from run import LAPTOP, SMOKE, Layout, Size, all_stages, make_corpus  # noqa: E402
from stages import Stage, run_stage  # noqa: E402

from benchmarks.retro_against_gpt import parameters  # noqa: E402
from retro_mcore.platform import setup_device  # noqa: E402
from retro_mcore.project.paths import ProjectPaths  # noqa: E402

FIRST_SEED = 1234
COLUMNS = ("real", "shuffled", "none", "gpt")


def call(command: str, flags: list[str]) -> None:
    """Run one command of the quickstart.

    Raises:
        SystemExit: with its exit code, if it fails.
    """
    if code := run_stage(Stage(command, command, flags), 1):
        raise SystemExit(code)


def prepare(size: Size, layout: Layout) -> None:
    """From text to neighbors, unless that is done: its samples may be another seed's by now."""
    if ProjectPaths(layout.project).stage_record("query_neighbors").is_file():
        return
    if code := make_corpus(layout, size.make_corpus):
        raise SystemExit(code)
    for stage in all_stages(size, layout.corpus, layout, 1)[:4]:
        call(stage.command, stage.flags)


def measure(size: Size, layout: Layout, seed: int) -> dict[str, Any]:
    """Train and evaluate both models with a seed."""
    place = Layout(layout.root / f"seed_{seed}")
    call("set_samples", ["--project-dir", str(layout.project), "--seed", str(seed)])
    row: dict[str, Any] = {"seed": seed}
    for stage in all_stages(size, layout.corpus, place, 1)[4:8]:
        seeded = ["--seed", str(seed)] if stage.command == "pretrain_retro" else []
        flags = replaced(stage.flags, "--project-dir", str(layout.project))
        call(stage.command, [*flags, *seeded])
    for name, folder in (("retro", place.checkpoints), ("gpt", place.gpt)):
        measured = json.loads((folder / "perplexity.json").read_text(encoding="utf-8"))
        found = {one["neighbors"]: one["perplexity"] for one in measured}
        row |= {"gpt": found["none"]} if name == "gpt" else found
        row[f"{name}_parameters"] = parameters(folder)
    return row


def replaced(flags: list[str], flag: str, value: str) -> list[str]:
    """The flags with another value of `flag`."""
    pairs = itertools.pairwise(["", *flags])
    return [value if before == flag else word for before, word in pairs]


def show(rows: list[dict[str, Any]]) -> None:
    """A row per seed, their mean and spread, and real ÷ each other column."""
    print(f"\n{'seed':>8} " + " ".join(f"{name:>10}" for name in COLUMNS))
    for row in rows:
        print(f"{row['seed']:8} " + " ".join(f"{row[name]:10.3f}" for name in COLUMNS))
    for name in COLUMNS[1:]:
        ratios = [row["real"] / row[name] for row in rows]
        spread = f" ± {statistics.stdev(ratios):.4f}" if len(ratios) > 1 else ""
        print(f"real ÷ {name}: {statistics.mean(ratios):.4f}{spread}")
    first = rows[0]
    print(f"parameters: Retro {first['retro_parameters']:,}, GPT {first['gpt_parameters']:,}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=Path("quickstart_seeds"))
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds")
    parser.add_argument("--smoke", action="store_true", help="tiny models that only try the path")
    parser.add_argument("--json", type=Path, help="write the rows here")
    options = parser.parse_args()
    size, layout = SMOKE if options.smoke else LAPTOP, Layout(options.folder)
    prepare(size, layout)
    setup_device("cpu")  # to count parameters
    rows = [measure(size, layout, FIRST_SEED + number) for number in range(options.seeds)]
    show(rows)
    if options.json:
        options.json.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
