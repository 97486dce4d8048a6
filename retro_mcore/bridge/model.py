"""The model for Megatron-Bridge: a configuration that its checkpoints store, and its builder."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar

from megatron.core.pipeline_parallel.utils import is_pp_first_stage, is_pp_last_stage
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.training.models.gpt import GPTModelBuilder, GPTModelConfig

from retro_mcore.errors import ConfigurationError, RetroError, raise_problems
from retro_mcore.model.decoder_model import DecoderModel
from retro_mcore.model.option_traits import passed_to
from retro_mcore.model.options import ModelArguments
from retro_mcore.training.options.model_sizes import check_divisible
from retro_mcore.training.options.pretrain import ParallelOptions, RecomputeOptions
from retro_mcore.training.provider_flags import changed_fields
from retro_mcore.training.setup.build import arguments_from, assemble_model
from retro_mcore.training.setup.model_config import build_config

#: Parallelism that Bridge's schedules or Retro's layers do not support, with a hint.
_REFUSED = {
    "pipeline_model_parallel_size": "Use tensor parallelism, or tools/pretrain_retro.py",
    "context_parallel_size": "Use tools/pretrain_retro.py, which divides samples",
    "expert_model_parallel_size": "Use tools/pretrain_retro.py",
}


@dataclass(kw_only=True)
class RetroModelConfig(GPTModelConfig):
    """A Retro model, or with `no_retrieval` the same GPT. `pretrain_config` makes it.

    Attributes:
        arguments: Options, sizes and tokenizer of the model (`ModelArguments`, as a dict), with
            the document tokens and the seed. Commands rebuild the model of a checkpoint from them.
    """

    builder: ClassVar[str] = "retro_mcore.bridge.model.RetroModelBuilder"
    arguments: dict[str, Any] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """The content of `run_config.yaml`, with the sizes that Bridge reads when it resumes."""
        sizes = ("tensor_model_parallel_size", "pipeline_model_parallel_size")
        return {**super().as_dict(), **{name: getattr(self, name) for name in sizes}}

    def finalize(self) -> None:
        """Check changes since the recipe; called by Bridge before it builds the model.

        Raises:
            ConfigurationError: the model would differ from what its checkpoints record, or the
                parallel layout is not supported. Names all such settings.
        """
        raise_problems([*self._contradictions(), *self._unsupported()])
        layout = ParallelOptions(tensor_model_parallel_size=self.tensor_model_parallel_size)
        check_divisible(arguments_from(self.arguments), layout)
        super().finalize()

    def _contradictions(self) -> Iterator[RetroError]:
        options = arguments_from(self.arguments)
        made = build_config(options, ParallelOptions(), RecomputeOptions())
        changed = {
            name: (getattr(self.transformer, name, None), getattr(made, name))
            for name in changed_fields(self.transformer, made)
        }
        recorded = {
            **passed_to("model", ModelArguments, options),
            "seq_length": options.seq_length,
            "vocab_size": options.padded_vocab_size,
            "share_embeddings_and_output_weights": not options.untie_embeddings_and_output_weights,
            "fp16_lm_cross_entropy": False,
        }
        for name, value in recorded.items():
            now = getattr(self, name, value)
            if now != value:
                changed[name] = now, value
        for name, (now, value) in changed.items():
            yield ConfigurationError(
                f"model.{name}",
                f"{now}, and the model was made with {value}",
                "Give it to pretrain_config, so that checkpoints record it",
            )

    def _unsupported(self) -> Iterator[RetroError]:
        for name, hint in _REFUSED.items():
            size = getattr(self, name)
            if size > 1:
                yield ConfigurationError(f"model.{name}", f"{size} in Megatron-Bridge", hint)


class RetroModelBuilder(GPTModelBuilder):
    """Builds `RetroModel`, or the GPT without retrieval, where Bridge builds a GPT."""

    def build_model(
        self,
        pg_collection: ProcessGroupCollection,
        pre_process: bool | None = None,
        post_process: bool | None = None,
        vp_stage: int | None = None,
    ) -> DecoderModel:
        """Build this rank's part of the model.

        Args:
            pg_collection: The process groups.
            pre_process: Whether it embeds. Default: by the pipeline rank.
            post_process: Whether it computes logits. Default: by the pipeline rank.
            vp_stage: Virtual pipeline stage (not supported).
        """
        config = self._model_config
        stages = pg_collection.pp
        return assemble_model(
            config.transformer,
            arguments_from(config.arguments),
            config.transformer.transformer_impl == "transformer_engine",
            pre_process=is_pp_first_stage(stages) if pre_process is None else pre_process,
            post_process=is_pp_last_stage(stages) if post_process is None else post_process,
            vp_stage=vp_stage,
            pg_collection=pg_collection,
        )
