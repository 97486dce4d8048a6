"""What the tests of training share: a small run on random tokens."""

from __future__ import annotations

from typing import Any

import numpy as np

VOCABULARY = 100
SEQUENCE_LENGTH, CHUNK_LENGTH, NUM_NEIGHBORS = 32, 8, 2
TRAIN_SAMPLES, BATCH = 24, 4


class RandomSamples:
    """Samples that are a function of their index, as a dataset of a project gives them."""

    def __init__(self, num_samples: int) -> None:
        self.num_samples = num_samples
        self.samples = self

    def __len__(self) -> int:
        return self.num_samples

    def tokens(self, index: int) -> np.ndarray:
        generator = np.random.default_rng(index)
        return generator.integers(0, VOCABULARY, SEQUENCE_LENGTH + 1)

    def text_item(self, index: int) -> dict[str, Any]:
        return {"text": self.tokens(index)}

    def __getitem__(self, index: int) -> dict[str, Any]:
        shape = (SEQUENCE_LENGTH // CHUNK_LENGTH, NUM_NEIGHBORS, 2 * CHUNK_LENGTH)
        generator = np.random.default_rng(1000 + index)
        return {
            "text": self.tokens(index),
            "neighbor_tokens": generator.integers(0, VOCABULARY, shape),
            "neighbor_mask": generator.random(shape) < 0.1,
        }


def small_project(**changes: Any) -> Any:
    from retro_mcore.project.config import ProjectConfig

    values: dict[str, Any] = {
        "retro_block_size": 100,
        "retro_gpt_chunk_length": CHUNK_LENGTH,
        "retro_gpt_seq_length": SEQUENCE_LENGTH,
        "retro_gpt_global_batch_size": BATCH,
        "retro_gpt_train_samples": TRAIN_SAMPLES,
        "retro_gpt_eval_interval": 3,
        "retro_gpt_eval_iters": 1,
        "retro_gpt_split": "98,2,0",
        "retro_gpt_seed": 1234,
        "retro_gpt_data_path": ["text"],
        "retro_gpt_tokenizer_type": "GPTSentencePieceTokenizer",
    }
    return ProjectConfig(**{**values, **changes})


def small_options(**changes: Any) -> Any:
    from retro_mcore.training.options.pretrain import TrainingOptions

    values: dict[str, Any] = {
        "project_dir": "project",
        "num_layers": 2,
        "hidden_size": 32,
        "num_attention_heads": 4,
        "retro_decoder_layers": [2],
        "position_embedding_type": "rope",
        "lr": 1e-2,
        "micro_batch_size": 2,
        "num_workers": 0,
        "log_interval": 2,
        "device": "cpu",
        # One padded vocabulary for every layout, so that their losses compare.
        "make_vocab_size_divisible_by": 64,
    }
    return TrainingOptions(**{**values, **changes})


NO_DROPOUT = {
    "hidden_dropout": 0.0,
    "attention_dropout": 0.0,
    "retro_encoder_hidden_dropout": 0.0,
    "retro_encoder_attention_dropout": 0.0,
}


def small_plan(**changes: Any) -> Any:
    from retro_mcore.platform import setup_device

    setup_device("cpu")  # before megatron is imported
    from retro_mcore.training.setup.plan import make_plan

    return make_plan(small_options(**changes), small_project(), VOCABULARY)


def small_trainer(samples: Any = None, **changes: Any) -> Any:
    from retro_mcore.platform import setup_device

    device = setup_device("cpu")  # before megatron is imported
    from retro_mcore.training.loop.trainer import Trainer

    samples = samples or RandomSamples(TRAIN_SAMPLES)
    return Trainer(small_plan(**changes), samples, RandomSamples(8), device)


def train(**changes: Any) -> Any:
    return small_trainer(**changes).train()
