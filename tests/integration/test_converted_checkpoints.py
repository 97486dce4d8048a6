"""A converted checkpoint is used as any other: trained on, and evaluated."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

import pytest
import torch

from retro_mcore.cli.commands import convert_checkpoint, evaluate_perplexity, pretrain_retro
from tests.unit.checkpoint.test_huggingface import VOCABULARY, logits, make_model, tokens_of_test
from tests.unit.data.projects import built_project
from tests.unit.training.small import NO_DROPOUT

pytestmark = pytest.mark.slow

MODEL = {
    "num_layers": 6,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "position_embedding_type": "rope",
    "rotary_percent": 0.5,
    "retro_origin": "legacy",
    "micro_batch_size": 2,
    "lr": 1e-3,
    "num_workers": 0,
    "device": "cpu",
    **NO_DROPOUT,
}


@pytest.fixture(scope="module")
def instructretro(tmp_path_factory) -> Path:
    """As the published checkpoints: older names, two ranks, no word of chunk or tokenizer."""
    folder, project = tmp_path_factory.mktemp("published"), str(built_project())
    pretrain_retro(project_dir=project, save=str(folder / "ours"), train_iters=2, **MODEL)
    convert_checkpoint(load=str(folder / "ours"), save=str(folder / "theirs"),
                       target="instructretro", target_tensor_parallel_size=2)  # fmt: skip
    for file in (folder / "theirs").rglob("*.pt"):
        state = torch.load(file, weights_only=False)
        for name in ("retro_chunk_length", "vocab_size"):
            delattr(state["args"], name)
        assert isinstance(state["args"], Namespace)
        torch.save(state, file)
    for checksums in (folder / "theirs").rglob("checksums.json"):
        checksums.unlink()  # theirs have none
    return folder


def losses(directory: str) -> dict[str, float]:
    """By kind of neighbors."""
    result = evaluate_perplexity(project_dir=str(built_project()), load=directory, device="cpu")
    return {measured.neighbors: measured.loss for measured in result.perplexities}


def test_it_is_trained_on_and_evaluated(instructretro):
    project, here = str(built_project()), str(instructretro / "here")
    convert_checkpoint(load=str(instructretro / "theirs"), save=here, project_dir=project)
    assert losses(here) == losses(str(instructretro / "ours"))
    tuned = pretrain_retro(
        project_dir=project, load=here, finetune=True, save=str(instructretro / "tuned"),
        train_iters=1, **MODEL,
    )  # fmt: skip
    assert tuned.iteration == 1


def test_a_hugging_face_model_becomes_a_gpt_of_ours(megatron, tmp_path):
    from retro_mcore.training.setup.load_model import load_model_from_checkpoint

    theirs = make_model("qwen2", tmp_path / "qwen2")
    convert_checkpoint(load=str(tmp_path / "qwen2"), save=str(tmp_path / "ours"))
    model, arguments = load_model_from_checkpoint(tmp_path / "ours")
    assert arguments.no_retrieval
    assert arguments.vocab_size == VOCABULARY
    with torch.no_grad():
        wanted = theirs(tokens_of_test()).logits
    torch.testing.assert_close(logits(model), wanted, atol=2e-5, rtol=1e-5)
