"""The same trained model with its database exchanged: perplexity on another domain.

    make quickstart                                          # trains the model, once
    python -m benchmarks.exchange --quickstart quickstart    # a few minutes on two cores

The model is the quickstart's, trained on the documentation of models in Transformers. The other
domain is the documentation of Python, of which neither the model nor its database has read
anything. Held-out documents of it are scored three times, with the same weights: without
neighbors, with neighbors from the old database, and from a database of the new domain's other
documents (`update_db --exchange`). Nothing is trained.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from retro_mcore.cli import commands as retro
from retro_mcore.errors import ConfigurationError
from retro_mcore.project import ProjectConfig, ProjectPaths

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY / "examples" / "quickstart"))

from make_corpus import python_documentation, write_jsonl  # noqa: E402

#: Sizes of the new domain's corpus: modules of the standard library, documents in all.
MODULES, DOCUMENTS = 80, 200
SMOKE_MODULES, SMOKE_DOCUMENTS = 2, 14


def make_other_domain(old: Path, folder: Path, smoke: bool) -> Path:
    """A project of the other domain, with the old one's tokenizer, embedder and lengths.

    Raises:
        ConfigurationError: the old project has no tokenizer of its own.
    """
    config, project = ProjectConfig.load(old), folder / "project"
    if config.retro_gpt_tokenizer_model is None:
        raise ConfigurationError("--quickstart", f"{old} has no tokenizer model", "Run it first")
    corpus = folder / "python.jsonl"
    sizes = (SMOKE_MODULES, SMOKE_DOCUMENTS) if smoke else (MODULES, DOCUMENTS)
    if not corpus.is_file():
        write_jsonl(python_documentation(*sizes), corpus)
    where = {"project_dir": str(project)}
    retro.preprocess_corpus(
        **where,
        input=[str(corpus)],
        tokenizer_model=str(ProjectPaths(old).root / config.retro_gpt_tokenizer_model),
        seq_length=config.retro_gpt_seq_length,
        retro_chunk_length=config.retro_gpt_chunk_length,
        split="70,15,15" if smoke else "90,5,5",
        train_samples=config.retro_gpt_global_batch_size,
        global_batch_size=config.retro_gpt_global_batch_size,
        eval_interval=1,
        eval_iters=1 if smoke else 20,
    )
    retro.build_db(**where)
    retro.build_index(**where, embedder="lexical", **({} if smoke else {"index": "IVF64,Flat"}))
    retro.query_neighbors(**where)
    return project


def measure(quickstart: Path, folder: Path, smoke: bool) -> dict[str, float]:
    """Perplexity of the other domain's test documents, by database; "none": without neighbors."""
    old = quickstart / "project"
    project = make_other_domain(old, folder, smoke)

    def perplexity(kinds: list[str]) -> list[float]:
        result = retro.evaluate_perplexity(
            project_dir=str(project),
            load=str(quickstart / "checkpoints"),
            split="test",
            retro_eval_neighbors=kinds,
            output=str(folder / "perplexity.json"),
        )
        return [result.perplexity(kind, "test") for kind in kinds]

    retro.update_db(project_dir=str(project), exchange=str(old))
    before, none = perplexity(["real", "none"])
    retro.update_db(project_dir=str(project), exchange=str(project))
    (after,) = perplexity(["real"])
    return {"none": none, "old database": before, "new database": after}


def show(found: dict[str, float]) -> None:
    """A table of the three, and the change by the exchange."""
    print(f"\n{'neighbors from':16} perplexity")
    for name, value in found.items():
        print(f"{name:16} {value:10.3f}")
    ratio = found["new database"] / found["old database"] - 1
    print(f"\nThe exchange changes perplexity by {ratio:+.1%}, without training.")


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--quickstart",
        type=Path,
        default=Path("quickstart"),
        help="folder of a finished quickstart (make quickstart), which is not changed",
    )
    parser.add_argument("--folder", type=Path, default=Path("exchange"), help="folder to write to")
    parser.add_argument("--json", type=Path, help="file to write the perplexities to")
    parser.add_argument("--smoke", action="store_true", help="a tiny run that only tries the path")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    found = measure(options.quickstart, options.folder, options.smoke)
    show(found)
    if options.json is not None:
        options.json.write_text(json.dumps(found, indent=4) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
