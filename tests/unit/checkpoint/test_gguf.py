"""--load-gpt from GGUF files: against transformers' forward pass, and a second dequantization."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

gguf = pytest.importorskip("gguf", reason="gguf, an optional package, is not installed")

from retro_mcore.checkpoint.conversion.formats import open_checkpoint  # noqa: E402
from retro_mcore.errors import CheckpointError, RetroError  # noqa: E402
from retro_mcore.gguf_file import read_gguf_header  # noqa: E402
from tests.gguf_files import metadata_of, tensors_of, write_gguf  # noqa: E402
from tests.unit.checkpoint.test_huggingface import (  # noqa: E402
    flags_of,
    load,
    logits,
    make_model,
    tokens_of_test,
)


def file_of(model, path, types=None, change=None, general=None, more=None, **kept):
    metadata = {**metadata_of(model), **(change or {})}
    tensors = {**tensors_of(model), **(more or {})}
    family = model.config.model_type
    return write_gguf(path / "m.gguf", tensors, metadata, family, general, types=types, **kept)


def assert_same_logits(theirs, file, **flags):
    ours, report = load(file, **flags)
    with torch.no_grad():
        wanted = theirs(tokens_of_test()).logits
    assert wanted.std() > 0.5
    torch.testing.assert_close(logits(ours), wanted, atol=2e-5, rtol=1e-5)
    return report


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_retrieval_off_equals_transformers(megatron, family, tmp_path):
    theirs = make_model(family, tmp_path)
    report = assert_same_logits(theirs, file_of(theirs, tmp_path), **flags_of(family))
    assert report.checkpoint.source == "gguf"
    assert report.checkpoint.notes == []


def test_a_tied_output_layer(megatron, tmp_path):
    theirs = make_model("llama", tmp_path, tie_word_embeddings=True)
    flags = {**flags_of("llama"), "untie_embeddings_and_output_weights": False}
    assert_same_logits(theirs, file_of(theirs, tmp_path), **flags)


def test_linear_rope_scaling(megatron, tmp_path):
    scaling = {"rope_type": "linear", "factor": 4.0, "rope_theta": 5000.0}
    theirs = make_model("llama", tmp_path, rope_parameters=scaling)
    change = {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}
    flags = {**flags_of("llama"), "rotary_seq_len_interpolation_factor": 4.0}
    assert_same_logits(theirs, file_of(theirs, tmp_path, change=change), **flags)


def test_llama_3_rope(megatron, tmp_path):
    scaling = {"rope_type": "llama3", "factor": 16.0, "low_freq_factor": 1.0,
               "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
               "rope_theta": 500000.0}  # fmt: skip
    theirs = make_model("llama", tmp_path, rope_parameters=scaling, head_dim=32)
    more = {"rope_freqs.weight": _llama3_divisors(500000.0, 32, 16.0)}
    flags = {**flags_of("llama"), "rotary_base": 500000, "kv_channels": 32}
    flags |= {"use_rope_scaling": True, "rope_scaling_factor": 16.0}
    assert_same_logits(theirs, file_of(theirs, tmp_path, more=more), **flags)
    more["rope_freqs.weight"][-1] *= 1.01
    with pytest.raises(CheckpointError, match=r"other factors than Llama 3\.1's"):
        open_checkpoint(file_of(theirs, tmp_path, more=more))


def _llama3_divisors(base, width, factor):
    """As convert_hf_to_gguf.py computes them."""
    divisors = []
    for place in range(0, width, 2):
        wavelength = 2 * math.pi * base ** (place / width)
        if wavelength < 8192 / 4:
            divisors.append(1.0)
        elif wavelength > 8192 / 1:
            divisors.append(factor)
        else:
            smooth = (8192 / wavelength - 1) / (4 - 1)
            divisors.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(divisors, np.float32)


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"])
def test_quantized_matrices(kind, tmp_path):
    """Every matrix of a model is the independent dequantization, in the right place and order."""
    theirs = make_model("llama", tmp_path, intermediate_size=64)
    matrices = [name for name, array in tensors_of(theirs).items() if array.ndim == 2]
    plain = open_checkpoint(file_of(theirs, tmp_path))
    file = file_of(theirs, tmp_path, types=dict.fromkeys(matrices, kind))
    found = open_checkpoint(file)
    assert bool(found.notes) == kind.startswith("Q")
    dequantized = {t.name: second_dequantization(t) for t in gguf.GGUFReader(file).tensors}
    rounded = open_checkpoint(write_gguf(tmp_path / "again.gguf", dequantized, metadata_of(theirs)))
    for name, weight in found.weights.items():
        kept = {"F16": torch.float16, "BF16": torch.bfloat16}.get(kind, torch.float32)
        assert weight.dtype == (kept if len(weight.shape) == 2 else torch.float32)
        assert torch.equal(weight.load().float(), rounded.weights[name].load())
        assert weight.shape == plain.weights[name].shape


def second_dequantization(tensor) -> np.ndarray:
    """ggml's reference loops (dequantize_row_*), written a second time."""
    kind, shape = tensor.tensor_type.name, tuple(int(size) for size in reversed(tensor.shape))
    if kind in ("F32", "F16"):
        return tensor.data.astype(np.float32).reshape(shape)
    raw = np.ascontiguousarray(tensor.data).tobytes()
    if kind == "BF16":
        bits = np.frombuffer(raw, np.uint16).astype(np.uint32) << 16
        return bits.view(np.float32).reshape(shape)
    size = gguf.GGML_QUANT_SIZES[tensor.tensor_type][1]
    blocks = [raw[start : start + size] for start in range(0, len(raw), size)]
    values = [_BLOCKS[kind](block) for block in blocks]
    return np.array(values, np.float32).reshape(shape)


