"""Settings in a Hugging Face config.json.

Keys that are absent have the defaults of transformers' own configuration of that family. A key
that would make the model compute something else than our decoder does is refused by name; so is
one that is not known here, unless its value is neutral (null, false, empty) or a mere remark.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from retro_mcore.checkpoint.conversion.huggingface_families import EXPERTS, FAMILIES, Family
from retro_mcore.checkpoint.conversion.huggingface_files import refuse

# Keys that no forward pass in evaluation depends on; and those of generation, of saved
# tokenizers, and of tools that only sign what they wrote.
_HARMLESS = re.compile(
    r"_.*|.*_token_ids?|.*_token_index|.*_version|unsloth.*|axolotl.*|summary_.*|"
    r"(output|return)_.*|num_labels|id2label|label2id|n_ctx|n_special|predict_special_tokens|"
    r"architectures|model_type|name_or_path|auto_map|torch_dtype|dtype|use_cache|use_bfloat16|"
    r"torchscript|tf_legacy_loss|initializer_range|initializer_factor|init_std|problem_type|"
    r"task_specific_params|prefix|finetuning_task|tokenizer_class|transformers_weights|"
    r"gradient_checkpointing|use_gradient_checkpointing|keys_to_ignore_at_inference|"
    r"attn_implementation|experts_implementation|use_flash_attn|use_flash_attention(_2)?|"
    r"pretraining_tp|chunk_size_feed_forward|reorder_and_upcast_attn|embd_pdrop|is_decoder|"
    r"embedding_dropout|classifier_dropout|hidden_dropout_prob|attention_probs_dropout_prob|"
    r"sliding_window_size|is_(llama|qwen2|starcoder2)_config|"
    r"(scale_)?attention_softmax_in_fp32|router_aux_loss_coef|"
    r"tie_encoder_decoder|seq_length|max_sequence_length|model_max_length|max_seq_len|loss_type|"
    # of generation
    r"do_sample|temperature|top_[kp]|typical_p|min_p|(min|max)_(new_tokens|length)|early_stopping|"
    r"num_beams|num_beam_groups|num_return_sequences|remove_invalid_values|cache_implementation|"
    r"(diversity|repetition|length|encoder_repetition)_penalty|(epsilon|eta)_cutoff|"
    r"(encoder_)?no_repeat_ngram_size|num_assistant_.*|assistant_.*|target_lookbehind"
)
# A text may be anybody's remark; under a key of these words it says how something is computed.
_COMPUTING = re.compile(
    r"att(entio)?n|norm|act|rope|rotary|position|scal|bias|mlp|resid|layer|expert|gate|gating|"
    r"window|embed|soft|logit|multipl|router|sink|head|hidden|mode|type|arch|quant|impl|kernel"
)
# Values with which settings of other families change nothing.
_NEUTRAL = {
    "embedding_multiplier": 1,
    "residual_multiplier": 1,
    "logits_scaling": 1,
    "logit_scale": 1,
    "embedding_scale": 1,
    "rope_ratio": 1,
    "num_experts": 0,
    "num_local_experts": 0,
}
# Switches of what every one of our layers does: here false, and null, change the model.
_ON = re.compile(r"(is|use)_causal(_mask|_attention)?|causal|use_(rope|rotary)(_.*)?")
_QUANTIZED = ("quantization_config", "compression_config", "quantization")


class Config:
    """A family's settings, each of the kind that it should be.

    Args:
        directory: Of the model, for errors.
        values: The content of config.json.

    Raises:
        CheckpointError: a family that is not known, a quantized model, or a setting that our
            decoder does not have.
    """

    def __init__(self, directory: Path, values: Mapping[str, Any]) -> None:
        self._directory = directory
        self.family = values.get("model_type")
        known = FAMILIES.get(self.family) if isinstance(self.family, str) else None
        if known is None:
            raise self.refusal(f"model_type {self.family!r}{_kind(values)}", " or ".join(FAMILIES))
        self.facts = known
        for key in _QUANTIZED:
            if values.get(key):
                raise self.refusal(
                    f"{key} {_method(values[key])}: a quantized model",
                    "plain weights: dequantize it, or take the model that it was made from",
                )
        aliased = {known.aliases.get(key, key): values[key] for key in values}
        # The other name counts, as in transformers.
        aliased |= {new: values[old] for old, new in known.aliases.items() if old in values}
        self._check_experts(values)
        self._values = {**known.defaults, **aliased}
        self.given = frozenset(aliased)
        self._check_keys(known)

    def _check_experts(self, values: Mapping[str, Any]) -> None:
        if kind := _kind(values, self.facts.experts):
            raise self.refusal(f"model_type {self.family!r}{kind}", "a dense model")

    def _check_keys(self, family: Family) -> None:
        problems = []
        for key, value in self._values.items():
            found = f"{shown(key)[1:-1]} {shown(value)}"
            if key in family.fixed:
                computed = family.fixed[key]
                if not any(value is one or value == one for one in computed):
                    problems.append(f"{found} (it computes {shown(computed[0])})")
            elif not (key in family.defaults or key in _WINDOWS or is_neutral(key, value)):
                problems.append(found)
        if problems:
            raise self.refusal(
                f"settings that our decoder does not have: {', '.join(problems[:8])}",
                "a model without them. A key that changes nothing in what the model computes may "
                "be removed from its config.json",
            )

    def refusal(self, found: str, expected: str) -> Exception:
        """The error about a setting."""
        return refuse(self._directory, found, expected)

    def get(self, key: str) -> Any:
        """A setting as it is written."""
        return self._values.get(key)

    def default(self, key: str) -> Any:
        """A key's default in this family."""
        return self.facts.defaults[key]

    def integer(self, key: str, least: int = 1) -> int:
        """A whole number, of at least `least`."""
        value = self._values.get(key)
        if not isinstance(value, int) or isinstance(value, bool) or not least <= value < 2**31:
            raise self.refusal(f"{key} {shown(value)}", f"a whole number from {least} on")
        return value

    def number(self, key: str, low: float, high: float = math.inf) -> float:
        """A number from `low` (excluded, unless 0 is a rate) up to `high` (excluded)."""
        return self.checked_number(key, self._values.get(key), low, high)

    def checked_number(self, key: str, value: Any, low: float, high: float = math.inf) -> float:
        """The same of a value that lies deeper."""
        plain = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not plain or not (low <= value < high):
            raise self.refusal(f"{key} {shown(value)}", f"a number from {low:g} to {high:g}")
        return value  # type: ignore[no-any-return]

    def boolean(self, key: str) -> bool:
        """True or false."""
        value = self._values.get(key)
        if not isinstance(value, bool):
            raise self.refusal(f"{key} {shown(value)}", "true or false")
        return value


_WINDOWS = ("layer_types",)  # looked at for every family


def _kind(values: Mapping[str, Any], known: str | None = None) -> str:
    """A remark if a model has experts that its family has not, and on models of images and text."""
    for key in () if known else EXPERTS:
        if isinstance(values.get(key), int) and values[key] > 1:
            return f" with {key} {values[key]}, a mixture of experts"
    return " with a text_config: a model of text and images" if values.get("text_config") else ""


def _method(value: Any) -> str:
    name = value.get("quant_method") if isinstance(value, dict) else None
    return str(name) if name else shown(value)


def shown(value: Any) -> str:
    """A value in at most 60 characters."""
    text = json.dumps(value, ensure_ascii=True)
    return text if len(text) <= 60 else text[:57] + "..."


def is_neutral(key: str, value: Any) -> bool:
    """Whether a key that is not known here changes nothing with this value."""
    if _ON.fullmatch(key):
        return value is True
    if value is None or value is False or value in ("", [], {}):
        return True
    if key in _NEUTRAL and value == _NEUTRAL[key]:
        return True
    if isinstance(value, str) and not _COMPUTING.search(key):
        return True
    return _HARMLESS.fullmatch(key) is not None
