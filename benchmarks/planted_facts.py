"""200 facts that only the database knows: the model's loss on them before and after their removal.

    python -m benchmarks.planted_facts            # about two minutes of processor time

A fact is a document "NAME means CODE". Questions ask for the code; the neighbor of their first
chunk is the fact's document, if the database has one. A small model is trained on other names'
questions, of which a part has no fact, so that it learns to copy a code only from its own name's
document. The planted facts are appended to the database and are in no training sample, so weights
cannot hold them. Then `update_db --remove` takes their documents out.

Printed is the loss of the held-out questions in nats per fact, relative to the same model without
neighbors: 0 means that retrieval adds nothing.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from retro_mcore.cli import commands as retro

NUM_FACTS, NUM_CODES, NUM_WORDS = 200, 16, 48
END = "<|end|>"


@dataclass(frozen=True)
class Size:
    """Sizes of a run.

    Attributes:
        questions: Training questions.
        with_facts: Those of them whose fact is in the database.
        iterations: Steps of training, of 16 samples of 64 tokens.
    """

    questions: int = 1600
    with_facts: int = 1120
    iterations: int = 400


@dataclass(frozen=True)
class Gains:
    """Nats per fact by which neighbors lower the loss of the planted questions.

    Attributes:
        before: While the facts are in the database.
        after: After they were removed.
        again: After the database was compacted.
        none: Loss without neighbors, in nats per token.
    """

    before: float
    after: float
    again: float
    none: float


def write_corpora(folder: Path, size: Size) -> None:
    """Write corpus.jsonl (training, then the 200 planted questions) and facts.jsonl."""
    generator = np.random.default_rng(1)
    names = generator.permutation(NUM_WORDS**2)[: size.questions + NUM_FACTS]
    codes = generator.integers(NUM_CODES, size=len(names))
    said = [f"a{name // NUM_WORDS} b{name % NUM_WORDS}" for name in names.tolist()]
    facts = [f"{name} means c{code}" for name, code in zip(said, codes, strict=True)]
    asked = [f"what is {name} c{code}" for name, code in zip(said, codes, strict=True)]
    trained = [*facts[: size.with_facts], *asked[: size.questions]]
    mixed = [trained[place] for place in generator.permutation(len(trained))]
    _write(folder / "corpus.jsonl", [*mixed, *asked[size.questions :]], "text")
    _write(folder / "facts.jsonl", facts[size.questions :], "fact")


def _write(path: Path, texts: Sequence[str], name: str) -> None:
    lines = [json.dumps({"id": f"{name}-{i}", "text": text}) for i, text in enumerate(texts)]
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def save_tokenizer(folder: Path) -> Path:
    """Save a tokenizer with one token per word."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = ["<unk>", END, "what", "is", "means"]
    words += [f"{letter}{i}" for letter in "ab" for i in range(NUM_WORDS)]
    words += [f"c{i}" for i in range(NUM_CODES)]
    vocabulary = {word: number for number, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens([END])
    folder.mkdir(parents=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": END}))
    return folder


def prepare(folder: Path, size: Size) -> Path:
    """A project of the corpus, whose database also holds the planted facts."""
    write_corpora(folder, size)
    project = folder / "project"
    documents = size.questions + size.with_facts
    held_out = 100 * (NUM_FACTS - 0.5) / (documents + NUM_FACTS)
    where = {"project_dir": str(project)}
    retro.preprocess_corpus(
        **where,
        input=[str(folder / "corpus.jsonl")],
        tokenizer_model=str(save_tokenizer(folder / "tokenizer")),
        seq_length=64,
        retro_chunk_length=4,
        split=f"{100 - held_out:.6f},{held_out:.6f},0",
        train_samples=16 * size.iterations,
        global_batch_size=16,
        eval_interval=size.iterations + 1,
        eval_iters=2,
    )
    retro.build_db(**where)
    retro.build_index(**where, embedder="lexical", index="Flat")
    retro.query_neighbors(**where, num_neighbors_save=4)
    retro.update_db(**where, append=[str(folder / "facts.jsonl")])
    return project


def train(project: Path, folder: Path, size: Size) -> Path:
    """Train a model of one neighbor per chunk, which is sometimes dropped."""
    checkpoints = folder / "model"
    retro.pretrain_retro(
        project_dir=str(project),
        save=str(checkpoints),
        num_layers=2,
        hidden_size=64,
        num_attention_heads=2,
        retro_decoder_layers=[2],
        retro_num_neighbors=1,
        retro_num_retrieved_chunks=1,
        retro_encoder_num_layers=1,
        retro_encoder_hidden_dropout=0.0,
        retro_encoder_attention_dropout=0.0,
        retro_drop_chunks=0.2,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        position_embedding_type="rope",
        micro_batch_size=16,
        lr=4e-3,
        min_lr=4e-4,
        lr_decay_style="cosine",
        lr_warmup_fraction=0.05,
        init_method_std=0.06,
        num_workers=0,
        log_interval=50,
        device="cpu",
    )
    return checkpoints


def run(folder: Path, size: Size) -> Gains:
    """Plant the facts, train, remove the facts, and compact the database."""
    project = prepare(folder, size)
    checkpoints = train(project, folder, size)
    names = folder / "names.txt"
    names.write_text("".join(f"fact-{i}\n" for i in range(NUM_FACTS)), encoding="utf-8")

    def gain() -> tuple[float, float]:
        measured = retro.evaluate_perplexity(
            project_dir=str(project),
            load=str(checkpoints),
            retro_eval_neighbors=["real", "none"],
            device="cpu",
        ).perplexities
        real, none = measured
        # Each question has five predictions: three words, the code and its end.
        return 5 * (none.loss - real.loss), none.loss

    before, none = gain()
    retro.update_db(project_dir=str(project), remove_file=str(names))
    after, _ = gain()
    retro.update_db(project_dir=str(project), compact=True)
    again, _ = gain()
    return Gains(before, after, again, none)


def main() -> None:
    """Run the benchmark and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--iterations", type=int, default=Size.iterations)
    options = parser.parse_args()
    with TemporaryDirectory() as folder:
        found = run(Path(folder), Size(iterations=options.iterations))
    print(f"\nnats per fact that neighbors give, of {np.log(NUM_CODES):.2f} that a code holds")
    print(f"facts in the database  {found.before:8.3f}")
    print(f"removed                {found.after:8.3f}")
    print(f"compacted              {found.again:8.3f}")


if __name__ == "__main__":
    main()