def half(data: bytes) -> np.float32:
    return np.frombuffer(data, np.float16)[0].astype(np.float32)


def _q4(block: bytes, minimum: bool) -> list:
    scale, start = half(block[:2]), 4 if minimum else 2
    nibbles = [byte & 15 for byte in block[start:]] + [byte >> 4 for byte in block[start:]]
    if minimum:
        least = half(block[2:4])
        return [np.float32(scale * np.float32(q)) + least for q in nibbles]
    return [scale * np.float32(q - 8) for q in nibbles]


def _q5(block: bytes, minimum: bool) -> list:
    scale, start = half(block[:2]), 4 if minimum else 2
    high = int.from_bytes(block[start : start + 4], "little")
    low = block[start + 4 :]
    nibbles = [byte & 15 for byte in low] + [byte >> 4 for byte in low]
    codes = [q | (high >> place & 1) << 4 for place, q in enumerate(nibbles)]
    if minimum:
        least = half(block[2:4])
        return [np.float32(scale * np.float32(q)) + least for q in codes]
    return [scale * np.float32(q - 16) for q in codes]


def _q8(block: bytes) -> list:
    return [half(block[:2]) * np.float32(q) for q in np.frombuffer(block[2:], np.int8)]


def _q2_k(block: bytes) -> list:
    scales, codes = block[:16], block[16:80]
    scale, least = half(block[80:82]), half(block[82:84])
    found = []
    for place in range(256):
        part, within = divmod(place, 128)
        code = codes[32 * part + within % 32] >> 2 * (within // 32) & 3
        both = scales[place // 16]
        made = scale * np.float32(both & 15) * np.float32(code)
        found.append(made - least * np.float32(both >> 4))
    return found


def _q3_k(block: bytes) -> list:
    high, codes, packed, scale = block[:32], block[32:96], block[96:108], half(block[108:110])
    scales = []
    for place in range(16):
        low = packed[place] & 15 if place < 8 else packed[place - 8] >> 4
        scales.append((low | (packed[8 + place % 4] >> 2 * (place // 4) & 3) << 4) - 32)
    found = []
    for place in range(256):
        part, within = divmod(place, 128)
        code = codes[32 * part + within % 32] >> 2 * (within // 32) & 3
        bit = high[place % 32] >> place // 32 & 1
        code -= 0 if bit else 4
        found.append(scale * np.float32(scales[place // 16]) * np.float32(code))
    return found


def _scales_of_k4(packed: bytes) -> list[tuple[int, int]]:
    """`get_scale_min_k4`: six-bit scales and minima of eight groups."""
    pairs = []
    for j in range(8):
        if j < 4:
            pairs.append((packed[j] & 63, packed[j + 4] & 63))
        else:
            low, top = packed[j + 4], (packed[j - 4] >> 6, packed[j] >> 6)
            pairs.append((low & 15 | top[0] << 4, low >> 4 | top[1] << 4))
    return pairs


def _q45_k(block: bytes, five: bool) -> list:
    scale, least = half(block[:2]), half(block[2:4])
    pairs = _scales_of_k4(block[4:16])
    high, codes = (block[16:48], block[48:]) if five else (None, block[16:])
    found = []
    for place in range(256):
        group, within = divmod(place, 32)
        code = codes[32 * (group // 2) + within] >> 4 * (group % 2) & 15
        if high is not None:
            code |= (high[within] >> group & 1) << 4
        d, m = scale * np.float32(pairs[group][0]), least * np.float32(pairs[group][1])
        found.append(d * np.float32(code) - m)
    return found


def _q6_k(block: bytes) -> list:
    low, high = block[:128], block[128:192]
    scales, scale = np.frombuffer(block[192:208], np.int8), half(block[208:210])
    found = []
    for place in range(256):
        part, within = divmod(place, 128)
        quarter, at = divmod(within, 32)
        nibble = low[64 * part + 32 * (quarter % 2) + at] >> 4 * (quarter // 2) & 15
        code = (nibble | (high[32 * part + at] >> 2 * quarter & 3) << 4) - 32
        found.append(scale * np.float32(scales[place // 16]) * np.float32(code))
    return found


_BLOCKS = {
    "Q4_0": lambda block: _q4(block, False),
    "Q4_1": lambda block: _q4(block, True),
    "Q5_0": lambda block: _q5(block, False),
    "Q5_1": lambda block: _q5(block, True),
    "Q8_0": _q8,
    "Q2_K": _q2_k,
    "Q3_K": _q3_k,
    "Q4_K": lambda block: _q45_k(block, False),
    "Q5_K": lambda block: _q45_k(block, True),
    "Q6_K": _q6_k,
}
#: Bytes at which a block of 256 has its scales in half precision.
_HALVES = {"Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,)}


@pytest.mark.parametrize("kind", _HALVES)
def test_k_quants(kind, tmp_path):
    """Blocks of random bits, in a model whose rows are long enough for them."""
    theirs = make_model("llama", tmp_path, hidden_size=256, intermediate_size=256, head_dim=64)
    generator = np.random.default_rng(1)
    size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]][1]
    raw = generator.integers(0, 256, (256, size), np.uint8)
    for at in _HALVES[kind]:
        halves = generator.uniform(0.5, 2, (256, 1)).astype(np.float16)
        raw[:, at : at + 2] = halves.view(np.uint8)
    name = "blk.1.ffn_down.weight"
    file = file_of(theirs, tmp_path, more={name: raw}, types={name: kind})
    found = open_checkpoint(file).weights["decoder.layers.1.mlp.linear_fc2.weight"].load()
    (tensor,) = (each for each in gguf.GGUFReader(file).tensors if each.name == name)
    wanted = torch.from_numpy(second_dequantization(tensor))
    # Two roundings, in another order than the package's.
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-4)
    assert found.abs().max() > 10


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0}, "rope.scaling.type 'yarn'"),
        ({"rope.dimension_count": 4}, "rope.dimension_count 4"),
        ({"attention.value_length": 16}, "attention.value_length 16"),
        ({"expert_count": 8}, "llama.expert_count 8"),
        ({"attention.sliding_window": 16}, "llama.attention.sliding_window 16"),
        ({"logit_scale": 2.0}, r"llama.logit_scale 2\.0"),
        ({"attention.causal": False}, "llama.attention.causal False"),
        ({"attention.max_alibi_bias": 8.0}, "max_alibi_bias"),
        ({"block_count": None}, "no llama.block_count in its metadata"),
        ({"block_count": 4}, r"no tensor layers\.3"),
        ({"block_count": 2}, r"unknown tensors layers\.2"),
        ({"feed_forward_length": [48, 48, 48]}, r"intermediate_size \[48, 48, 48\]"),
        ({"attention.head_count_kv": 3}, "num_key_value_heads 3 for 4"),
        ({"embedding_length": 36}, "tensors of other sizes than its metadata says"),
        ({"vocab_size": 100}, "is 101 x 32, not 100 x 32"),
    ],
)
def test_what_the_decoder_cannot_compute_is_refused(tmp_path, change, message):
    theirs = make_model("llama", tmp_path)
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(file_of(theirs, tmp_path, change=change))


@pytest.mark.parametrize(
    ("general", "message"),
    [
        ({"general.type": "adapter"}, "general.type 'adapter'"),
        ({"split.count": 3, "split.no": 0}, "one of 3 parts of a split GGUF model"),
        ({"general.alignment": 48}, "general.alignment is 48"),
    ],
)
def test_other_kinds_of_files_are_refused(tmp_path, general, message):
    theirs = make_model("llama", tmp_path)
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(file_of(theirs, tmp_path, general=general))


def test_other_architectures_and_types_are_refused(tmp_path):
    theirs = make_model("llama", tmp_path)
    metadata, tensors = metadata_of(theirs), tensors_of(theirs)
    gemma = write_gguf(tmp_path / "gemma.gguf", tensors, metadata, "gemma2")
    with pytest.raises(CheckpointError, match=r"architecture 'gemma2'.*llama, qwen2, qwen3"):
        open_checkpoint(gemma)
    tensors["blk.0.ffn_up.weight"] = np.zeros((256, 66), np.uint8)
    other = write_gguf(
        tmp_path / "iq2.gguf", tensors, metadata, types={"blk.0.ffn_up.weight": "IQ2_XXS"}
    )
    with pytest.raises(CheckpointError, match=r"blk\.0\.ffn_up\.weight' \(IQ2_XXS\)"):
        open_checkpoint(other)
    (tmp_path / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"Name the GGUF file itself: .*gemma\.gguf"):
        open_checkpoint(tmp_path)


def test_damaged_files_are_refused(tmp_path):
    """Cut anywhere, or with any byte of the header changed: an error of ours, or another model."""
    theirs = make_model("llama", tmp_path)
    file = file_of(theirs, tmp_path)
    whole = file.read_bytes()
    header = min(tensor.offset for tensor in read_gguf_header(file).tensors.values())
    generator = np.random.default_rng(0)
    cuts = [0, 3, 4, 8, 20, header - 1, header, len(whole) - 64]
    for cut in [*cuts, *generator.integers(0, header, 20)]:
        file.write_bytes(whole[:cut])
        with pytest.raises(CheckpointError, match="is not an intact GGUF file"):
            open_checkpoint(file)
    errors = []
    for at in generator.integers(0, header, 100):
        file.write_bytes(whole[:at] + bytes([generator.integers(256)]) + whole[at + 1 :])
        try:
            open_checkpoint(file)
        except RetroError as error:
            errors.append(str(error))
    assert len(errors) > 50
    assert not any("\n" in error for error in errors)
    for start in (b"GGUF\0\0\0\3" + whole[8:], b"GGUF\1" + whole[5:]):
        file.write_bytes(start)
        with pytest.raises(CheckpointError, match=r"big-endian|version 1"):
            open_checkpoint(file)


def test_the_header_is_the_packages(tmp_path):
    theirs = make_model("llama", tmp_path)
    file = file_of(theirs, tmp_path, general={"general.tags": ["a", "ü"], "general.x": [1, 2]})
    ours, package = read_gguf_header(file), gguf.GGUFReader(file)
    for key, value in ours.metadata.items():
        wanted = package.fields[key].contents()
        assert value == (pytest.approx(wanted) if isinstance(wanted, float) else wanted)
    places = {t.name: (t.data_offset, t.n_bytes) for t in package.tensors}
    assert {t.name: (t.offset, t.num_bytes) for t in ours.tensors.values()} == places


def test_a_run_is_not_resumed_with_another_file(tmp_path):
    from retro_mcore.training.setup.gpt_contents import check_same_gpt, contents_of_gpt

    theirs = make_model("llama", tmp_path)
    file = file_of(theirs, tmp_path)
    saved = contents_of_gpt(file)
    moved = file.rename(tmp_path / "moved.gguf")
    check_same_gpt(str(moved), saved, tmp_path)
    data = bytearray(moved.read_bytes())
    data[-200:] = bytes(200)
    moved.write_bytes(data)
    with pytest.raises(CheckpointError, match="started from another GPT"):
        check_same_gpt(str(moved), saved, tmp_path)


def test_ends_of_text_turn_and_message_end_a_generated_text(megatron, tmp_path):
    """Also in the checkpoint of a run that started from the file, and in its export."""
    import json

    from retro_mcore.checkpoint.arguments import read_arguments
    from retro_mcore.checkpoint.tracker import tracked_checkpoint
    from tests.unit.checkpoint.test_convert_checkpoint import convert
    from tests.unit.training.small import NO_DROPOUT, small_trainer

    theirs = make_model("llama", tmp_path)
    ends = {"eos_token_id": 7, "eot_token_id": 5, "eom_token_id": 7}
    tokenizer = {f"tokenizer.ggml.{key}": token for key, token in ends.items()}
    file = file_of(theirs, tmp_path, tokenizer=tokenizer)
    assert open_checkpoint(file).flags["end_tokens"] == [7, 5]
    run = {**flags_of("llama"), **NO_DROPOUT, "load_gpt": str(file)}
    small_trainer(save=str(tmp_path / "run"), train_iters=1, **run).train()
    assert read_arguments(tracked_checkpoint(tmp_path / "run"))["end_tokens"] == [7, 5]
    convert(file, tmp_path / "back", target="huggingface", decoder_only=True)
    generation = json.loads((tmp_path / "back" / "generation_config.json").read_text())
    assert generation["eos_token_id"] == [7, 5]
    tokenizer["tokenizer.ggml.eot_token_id"] = 10**6
    checkpoint = open_checkpoint(file_of(theirs, tmp_path, tokenizer=tokenizer))
    assert checkpoint.flags["end_tokens"] == [7]
    assert "eot_token_id 1000000 left out: the embedding has" in " ".join(checkpoint.notes)
    tokenizer["tokenizer.ggml.eos_token_id"] = 10**6
    with pytest.raises(CheckpointError, match=r"eos_token_id 1000000.*a token below"):
        open_checkpoint(file_of(theirs, tmp_path, tokenizer=tokenizer))
    assert "end_tokens" not in open_checkpoint(file_of(theirs, tmp_path)).flags
