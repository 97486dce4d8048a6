"""Which tensors of a Hugging Face directory are read: those that transformers reads.

Folders that were downloaded twice, merged or trained on hold more files than one; whoever starts
from one wants the model that transformers shows.
"""

from __future__ import annotations

import json
import struct

import pytest
import torch
from safetensors.torch import load_file, save_file

from retro_mcore.checkpoint.conversion.formats import open_checkpoint
from retro_mcore.errors import CheckpointError
from tests.unit.checkpoint.test_huggingface import (
    FAMILIES,
    VOCABULARY,
    flags_of,
    load,
    logits,
    make_model,
    tokens_of_test,
)

EMBEDDING = "model.embed_tokens.weight"
INDEX = "model.safetensors.index.json"


def other(tensors: dict) -> dict:
    """The same tensors with other values."""
    generator = torch.Generator().manual_seed(1)
    return {
        name: tensor + torch.randn(tensor.shape, generator=generator).to(tensor.dtype) * 0.1
        for name, tensor in tensors.items()
    }


def weights_of(path) -> dict:
    return load_file(path / "model.safetensors")


def stale_index(path, tensors):
    """The shards of another state, and the index that names them."""
    save_file(other(tensors), path / "model-00001-of-00001.safetensors")
    names = dict.fromkeys(tensors, "model-00001-of-00001.safetensors")
    (path / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": names}))


def a_second_file(path, tensors):
    save_file(other(tensors), path / "zzz.safetensors")


def consolidated(path, tensors):
    save_file({"layers.0.attention.wq.weight": torch.ones(2, 2)}, path / "consolidated.safetensors")
    torch.save({"x": torch.ones(1)}, path / "consolidated.00.pth")


def adapter(path, tensors):
    save_file(
        {"base_model.model.x.lora_A.weight": torch.ones(2)}, path / "adapter_model.safetensors"
    )


def an_older_bin(path, tensors):
    torch.save(other(tensors), path / "pytorch_model.bin")


def its_own_output_layer(path, tensors):
    """Although config.json ties it."""
    save_file({**tensors, "lm_head.weight": tensors[EMBEDDING] * 2}, path / "model.safetensors",
              {"format": "pt"})  # fmt: skip


def the_output_layer_saved_twice(path, tensors):
    save_file({**tensors, "lm_head.weight": tensors[EMBEDDING].clone()}, path / "model.safetensors",
              {"format": "pt"})  # fmt: skip


def the_embedding_under_its_other_name(path, tensors):
    tensors = dict(tensors)
    tensors["lm_head.weight"] = tensors.pop(EMBEDDING)
    save_file(tensors, path / "model.safetensors", {"format": "pt"})


def without_prefix(path, tensors):
    bare = {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
    save_file(bare, path / "model.safetensors", {"format": "pt"})


def with_old_buffers(path, tensors):
    buffers = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    save_file({**tensors, **buffers}, path / "model.safetensors", {"format": "pt"})


def as_bin(path, tensors):
    (path / "model.safetensors").unlink()
    torch.save(tensors, path / "pytorch_model.bin")


def as_sharded_bin(path, tensors):
    (path / "model.safetensors").unlink()
    names = list(tensors)
    files = {name: f"pytorch_model-0000{1 + i % 2}-of-00002.bin" for i, name in enumerate(names)}
    for file in set(files.values()):
        torch.save({n: tensors[n] for n in names if files[n] == file}, path / file)
    index = {"metadata": {}, "weight_map": files}
    (path / "pytorch_model.bin.index.json").write_text(json.dumps(index))


def a_tensor_in_two_shards(path, tensors):
    """The later file counts, whatever the index says."""
    (path / "model.safetensors").unlink()
    save_file(other(tensors), path / "model-00001-of-00002.safetensors", {"format": "pt"})
    save_file(tensors, path / "model-00002-of-00002.safetensors", {"format": "pt"})
    names = dict.fromkeys(tensors, "model-00001-of-00002.safetensors")
    names[EMBEDDING] = "model-00002-of-00002.safetensors"
    (path / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": names}))


def doubles(path, tensors):
    wide = {name: tensor.double() for name, tensor in tensors.items()}
    save_file(wide, path / "model.safetensors", {"format": "pt"})


def named_in_config(path, tensors):
    save_file(tensors, path / "mine.safetensors", {"format": "pt"})
    save_file(other(tensors), path / "model.safetensors", {"format": "pt"})
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(
        json.dumps({**config, "transformers_weights": "mine.safetensors"})
    )


@pytest.mark.parametrize(
    "change",
    [
        stale_index, a_second_file, consolidated, adapter, an_older_bin, its_own_output_layer,
        the_output_layer_saved_twice, the_embedding_under_its_other_name, without_prefix,
        with_old_buffers, as_bin, as_sharded_bin, a_tensor_in_two_shards, doubles, named_in_config,
    ],
)  # fmt: skip
def test_the_weights_are_those_that_transformers_reads(megatron, tmp_path, change):
    import transformers

    make_model("qwen2", tmp_path)
    change(tmp_path, weights_of(tmp_path))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    untied = change is its_own_output_layer
    ours, report = load(
        tmp_path,
        **flags_of("qwen2"),
        **({"untie_embeddings_and_output_weights": True} if untied else {}),
    )
    with torch.no_grad():
        wanted = theirs(tokens_of_test()).logits
    torch.testing.assert_close(logits(ours), wanted, atol=2e-5, rtol=1e-5)
    assert ("config.json ties" in str(report)) == untied


QUANTIZED = {
    "fp8": lambda tensor: tensor.to(torch.float8_e4m3fn),
    "uint8": lambda tensor: (tensor * 10).to(torch.uint8),
    "int": lambda tensor: (tensor * 10).to(torch.int8),
    "bool": lambda tensor: tensor > 0,
}


@pytest.mark.parametrize("form", ["safetensors", "bin"])
@pytest.mark.parametrize("kind", QUANTIZED)
def test_tensors_of_another_type_are_a_quantized_model(tmp_path, kind, form):
    make_model("llama", tmp_path)
    tensors = weights_of(tmp_path)
    name = "model.layers.1.mlp.up_proj.weight"
    tensors[name] = QUANTIZED[kind](tensors[name])
    if form == "bin":
        as_bin(tmp_path, tensors)
    else:
        save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(
        CheckpointError, match=r"layers\.1\.mlp\.up_proj\.weight of type .*quantized"
    ):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize(
    "added", [".qweight .qzeros .scales .g_idx", ".weight_scale_inv", ".weight.absmax", ".SCB"]
)
def test_a_quantizers_tensors_are_told_as_such(tmp_path, added):
    """GPTQ, AWQ, fp8, bitsandbytes, without a word of it in config.json."""
    make_model("llama", tmp_path)
    tensors = weights_of(tmp_path)
    weight = tensors.pop("model.layers.0.mlp.up_proj.weight")
    prefix = "model.layers.0.mlp.up_proj"
    save_file(
        {**tensors, **{prefix + end: weight.clone() for end in added.split()}},
        tmp_path / "model.safetensors",
    )
    with pytest.raises(CheckpointError, match="quantized"):
        open_checkpoint(tmp_path)


def truncated(path):
    file = path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:100])


def cut_at_the_end(path):
    file = path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-10])


