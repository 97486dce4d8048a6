"""Training, loading and using a model from Python.

Each function sets up the device and the process group. Under torchrun all ranks call it together.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from retro_mcore.api.signatures import takes_fields_of
from retro_mcore.distributed import get_rank, initialize, raise_together
from retro_mcore.errors import ConfigurationError
from retro_mcore.evaluation.perplexity_config import EvaluatePerplexityConfig
from retro_mcore.inference.prompt_files import Prompt
from retro_mcore.inference.sampling import SamplingOptions
from retro_mcore.platform import distributed_backend, setup_device
from retro_mcore.project.integrity import verifying
from retro_mcore.time_limit import INFERENCE_MINUTES
from retro_mcore.training.options.pretrain import ParallelOptions
from retro_mcore.training.options.run import PretrainOptions, model_options

if TYPE_CHECKING:
    from retro_mcore.evaluation.perplexity_run import EvaluatePerplexityResult
    from retro_mcore.session import GenerationModel
    from retro_mcore.session.continuation import Continuation
    from retro_mcore.training.loop.trainer import TrainingResult


@takes_fields_of(PretrainOptions, defaults=partial(model_options, PretrainOptions))
def pretrain(options: PretrainOptions) -> TrainingResult:
    """Train a Retro model on a project, or resume a run, or find that it is already finished.

    Takes the fields of `retro_mcore.training.options.run.PretrainOptions` as keyword arguments:
    the flags of pretrain_retro with underscores. `load_gpt` and `use_checkpoint_args` fill in the
    model's fields that are not given.

    Returns:
        Losses, iterations and the checkpoint's path.

    Raises:
        RetroError: options, project, checkpoint and processes do not fit together.
    """
    device = setup_device(options.device)
    initialize(distributed_backend(), options.distributed_timeout_minutes)
    from retro_mcore.training import pretraining

    with verifying(options.verify):
        return pretraining.pretrain(options, device)[1]


def load_model(
    project_dir: str | Path,
    load: str | Path,
    *,
    neighbors: Literal["live", "none"] = "live",
    attention_gate: float | None = None,
    retrieval_interval: int = 1,
    retrieval_lead: int = 0,
    add_bos: bool = False,
    two_chunks: bool = False,
    tensor_model_parallel_size: int = 1,
    pipeline_model_parallel_size: int = 1,
    device: Literal["auto", "cpu", "cuda"] = "auto",
) -> GenerationModel:
    """Load a trained model, after checking that it fits the project.

    Args:
        project_dir: The project directory: tokenizer, database and index.
        load: The --save directory of a run; its latest checkpoint is loaded.
        neighbors: "live": retrieve the neighbors of each chunk from the project's index as soon as
            the chunk is complete. "none": no retrieval, except for neighbors that a prompt gives.
        attention_gate: Factor on what the model reads in its neighbors. Default: the checkpoint's.
        retrieval_interval: Search for every n-th chunk; those between keep the last neighbors.
        retrieval_lead: Number of tokens before a chunk's end at which its search starts.
        add_bos: Begin every prompt with BOS, even if the project's documents do not.
        two_chunks: The prompt is the first chunk and the answer the second, whatever their lengths,
            as instruction-tuned models are used.
        tensor_model_parallel_size: Number of ranks that share one layer.
        pipeline_model_parallel_size: Number of ranks that the layers are divided over.
        device: "auto": CUDA if there is one, else the CPU.

    Raises:
        RetroError: an argument, the project or the checkpoint is at fault.
    """
    setup_device(device)
    initialize(distributed_backend(), INFERENCE_MINUTES)
    from retro_mcore.session import load_generation_model

    return load_generation_model(
        project_dir,
        load,
        retrieval=neighbors == "live",
        layout=ParallelOptions(
            device=device,
            tensor_model_parallel_size=tensor_model_parallel_size,
            pipeline_model_parallel_size=pipeline_model_parallel_size,
        ),
        retro_attention_gate=attention_gate,
        retrieval_interval=retrieval_interval,
        retrieval_lead=retrieval_lead,
        add_bos=add_bos,
        two_chunks=two_chunks,
    )


def generate(
    model: GenerationModel,
    prompts: str | Prompt | Sequence[str | Prompt],
    *,
    max_new_tokens: int = 64,
    min_new_tokens: int = 0,
    stop: Sequence[str] = (),
    stop_token_ids: Sequence[int] = (),
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 1234,
    logprobs: int | None = None,
    micro_batch_size: int = 8,
) -> list[Continuation]:
    """Continue prompts.

    Args:
        model: From `load_model`.
        prompts: One prompt or several. A `Prompt` may bring neighbors of its own.
        max_new_tokens: Number of tokens to add, unless the text ends before.
        min_new_tokens: Number of tokens before which a text does not end.
        stop: Strings that end a text.
        stop_token_ids: Tokens that end a text, besides the tokenizer's EOD.
        temperature: Divides the logits; 0 takes the most likely token.
        top_k: Draw from the k most likely tokens; 0: from all.
        top_p: Draw from the most likely tokens with this total probability; 1: from all.
        seed: Prompt i draws with seed + i.
        logprobs: Keep the log-probability of each new token (0), and of the n likeliest (n).
        micro_batch_size: Number of prompts that are continued together.

    Returns:
        One `Continuation` per prompt, in order: its `text`, and tokens, neighbors and
        log-probabilities in `generated`.

    Raises:
        RetroError: an argument is out of range, or prompts cannot be continued; all are named.
    """
    from retro_mcore.inference.requests import GenerationRequest, StoppingOptions
    from retro_mcore.session.continuation import check_prompts, continue_prompts

    if micro_batch_size < 1:
        raise ConfigurationError("micro_batch_size", str(micro_batch_size), "Give at least 1")
    given = [prompts] if isinstance(prompts, (str, Prompt)) else prompts
    asked = [Prompt(prompt) if isinstance(prompt, str) else prompt for prompt in given]
    if not asked:
        raise ConfigurationError("prompts", "none given", "Give at least one")
    stopping = StoppingOptions(max_new_tokens, min_new_tokens, tuple(stop_token_ids), tuple(stop))
    sampling = SamplingOptions(temperature, top_k, top_p, seed)
    like = GenerationRequest(sampling=sampling, stopping=stopping, top_logprobs=logprobs)
    requests = check_prompts(model, asked, like)
    return list(continue_prompts(model, asked, requests, micro_batch_size))


@takes_fields_of(EvaluatePerplexityConfig)
def evaluate_perplexity(config: EvaluatePerplexityConfig) -> EvaluatePerplexityResult:
    """Measure perplexity on held-out documents with real, shuffled, random and no neighbors.

    Takes the fields of `retro_mcore.evaluation.perplexity_config.EvaluatePerplexityConfig` as
    keyword arguments: the flags of evaluate_perplexity with underscores. The results are written
    only if `output` is given.

    Raises:
        RetroError: arguments, project and checkpoint do not fit together.
    """
    setup_device(config.device)
    initialize(distributed_backend(), config.distributed_timeout_minutes)
    from retro_mcore.evaluation.perplexity_run import run

    result = run(config)
    if config.output is not None:
        with raise_together():
            if get_rank() == 0:
                result.write()
    return result
