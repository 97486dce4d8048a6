"""Train a few steps under any parallel layout, from one set of weights, on megatron's own parts."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from tests.processes import join_megatron
from tests.unit.model.builders import MODEL_KEYS, SMALL, VOCABULARY, make_inputs, randomize_vectors

STEPS, MICRO_BATCH_SIZE, GLOBAL_BATCH_SIZE, SEQUENCE_LENGTH = 3, 2, 8, 16


@dataclass
class Layout:
    """A way to spread the model, and what is special about the model under it."""

    tensor: int = 1
    pipeline: int = 1
    virtual: int | None = None
    sequence: bool = False
    context: int = 1
    distributed_optimizer: bool = False
    fields: dict[str, Any] = field(default_factory=dict)
    #: Samples of two documents that are kept apart.
    documents: bool = False

    def sizes(self) -> tuple[int, int, int | None, int]:
        """Tensor, pipeline, virtual pipeline and context parallel sizes."""
        return self.tensor, self.pipeline, self.virtual, self.context

    def model_fields(self) -> dict[str, Any]:
        """Of the model alone: what a one-process run shares with this layout."""
        parallel = ("recompute_", "num_layers_in_", "pipeline_")
        own = {k: v for k, v in self.fields.items() if not k.startswith(parallel)}
        sizes = {"num_layers": 8, "retro_decoder_layers": [3, 6], "retro_chunk_length": 4}
        return {**SMALL, **sizes, **own}


@dataclass
class Run:
    """What training under a layout gave, on one rank."""

    losses: list[float]
    gradient_norms: list[float]
    embedding_copies: list[torch.Tensor]
    #: Bytes that this rank sent to each other pipeline rank in the first step.
    sent_bytes: dict[int, int]


def serial_weights(fields: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The whole model's weights, from one process."""
    torch.manual_seed(7)
    chunk = build_chunk({**fields}, None, True, True)
    randomize_vectors(chunk)
    return {k: v.detach().clone() for k, v in chunk.named_parameters()}


def train(layout: Layout, weights: dict[str, torch.Tensor]) -> Run:
    """Join the layout's groups, load this rank's part of `weights`, and take the steps."""
    trainer = Trainer(layout, weights)
    with counting_sent_bytes() as sent_bytes:
        runs = [trainer.step()]
    runs += [trainer.step() for _ in range(1, STEPS)]
    losses, norms = ([run[i] for run in runs] for i in range(2))
    return Run(losses, norms, trainer.embedding_copies(), sent_bytes)


def train_all(
    layouts: dict[str, Layout], weights: dict[str, dict[str, torch.Tensor]]
) -> dict[str, Run]:
    """`train` under every layout; those of one size follow each other, in the same groups."""
    names = sorted(layouts, key=lambda name: str(layouts[name].sizes()))
    return {name: train(layouts[name], weights[name]) for name in names}


@contextmanager
def counting_sent_bytes() -> Iterator[dict[int, int]]:
    """What the non-interleaved schedule sends, in bytes by pipeline rank."""
    from megatron.core import parallel_state

    sent: dict[int, int] = {}
    group = parallel_state.get_pipeline_model_parallel_group()
    ranks = torch.distributed.get_process_group_ranks(group)
    exchange = torch.distributed.batch_isend_irecv

    def counting(operations):
        for operation in operations:
            if operation.op is torch.distributed.isend and operation.group is group:
                peer = ranks.index(operation.peer)
                sent[peer] = sent.get(peer, 0) + operation.tensor.nbytes
        return exchange(operations)

    torch.distributed.batch_isend_irecv = counting
    try:
        yield sent
    finally:
        torch.distributed.batch_isend_irecv = exchange


