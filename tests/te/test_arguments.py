"""Every argument that reaches Transformer Engine exists in the oldest release that pyproject.toml
allows, and in the installed one."""

from __future__ import annotations

import re
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from packaging.version import Version

from tests.te.arithmetic import computed_here
from tests.te.engines import MARKS, model_of
from tests.te.signatures import arguments, recorded
from tests.unit.huggingface.models import inputs_of, our_logits
from tests.unit.huggingface.test_against_megatron import CASES, TOGETHER

pytestmark = [*MARKS, pytest.mark.usefixtures("megatron")]


def package() -> Path:
    import transformer_engine

    return Path(transformer_engine.__file__).parent


def oldest() -> Path:
    """The sources that requirements/transformer_engine.sh put beside it."""
    return package().parent / "oldest" / "transformer_engine"


def oldest_version() -> Version:
    (info,) = oldest().parent.glob("transformer_engine-*.dist-info")
    return Version(info.name.removesuffix(".dist-info").split("-")[1])


@pytest.fixture(params=["oldest", "installed"])
def release(request, monkeypatch):
    """A release's sources. Megatron passes what it would pass to that release."""
    from megatron.core import utils

    old = request.param == "oldest"
    number = oldest_version() if old else Version(version("transformer_engine"))
    monkeypatch.setattr(utils, "_te_version", number)
    return oldest() if old else package()


def test_the_oldest_is_the_one_that_is_allowed():
    text = (Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8")
    allowed = re.findall(r"transformer-engine\[pytorch\](\S*?)\"", text)
    assert set(allowed) == {f">={oldest_version().major}.{oldest_version().minor}"}


#: Arguments that a release takes and ignores: recipes are pydantic's dataclasses. Of these only
#: `override_linear_precision` would change numbers, and --no-fp8-wgrad, which sets it, is refused.
IGNORED = {"DelayedScaling": {"params_dtype", "device", "override_linear_precision"}}


def assert_taken(release: Path, calls, method: str | None = None) -> None:
    for name, each in calls.items():
        assert each.keywords or each.positional, f"{name} was not called"
        taken = arguments(release, name, method)
        assert taken is not None, f"{release} has no {name}"
        unknown = each.keywords - set(taken) - IGNORED.get(name, set())
        assert not unknown, f"{name}: {unknown}"
        now = arguments(package(), name, method)
        assert taken[: each.positional] == now[: each.positional], name


MODULES = ("Linear", "LayerNormLinear", "LayerNorm", "RMSNorm", "DotProductAttention")


def modules(method):
    from transformer_engine import pytorch

    return {name: (getattr(pytorch, name), method) for name in MODULES}


def test_of_modules(release):
    """Of every option's model, and of one that divides sequences."""
    with recorded(modules("__init__")) as calls:
        for options in (*CASES.values(), *TOGETHER.values()):
            model_of(True, **options)
        model_of(True, {"context_parallel_size": 2})
    assert {"cp_group", "cp_comm_type", "window_size", "softmax_scale"} < calls[
        "DotProductAttention"
    ].keywords
    assert_taken(release, calls, "__init__")


def test_of_their_forward_passes(release):
    models = [model_of(True, **CASES[name]) for name in ("num_attention_heads", "qk_layernorm")]
    with computed_here(), recorded(modules("forward")) as calls:
        for model in models:
            our_logits(model, inputs_of(model))
    # Norms are classes of one operation; they take the states alone.
    for name in ("LayerNorm", "RMSNorm"):
        norm = calls.pop(name)
        assert (norm.keywords, norm.positional) == (set(), 1)
    assert_taken(release, calls, "forward")


def test_of_packed_sequences(release):
    """As Megatron hands over `packed_seq_params`."""
    from megatron.core.packed_seq_params import PackedSeqParams
    from megatron.core.transformer.enums import AttnMaskType

    attention = model_of(True).decoder.layers[0].self_attention.core_attention
    ends = torch.tensor([0, 3, 8], dtype=torch.int32)
    packed = PackedSeqParams("thd", ends, ends, max_seqlen_q=5, max_seqlen_kv=5)
    states = torch.zeros(8, 4, 8)
    places = {"DotProductAttention": modules("forward")["DotProductAttention"]}
    with recorded(places, instead=lambda self, query, *args, **kwargs: query) as calls:
        attention(states, states, states, None, AttnMaskType.causal, packed_seq_params=packed)
    assert {"cu_seqlens_q", "qkv_format"} < calls["DotProductAttention"].keywords
    assert_taken(release, calls, "forward")


def test_of_the_rotary_embedding(release):
    from megatron.core.extensions import transformer_engine as extension

    angles, states = torch.zeros(8, 1, 1, 8), torch.zeros(8, 1, 4, 8)
    ends = torch.tensor([0, 3, 8], dtype=torch.int32)
    places = {"apply_rotary_pos_emb": (extension, "apply_rotary_pos_emb")}
    with recorded(places, instead=lambda states, *args, **kwargs: states) as calls:
        extension.fused_apply_rotary_pos_emb(states, angles)
        extension.fused_apply_rotary_pos_emb_thd(states[:, 0], ends, angles, cp_size=2, cp_rank=0)
    assert_taken(release, calls)


#: Recipes of fp8 that Megatron refuses with the oldest release, by name.
LATER = ("tensorwise", "blockwise")


@pytest.mark.parametrize("recipe", ["delayed", "tensorwise", "blockwise", "mxfp8"])
def test_of_recipes_of_fp8(release, recipe):
    from megatron.core.fp8_utils import get_fp8_context
    from transformer_engine import pytorch
    from transformer_engine.common import recipe as recipes

    names = {
        "delayed": "DelayedScaling",
        "tensorwise": "Float8CurrentScaling",
        "blockwise": "Float8BlockScaling",
        "mxfp8": "MXFP8BlockScaling",
    }
    config = model_of(True).config
    config.fp8, config.fp8_recipe = "hybrid", recipe
    if release == oldest() and recipe in LATER:
        with pytest.raises(ValueError, match="only supported FP8 recipes"):
            get_fp8_context(config)
        return
    kind = getattr(recipes, names[recipe])
    places = {"fp8_autocast": (pytorch, "fp8_autocast")}
    with (
        recorded(places, instead=lambda **_: None) as entered,
        recorded({names[recipe]: (kind, "__init__")}) as made,
    ):
        get_fp8_context(config)
    assert_taken(release, made, "__init__")
    assert_taken(release, entered)


class Built(Exception):
    """Raised in place of building Adam, which needs a GPU."""


@pytest.mark.parametrize(
    "options",
    [{}, {"bf16": True, "use_distributed_optimizer": True, "use_precision_aware_optimizer": True}],
    ids=["Adam", "precision-aware"],
)
def test_of_adam(release, options, monkeypatch):
    from megatron.core import optimizer

    from retro_mcore.training.loop import optimizer as loop
    from tests.unit.training.small import small_trainer

    def build(*args, **kwargs):
        raise Built

    # On the CPU our trainer takes PyTorch's Adam (test_on_cpu.py).
    monkeypatch.setattr(loop, "use_torch_optimizers", lambda config: None)
    places = {"FusedAdam": (optimizer, "Adam")}
    with recorded(places, instead=build) as calls, pytest.raises(Built):
        small_trainer(**options)
    assert_taken(release, calls, "__init__")
