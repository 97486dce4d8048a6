"""Models, samples and training runs that sections share."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.gpu_report.options import Setting

NEIGHBORS = 2


@dataclass(frozen=True)
class Shape:
    """Sizes of a model and its batches.

    Attributes:
        layers: Decoder layers.
        hidden: Width.
        heads: Attention heads.
        sequence: S, tokens.
        chunk: M, tokens.
        batch: Samples per step.
        vocabulary: Rows of the embedding.
        every: Distance of the layers that cross-attend.
    """

    layers: int = 4
    hidden: int = 256
    heads: int = 4
    sequence: int = 512
    chunk: int = 64
    batch: int = 8
    vocabulary: int = 2048
    every: int = 2


#: A model small enough for many runs, with heads as wide as flash attention wants them.
USUAL, SMALL = Shape(), Shape(2, 64, 2, 64, 16, 4, 256)


def shape_of(setting: Setting) -> Shape:
    """The sizes of most sections."""
    return setting.pick(USUAL, SMALL)


class ChainSamples:
    """Samples that can be learned: after most tokens always the same one follows.

    A tenth of the tokens is random. Sample and neighbors are a function of the index.
    """

    def __init__(self, shape: Shape, count: int) -> None:
        self._shape, self._count = shape, count
        self._next = np.random.default_rng(0).permutation(shape.vocabulary)

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> dict[str, Any]:
        shape, random = self._shape, np.random.default_rng(index)
        chunks = shape.sequence // shape.chunk
        rows = (chunks, NEIGHBORS, 2 * shape.chunk)
        neighbors = self._chains(random, rows)
        mask = np.zeros(rows, bool)
        mask[..., -3:] = True  # padding, as at the end of a document
        return {
            "text": self._chains(random, (shape.sequence + 1,)),
            "neighbor_tokens": neighbors,
            "neighbor_mask": mask,
        }

    def _chains(self, random: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
        """Tokens i64 `shape`; chains run along the last dimension."""
        tokens = random.integers(0, self._shape.vocabulary, shape)
        follows = random.random(shape) < 0.9
        for place in range(1, shape[-1]):
            after = self._next[tokens[..., place - 1]]
            tokens[..., place] = np.where(follows[..., place], after, tokens[..., place])
        return tokens


def make_plan(setting: Setting, shape: Shape, steps: int, **flags: Any) -> Any:
    """The plan of a run of some steps on `ChainSamples`."""
    setting.setup()  # before megatron is imported
    from retro_mcore.project.config import ProjectConfig
    from retro_mcore.training.options.pretrain import TrainingOptions
    from retro_mcore.training.setup.plan import make_plan

    project = ProjectConfig(
        retro_block_size=100,
        retro_gpt_chunk_length=shape.chunk,
        retro_gpt_seq_length=shape.sequence,
        retro_gpt_global_batch_size=shape.batch,
        retro_gpt_train_samples=shape.batch * steps,
        retro_gpt_eval_interval=10**6,
        retro_gpt_eval_iters=1,
        retro_gpt_split="98,2,0",
        retro_gpt_seed=1234,
        retro_gpt_data_path=["text"],
        retro_gpt_tokenizer_type="GPTSentencePieceTokenizer",
    )
    options: dict[str, Any] = {
        "project_dir": "project",
        "num_layers": shape.layers,
        "hidden_size": shape.hidden,
        "num_attention_heads": shape.heads,
        "retro_decoder_layers": list(range(shape.every, shape.layers + 1, shape.every)),
        "position_embedding_type": "rope",
        "micro_batch_size": shape.batch,
        "num_workers": 0,
        "lr": 3e-3,
        "log_interval": 10**6,
        "device": setting.device,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "retro_encoder_hidden_dropout": 0.0,
        "retro_encoder_attention_dropout": 0.0,
        "make_vocab_size_divisible_by": 64,
        "use_cpu_initialization": True,  # the same weights for every layout
        "transformer_impl": "local",
        "no_gradient_accumulation_fusion": True,
    }
    if flags.get("no_retrieval"):
        del options["retro_decoder_layers"]
    return make_plan(TrainingOptions(**{**options, **flags}), project, shape.vocabulary)


def make_trainer(setting: Setting, shape: Shape, steps: int, **flags: Any) -> Any:
    """A trainer of some steps on `ChainSamples`."""
    plan = make_plan(setting, shape, steps, **flags)
    from retro_mcore.training.loop.trainer import Trainer

    return Trainer(plan, ChainSamples(shape, shape.batch * steps), None, setting.setup())


def train(
    setting: Setting, shape: Shape, steps: int, folder: Path | None = None, **flags: Any
) -> Any:
    """Train some steps, saving to and resuming from a folder; returns the trainer's result."""
    if folder is not None:
        flags |= {"save": str(folder), "load": str(folder)}
    return make_trainer(setting, shape, steps, **flags).train()


def build_model(setting: Setting, shape: Shape, **flags: Any) -> Any:
    """A model in training mode, with initial weights."""
    plan = make_plan(setting, shape, 1, **flags)
    from retro_mcore.training.setup.build import build_model_stages
    from retro_mcore.training.setup.initialize import initialize_parallel, set_seeds

    initialize_parallel()
    set_seeds(1234)
    return build_model_stages(plan.arguments, plan.options, plan.options)[0].train()


def make_batch(setting: Setting, shape: Shape, retrieval: bool = True) -> Any:
    """A `RetroBatch` on the device."""
    from retro_mcore.samples.batch import collate

    samples = ChainSamples(shape, shape.batch)
    rows = [{**samples[index], "sample_id": index} for index in range(shape.batch)]
    if not retrieval:
        rows = [{"text": row["text"], "sample_id": row["sample_id"]} for row in rows]
    return collate(rows).to(setting.setup())


def require_engine(setting: Setting) -> None:
    """Check that Transformer Engine runs here.

    Raises:
        Skipped: it does not.
    """
    from benchmarks.gpu_report.findings import Skipped

    if setting.device == "cpu":
        raise Skipped("Transformer Engine needs a GPU")
    try:
        import transformer_engine.pytorch  # noqa: F401
    except ImportError as error:
        raise Skipped(f"Transformer Engine does not import: {error}") from error
