"""`RetroForCausalLM` in Megatron-Bridge: `AutoBridge` finds its configuration and its weights here.

Options and names are those of `retro_mcore.checkpoint.conversion`, which `convert_checkpoint` reads
and writes such directories with.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from megatron.bridge import AutoBridge
from megatron.bridge.models.conversion.mapping_registry import MegatronMappingRegistry
from megatron.bridge.models.conversion.model_bridge import (
    MegatronModelBridge,
    WeightConversionTask,
)
from megatron.bridge.models.conversion.param_mapping import MegatronParamMapping
from megatron.bridge.models.conversion.utils import persistent_buffers
from torch import Tensor

import retro_mcore.huggingface  # noqa: F401 (registers it with transformers)
from retro_mcore.bridge.model import RetroModelConfig, model_config
from retro_mcore.checkpoint.conversion.huggingface_files import end_tokens
from retro_mcore.checkpoint.conversion.model_fields import END_TOKENS, Flags
from retro_mcore.checkpoint.conversion.names import fused_name, local_name
from retro_mcore.checkpoint.conversion.retro_config import DOCUMENT_TOKENS, flags_of_retro_config
from retro_mcore.checkpoint.conversion.retro_huggingface import config_values, parts_by_name
from retro_mcore.checkpoint.conversion.retro_names import Parts, is_gated
from retro_mcore.checkpoint.conversion.weights import cut, join, partition_dim
from retro_mcore.errors import CheckpointError, ConfigurationError
from retro_mcore.model.decoder_model import DecoderModel
from retro_mcore.training.options.parallel import ParallelOptions
from retro_mcore.training.setup.build import arguments_from
from retro_mcore.training.setup.saved_arguments import complete_arguments

_EMBEDDING, _OUTPUT = "embedding.word_embeddings.weight", "output_layer.weight"
_TIED = "lm_head.weight"
#: The seed of a model that has none of its own, as of other conversions.
_SEED = 1234


def load_huggingface(directory: str) -> RetroModelConfig:
    """The configuration of a directory's model, which loads its weights when it is built.

    Raises:
        CheckpointError: it holds another model.
    """
    config: Any = AutoBridge.from_hf_pretrained(directory).to_megatron_provider()
    if not isinstance(config, RetroModelConfig):
        raise CheckpointError(directory, "holds no RetroForCausalLM", "Convert it to one")
    return config


class RetroMapping(MegatronParamMapping[dict[str, Tensor]]):
    """One weight of ours and its tensors in transformers.

    Args:
        name: Of the parameter, as it is in the model.
        parts: Its tensors.
        gated: Whether the MLP is gated.
    """

    def __init__(self, name: str, parts: Parts, gated: bool) -> None:
        # A dictionary has the keys of Bridge's own mappings: q, k, v, gate, up.
        keys = {part.split(".")[-2].removesuffix("_proj"): part for part in parts.names}
        super().__init__(name, keys if len(parts.names) > 1 else parts.names[0])
        self._parts, self._gated = parts, gated
        self._local_name = local_name(name)

    def resolve(self, captures: tuple[str, ...]) -> RetroMapping:
        """This mapping: its names have no wildcards."""
        return self

    def hf_to_megatron(
        self, hf_weights: Tensor | Mapping[str, Tensor], megatron_module: torch.nn.Module
    ) -> Tensor:
        """This tensor parallel rank's part of the weight.

        Args:
            hf_weights: The whole tensors.
            megatron_module: Has the parameter.
        """
        tensors = [hf_weights] if isinstance(hf_weights, Tensor) else hf_weights.values()
        whole = self._parts.join(*tensors)
        return cut(self._local_name, whole, self.tp_rank, self.tp_size, self._gated)

    def megatron_to_hf(
        self, megatron_weights: Tensor | None, megatron_module: torch.nn.Module | None
    ) -> dict[str, Tensor]:
        """The whole tensors, from the parts of all tensor parallel ranks, which call it together.

        Args:
            megatron_weights: This rank's part.
            megatron_module: Has the parameter.
        """
        assert megatron_weights is not None  # every rank has every parameter
        part = self.maybe_dequantize(megatron_weights).contiguous()
        divided = partition_dim(self._local_name) is not None
        whole = join(
            self._local_name, self.gather_from_tp_ranks(part) if divided else [part], self._gated
        )
        tensors = self._parts.cut(whole)
        return {
            name: tensor.contiguous()
            for name, tensor in zip(self._parts.names, tensors, strict=True)
        }


@MegatronModelBridge.register_bridge(
    source="RetroForCausalLM", target=DecoderModel, model_type="retro"
)
class RetroBridge(MegatronModelBridge):
    """Retro, and its GPT without retrieval, for `AutoBridge`."""

    def provider_bridge(self, hf_pretrained: Any) -> RetroModelConfig:
        """The configuration of Bridge for a transformers model.

        Args:
            hf_pretrained: Bridge's reader of the model, with its configuration.

        Raises:
            CheckpointError: a setting is missing, or none of our model's.
            ConfigurationError: a setting is invalid, or of another type.
        """
        source = Path(getattr(hf_pretrained, "model_name_or_path", None) or "RetroConfig")
        flags = _flags(source, hf_pretrained.config)
        arguments = arguments_from(complete_arguments(flags, source))
        dtype = self.dtype_from_hf(hf_pretrained.config, default=torch.float32)
        layout = ParallelOptions(bf16=dtype == torch.bfloat16, fp16=dtype == torch.float16)
        recorded = {DOCUMENT_TOKENS: flags.get(DOCUMENT_TOKENS), "seed": _SEED}
        if source.is_dir() and (ends := end_tokens(source, hf_pretrained.config.to_dict())):
            recorded[END_TOKENS] = ends
        return model_config(arguments, layout, recorded)

    @classmethod
    def megatron_to_hf_config(cls, provider: RetroModelConfig) -> dict[str, Any]:
        """The content of config.json for a configuration of Bridge."""
        return config_values(provider.arguments, provider.transformer.params_dtype)

    def mapping_registry(self) -> MegatronMappingRegistry:
        """One mapping for each weight of the model, under its local and its fused name."""
        config = self._config()
        flags = _flags("RetroConfig", config)
        parts = parts_by_name(flags, config.to_dict())
        if _OUTPUT not in parts and _TIED in self._stored():
            parts[_OUTPUT] = Parts((_TIED,), lambda tensor: (tensor,), lambda tensor: tensor)
        gated = is_gated(flags)
        mappings = {}
        for name, each in parts.items():
            for alias in (name, fused_name(name)):
                mappings[alias] = RetroMapping(alias, each, gated)
        return MegatronMappingRegistry(*mappings.values())

    def build_conversion_tasks(
        self, hf_pretrained: Any, megatron_model: list[Any], *args: Any, **kwargs: Any
    ) -> list[WeightConversionTask]:
        """Bridge's list of what to convert, complete: Bridge itself leaves out what it misses.

        Args:
            hf_pretrained: Bridge's reader of the model, or its configuration.
            megatron_model: This rank's stages.
            *args, **kwargs: As Bridge's takes them.

        Raises:
            CheckpointError: the directory lacks a tensor of the model, or has others.
            ConfigurationError: the model has parameters that transformers' has not, such as
                adapters.
        """
        self.hf_pretrained = hf_pretrained
        parts = parts_by_name(_flags("RetroConfig", self._config()), self._config().to_dict())
        self._check_model(megatron_model, parts)
        if stored := self._stored():
            self._check_stored(stored, {name for each in parts.values() for name in each.names})
        tasks: list[WeightConversionTask] = super().build_conversion_tasks(
            hf_pretrained, megatron_model, *args, **kwargs
        )
        return tasks

    def _check_model(self, stages: Iterable[torch.nn.Module], parts: Mapping[str, Parts]) -> None:
        found = set()
        for stage in stages:
            names = [name for name, _ in (*stage.named_parameters(), *persistent_buffers(stage))]
            found |= {local_name(self._unwrap_name(name)) for name in names}
        found = {name for name in found if not name.endswith("_extra_state")}
        unknown, missing = sorted(found - parts.keys()), sorted(parts.keys() - found)
        if unknown or missing:
            raise ConfigurationError(
                "the model in Megatron-Bridge",
                f"has {', '.join(unknown) or 'nothing'} beside the weights of RetroForCausalLM, "
                f"and lacks {', '.join(missing) or 'none'}",
                "Convert the model as it was built from the directory, without adapters",
            )

    def _check_stored(self, stored: set[str], wanted: set[str]) -> None:
        source = self.hf_pretrained.model_name_or_path
        tied = {_TIED} - wanted
        problems = [f"lacks {name}" for name in sorted(wanted - stored)]
        problems += [f"has an unknown {name}" for name in sorted(stored - wanted - tied)]
        if tied & stored:
            state = self.hf_pretrained.state
            if not torch.equal(state[_TIED], state["model.embed_tokens.weight"]):
                problems.append(f"ties {_TIED} to the embedding, and they differ")
        if problems:
            raise CheckpointError(source, "; ".join(problems), "Write it with convert_checkpoint")

    def _config(self) -> Any:
        """The configuration that Bridge set."""
        return getattr(self.hf_pretrained, "config", self.hf_pretrained)

    def _stored(self) -> set[str]:
        """The tensors of the directory; empty if there is a configuration alone."""
        state = getattr(self.hf_pretrained, "state", None)
        return set() if state is None else set(state.source.get_all_keys())

    def _share_embeddings_and_output_weights(self, model_config: Any) -> bool:
        # Bridge reads it from the model's configuration, which is a TransformerConfig here.
        return bool(self._config().tie_word_embeddings)


def _flags(source: str | Path, config: Any) -> Flags:
    """The model's options, from transformers' configuration."""
    return flags_of_retro_config(Path(source), config.to_dict())
