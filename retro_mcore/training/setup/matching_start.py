"""`--retro-matching-start`: initial weights with which a GPT's cross-attention works at once.

A GPT states each token in a space of its own, which encoder and cross-attention with random weights
must first discover; a frozen decoder does not come to meet them. Here they start where training
would lead first: each cross-attention finds in the neighbors the token that a position holds, and
the last one raises the logit of the token that followed it there. This is a cache of what was
retrieved (Grave et al. 2017, "Improving neural language models with a continuous cache", section
3), with the lookup of kNN-LM (Khandelwal et al. 2020, section 2).

The encoder's layers start as the decoder's first ones, without cross-attention. What has to be
known of the decoder is fitted by least squares on training samples: the encoded token, from the
state that a cross-attention reads; and the row of the output layer, from the encoded token.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.distributed as dist
from torch import Tensor

from retro_mcore.errors import ConfigurationError, flag_of, raise_problems
from retro_mcore.model.model import RetroModel
from retro_mcore.samples.batch import RetroBatch
from retro_mcore.training.loop.sample_reader import MicroBatchSampler, NumberedSamples, read_batches
from retro_mcore.training.loop.scoring import token_losses

if TYPE_CHECKING:
    from retro_mcore.training.loop.sample_reader import Samples
    from retro_mcore.training.setup.plan import TrainingPlan

_LOG = logging.getLogger(__name__)

#: Tokens that are read, per channel of the hidden states: least squares has as many unknowns.
TOKENS_PER_CHANNEL = 32
#: Expected score (before the softmax) of a token's query and the key of the same token.
MATCH = 16.0
#: What attention to one token adds, in root mean squares of the hidden states; the best is taken.
GAINS = (0.0, *(2.0**power for power in range(-6, 4)))
#: Samples on which the gain is chosen.
SAMPLES_OF_GAIN = 4


@dataclass(frozen=True)
class MatchingStart:
    """What was fitted.

    Attributes:
        found: Per cross-attention, share of the encoded tokens' squares that its input explains.
        written: Share of the output rows' squares that values explain.
        gain: The gain, of `GAINS`.
        losses: Nats per token for the gains that were tried, the first one without retrieval.
    """

    found: tuple[float, ...]
    written: float
    gain: float
    losses: tuple[float, ...]


def start_by_matching(
    models: Sequence[Any], plan: TrainingPlan, samples: Samples, device: torch.device
) -> MatchingStart | None:
    """Give encoder and cross-attentions their initial weights, if --retro-matching-start asks for
    it. All ranks call it after the GPT is loaded and before the optimizer is built.

    Args:
        models: This rank's stages.
        plan: The run's plan.
        samples: The training samples; the first of them are read.
        device: The model's.
    """
    if not plan.options.retro_matching_start:
        return None
    (model,) = cast("Sequence[RetroModel]", models)
    _copy_layers(model)
    was_training = model.training
    model.eval()
    with torch.no_grad():
        result = _fit(model, plan, samples, device)
        for weight in _changed(model):
            if dist.is_initialized():
                dist.broadcast(weight, 0)
    model.train(was_training)
    _report(result)
    return result


def check_can_match(plan: TrainingPlan) -> None:
    """Reject options under which a retrieved token would not match, if it is asked for.

    Raises:
        ConfigurationError: naming the flag.
        SeveralErrors: naming all of them.
    """
    options, arguments = plan.options, plan.arguments
    if not options.retro_matching_start:
        return
    needed = {
        "tensor_model_parallel_size": 1,
        "pipeline_model_parallel_size": 1,
        "context_parallel_size": 1,
        "retro_encoder_input": "raw",
        "retro_cross_attention_keys": "previous",
        "retro_cross_attention_positions": ("none", None),
        "retro_encoder_hidden_size": (None, arguments.hidden_size),
        "retro_encoder_num_attention_heads": None,
        "retro_encoder_ffn_hidden_size": None,
        "num_experts": None,
    }
    one_process = "Fit in one process (--train-iters 1); then --load it with --finetune on several"
    hints = dict.fromkeys(list(needed)[:3], one_process)
    hints["num_experts"] = "Leave --retro-matching-start out"  # the GPT has them
    problems = []
    for name, values in needed.items():
        allowed = values if isinstance(values, tuple) else (values,)
        found = getattr(arguments if hasattr(arguments, name) else options, name, None)
        if found not in allowed:
            hint = hints.get(name, f"Give {allowed[0]}" if allowed[0] else "Leave it out")
            problems.append(
                ConfigurationError(
                    flag_of(name), f"{found}, given with --retro-matching-start", hint
                )
            )
    retrieved = arguments.retro_chunk_length * arguments.retro_num_retrieved_chunks
    if plan.sequence_length < retrieved:
        problems.append(
            ConfigurationError(
                "--retro-matching-start",
                f"given with samples of {plan.sequence_length} tokens, shorter than a neighbor",
                f"It needs --seq-length {retrieved} or more",
            )
        )
    if arguments.no_retrieval:
        problems.append(
            ConfigurationError("--no-retrieval", "given with --retro-matching-start", "Choose one")
        )
    raise_problems(problems)


def _copy_layers(model: RetroModel) -> None:
    """The encoder's layers become the decoder's first, and add nothing of the retrieving chunk."""
    assert model.neighbor_encoder is not None
    for layer, source in zip(model.neighbor_encoder.layers, model.decoder.layers, strict=False):
        weights = dict(source.named_parameters())
        with torch.no_grad():
            for name, weight in layer.named_parameters():
                if name.startswith("cross_attention.linear_proj"):
                    weight.zero_()
                elif "cross_att" not in name:
                    weight.copy_(weights[name])


def _changed(model: RetroModel) -> Iterator[Tensor]:
    assert model.neighbor_encoder is not None
    yield from model.neighbor_encoder.parameters()
    for layer in _retro_layers(model):
        yield from layer.cross_attention.parameters()


def _retro_layers(model: RetroModel) -> list[Any]:
    numbers = model.config.retro_layer_numbers
    return [layer for layer in model.decoder.layers if layer.layer_number in numbers]


def _fit(
    model: RetroModel, plan: TrainingPlan, samples: Samples, device: torch.device
) -> MatchingStart:
    wanted = TOKENS_PER_CHANNEL * model.config.hidden_size
    number = min(len(samples), max(SAMPLES_OF_GAIN, -(-wanted // plan.sequence_length)))
    sums = _Sums(model, device)
    for batch in _batches(plan, samples, number, device, retrieval=False):
        sums.add(batch)
    attentions = [layer.cross_attention for layer in _retro_layers(model)]
    lookups = _lookups(attentions[0], plan.project.retro_gpt_seed, device)
    found = tuple(
        _fit_query(attention, sums, lookups, place) for place, attention in enumerate(attentions)
    )
    written = 0.0
    for attention in attentions:
        output, written = _fit_value(attention, sums)
    last, size = attentions[-1], sums.residual_size()
    few = list(_batches(plan, samples, min(number, SAMPLES_OF_GAIN), device, retrieval=True))

    def loss(gain: float) -> float:
        last.linear_proj.weight.copy_(output * (gain * size))
        return _mean_loss(model, few, plan)

    gain, losses = _best_gain(loss)
    last.linear_proj.weight.copy_(output * (gain * size))
    return MatchingStart(found, written, gain, losses)


def _batches(
    plan: TrainingPlan, samples: Samples, number: int, device: torch.device, retrieval: bool
) -> Iterator[RetroBatch]:
    """The first samples, the same on all ranks; without `retrieval` neighbors are not read."""
    sampler = MicroBatchSampler(0, number, plan.options.micro_batch_size, 0, 1, keep_rest=True)
    return read_batches(NumberedSamples(samples, retrieval), sampler, 0, device)


class _Sums:
    """Products over tokens of what cross-attentions read, of encoded tokens, and of the output
    layer's rows; `[D, D]` each, in double precision."""

    def __init__(self, model: RetroModel, device: torch.device) -> None:
        self.model, self.layers, self.count = model, _retro_layers(model), 0
        size = model.config.hidden_size
        blank = torch.zeros(size, size, dtype=torch.float64, device=device)
        self.encoded, self.rows = blank.clone(), blank.clone()
        self.encoded_by_row = blank.clone()
        self.inputs = [blank.clone() for _ in self.layers]
        self.inputs_by_encoded = [blank.clone() for _ in self.layers]
        self.residual = 0.0

    @torch.no_grad()
    def add(self, batch: RetroBatch) -> None:
        """Read a batch's text, and its windows of R tokens as if they were neighbors."""
        config, model = self.model.config, self.model
        length, neighbors = config.retro_retrieved_length, config.retro_num_neighbors
        assert length is not None  # set by the configuration
        batch_size, text_length = batch.tokens.shape
        windows = batch_size * (text_length // length)
        reads, streams = self._read_text(batch)

        def cut(states_BS: Tensor) -> Tensor:
            """`[B, S, ...]` to `[windows, R, ...]`."""
            parts = states_BS[:, : text_length // length * length]
            return parts.unflatten(1, (-1, length)).flatten(0, 1)

        tokens = cut(batch.tokens)
        chunks = -(-windows // neighbors)  # the encoder takes K neighbors of each
        filled = torch.cat((tokens, tokens[:1].expand(chunks * neighbors - windows, -1)))
        places = torch.arange(length, device=tokens.device).expand_as(filled)
        nothing = torch.zeros(
            chunks * config.retro_chunk_length, 1, config.hidden_size,
            dtype=config.params_dtype, device=tokens.device,
        )  # fmt: skip
        assert model.neighbor_encoder is not None
        encoded = model.neighbor_encoder(model.embedding(filled, places), nothing)
        kept = cut(batch.loss_mask) > 0
        encoded = encoded.transpose(0, 1)[:windows][kept].double()
        rows = output_rows(model, tokens[kept])
        self.count += len(encoded)
        self.encoded += encoded.t() @ encoded
        self.rows += rows.t() @ rows
        self.encoded_by_row += encoded.t() @ rows
        for place, read in enumerate(reads):
            own = cut(read.transpose(0, 1))[kept].double()
            self.inputs[place] += own.t() @ own
            self.inputs_by_encoded[place] += own.t() @ encoded
        self.residual += float(cut(streams[-1].transpose(0, 1))[kept].double().square().sum())

    def _read_text(self, batch: RetroBatch) -> tuple[list[Tensor], list[Tensor]]:
        """What each cross-attention reads, and its layer's output, `[S, B, D]`."""
        reads: list[Tensor] = []
        streams: list[Tensor] = []
        hooks = []
        for layer in self.layers:
            hooks.append(
                layer.cross_attention.register_forward_pre_hook(
                    lambda _, args, kwargs: reads.append(
                        args[0] if args else kwargs["hidden_states"]
                    ),
                    with_kwargs=True,
                )
            )
            hooks.append(layer.register_forward_hook(lambda *call: streams.append(call[-1][0])))
        text = batch.model_inputs()
        own = ("input_ids", "position_ids", "attention_mask")
        self.model(**{name: text[name] for name in own})
        for hook in hooks:
            hook.remove()
        return reads, streams

    def encoded_size(self) -> float:
        """Root mean square of encoded tokens."""
        return float(self.encoded.trace() / max(1, self.count * len(self.encoded))) ** 0.5

    def residual_size(self) -> float:
        """Root mean square of the last of these layers' output."""
        return (self.residual / max(1, self.count * len(self.encoded))) ** 0.5


def output_rows(model: RetroModel, tokens: Tensor) -> Tensor:
    """What raises a token's logit most, `[..., D]` in double precision, with a mean square of 1:
    its row of the output layer, times the weight of the norm before."""
    weight = model.shared_embedding_or_output_weight()
    if weight is None:
        weight = model.output_layer.weight
    rows = weight[tokens].double()
    norm = getattr(model.decoder.final_layernorm, "weight", None)
    if norm is not None:
        rows = rows * (norm.double() + float(model.config.layernorm_zero_centered_gamma))
    return torch.nn.functional.rms_norm(rows, rows.shape[-1:], eps=1e-12)


def _solve(squares: Tensor, products: Tensor) -> Tensor:
    """Least squares with a small ridge, from sums of products."""
    ridge = 1e-4 * squares.diagonal().mean()
    return torch.linalg.solve(
        squares + ridge * torch.eye(len(squares), dtype=squares.dtype, device=squares.device),
        products,
    )


def _explained(solution: Tensor, squares: Tensor, products: Tensor, targets: Tensor) -> float:
    """Share of the targets' squares that a linear map explains."""
    residue = targets.trace() - 2 * (solution * products).sum()
    residue = residue + (solution * (squares @ solution)).sum()
    return float(1 - residue / targets.trace())


def _lookups(attention: Any, seed: int, device: torch.device) -> Tensor:
    """Random projections `[G, C, D]` that queries and keys share."""
    config = attention.config
    scale = config.softmax_scale or config.kv_channels**-0.5
    shape = (config.num_query_groups, config.kv_channels, config.hidden_size)
    draws = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    deviation = (MATCH / (scale * config.kv_channels * config.hidden_size)) ** 0.5
    return (draws * deviation).to(device)


def _fit_query(attention: Any, sums: _Sums, lookups: Tensor, place: int) -> float:
    """Keys look encoded tokens up; queries what they expect of them."""
    config = attention.config
    groups, channels = config.num_query_groups, config.kv_channels
    squares, products = sums.inputs[place], sums.inputs_by_encoded[place]
    expected = _solve(squares, products)
    lookups = lookups / sums.encoded_size()
    keys = attention.linear_kv.weight.view(groups, 2, channels, -1)
    keys[:, 0] = lookups.to(keys.dtype)
    queries = (lookups @ expected.t()).repeat_interleave(config.num_attention_heads // groups, 0)
    attention.linear_q.weight.copy_(queries.flatten(0, 1))
    return _explained(expected, squares, products, sums.encoded)


def _fit_value(attention: Any, sums: _Sums) -> tuple[Tensor, float]:
    """Values keep what the output rows need of encoded tokens; returns the output projection."""
    config = attention.config
    groups, channels = config.num_query_groups, config.kv_channels
    rows = _solve(sums.encoded, sums.encoded_by_row)
    left, strength, right = torch.linalg.svd(rows, full_matrices=False)
    rank = min(groups * channels, len(strength))
    root = strength[:rank].sqrt()
    kept = left[:, :rank] * root
    value = torch.zeros(groups * channels, len(rows), dtype=rows.dtype, device=rows.device)
    value[:rank] = kept.t()
    output = torch.zeros(len(rows), groups * channels, dtype=rows.dtype, device=rows.device)
    output[:, :rank] = (root[:, None] * right[:rank]).t()
    keys_values = attention.linear_kv.weight.view(groups, 2, channels, -1)
    keys_values[:, 1] = value.view(groups, channels, -1).to(keys_values.dtype)
    heads = config.num_attention_heads // groups
    output_heads = output.view(-1, groups, 1, channels).expand(-1, -1, heads, -1) / heads
    approximate = kept @ (root[:, None] * right[:rank])
    written = _explained(approximate, sums.encoded, sums.encoded_by_row, sums.rows)
    weight = attention.linear_proj.weight
    return output_heads.flatten(1).to(weight.dtype), written


def _best_gain(loss: Callable[[float], float]) -> tuple[float, tuple[float, ...]]:
    """The gain of the lowest loss; gains after two that are worse than the best are not tried."""
    losses: list[float] = []
    for gain in GAINS:
        losses.append(loss(gain))
        if len(losses) - 1 - losses.index(min(losses)) == 2:
            break
    return GAINS[losses.index(min(losses))], tuple(losses)


def _mean_loss(model: RetroModel, batches: Sequence[RetroBatch], plan: TrainingPlan) -> float:
    total, number = 0.0, 0.0
    for batch, losses_BS in token_losses([model], iter(batches), plan.used_vocab_size):
        assert losses_BS is not None  # one stage
        total += float((losses_BS * batch.loss_mask).sum())
        number += float(batch.loss_mask.sum())
    return total / max(1.0, number)


def _report(result: MatchingStart) -> None:
    found = ", ".join(f"{share:.2f}" for share in result.found)
    _LOG.info(
        "matching start: queries explain %s of an encoded token, values %.2f of its output row; "
        "gain %g, loss %.4f without neighbors and %.4f with them",
        found,
        result.written,
        result.gain,
        result.losses[0],
        min(result.losses),
    )
    if result.gain == 0.0:
        _LOG.warning(
            "matching start: no gain lowers the loss of the first samples; cross-attention starts "
            "with an output of zero"
        )
