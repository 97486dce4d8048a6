"""Encoders in half precision on a GPU: `make test-gpu`."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.gpu_report.findings import Skipped
from benchmarks.gpu_report.retrieval import make_texts, random_encoder
from retro_mcore.errors import MissingDependencyError
from retro_mcore.retrieval.embedders import build_embedder

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("pooling", [None, "mean", "cls"])
@pytest.mark.parametrize("name", ["minilm", "random"])
def test_half_precision(name, pooling, tmp_path):
    texts = ["A dog chases a cat.", "Interest rates rose.", *make_texts(2, 64)]
    try:
        name = random_encoder(tmp_path / "encoder", 2, 64, 2) if name == "random" else name
        full = build_embedder(name, 2, "cpu", pooling).embed(texts)
    except (Skipped, MissingDependencyError) as reason:
        pytest.skip(str(reason))
    half = build_embedder(name, 2, "cuda", pooling, precision="fp16").embed(texts)
    assert half.dtype == np.float32
    lengths = np.linalg.norm(full, axis=1, keepdims=True)
    np.testing.assert_allclose(half / lengths, full / lengths, atol=2e-2)