class Trainer:
    """The smallest trainer on megatron-core's own parts."""

    def __init__(self, layout: Layout, weights: dict[str, torch.Tensor] | None = None) -> None:
        join_layout(layout)
        from megatron.core import parallel_state
        from megatron.core.distributed import (
            DistributedDataParallel,
            DistributedDataParallelConfig,
        )
        from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

        from retro_mcore.model.pipeline import (
            create_embedding_groups,
            finalize_model_grads_with,
            synchronize_embedding_copies,
        )

        self.layout = layout
        models = build_chunks(layout)
        self.config = models[0].config
        tied = models[0].share_embeddings_and_output_weights
        groups = create_embedding_groups(
            self.config, parallel_state.get_pipeline_model_parallel_group(), tied
        )
        if weights is not None:
            for model in models:
                load_part(model, weights)
        synchronize_embedding_copies(models, groups)
        ddp_config = DistributedDataParallelConfig(
            use_distributed_optimizer=layout.distributed_optimizer, grad_reduce_in_fp32=True
        )
        self.chunks = [
            DistributedDataParallel(self.config, ddp_config, m, disable_bucketing=i > 0)
            for i, m in enumerate(models)
        ]
        optimizer_config = OptimizerConfig(
            optimizer="adam",
            lr=3e-3,
            adam_eps=1e-5,  # far above rounding, which Adam would enlarge to whole steps
            weight_decay=0.01,
            clip_grad=1.0,
            use_distributed_optimizer=layout.distributed_optimizer,
        )
        self.optimizer = get_megatron_optimizer(optimizer_config, self.chunks)
        for group in self.optimizer.param_groups:
            group["lr"] = 3e-3
        self.config.finalize_model_grads_func = finalize_model_grads_with(groups)

    def step(self) -> tuple[float, float]:
        """One optimizer step: the global batch's mean loss, and the gradient norm."""
        from megatron.core import parallel_state
        from megatron.core.pipeline_parallel import get_forward_backward_func

        from retro_mcore.model.pipeline import schedule_kwargs

        ranks = parallel_state.get_data_parallel_world_size()
        for chunk in self.chunks:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        batches = list(microbatches(self.config))[parallel_state.get_data_parallel_rank() :: ranks]
        if self.layout.documents:
            batches = [{**batch, **two_documents(self.config)} for batch in batches]
        outputs = get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=[iter(batches) for _ in self.chunks],
            model=self.chunks if len(self.chunks) > 1 else self.chunks[0],
            num_microbatches=len(batches),
            micro_batch_size=MICRO_BATCH_SIZE,
            forward_only=False,
            **schedule_kwargs(self.config, SEQUENCE_LENGTH),
        )
        _, gradient_norm, _ = self.optimizer.step()
        loss = torch.tensor([sum(float(o["loss"]) for o in outputs) / len(batches)])
        if parallel_state.is_pipeline_last_stage(ignore_virtual=True):
            group = parallel_state.get_data_parallel_group(with_context_parallel=True)
            torch.distributed.all_reduce(loss, group=group)
            loss /= group.size()
        source = parallel_state.get_pipeline_model_parallel_last_rank()
        torch.distributed.broadcast(
            loss, source, group=parallel_state.get_pipeline_model_parallel_group()
        )
        return loss.item(), float(gradient_norm)

    def embedding_copies(self) -> list[torch.Tensor]:
        """This rank's copies of the word embedding, put together over tensor parallelism."""
        from megatron.core import parallel_state

        from retro_mcore.model.pipeline import _word_weights

        group = parallel_state.get_tensor_model_parallel_group()
        whole = []
        for weight in _word_weights(self.chunks).all:
            parts = [torch.empty_like(weight) for _ in range(group.size())]
            torch.distributed.all_gather(parts, weight.detach(), group=group)
            whole.append(torch.cat(parts).detach())
        return whole


def join_layout(layout: Layout) -> None:
    """Megatron's process groups for this layout: those of the last one, if they fit."""
    from retro_mcore.platform import use_cpu

    use_cpu()
    from retro_mcore.training.setup.initialize import initialize_parallel

    initialize_parallel(*layout.sizes())
    join_megatron()


def build_chunks(layout: Layout) -> list[Any]:
    """This rank's model chunks."""
    from megatron.core import parallel_state

    fields = {
        **layout.model_fields(),
        **layout.fields,
        "tensor_model_parallel_size": layout.tensor,
        "pipeline_model_parallel_size": layout.pipeline,
        "virtual_pipeline_model_parallel_size": layout.virtual,
        "sequence_parallel": layout.sequence,
        "context_parallel_size": layout.context,
        "pipeline_dtype": torch.float32,
        # gloo knows no tags: batched transfers of the interleaved schedule would be mixed up.
        "batch_p2p_comm": layout.virtual is None,
        "overlap_p2p_comm": False,
        "deallocate_pipeline_outputs": True,
    }
    first, last = (
        partial(parallel_state.is_pipeline_first_stage, ignore_virtual=False),
        partial(parallel_state.is_pipeline_last_stage, ignore_virtual=False),
    )
    return [
        build_chunk(fields, stage, first(vp_stage=stage), last(vp_stage=stage))
        for stage in (range(layout.virtual) if layout.virtual else [None])
    ]


