"""Decoders of every family, read and written back for transformers."""

from __future__ import annotations

import json

import pytest
import torch

from retro_mcore.checkpoint.conversion.families_by_options import model_type_of, problems_of
from retro_mcore.checkpoint.conversion.families_out import decoder_files, family_of
from retro_mcore.checkpoint.conversion.formats import open_checkpoint
from retro_mcore.checkpoint.conversion.safetensors_files import write_safetensors
from retro_mcore.errors import ConfigurationError
from retro_mcore.model.family_options import plain_options
from tests.unit.checkpoint.families import CASES, save_model, theirs
from tests.unit.checkpoint.test_families import reload
from tests.unit.huggingface.models import mostly_slow

#: Families that another one computes as well, which is written instead.
OTHERS = {
    "Phi-3, window": "mistral",
    "Mistral": "llama",
    "Phi-3": "llama",
    "Phi-3, longrope": "llama",
}
#: No family has biases beside norms on queries and keys.
NONE = ("Qwen 3, yarn and biases",)
WITH_EXPERTS = ("mixtral", "moe", "olmoe")
NAMES = [
    name
    for name, (family, _) in CASES.items()
    if name not in NONE and not any(word in family for word in WITH_EXPERTS)
]
IN_DEFAULT = (
    *("Gemma 3", "OLMo 3", "Phi-4 mini, partial longrope", "SmolLM3", "Granite"),
    *("StarCoder2, a broken base", "GPT-NeoX"),
)


def write_back(directory, target):
    """Write the decoder of a Hugging Face directory as another one."""
    checkpoint = open_checkpoint(directory)
    values, weights, _ = decoder_files(checkpoint.flags, checkpoint.weights)
    target.mkdir()
    write_safetensors(target, weights, 10**9)
    (target / "config.json").write_text(json.dumps(values))
    return checkpoint


@pytest.mark.parametrize("name", mostly_slow(NAMES, *IN_DEFAULT))
def test_a_family_is_written_back_bit_for_bit(tmp_path, name):
    original = save_model(name, tmp_path / "read")
    checkpoint = write_back(tmp_path / "read", tmp_path / "written")
    written = reload(tmp_path / "written")
    family = original.config.model_type
    assert written.config.model_type == OTHERS.get(name, family)
    if name not in OTHERS:
        state = written.state_dict()
        for key, weight in original.state_dict().items():
            assert torch.equal(state[key], weight), key
    # Frequencies of its own are divided and multiplied once more. Another family may have several
    # products where this one has a fused one: processors add them up in different orders.
    same_sums = name not in OTHERS and checkpoint.flags.get("rotary_frequencies") is None
    rounding = 0 if same_sums else 5e-5
    torch.testing.assert_close(theirs(written), theirs(original), atol=rounding, rtol=0)
    again = open_checkpoint(tmp_path / "written")
    assert again.weights.keys() == checkpoint.weights.keys()
    for key in checkpoint.weights:
        assert torch.equal(again.weights[key].load(), checkpoint.weights[key].load()), key
    differing = {key for key, value in checkpoint.flags.items() if again.flags.get(key) != value}
    assert differing <= {"rotary_frequencies", "max_position_embeddings", "end_tokens"}


#: For each family a model of it, and options with which it is none.
NEAR = [
    ("Gemma", {"embedding_multiplier": 2.0}, "embedding_multiplier 2.0"),
    ("Gemma", {"apply_layernorm_1p": False}, "apply_layernorm_1p False"),
    ("Gemma 2", {"residual_multiplier": 0.5}, "residual_multiplier 0.5"),
    ("Gemma 3", {"attention_softcap": 2.0}, "attention_softcap 2.0"),
    ("OLMo 2", {"qk_layernorm_over": "head"}, "qk_layernorm_over head"),
    ("OLMo 2", {"logits_scaling": 2.0}, "logits_scaling 2.0"),
    ("SmolLM3", {"logit_softcap": 2.0}, "logit_softcap 2.0"),
    ("Granite", {"rotary_percent": 0.5}, "rotary_percent 0.5"),
    ("Granite", {"parallel_residual": True}, "parallel_residual True"),
    ("Phi-4 mini, partial longrope", {"disable_bias_linear": False}, "disable_bias_linear False"),
    ("StarCoder2", {"parallel_residual": True}, "parallel_residual True"),
    ("StarCoder2", {"rotary_percent": 0.5}, "rotary_percent 0.5"),
    ("GPT-NeoX", {"embedding_multiplier": 2.0}, "embedding_multiplier 2.0"),
]


@pytest.mark.parametrize(("name", "changes", "message"), NEAR)
def test_what_the_family_does_not_compute_is_refused(tmp_path, name, changes, message):
    save_model(name, tmp_path)
    flags = {**open_checkpoint(tmp_path).flags, **changes}
    with pytest.raises(ConfigurationError, match=f"no transformers family computes .*{message}"):
        family_of(flags)


COMPUTED_BY_GRANITE = (
    *("embedding_multiplier", "residual_multiplier", "logits_scaling", "softmax_scale"),
    *("rotary_frequencies", "rotary_attention_factor"),
)


def test_no_family_ignores_an_option(tmp_path):
    """Each family has every option of families, or refuses values that change its numbers."""
    others = {"sublayer_norms": "post", "qk_layernorm_over": "all_heads", "no_rope_layers": [1],
              "rotary_frequencies": [1.0], "rotary_local_layers": [1]}  # fmt: skip
    save_model("Granite", tmp_path)
    granite = open_checkpoint(tmp_path).flags
    for name in plain_options():
        flags = {**granite, name: others.get(name, 7)}
        family = model_type_of(flags)
        computes = name in COMPUTED_BY_GRANITE
        assert computes == (problems_of(family, flags) == [])
