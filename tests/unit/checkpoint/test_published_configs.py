"""Published models are accepted with the flags that they need, or refused with the reason."""

from __future__ import annotations

import pytest

from retro_mcore.checkpoint.conversion.huggingface_config import Config
from retro_mcore.checkpoint.conversion.huggingface_flags import config_flags
from retro_mcore.errors import CheckpointError
from tests.unit.checkpoint.published_configs import ACCEPTED, REFUSED


@pytest.mark.parametrize("name", ACCEPTED)
def test_a_published_model_is_accepted_with_the_flags_that_it_needs(name):
    settings, wanted = ACCEPTED[name]
    flags = config_flags(Config(name, settings))
    for key, value in wanted.items():
        assert flags[key] == (pytest.approx(value) if isinstance(value, float) else value), key
    sizes = {
        "hidden_size": "hidden_size",
        "num_layers": "num_hidden_layers",
        "num_attention_heads": "num_attention_heads",
        "ffn_hidden_size": "intermediate_size",
        "vocab_size": "vocab_size",
    }
    assert {ours: flags[ours] for ours in sizes} == {
        ours: settings[theirs] for ours, theirs in sizes.items()
    }


@pytest.mark.parametrize("name", REFUSED)
def test_a_published_model_that_computes_something_else_is_refused(name):
    settings, message = REFUSED[name]
    with pytest.raises(CheckpointError, match=message):
        config_flags(Config(name, settings))
