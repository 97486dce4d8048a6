"""The decoder's own model class: its checkpoints, its numbers, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from retro_mcore.errors import ConfigurationError, RetroError
from tests.unit.model.checkpoint_names import MODELS, checkpoint_names

STORED = Path(__file__).parents[2] / "data" / "checkpoint_names.json"
DECODER = {
    "num_layers": 2,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "use_cpu_initialization": True,
    "gradient_accumulation_fusion": False,
    "hidden_dropout": 0.0,
    "attention_dropout": 0.0,
    "init_method_std": 0.2,
}
SIZES = {"vocab_size": 96, "max_sequence_length": 64}


@pytest.mark.parametrize("name", MODELS)
def test_checkpoints_keep_their_names_and_shapes(megatron, name):
    """As when the model was a GPTModel: all checkpoints have these."""
    assert checkpoint_names(name) == json.loads(STORED.read_text())[name]


def test_norms_with_an_extra_state_change_nothing_in_checkpoints(megatron):
    """As Transformer Engine's norms have one, always empty: each loads what the other saved."""
    from retro_mcore.checkpoint.state import METADATA
    from tests.unit.model.builders import build_model

    class NormWithState(torch.nn.LayerNorm):
        def get_extra_state(self):
            return torch.empty(0, dtype=torch.uint8)

        def set_extra_state(self, state):
            assert state is None or not len(state)

    local, other = build_model(), build_model()
    other.decoder.final_layernorm = NormWithState(32)
    for layer in other.decoder.layers:
        layer.input_layernorm = NormWithState(32)
    assert "decoder.final_layernorm._extra_state" in other.state_dict()
    wanted, found = (model.sharded_state_dict(metadata=METADATA) for model in (local, other))
    assert {entry.key for entry in found.values()} == {entry.key for entry in wanted.values()}
    other.load_state_dict(local.state_dict())
    assert torch.equal(other.decoder.final_layernorm.bias, local.decoder.final_layernorm.bias)


@pytest.mark.parametrize("tied", [True, False])
def test_losses_and_gradients_are_those_of_megatrons_gpt_model(megatron, tied):
    from megatron.core.models.gpt import GPTModel

    from retro_mcore.model.decoder_config import DecoderConfig
    from retro_mcore.model.decoder_model import DecoderModel
    from retro_mcore.model.specs import get_gpt_decoder_block_spec

    config = DecoderConfig(**DECODER)
    kinds = {
        "share_embeddings_and_output_weights": tied,
        "position_embedding_type": "rope",
        "rotary_percent": 0.5,
        "rotary_base": 500,
        "rope_scaling": True,
        "seq_len_interpolation_factor": 2.0,
    }
    ours, theirs = (
        model(config, get_gpt_decoder_block_spec(config), **SIZES, **kinds)
        for model in (DecoderModel, GPTModel)
    )
    theirs.load_state_dict(ours.state_dict(), strict=True)
    tokens, labels = torch.randint(96, (2, 2, 24))
    positions = torch.arange(24).expand_as(tokens)
    losses = [model(tokens, positions, None, labels=labels) for model in (ours, theirs)]
    assert torch.equal(*losses)
    for loss in losses:
        loss.sum().backward()
    gradients = zip(ours.named_parameters(), theirs.named_parameters(), strict=True)
    for (name, own), (other_name, other) in gradients:
        assert name == other_name
        assert torch.equal(own.grad, other.grad), name


@pytest.mark.parametrize(
    "field",
    [
        *("mtp_num_layers", "multi_latent_attention", "use_mup"),
        *("fine_grained_activation_offloading", "use_te_activation_func"),
    ],
)
def test_what_the_model_does_not_have_is_refused(megatron, field):
    from retro_mcore.model.decoder_config import DecoderConfig
    from retro_mcore.model.decoder_model import DecoderModel
    from retro_mcore.model.specs import get_gpt_decoder_block_spec

    config = DecoderConfig(**DECODER)
    spec = get_gpt_decoder_block_spec(config)
    setattr(config, field, 1)
    with pytest.raises(ConfigurationError, match=f"{field}: (1|True)"):
        DecoderModel(config, spec, **SIZES)
    with pytest.raises(RetroError) as caught:
        DecoderModel(config, spec, **SIZES, position_embedding_type="yarn")
    assert [error.subject for error in caught.value.problems] == [field, "position_embedding_type"]
