"""The model for Megatron-Bridge: a configuration that its checkpoints store, and its builder."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar

import torch
from megatron.bridge.models.model_provider import ModelProviderMixin
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.pipeline_parallel.utils import is_pp_first_stage, is_pp_last_stage
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.training.models.gpt import GPTModelBuilder, GPTModelConfig

from retro_mcore.bridge.names import names_of_recipe
from retro_mcore.errors import ConfigurationError, RetroError, raise_problems
from retro_mcore.model.config import RetroConfig
from retro_mcore.model.decoder_model import DecoderModel
from retro_mcore.model.option_traits import passed_to
from retro_mcore.model.options import ModelArguments, ModelOptions
from retro_mcore.model.pipeline import share_embedding
from retro_mcore.training.options.model_sizes import check_context_parallel, check_divisible
from retro_mcore.training.options.pretrain import ParallelOptions, RecomputeOptions
from retro_mcore.training.provider_flags import REFUSED_IN_PIPELINES, changed_fields
from retro_mcore.training.setup.build import arguments_from, assemble_model
from retro_mcore.training.setup.model_config import build_config, uses_transformer_engine

#: Options of the model that need our trainer, with the reason.
_OF_OUR_TRAINER = {
    "retro_mup_base_hidden_size": "whose optimizer would not scale learning rates",
    "num_experts": "whose losses do not weigh the experts' balance",
}
#: Fields that divide samples in other ways than `context_parallel_size`.
_OTHER_CONTEXT = (
    *("hybrid_context_parallel", "dynamic_context_parallel"),
    "hierarchical_context_parallel_sizes",
)


@dataclass(kw_only=True)
class RetroModelConfig(GPTModelConfig):
    """A Retro model, or with `no_retrieval` the same GPT. `pretrain_config` makes it.

    Attributes:
        arguments: Options, sizes and tokenizer of the model (`ModelArguments`, as a dict), with
            the document tokens and the seed. Commands rebuild the model of a checkpoint from them.
        hf_model_id: Directory or name of the transformers model that it started from.
    """

    builder: ClassVar[str] = "retro_mcore.bridge.model.RetroModelBuilder"
    arguments: dict[str, Any] = field(default_factory=dict)
    hf_model_id: str | None = None

    def as_dict(self) -> dict[str, Any]:
        """The content of `run_config.yaml`, with the sizes that Bridge reads when it resumes."""
        sizes = ("tensor_model_parallel_size", "pipeline_model_parallel_size")
        return {**super().as_dict(), **{name: getattr(self, name) for name in sizes}}

    def finalize(self) -> None:
        """Check changes since the recipe; called before the model is built.

        Raises:
            ConfigurationError: the model would differ from what its checkpoints record, or the
                parallel layout is not supported. Names all such settings.
        """
        raise_problems([*self._contradictions(), *self._unsupported()])
        layout = ParallelOptions(
            tensor_model_parallel_size=self.tensor_model_parallel_size,
            pipeline_model_parallel_size=self.pipeline_model_parallel_size,
            context_parallel_size=self.context_parallel_size,
            sequence_parallel=self.sequence_parallel,
            decoder_first_pipeline_num_layers=self.num_layers_in_first_pipeline_stage,
            decoder_last_pipeline_num_layers=self.num_layers_in_last_pipeline_stage,
            pipeline_model_parallel_layout=self.pipeline_model_parallel_layout,
            account_for_embedding_in_pipeline_split=self.account_for_embedding_in_pipeline_split,
            account_for_loss_in_pipeline_split=self.account_for_loss_in_pipeline_split,
        )
        with names_of_recipe():
            check_divisible(arguments_from(self.arguments), layout)
            check_context_parallel(arguments_from(self.arguments), layout)
        super().finalize()

    def take_weights_of(self, start: RetroModelConfig) -> None:
        """Load the weights that another configuration loads, when the model is built."""
        self.pre_wrap_hooks += start.pre_wrap_hooks
        self.transformer.perform_initialization = start.transformer.perform_initialization
        self.hf_model_id = start.hf_model_id

    def register_pre_wrap_hook(self, hook: Callable[[list[Any]], list[Any]]) -> None:
        """Call a function with the built model before it is wrapped, as `AutoBridge` asks for."""
        self.pre_wrap_hooks.append(hook)

    #: Bridge's own; its scripts call it before they build a model outside of its trainer.
    initialize_model_parallel = ModelProviderMixin.initialize_model_parallel

    def provide_distributed_model(
        self,
        ddp_config: DistributedDataParallelConfig | None = None,
        wrap_with_ddp: bool = True,
        use_cpu_initialization: bool | None = None,
        pg_collection: ProcessGroupCollection | None = None,
        **kwargs: Any,
    ) -> list[Any]:
        """Build this rank's model, as `AutoBridge.to_megatron_model` asks for.

        Args:
            ddp_config: Data parallelism; needed with `wrap_with_ddp`.
            wrap_with_ddp: Whether it will be trained.
            use_cpu_initialization: Whether it stays on the CPU; None: by the configuration.
            pg_collection: The process groups. None: megatron's global ones.
            **kwargs: As `RetroModelBuilder.build_distributed_models` takes them.

        Raises:
            ConfigurationError: there are no process groups yet, or see `finalize`.
        """
        if use_cpu_initialization is not None:
            self.transformer.use_cpu_initialization = use_cpu_initialization
        if pg_collection is None:
            if not parallel_state.model_parallel_is_initialized():
                raise ConfigurationError(
                    "provide_distributed_model",
                    "called before megatron's process groups exist",
                    "Call initialize_model_parallel(seed) of this configuration first",
                )
            pg_collection = ProcessGroupCollection.use_mpu_process_groups()
        self.finalize()
        return RetroModelBuilder(self).build_distributed_models(
            pg_collection, ddp_config=ddp_config, wrap_with_ddp=wrap_with_ddp, **kwargs
        )

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
        rows, ranks = self.arguments["padded_vocab_size"], self.tensor_model_parallel_size
        if rows % ranks:
            yield ConfigurationError(
                "model.tensor_model_parallel_size",
                f"{ranks}, which does not divide the padded vocabulary of {rows}",
                "Choose a divisor",
            )
        if (size := self.expert_model_parallel_size) > 1:
            yield ConfigurationError(
                "model.expert_model_parallel_size",
                f"{size} in Megatron-Bridge, where this model has no experts",
                "Use tools/pretrain_retro.py",
            )
        for name in _OTHER_CONTEXT:
            if value := getattr(self.transformer, name, None):
                yield ConfigurationError(
                    f"model.{name}",
                    f"{value}, which divides samples in another way than the forward step",
                    "Leave it out; context_parallel_size divides every sample alike",
                )
        if self.virtual_pipeline_model_parallel_size is not None:
            yield ConfigurationError(
                "model.virtual_pipeline_model_parallel_size",
                f"{self.virtual_pipeline_model_parallel_size} in Megatron-Bridge",
                "Use tools/pretrain_retro.py, which interleaves",
            )
        if self.pipeline_model_parallel_size > 1:
            yield from self._unsupported_in_pipelines()

    def _unsupported_in_pipelines(self) -> Iterator[RetroError]:
        stages = self.pipeline_model_parallel_size
        if self.hf_model_id is not None:
            yield ConfigurationError(
                "model.pipeline_model_parallel_size",
                f"{stages}, for a model that starts from {self.hf_model_id}",
                "Use tensor parallelism, or tools/pretrain_retro.py with the converted checkpoint",
            )
        if isinstance(self.pipeline_model_parallel_layout, str | list):
            yield ConfigurationError(
                "model.pipeline_model_parallel_layout",
                f"{self.pipeline_model_parallel_layout}, which is only read when it is made",
                "Give it to pretrain_config",
            )
        if not isinstance(self.transformer, RetroConfig):
            return
        for name, (neutral, hint) in REFUSED_IN_PIPELINES.items():
            value = getattr(self, name, None)
            if value not in neutral:
                yield ConfigurationError(
                    f"model.{name}", f"{value} for Retro in a pipeline of {stages} stages", hint
                )


def check_needs_no_trainer(options: ModelOptions) -> None:
    """Reject options of the model that Bridge's trainer does not honor.

    Raises:
        ConfigurationError: names all such options.
    """
    raise_problems(
        [
            ConfigurationError(
                name, f"{value} in Megatron-Bridge, {reason}", "Use tools/pretrain_retro.py"
            )
            for name, reason in _OF_OUR_TRAINER.items()
            if (value := getattr(options, name)) is not None
        ]
    )


def model_config(
    arguments: ModelArguments, layout: ParallelOptions, recorded: Mapping[str, Any]
) -> RetroModelConfig:
    """The configuration of a model.

    Args:
        arguments: Its options.
        layout: Parallel layout and precision.
        recorded: What its checkpoints state beside them: document tokens and the seed.

    Raises:
        ConfigurationError: an option is invalid, or needs our trainer.
    """
    check_needs_no_trainer(arguments)
    transformer = build_config(arguments, layout, RecomputeOptions())
    engine = uses_transformer_engine(layout)
    transformer.transformer_impl = "transformer_engine" if engine else "local"
    return RetroModelConfig(
        transformer=transformer,
        arguments={**asdict(arguments), **recorded, "trainer": "megatron-bridge"},
        seq_length=arguments.seq_length,
        vocab_size=arguments.padded_vocab_size,
        make_vocab_size_divisible_by=arguments.make_vocab_size_divisible_by,
        share_embeddings_and_output_weights=not arguments.untie_embeddings_and_output_weights,
        position_embedding_type=arguments.position_embedding_type,
        rotary_percent=arguments.rotary_percent,
        rotary_base=arguments.rotary_base,
        rope_scaling=arguments.use_rope_scaling,
        rope_scaling_factor=arguments.rope_scaling_factor,
        seq_len_interpolation_factor=arguments.rotary_seq_len_interpolation_factor,
    )


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

        In a pipeline all ranks must call this together.
        """
        config = self._model_config
        stages = pg_collection.pp
        pipelined = stages.size() > 1 and isinstance(config.transformer, RetroConfig)
        if stages.size() > 1:
            # As megatron does it when a configuration is made, which recipes change afterwards.
            residuals = torch.float32 if config.fp32_residual_connection else config.params_dtype
            config.transformer.pipeline_dtype = residuals
        if pipelined:
            # Bridge's trainer expects boundaries with hidden states alone.
            config.transformer.variable_seq_lengths = True
        model = assemble_model(
            config.transformer,
            arguments_from(config.arguments),
            config.transformer.transformer_impl == "transformer_engine",
            pre_process=is_pp_first_stage(stages) if pre_process is None else pre_process,
            post_process=is_pp_last_stage(stages) if post_process is None else post_process,
            vp_stage=vp_stage,
            pg_collection=pg_collection,
        )
        # For config.json: what writes it beside the weights is given the model alone.
        model.bridge_arguments = config.arguments
        if pipelined:
            share_embedding(model, stages)
        return model
