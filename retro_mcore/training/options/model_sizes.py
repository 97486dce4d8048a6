"""Sizes derived from the model options, and checks that they are divisible among the processes."""

from __future__ import annotations

from retro_mcore.errors import ConfigurationError, flag_of
from retro_mcore.model.options import ModelArguments, ModelOptions
from retro_mcore.training.options.parallel import ParallelOptions


def padded_vocab_size(vocab_size: int, divisible_by: int, tensor_model_parallel_size: int) -> int:
    """Vocabulary size, rounded up so that every tensor parallel rank gets an equal, aligned part.

    >>> padded_vocab_size(50257, 128, 8)
    51200
    """
    multiple = divisible_by * tensor_model_parallel_size
    return -(-vocab_size // multiple) * multiple


def default_ffn_hidden_size(options: ModelOptions) -> int:
    """Megatron's MLP size: 4 hidden sizes; for gated MLPs two thirds of it, a multiple of 64."""
    if options.ffn_hidden_size is not None:
        return options.ffn_hidden_size
    if options.swiglu or options.geglu:
        return int(4 * options.hidden_size * 2 / 3 / 64) * 64
    return 4 * options.hidden_size


def expert_width(options: ModelOptions) -> int | None:
    """Width of an expert's MLP; None without experts."""
    if options.num_experts is None:
        return None
    return options.moe_ffn_hidden_size or default_ffn_hidden_size(options)


def check_divisible(arguments: ModelOptions, parallel: ParallelOptions) -> None:
    """Reject sizes that are not divisible by the heads or the tensor parallel size.

    Raises:
        ConfigurationError: an option is invalid. Names the flag.
    """
    heads = arguments.num_attention_heads
    groups = arguments.num_query_groups or heads
    parts = parallel.tensor_model_parallel_size
    if arguments.kv_channels is None and arguments.hidden_size % heads:
        raise ConfigurationError(
            "--num-attention-heads",
            f"{heads} does not divide the hidden size {arguments.hidden_size}",
            "Choose a divisor, or give --kv-channels",
        )
    if heads % groups:
        raise ConfigurationError(
            "--num-query-groups",
            f"{groups} does not divide the {heads} attention heads",
            "Choose a divisor",
        )
    for flag, value in (
        ("--num-attention-heads", heads),
        ("--num-query-groups", groups),
        ("--ffn-hidden-size", default_ffn_hidden_size(arguments)),
    ):
        if value % parts:
            raise ConfigurationError(
                "--tensor-model-parallel-size",
                f"{parts} does not divide {flag} {value}",
                f"Choose a tensor parallel size that divides {value}",
            )
    _check_pipeline(arguments, parallel)
    _check_experts(arguments, parallel)
    if parallel.sequence_parallel and parts == 1:
        raise ConfigurationError(
            "--sequence-parallel",
            "given with --tensor-model-parallel-size 1",
            "Leave it out, or use more tensor parallel processes",
        )


def check_context_parallel(arguments: ModelArguments, parallel: ParallelOptions) -> None:
    """Reject samples that context parallelism cannot divide.

    Each process holds two pieces of each sample. With retrieval they must hold whole chunks.

    Raises:
        ConfigurationError: the sample length has another divisor. Names the flag.
    """
    ranks = parallel.context_parallel_size
    if ranks == 1:
        return
    length, chunk = arguments.seq_length, arguments.retro_chunk_length
    multiple, why = 2 * ranks, f"2 x {ranks} pieces"
    if not arguments.no_retrieval:
        multiple, why = multiple * chunk, f"{why} of whole chunks of {chunk}"
    if length % multiple:
        raise ConfigurationError(
            "--context-parallel-size",
            f"{ranks}, for samples of {length} tokens",
            f"Choose a size, or --seq-length, so that {why} divide a sample: a multiple of "
            f"{multiple} tokens",
        )
    parts = parallel.tensor_model_parallel_size
    if parallel.sequence_parallel and length // ranks % parts:
        raise ConfigurationError(
            "--sequence-parallel",
            f"{length // ranks} tokens of each sample over {parts} tensor parallel processes",
            "Choose --context-parallel-size so that their number is a multiple",
        )


def _check_experts(arguments: ModelOptions, parallel: ParallelOptions) -> None:
    experts, parts = arguments.num_experts, parallel.expert_model_parallel_size
    if experts is None:
        for name in ("expert_model_parallel_size", "expert_tensor_parallel_size"):
            if getattr(parallel, name) not in (None, 1):
                raise ConfigurationError(
                    flag_of(name), f"{getattr(parallel, name)} without experts", "Leave it out"
                )
        return
    if experts % parts:
        raise ConfigurationError(
            "--expert-model-parallel-size",
            f"{parts} does not divide --num-experts {experts}",
            "Choose a divisor",
        )
    split = parallel.expert_tensor_parallel_size or parallel.tensor_model_parallel_size
    width, shared = expert_width(arguments), arguments.moe_shared_expert_intermediate_size
    for flag, value, divisor in (
        ("--moe-ffn-hidden-size", width or 0, split),
        (
            "--moe-shared-expert-intermediate-size",
            shared or 0,
            parallel.tensor_model_parallel_size,
        ),
    ):
        if value % divisor:
            raise ConfigurationError(
                flag, f"{value}, which {divisor} processes do not divide", "Choose a multiple"
            )


def check_trains(arguments: ModelOptions, parallel: ParallelOptions) -> None:
    """Reject a layout that Megatron's experts cannot be trained in.

    Raises:
        ConfigurationError: experts under tensor parallelism without --sequence-parallel.
    """
    parts = parallel.tensor_model_parallel_size
    if arguments.num_experts is not None and parts > 1 and not parallel.sequence_parallel:
        raise ConfigurationError(
            "--sequence-parallel",
            f"not given, with experts and --tensor-model-parallel-size {parts}",
            "Add it: Megatron's experts train only with it",
        )


def _check_pipeline(arguments: ModelOptions, parallel: ParallelOptions) -> None:
    stages = parallel.pipeline_model_parallel_size
    virtual = parallel.num_virtual_stages_per_pipeline_rank
    first_last = {
        "--decoder-first-pipeline-num-layers": parallel.decoder_first_pipeline_num_layers,
        "--decoder-last-pipeline-num-layers": parallel.decoder_last_pipeline_num_layers,
    }
    uneven = {flag: number for flag, number in first_last.items() if number is not None}
    layout = parallel.pipeline_model_parallel_layout
    if stages == 1:
        given = {
            **uneven,
            "--num-virtual-stages-per-pipeline-rank": virtual,
            "--pipeline-model-parallel-layout": layout,
        }
        for flag, value in given.items():
            if value is not None:
                raise ConfigurationError(
                    flag, f"{value}, without a pipeline", "Add --pipeline-model-parallel-size"
                )
        return
    if layout is not None:
        if uneven:
            raise ConfigurationError(
                next(iter(uneven)), "given with --pipeline-model-parallel-layout", "Choose one"
            )
        return
    layers = arguments.num_layers - sum(uneven.values())
    layers += parallel.account_for_embedding_in_pipeline_split
    layers += parallel.account_for_loss_in_pipeline_split
    parts = (stages - len(uneven)) * (virtual or 1)
    if layers < parts or (parts and layers % parts) or (not parts and layers):
        raise ConfigurationError(
            "--pipeline-model-parallel-size",
            f"{stages} stages of {virtual or 1} do not divide {arguments.num_layers} layers"
            + "".join(f", {flag} {number}" for flag, number in uneven.items()),
            "Choose stages that divide the layers, or --pipeline-model-parallel-layout",
        )
