"""A project of real text in which retrieval helps, and a model that trains on it in minutes.

The text: the docstrings of the installed Transformers' models, one document per model. Models
document their arguments in one another's words, so that neighbors hold much of what comes next.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

from retro_mcore.chunking import SampleLayout
from retro_mcore.errors import MissingDependencyError

REPOSITORY = Path(__file__).resolve().parents[1]
BATCH = 8
#: Training steps if nothing else is asked for.
TRAIN_ITERS = 3000

MODEL_FLAGS = (
    "--num-layers 4 --hidden-size 128 --num-attention-heads 4 --retro-decoder-layers 3 "
    "--retro-encoder-num-layers 1 --retro-encoder-hidden-size 64 "
    "--retro-encoder-num-attention-heads 2 --retro-cross-attention-positions rotary "
    "--position-embedding-type rope --normalization RMSNorm "
    "--disable-bias-linear --hidden-dropout 0 --attention-dropout 0 "
    "--retro-encoder-hidden-dropout 0 --retro-encoder-attention-dropout 0 "
    f"--init-method-std 0.06 --micro-batch-size {BATCH} --lr 3e-3 --min-lr 3e-4 "
    "--lr-decay-style cosine --lr-warmup-fraction 0.05 --adam-beta2 0.95 --weight-decay 0.1 "
    "--log-interval 50"
).split()


def make_project(
    folder: Path,
    train_iters: int,
    samples: SampleLayout = "packed",
    seed: int = 1234,
) -> Path:
    """The project below `folder`, as far as it is not there; returns its directory.

    Args:
        folder: Where to make it.
        train_iters: Training steps that it has samples for.
        samples: Layout of the samples.
        seed: Seed for their order.

    Raises:
        MissingDependencyError: Transformers is not installed.
    """
    from retro_mcore.cli.build_db import BuildDbOptions, build_db
    from retro_mcore.cli.build_index import BuildIndexOptions, build_index
    from retro_mcore.cli.preprocess_corpus import PreprocessCorpusOptions, preprocess_corpus
    from retro_mcore.cli.query_neighbors import QueryNeighborsOptions, query_neighbors

    corpus, project = folder / "documentation.jsonl", folder / "project"
    if not corpus.is_file():
        maker = _corpus_maker()
        try:
            documents = maker.models_documentation()
        except ModuleNotFoundError as error:
            raise MissingDependencyError(
                "transformers", "not installed", "pip install transformers"
            ) from error
        maker.write_jsonl(documents, corpus)
    preprocess_corpus(
        PreprocessCorpusOptions(
            str(project),
            input=[str(corpus)],
            vocab_size=512,
            samples=samples,
            seed=seed,
            seq_length=256,
            retro_chunk_length=32,
            split="97,3,0",
            train_samples=train_iters * BATCH,
            global_batch_size=BATCH,
            eval_interval=train_iters,
            eval_iters=16,
        )
    )
    build_db(BuildDbOptions(str(project)))
    build_index(BuildIndexOptions(str(project), embedder="lexical"))
    query_neighbors(QueryNeighborsOptions(str(project)))
    return project


def _corpus_maker() -> ModuleType:
    """examples/quickstart/make_corpus.py as a module."""
    path = REPOSITORY / "examples" / "quickstart" / "make_corpus.py"
    spec = importlib.util.spec_from_file_location("make_corpus", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module
