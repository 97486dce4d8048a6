"""200 facts that only the database knows: the model's loss on them before and after their removal.

    python -m benchmarks.planted_facts            # a few minutes of processor time

A fact is a document "NAME means CODE". Questions ask for the code. If the database has the name's
fact, it is among the neighbors of the question's first chunk. A small model is trained on other
names' questions. Half of them have no fact, so that their neighbors are other names' documents:
the model has to learn to copy a code only from its own name's document. Each name is read a few
times only, so the model cannot learn codes by heart instead. The planted facts are appended to the
database and are in no training sample, so weights cannot hold them. Then `update_db --remove` takes
their documents out.

Measured is the loss of the 200 codes relative to the same model without neighbors: 0 nats means
that retrieval adds nothing. Intervals are bootstrapped over the facts. While the facts are in the
database, the neighbors of each question are also credited as `evaluate_perplexity --attribute`
credits them, in shuffled order: the one with the most credit should be the one that holds the fact.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch

from retro_mcore import session
from retro_mcore.cli import commands as retro
from retro_mcore.evaluation.attribution import batch_credit
from retro_mcore.evaluation.bootstrap import Estimate, estimate_mean
from retro_mcore.platform import setup_device
from retro_mcore.samples.batch import RetroBatch, collate
from retro_mcore.samples.retro_dataset import RetroDataset, build_retro_datasets
from retro_mcore.session import LoadedModel
from retro_mcore.training.loop.scoring import token_losses

NUM_FACTS, NUM_CODES, NUM_WORDS = 200, 16, 128
NUM_NEIGHBORS, CHUNK_LENGTH = 2, 4
END = "<|end|>"
BATCH = 16


@dataclass(frozen=True)
class Size:
    """Sizes of a run.

    Attributes:
        questions: Training questions.
        with_facts: Those of them whose fact is in the database.
        iterations: Steps of training, of 16 samples of 64 tokens.
    """

    questions: int = 8000
    with_facts: int = 4000
    iterations: int = 600


@dataclass(frozen=True)
class Findings:
    """Results of a run.

    Attributes:
        before: Nats by which neighbors lower the loss of a planted code, with the facts in the
            database.
        after: The same after they were removed.
        again: The same after the database was compacted.
        top_credit: Share of the questions whose fact's document has the most credit.
    """

    before: Estimate
    after: Estimate
    again: Estimate
    top_credit: float


def write_corpora(folder: Path, size: Size, seed: int) -> None:
    """Write corpus.jsonl (training, then the 200 planted questions) and facts.jsonl."""
    generator = np.random.default_rng(seed)
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
    """Save a tokenizer with one token per word; the codes have the last numbers."""
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


def prepare(folder: Path, size: Size, seed: int) -> Path:
    """A project of the corpus, whose database also holds the planted facts."""
    write_corpora(folder, size, seed)
    project = folder / "project"
    documents = size.questions + size.with_facts
    held_out = 100 * (NUM_FACTS - 0.5) / (documents + NUM_FACTS)
    where = {"project_dir": str(project)}
    retro.preprocess_corpus(
        **where,
        input=[str(folder / "corpus.jsonl")],
        tokenizer_model=str(save_tokenizer(folder / "tokenizer")),
        seq_length=64,
        retro_chunk_length=CHUNK_LENGTH,
        split=f"{100 - held_out:.6f},{held_out:.6f},0",
        train_samples=BATCH * size.iterations,
        global_batch_size=BATCH,
        eval_interval=size.iterations + 1,
        eval_iters=16,  # each question about ten times, so that none is left out
        seed=seed,
    )
    retro.build_db(**where)
    retro.build_index(**where, embedder="lexical", index="Flat")
    retro.query_neighbors(**where, num_neighbors_save=4)
    retro.update_db(**where, append=[str(folder / "facts.jsonl")])
    return project


def train(project: Path, folder: Path, seed: int, keys: str | None = None) -> Path:
    """Train a small model, some of whose chunks are left without neighbors."""
    checkpoints = folder / "model"
    retro.pretrain_retro(
        project_dir=str(project),
        save=str(checkpoints),
        num_layers=2,
        hidden_size=64,
        num_attention_heads=2,
        retro_decoder_layers=[2],
        retro_num_neighbors=NUM_NEIGHBORS,
        retro_num_retrieved_chunks=1,
        retro_cross_attention_keys=keys,
        retro_encoder_num_layers=1,
        retro_encoder_hidden_dropout=0.0,
        retro_encoder_attention_dropout=0.0,
        retro_drop_chunks=0.2,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        position_embedding_type="rope",
        micro_batch_size=BATCH,
        lr=4e-3,
        min_lr=4e-4,
        lr_decay_style="cosine",
        lr_warmup_fraction=0.05,
        init_method_std=0.06,
        num_workers=0,
        log_interval=50,
        seed=seed,
        device="cpu",
    )
    return checkpoints


@dataclass(frozen=True)
class Questions:
    """The planted questions as a model reads them.

    Attributes:
        loaded: The model.
        dataset: The samples that hold the questions, with the neighbors of the moment.
    """

    loaded: LoadedModel
    dataset: RetroDataset

    @classmethod
    def open(cls, project: Path, loaded: LoadedModel) -> Questions:
        """Open the questions with the neighbors that the project has now."""
        dataset = build_retro_datasets(project, NUM_NEIGHBORS, 1)["valid"]
        assert dataset is not None
        return cls(loaded, dataset)

    def batches(self) -> Iterator[RetroBatch]:
        """All samples, which hold each question several times."""
        for start in range(0, len(self.dataset), BATCH):
            numbers = range(start, min(start + BATCH, len(self.dataset)))
            items = [{**self.dataset[number], "sample_id": number} for number in numbers]
            yield collate(items)

    def gains(self) -> np.ndarray:
        """Nats by which neighbors lower the loss of each question's code, f64 [facts]."""
        found: dict[tuple[int, ...], float] = {}
        for batch in self.batches():
            bare = replace(batch, retrieved_tokens=None, retrieved_mask=None)
            with_neighbors, without = (self._losses(each) for each in (batch, bare))
            for row, position, name in _asked(batch, self.loaded.tokenizer.vocab_size):
                gain = without[row, position] - with_neighbors[row, position]
                found.setdefault(name, float(gain))
        assert len(found) == NUM_FACTS
        return np.array(list(found.values()))

    def _losses(self, batch: RetroBatch) -> torch.Tensor:
        model, size = self.loaded.model, self.loaded.tokenizer.vocab_size
        ((_, losses_BS),) = token_losses([model], [batch], size)
        assert losses_BS is not None
        return losses_BS

    def top_credit(self, seed: int) -> float:
        """Share of the questions whose fact's document has the most credit.

        Neighbors are read in shuffled order, so that their rank does not tell.
        """
        generator = np.random.default_rng(seed)
        right: dict[tuple[int, ...], bool] = {}
        for batch in self.batches():
            batch = _reordered(batch, generator)
            credit_BSK = batch_credit(self.loaded, batch)
            assert credit_BSK is not None
            assert batch.retrieved_tokens is not None
            neighbors = batch.retrieved_tokens.view(
                len(batch.tokens), -1, NUM_NEIGHBORS, CHUNK_LENGTH
            )
            for row, position, name in _asked(batch, self.loaded.tokenizer.vocab_size):
                read = neighbors[row, position // CHUNK_LENGTH, :, :2].tolist()
                best = int(credit_BSK[row, position].argmax())
                right.setdefault(name, tuple(read[best]) == name)
        return float(np.mean(list(right.values())))


def _asked(batch: RetroBatch, vocab_size: int) -> Iterator[tuple[int, int, tuple[int, ...]]]:
    """Row, position and name of each question in a batch; the position's label is the code."""
    is_code = (batch.labels >= vocab_size - NUM_CODES) & (batch.loss_mask > 0)
    for row, position in is_code.nonzero().tolist():
        yield row, position, tuple(batch.tokens[row, position - 1 : position + 1].tolist())


def _reordered(batch: RetroBatch, generator: np.random.Generator) -> RetroBatch:
    """The batch with the neighbors of each chunk in random order."""
    assert batch.retrieved_tokens is not None
    assert batch.retrieved_mask is not None
    chunks = len(batch.retrieved_tokens) // NUM_NEIGHBORS
    order = generator.permuted(np.tile(np.arange(NUM_NEIGHBORS), (chunks, 1)), axis=1)
    rows = torch.from_numpy((order + NUM_NEIGHBORS * np.arange(chunks)[:, None]).reshape(-1))
    return replace(
        batch,
        retrieved_tokens=batch.retrieved_tokens[rows],
        retrieved_mask=batch.retrieved_mask[rows],
    )


def run(folder: Path, size: Size, seed: int = 1, keys: str | None = None) -> Findings:
    """Plant the facts, train, remove the facts, and compact the database."""
    project = prepare(folder, size, seed)
    checkpoints = train(project, folder, seed, keys)
    names = folder / "names.txt"
    names.write_text("".join(f"fact-{i}\n" for i in range(NUM_FACTS)), encoding="utf-8")
    setup_device("cpu")
    loaded = session.load_model(project, checkpoints)

    def gain() -> Estimate:
        return estimate_mean(Questions.open(project, loaded).gains().tolist())

    before, top = gain(), Questions.open(project, loaded).top_credit(seed)
    retro.update_db(project_dir=str(project), remove_file=str(names))
    after = gain()
    retro.update_db(project_dir=str(project), compact=True)
    return Findings(before, after, gain(), top)


def main() -> None:
    """Run the benchmark and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--iterations", type=int, default=Size.iterations)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--keys", help="--retro-cross-attention-keys of the model")
    options = parser.parse_args()
    with TemporaryDirectory() as folder:
        found = run(Path(folder), Size(iterations=options.iterations), options.seed, options.keys)
    print(f"\nnats that neighbors give per code, of {np.log(NUM_CODES):.2f} that it holds")
    for name, estimate in (
        ("facts in the database", found.before),
        ("removed", found.after),
        ("compacted", found.again),
    ):
        print(f"{name:22} {estimate.mean:7.3f}  [{estimate.low:.3f}, {estimate.high:.3f}]")
    print(f"most credit for the document with the fact: {found.top_credit:.1%}")


if __name__ == "__main__":
    main()
