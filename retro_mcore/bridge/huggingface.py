"""`RetroForCausalLM` in Megatron-Bridge: `AutoBridge` finds its configuration and its weights here.

Options and names are those of `retro_mcore.checkpoint.conversion`, which `convert_checkpoint` reads
and writes such directories with.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
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
from megatron.bridge.models.conversion.utils import persistent_buffers, unwrap_model
from torch import Tensor

import retro_mcore.huggingface  # noqa: F401 (registers it with transformers)
from retro_mcore.bridge.model import RetroModelConfig, model_config
from retro_mcore.checkpoint.conversion.huggingface_files import end_tokens
from retro_mcore.checkpoint.conversion.model_fields import END_TOKENS, Flags
from retro_mcore.checkpoint.conversion.names import fused_name, local_name
from retro_mcore.checkpoint.conversion.retro_config import DOCUMENT_TOKENS, flags_of_retro_config
from retro_mcore.checkpoint.conversion.retro_huggingface import (
    config_values,
    is_retro,
    parts_by_name,
)
from retro_mcore.checkpoint.conversion.retro_names import Parts, is_gated
from retro_mcore.checkpoint.conversion.weights import cut, join, partition_dim
from retro_mcore.errors import CheckpointError, ConfigurationError, check_all
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
        CheckpointError: it is no directory of a `RetroForCausalLM`, or cannot be read.
        ConfigurationError: the model needs our trainer.
    """
    config: RetroModelConfig = _opened(directory).to_megatron_provider()
    return config


def check_export(directory: str, model: RetroModelConfig, trust_remote_code: bool) -> None:
    """Reject a directory that Bridge cannot write others after, beside a run's checkpoints.

    Args:
        directory: Gives names, dtype and tokenizer.
        model: The run's model.
        trust_remote_code: Whether code of the tokenizer may run.

    Raises:
        CheckpointError: it is no directory of a `RetroForCausalLM`, or cannot be read.
        ConfigurationError: it has no tokenizer, or its dtype would round the weights.
    """
    reader: Any = _opened(directory, trust_remote_code).hf_pretrained
    stated = RetroBridge().dtype_from_hf(reader.config, default=torch.float32)
    check_all(
        partial(_check_dtype, directory, stated, model.params_dtype),
        partial(_check_tokenizer, directory, reader),
    )