def build_chunk(fields: dict[str, Any], vp_stage: int | None, first: bool, last: bool) -> Any:
    """A RetroModel that is one stage."""
    from retro_mcore import RetroConfig, RetroModel, get_retro_decoder_block_spec

    fields = dict(fields)
    model_kwargs = {key: fields.pop(key) for key in MODEL_KEYS if key in fields}
    config = RetroConfig(**fields)
    return RetroModel(
        config=config,
        transformer_layer_spec=get_retro_decoder_block_spec(config, vp_stage=vp_stage),
        vocab_size=VOCABULARY,
        max_sequence_length=64,
        pre_process=first,
        post_process=last,
        vp_stage=vp_stage,
        **model_kwargs,
    )


def load_part(model: Any, weights: dict[str, torch.Tensor]) -> None:
    """Copy this rank's part of the whole model's weights."""
    from megatron.core import parallel_state

    from retro_mcore.model.pipeline import stage_layer_numbers

    rank = parallel_state.get_tensor_model_parallel_rank()
    size = parallel_state.get_tensor_model_parallel_world_size()
    offset = stage_layer_numbers(model.config, model.vp_stage).start - 1
    for name, parameter in model.named_parameters():
        whole = weights[global_name(name, offset, model)]
        if getattr(parameter, "tensor_model_parallel", False):
            if "linear_fc1" in name and model.config.gated_linear_unit:
                whole = torch.cat([half.chunk(size)[rank] for half in whole.chunk(2)])
            else:
                whole = whole.chunk(size, dim=parameter.partition_dim)[rank]
        parameter.data.copy_(whole)


def global_name(name: str, offset: int, model: Any) -> str:
    """A stage's parameter name in the whole model."""
    if name == "output_layer.weight" and model.share_embeddings_and_output_weights:
        return "embedding.word_embeddings.weight"
    if not name.startswith("decoder.layers."):
        return name
    prefix, index, rest = name[len("decoder.") :].split(".", 2)
    return f"decoder.{prefix}.{int(index) + offset}.{rest}"


def microbatches(config: Any):
    """The microbatches of every step's batch; each a dictionary of `make_inputs`."""
    for index in range(GLOBAL_BATCH_SIZE // MICRO_BATCH_SIZE):
        yield make_inputs(config, SEQUENCE_LENGTH, MICRO_BATCH_SIZE, seed=index)


def two_documents(config: Any) -> dict[str, torch.Tensor]:
    """The documents of a batch's samples, of other lengths in every row."""
    first = torch.tensor([[1], [3]]) * config.retro_chunk_length
    return {"segments": (torch.arange(SEQUENCE_LENGTH) >= first).long()}


def forward_step(data_iterator: Any, model: Any):
    """megatron's forward step: the model's output, and the function of it that is the loss."""
    from retro_mcore.platform.parallel import context_part
    from retro_mcore.samples.batch import RetroBatch
    from retro_mcore.training.loop.loss import own_part

    inputs = next(data_iterator)
    tokens = inputs["tokens"]
    batch = RetroBatch(
        tokens,
        inputs["labels"],
        torch.ones_like(tokens),
        torch.arange(tokens.size(1)).expand_as(tokens),
        inputs["retrieved"].flatten(0, 2),
        inputs["mask"].flatten(0, 2),
        [],
        inputs.get("segments"),
    )
    batch = own_part(batch, model)
    output = model(**batch.model_inputs(), labels=batch.labels)

    def loss(output: torch.Tensor):
        mean = output.float().mean()
        # The schedule scales the loss in place: by the context parallel ranks, among other things.
        return mean / context_part().size, {"loss": mean.detach().clone()}

    return output, loss
