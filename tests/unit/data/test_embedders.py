"""Embedders: what they give, and that nothing around them changes it."""

import subprocess
import sys

# Embeddings before and after the CPU platform replaces torch's CUDA queries and factories.
AROUND_USE_CPU = """
import numpy as np
from retro_mcore.data.embedders import build_embedder
texts = ["A dog chases a cat.", "Interest rates rose.", "", "x" * 400]
before = build_embedder("minilm", device="cpu").embed(texts)
from retro_mcore.platform import use_cpu
use_cpu()
after = build_embedder("minilm", device="cpu").embed(texts)
assert before.shape == (4, 384) and np.isfinite(before).all()
assert np.array_equal(before, after), abs(before - after).max()
"""


def test_an_encoder_loaded_after_use_cpu_gives_the_same_embeddings():
    command = [sys.executable, "-W", "ignore", "-c", AROUND_USE_CPU]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