def a_huge_header(path):
    (path / "model.safetensors").write_bytes(struct.pack("<Q", 2**60) + b"{}")


def an_empty_file(path):
    (path / "model.safetensors").write_bytes(b"")


def no_header(path):
    (path / "model.safetensors").write_bytes(struct.pack("<Q", 8) + b"\xff" * 8)


def index_of(weight_map):
    def change(path):
        (path / "model.safetensors").rename(path / "part.safetensors")
        (path / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))

    return change


def no_index(path):
    (path / "model.safetensors").rename(path / "model-00001-of-00002.safetensors")


def text_as_index(path):
    (path / "model.safetensors").unlink()
    (path / INDEX).write_text("not JSON")


def gguf(path):
    (path / "model.safetensors").rename(path / "model.Q4_K_M.gguf")


def a_pickle_with_code(path):
    (path / "model.safetensors").unlink()
    torch.save({"x": print}, path / "pytorch_model.bin")


def a_git_lfs_pointer(path):
    (path / "model.safetensors").unlink()
    (path / "pytorch_model.bin").write_text("version https://git-lfs.github.com/spec/v1")


def another_size(path):
    tensors = weights_of(path)
    narrow = {name: t[..., : t.shape[-1] // 2].contiguous() for name, t in tensors.items()}
    save_file(narrow, path / "model.safetensors")


def no_config(path):
    (path / "config.json").write_bytes(b"\xff\xfe{")


def many_layers(path):
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 10**9}))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (truncated, "model.safetensors"),
        (cut_at_the_end, "model.safetensors"),
        (a_huge_header, "model.safetensors"),
        (an_empty_file, "model.safetensors"),
        (no_header, "model.safetensors"),
        (index_of({EMBEDDING: "gone.safetensors"}), r"no gone\.safetensors"),
        (index_of({EMBEDDING: "../part.safetensors"}), "outside of it"),
        (index_of({EMBEDDING: "/etc/passwd.safetensors"}), "outside of it"),
        (index_of({EMBEDDING: 5}), INDEX),
        (index_of([]), INDEX),
        (no_index, r"only model-00001-of-00002\.safetensors"),
        (text_as_index, INDEX),
        (gguf, r"only model\.Q4_K_M\.gguf"),
        (a_pickle_with_code, r"print, which could run code"),
        (a_git_lfs_pointer, "is not a PyTorch file"),
        (index_of({EMBEDDING: "x" * 5000 + ".safetensors"}), "no xxxx"),
        (index_of({EMBEDDING: "\ud83d.safetensors"}), r"no \\ud83d"),
        (another_size, r"embed_tokens\.weight is 101 x 16, not 101 x 32.* and \d+ more"),
        (no_config, "config.json"),
        (many_layers, r"no tensor layers\.3\."),
    ],
)
def test_damage_is_one_line(tmp_path, change, named):
    make_model("llama", tmp_path)
    change(tmp_path)
    with pytest.raises(CheckpointError, match=named) as caught:
        open_checkpoint(tmp_path)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 700


def test_qwen3_without_the_width_of_its_heads(tmp_path):
    """Its default is 128, whatever the sizes beside it say."""
    make_model("qwen3", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["head_dim"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"q_proj\.weight is 32 x 32, not 512 x 32"):
        open_checkpoint(tmp_path)


def test_the_sizes_of_every_family_are_those_of_its_config(tmp_path):
    """Opening reads no weights, and refuses none of a whole model."""
    for family in FAMILIES:
        make_model(family, tmp_path / family)
        flags = open_checkpoint(tmp_path / family).flags
        assert flags["num_layers"] == 3
        assert flags["vocab_size"] == VOCABULARY