def _opened(directory: str, trust_remote_code: bool = False) -> AutoBridge:
    _check_directory(directory)
    try:
        return AutoBridge.from_hf_pretrained(directory, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise CheckpointError(
            directory, f"cannot be read by Megatron-Bridge ({error})", "Write it again"
        ) from error


def _check_directory(directory: str) -> None:
    if not Path(directory).is_dir():
        raise CheckpointError(
            directory, "is no directory", "Check the path, or download the model into a directory"
        )
    if not is_retro(Path(directory)):
        raise CheckpointError(directory, "holds no RetroForCausalLM", "Convert it to one")


def _check_dtype(source: object, stated: torch.dtype, written: torch.dtype) -> None:
    if torch.promote_types(stated, written) != stated:
        stated_name, name = (str(dtype).removeprefix("torch.") for dtype in (stated, written))
        raise ConfigurationError(
            source,
            f"its config.json says {stated_name}, in which transformers would round weights of "
            f"{name}",
            f"Take the same model in {name} (AutoModelForCausalLM.from_pretrained(DIRECTORY, "
            f"dtype={name!r}).save_pretrained(OTHER)), or convert with convert_checkpoint",
        )


def _check_tokenizer(directory: str, reader: Any) -> None:
    try:
        _ = reader.tokenizer
    except Exception as error:  # its kind depends on which files are there
        raise ConfigurationError(
            directory,
            "has no tokenizer that transformers loads, and Megatron-Bridge copies one",
            "Save a tokenizer there, or convert checkpoints with convert_checkpoint",
        ) from error


def _refusal(what: str) -> Callable[..., Any]:
    """A method of Bridge's that refuses what it is called for."""

    def refuse(self: RetroBridge, *args: Any, **kwargs: Any) -> Any:
        raise ConfigurationError(
            what, "asked for, and RetroForCausalLM has plain weights", "Export the whole model"
        )

    return refuse


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
            CheckpointError: a setting is missing, or none of our model's, or it is a name on a
                hub, whose generation_config.json is not read.
            ConfigurationError: a setting is invalid, of another type, or needs our trainer.
        """
        source = Path("RetroConfig")
        if name := getattr(hf_pretrained, "model_name_or_path", None):
            _check_directory(name)
            source = Path(name)
        flags = _flags(source, hf_pretrained.config)
        arguments = arguments_from(complete_arguments(flags, source))
        dtype = self.dtype_from_hf(hf_pretrained.config, default=torch.float32)
        layout = ParallelOptions(bf16=dtype == torch.bfloat16, fp16=dtype == torch.float16)
        recorded = {DOCUMENT_TOKENS: flags.get(DOCUMENT_TOKENS), "seed": _SEED}
        if ends := end_tokens(source, hf_pretrained.config.to_dict()):
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

    def stream_weights_megatron_to_hf(
        self,
        megatron_model: Any,
        hf_pretrained: Any,
        *args: Any,
        weight_dtype: torch.dtype | None = None,
        **kwargs: Any,
    ) -> Iterable[Any]:
        """The model's tensors, in the dtype that config.json states; called by all ranks.

        Bridge's trainer writes config.json afterwards: it states the options of the run.

        Args:
            megatron_model: This rank's stages.
            hf_pretrained: Bridge's reader of the directory that is written after.
            *args, **kwargs: As Bridge's takes them.
            weight_dtype: Another dtype, which config.json's must hold.

        Raises:
            CheckpointError: see `build_conversion_tasks`.
            ConfigurationError: config.json's dtype would round the weights.
        """
        self.hf_pretrained = hf_pretrained
        stages = unwrap_model(
            megatron_model if isinstance(megatron_model, list) else [megatron_model]
        )
        config, stated = self._config(), self._stated_dtype()
        source = getattr(hf_pretrained, "model_name_or_path", None) or "RetroConfig"
        weights = [weight for stage in stages for weight in stage.parameters()]
        for written in {weight_dtype or weight.dtype for weight in weights}:
            _check_dtype(source, stated, written)
        if arguments := getattr(stages[0], "bridge_arguments", None):
            values = config_values(arguments, stated)
            kept = ("architectures", "auto_map", "dtype")
            config.update({name: v for name, v in values.items() if name not in kept})
        tensors: Iterable[Any] = super().stream_weights_megatron_to_hf(
            megatron_model, hf_pretrained, *args, weight_dtype=weight_dtype, **kwargs
        )
        return tensors

    stream_adapter_weights_megatron_to_hf = _refusal("adapters")
    stream_weights_megatron_to_hf_quant = _refusal("quantized weights")
    build_export_fp8_tasks = _refusal("weights in fp8")

    def build_conversion_tasks(
        self,
        hf_pretrained: Any,
        megatron_model: list[Any],
        weight_dtype: torch.dtype | None = None,
    ) -> list[WeightConversionTask]:
        """Bridge's list of what to convert, complete: Bridge itself leaves out what it misses.

        Args:
            hf_pretrained: Bridge's reader of the model, or its configuration.
            megatron_model: This rank's stages.
            weight_dtype: Of exported tensors. None: as config.json states.

        Raises:
            CheckpointError: the directory lacks a tensor of the model, or has others.
            ConfigurationError: the model is a pipeline's, or has parameters that transformers' has
                not, such as adapters.
        """
        self.hf_pretrained = hf_pretrained
        parts = parts_by_name(_flags("RetroConfig", self._config()), self._config().to_dict())
        self._check_model(megatron_model, parts)
        if stored := self._stored():
            self._check_stored(stored, {name for each in parts.values() for name in each.names})
        tasks: list[WeightConversionTask] = super().build_conversion_tasks(
            hf_pretrained, megatron_model, weight_dtype or self._stated_dtype()
        )
        return tasks

    def _check_model(self, stages: Sequence[Any], parts: Mapping[str, Parts]) -> None:
        size = unwrap_model(stages[0]).config.pipeline_model_parallel_size
        if size > 1:
            raise ConfigurationError(
                "model.pipeline_model_parallel_size",
                f"{size}, and weights are converted for one stage",
                "Convert checkpoints with convert_checkpoint",
            )
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
        reader = getattr(self, "hf_pretrained", None)
        if reader is None:
            raise ConfigurationError(
                "RetroBridge", "called before it has a model", "Use it through AutoBridge"
            )
        return getattr(reader, "config", reader)

    def _stated_dtype(self) -> torch.dtype:
        dtype: torch.dtype = self.dtype_from_hf(self._config(), default=torch.float32)
        return dtype

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
