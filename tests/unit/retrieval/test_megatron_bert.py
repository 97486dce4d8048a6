"""A Megatron-Core BERT, saved by megatron-core itself, as an embedder."""

from __future__ import annotations

import shutil
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch

from retro_mcore.errors import CheckpointError, ConfigurationError
from retro_mcore.retrieval.embedders import build_embedder
from retro_mcore.retrieval.embedders.base import embed_unique
from retro_mcore.retrieval.vectors import EmbeddingCounts
from tests.unit.data.projects import documents

pytestmark = pytest.mark.usefixtures("megatron")

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory, megatron: None):
    """A tiny BertModel with its folder: torch_dist, arguments as Megatron-LM keeps them."""
    from megatron.core import dist_checkpointing
    from megatron.core.models.bert.bert_layer_specs import bert_layer_local_spec
    from megatron.core.models.bert.bert_model import BertModel
    from megatron.core.transformer.transformer_config import TransformerConfig

    folder = tmp_path_factory.mktemp("bert")
    letters = [chr(code) for code in range(33, 127)]
    vocabulary = [*WORDS, *letters, *(f"##{letter}" for letter in letters)]
    (folder / "vocab.txt").write_text("".join(f"{word}\n" for word in vocabulary))
    sizes = {"num_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "ffn_hidden_size": 48}
    config = TransformerConfig(
        **sizes, use_cpu_initialization=True, gradient_accumulation_fusion=False,
        hidden_dropout=0.0, attention_dropout=0.0,
    )  # fmt: skip
    torch.manual_seed(0)
    model = BertModel(config, 2, bert_layer_local_spec, 208, 96).eval()
    model.return_embeddings = True  # given to it at once, it fails in 0.16
    for parameter in model.parameters():  # biases and norms that would be 0 and 1
        parameter.data += 0.1 * torch.randn_like(parameter)
    arguments = Namespace(
        **sizes, kv_channels=8, padded_vocab_size=208, max_position_embeddings=96,
        bert_binary_head=True, norm_epsilon=1e-5, normalization="LayerNorm",
        position_embedding_type="learned_absolute", tokenizer_type="BertWordPieceLowerCase",
    )  # fmt: skip
    checkpoint = folder / "iter_0000010"
    checkpoint.mkdir()
    state = {"model": model.sharded_state_dict(), "args": arguments, "iteration": 10}
    dist_checkpointing.save(state, str(checkpoint))
    (folder / "latest_checkpointed_iteration.txt").write_text("10")
    return folder, model


def texts() -> list[str]:
    return [*(text[:n] for text in documents(6) for n in (9, 40, 70)), "", "x", "y" * 300]


def test_vectors_are_megatrons_own_row_by_row(saved) -> None:
    """Batches of one length are padded; a single row is not, and goes through BertModel.forward."""
    folder, model = saved
    embedder = build_embedder(str(folder), batch_size=4, device="cpu")
    assert embedder.dimension == 32
    vectors = embedder.embed(texts())
    for text, vector in zip(texts(), vectors, strict=True):
        ids = torch.tensor([embedder._tokenizer.encode(text).ids])
        assert ids.shape[1] <= 96
        with torch.no_grad():
            expected = model(ids, torch.ones_like(ids), tokentype_ids=torch.zeros_like(ids))[0]
        expected = torch.nan_to_num(expected)  # Megatron's mean of no tokens
        np.testing.assert_allclose(vector, expected.numpy(), rtol=1e-4, atol=1e-5)
    assert not vectors[texts().index("")].any()
    np.testing.assert_allclose(embedder.embed(texts()), vectors, rtol=1e-4, atol=1e-5)
    assert embedder.max_tokens == 96
    counts = EmbeddingCounts()
    embed_unique(embedder, ["y" * 300, "a b", ""], counts)
    assert counts.tokens == sum(embedder.count_tokens(["y" * 300, "a b", ""]))
    long = " ".join("y" * 60 for _ in range(3))
    assert embedder.count_tokens([long]).tolist() == [182]
    embed_unique(embedder, [long, long], counts)
    assert (counts.chunks_cut, counts.tokens_cut) == (2, 2 * (182 - 96))


def test_the_first_hidden_state(saved) -> None:
    folder, _ = saved
    embedder = build_embedder(
        str(folder / "iter_0000010"), device="cpu", pooling="cls", batch_size=1
    )
    alone, mean = embedder.embed(texts()[:2]), build_embedder(str(folder), device="cpu")
    assert alone.shape == (2, 32)
    assert (np.abs(alone - mean.embed(texts()[:2])) > 1e-3).any()


def test_what_cannot_be_is_refused(saved, tmp_path: Path) -> None:
    folder, _ = saved
    copy = shutil.copytree(folder, tmp_path / "copy")
    (copy / "vocab.txt").write_text("none\n")
    with pytest.raises(CheckpointError, match=r"vocab\.txt: .* not found in the vocabulary"):
        build_embedder(str(copy), device="cpu")
    (copy / "vocab.txt").write_text("".join(f"{w}\n" for w in [*WORDS, *map(str, range(300))]))
    with pytest.raises(CheckpointError, match=r"vocab\.txt: has 3\d\d tokens, the model 208"):
        build_embedder(str(copy), device="cpu")
    with pytest.raises(ConfigurationError, match="--embed-fp16"):
        build_embedder(str(folder), device="cpu", precision="fp16")
    largest = max((copy / "iter_0000010").glob("*.distcp"), key=lambda path: path.stat().st_size)
    largest.write_bytes(largest.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"\.distcp: has \d+ bytes, not"):
        build_embedder(str(copy), device="cpu")


@pytest.mark.gpu
def test_half_precision_is_close(saved) -> None:
    folder, _ = saved
    full = build_embedder(str(folder), device="cuda")
    half = build_embedder(str(folder), device="cuda", precision="fp16")
    np.testing.assert_allclose(half.embed(texts()), full.embed(texts()), atol=0.05)
