"""Workarounds for how Megatron saves and loads an optimizer's state.

| function                  | releases         | what happens without it                           |
|---------------------------|------------------|---------------------------------------------------|
| `allocate_adam_state`     | 0.16.1 to 0.19.2 | no checkpoint before the first step               |
| `supply_adam_step`        | 0.16.1 to 0.19.2 | such a checkpoint does not load                   |
| `keeping_adam_steps`      | 0.16.1 to 0.19.2 | the distributed optimizer's state does not load   |
| `unshare_adam_steps`      | 0.16.1 to 0.19.2 | Adam steps wrongly after loading, silently        |
| `unpadded_bucket_offsets` | 0.16.1 to 0.19.2 | small models' moments are mixed up, silently      |
| `without_squares`         | 0.18 to 0.19.2   | SOAP's state cannot be saved                      |
| `regroup`                 | 0.16.1 to 0.19.2 | no change between one and several expert ranks    |
| `mark_decoupled_rates`    | 0.16.1 to 0.18.2 | --decoupled-lr resumes with one rate, silently    |
| `refuse_infinite_norms`   | 0.16.1 to 0.19.2 | infinite gradients reach the weights              |

The four for Adam concern PyTorch's own, which counts steps per parameter. Megatron is written for
the fused Adams of Transformer Engine and Apex, which count them per group; those are left alone.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache, partial
from types import SimpleNamespace
from typing import Any

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.dist_checkpointing.utils import extract_sharded_tensors_and_factories
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import MegatronOptimizer
from torch import Tensor

from retro_mcore.errors import ConfigurationError


def allocate_adam_state(optimizer: MegatronOptimizer) -> None:
    """Give Adam zero moments and step 0 where it has not made a step (0.16.1 to 0.19.2).

    Megatron reads them before it loads the real ones, and a checkpoint may be saved before the
    first step (in fp16, while the loss scale is found).
    """
    for adam in _torch_adams(optimizer):
        for group in adam.param_groups:
            for parameter in group["params"]:
                if not adam.state[parameter]:
                    adam.state[parameter] = {
                        "step": torch.tensor(0.0),
                        "exp_avg": torch.zeros_like(parameter.data),
                        "exp_avg_sq": torch.zeros_like(parameter.data),
                    }


def supply_adam_step(optimizer: MegatronOptimizer, state: dict[str, Any]) -> None:
    """Put step 0 into a loaded state that has none (0.16.1 to 0.19.2).

    Megatron does not save it before the first step, and asks for it all the same.
    """
    saved = [state[key] for key in sorted(key for key in state if isinstance(key, int))] or [state]
    for part, own in zip(saved, _parts(optimizer), strict=True):
        parameters = part.get("optimizer", part).get("state")
        if parameters is not None and _is_torch_adam(own.optimizer):
            parameters.setdefault("common_step", torch.tensor(0.0))


def regroup(optimizer: MegatronOptimizer, state: dict[Any, Any]) -> dict[Any, Any]:
    """A loaded state in as many parts as the optimizer has (0.16.1 to 0.19.2).

    Under expert parallelism experts have an optimizer of their own, and the state has parts 0 and
    1. What is saved per parameter loads into either form. What is saved once, hyperparameters and
    steps, stays in the form of the checkpoint, and is brought into the other one here.
    """
    numbered = {key: part for key, part in state.items() if isinstance(key, int)}
    rest = {key: value for key, value in state.items() if not isinstance(key, int)}
    parts = _parts(optimizer)
    if not numbered or not rest:
        return state
    if len(parts) == 1:
        return _completed(parts[0], rest, [numbered[key] for key in sorted(numbered)])
    return {index: _completed(part, numbered[index], [rest]) for index, part in enumerate(parts)}


def mark_decoupled_rates(groups: Iterable[dict[str, Any]]) -> None:
    """Mark the groups of parameters with a learning rate of their own (0.16.1 to 0.18.2).

    Megatron finds a group's saved state by a mark that it never sets. All groups with the same
    multipliers would get the state and rates of one of them. Groups that say nothing stay as they
    are: those of checkpoints of 0.15, and those that `regroup` completes.
    """
    for group in groups:
        if "default_config" in group:
            group["is_decoupled_lr"] = not group["default_config"] and group["lr_mult"] == 1.0


def mark_saved_rates(state: dict[Any, Any]) -> None:
    """Mark the groups of a loaded state, as `mark_decoupled_rates` does with the optimizer's."""
    mark_decoupled_rates(_saved_groups(state))


#: Classes of Megatron's optimizers of matrices, and what their groups of parameters tell apart.
_MATRIX_OPTIMIZERS = ("TensorParallelMuon", "TensorParallelAdaptiveMuon", "Lion", "SOAP")
_SETTINGS = ("betas", "eps", "shampoo_beta")


def unlike_parts(optimizer: MegatronOptimizer, saved: dict[Any, Any]) -> str:
    """How a saved state differs from an optimizer of matrices in its parts (0.16.1 to 0.19.2).

    Under expert parallelism experts have an optimizer of their own; `regroup` knows AdamW's parts
    only.

    Args:
        optimizer: The run's.
        saved: What the checkpoint holds of it once: hyperparameters and steps.

    Returns:
        What was found and is expected; "" if they agree, and for other optimizers.
    """
    parts = _parts(optimizer)
    if not any(type(part.optimizer).__name__ in _MATRIX_OPTIMIZERS for part in parts):
        return ""
    theirs = _settings_by_part(
        saved.get(index, {}).get("optimizer", saved.get(index, {})).get("param_groups", ())
        for index in range(len([key for key in saved if isinstance(key, int)]))
    )
    own = _settings_by_part(part.param_groups for part in parts)
    if theirs == own:
        return ""
    return f"{_described(theirs)}, and this run's has {_described(own)}"


def _settings_by_part(parts: Iterable[Iterable[dict[str, Any]]]) -> list[list[list[str]]]:
    """For each part's groups, which of the settings they have that tell optimizers apart."""
    return [[[name for name in _SETTINGS if name in group] for group in part] for part in parts]


def _described(parts: list[list[list[str]]]) -> str:
    groups = " + ".join(
        str([", ".join(settings) or "neither betas nor eps" for settings in part]) for part in parts
    )
    return f"{len(parts)} parts of an optimizer, of groups of weights with {groups}"


#: SOAP's state that is square: averages of G G' and G' G for gradients G, and their eigenvectors.
_SQUARES = ("L", "R", "Q_L", "Q_R")


@contextmanager
def without_squares(optimizer: MegatronOptimizer) -> Iterator[list[dict[str, Tensor]]]:
    """While making sharded state dicts, take what is square out of SOAP's state (0.18 to 0.19.2).

    Megatron saves only what has a parameter's shape, and asserts it.

    Yields:
        What was taken, for each parameter of SOAP; for `sharded_squares`.
    """
    for soap in {id(soap): soap for soap, _ in _of_soap(optimizer)}.values():
        for group in soap.param_groups:  # before the first step, and for loading
            soap._init_group(group, skip_non_grad_params=False)
    states = [soap.state[parameter] for soap, parameter in _of_soap(optimizer)]
    squares = [{name: state.pop(name) for name in _SQUARES} for state in states]
    try:
        yield squares
    finally:
        for state, own in zip(states, squares, strict=True):
            state.update(own)


def sharded_squares(
    optimizer: MegatronOptimizer,
    stages: Sequence[torch.nn.Module],
    model_state: dict[str, Any],
    squares: Sequence[dict[str, Tensor]],
) -> dict[str, ShardedTensor]:
    """What is square in SOAP's state, to be saved beside it. No matrix is divided over ranks.

    Args:
        optimizer: The run's.
        stages: The model's stages on this rank.
        model_state: Their sharded state.
        squares: As `without_squares` yields them.
    """
    weights = {
        id(getattr(weight, "main_param", weight)): weight
        for stage in stages
        for weight in stage.parameters()
    }
    entries, _ = extract_sharded_tensors_and_factories(model_state)
    by_weight = {id(entry.data): entry for entry in nested_values(entries)}
    places = [by_weight[id(weights[id(parameter)])] for _, parameter in _of_soap(optimizer)]
    return {
        f"{index}.{name}": _square_of(place, name, square)
        for index, (place, own) in enumerate(zip(places, squares, strict=True))
        for name, square in own.items()
    }


def put_squares(optimizer: MegatronOptimizer, loaded: dict[str, Tensor]) -> None:
    """Complete SOAP's loaded state by what `sharded_squares` saved."""
    for index, (soap, parameter) in enumerate(_of_soap(optimizer)):
        state = soap.state[parameter]
        state.setdefault("step", 0)  # Megatron does not save it before the first step
        state.update({name: loaded[f"{index}.{name}"] for name in _SQUARES})


def _of_soap(optimizer: MegatronOptimizer) -> list[tuple[Any, Tensor]]:
    """SOAP, once for each of its parameters."""
    inner = [part.optimizer for part in _parts(optimizer)]
    return [
        (each, parameter)
        for each in inner
        if type(each).__name__ == "SOAP"
        for group in each.param_groups
        for parameter in group["params"]
    ]


def _square_of(weight: Any, name: str, square: Tensor) -> ShardedTensor:
    """A square matrix of a weight, in its place among layers or experts."""
    if isinstance(weight, ShardedTensorFactory):
        weight = next(iter(nested_values(weight.build())))
    stacked = weight.prepend_axis_num
    return ShardedTensor.from_rank_offsets(
        f"optimizer.state.{name}.{weight.key}",
        square,
        *(
            (axis, weight.global_offset[axis], weight.axis_fragmentations[axis])
            for axis in range(stacked)
        ),
        replica_id=weight.replica_id,
        prepend_axis_num=stacked,
    )


def _saved_groups(state: dict[Any, Any]) -> Iterator[dict[str, Any]]:
    numbered = [part for key, part in state.items() if isinstance(key, int)]
    rest = {key: value for key, value in state.items() if not isinstance(key, int)}
    for part in [*numbered, rest]:
        yield from part.get("optimizer", part).get("param_groups", ())


#: Learning rates and weight decays of a group of parameters, which the scheduler reads.
_RATES = ("max_lr", "min_lr", "start_wd", "end_wd")


def use_own_rates(optimizer: MegatronOptimizer, state: dict[Any, Any]) -> None:
    """Put the optimizer's own rates into a loaded state, in place of the saved ones.

    The scheduler reads them from the groups first. From 0.19 on, Megatron also finds each group's
    saved state by them, and refuses a state with other rates.
    """
    rates = {
        _identity(group): {name: group[name] for name in _RATES if name in group}
        for group in optimizer.param_groups
    }
    for group in _saved_groups(state):
        group.update(rates.get(_identity(group), {}))


def _identity(group: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(group.get(key) for key in (*_GROUP_KEYS, "is_expert_parallel"))


#: What tells an optimizer's groups of parameters apart, beside belonging to experts.
_GROUP_KEYS = ("wd_mult", "lr_mult", "is_decoupled_lr")


def _completed(part: Any, own: dict[str, Any], saved: list[dict[str, Any]]) -> dict[str, Any]:
    """One optimizer's state, with what others' states hold once."""
    nested = "optimizer" in saved[0]  # that of the distributed optimizer
    inner = own.get("optimizer", {}) if nested else own
    sources = [each["optimizer"] if nested else each for each in saved]
    groups = [group for source in sources for group in source["param_groups"]]
    current = part.optimizer.param_groups
    loaded = inner.get("param_groups") or [{} for _ in current]
    inner = {
        **inner,
        "state": {**sources[0].get("state", {}), **inner.get("state", {})},
        "param_groups": [
            {**_like(group, groups), **mine} for group, mine in zip(current, loaded, strict=True)
        ],
    }
    others = {key: value for key, value in saved[0].items() if key not in ("param_state", *inner)}
    return {**others, **own, **({"optimizer": inner} if nested else inner)}


def _like(group: dict[str, Any], saved: list[dict[str, Any]]) -> dict[str, Any]:
    """The saved group with the same multipliers, whether of experts or not."""
    for other in saved:
        if all(other.get(key) == group.get(key) for key in _GROUP_KEYS):
            same = {key: value for key, value in other.items() if key != "params"}
            return {**same, "is_expert_parallel": group["is_expert_parallel"]}
    return {key: value for key, value in group.items() if key != "params"}


@contextmanager
def keeping_adam_steps(optimizer: MegatronOptimizer) -> Iterator[None]:
    """While loading, let the distributed optimizer leave the steps alone (0.16.1 to 0.19.2).

    It copies every entry of a parameter's state from the checkpoint, where there is no step:
    steps come from the groups.
    """
    parts = _distributed_parts(optimizer)
    for part in parts:
        part._set_main_param_and_optimizer_states = partial(_set_state_but_step, part)
    try:
        yield
    finally:
        for part in parts:
            del part._set_main_param_and_optimizer_states


def _set_state_but_step(
    part: DistributedOptimizer, parameter: torch.nn.Parameter, tensors: dict[str, Tensor]
) -> None:
    group, order = part.model_param_group_index_map[parameter]
    state = part.optimizer.state[part.optimizer.param_groups[group]["params"][order]]
    own = {"step": state["step"]} if "step" in state else {}
    type(part)._set_main_param_and_optimizer_states(part, parameter, {**own, **tensors})


def unshare_adam_steps(optimizer: MegatronOptimizer) -> None:
    """Give each parameter a step counter of its own after loading (0.16.1 to 0.19.2).

    Megatron loads one tensor into all of them, which Adam would advance once per parameter.
    """
    for adam in _torch_adams(optimizer):
        for state in adam.state.values():
            if "step" in state:
                state["step"] = state["step"].clone()


@contextmanager
def unpadded_bucket_offsets(optimizer: MegatronOptimizer) -> Iterator[None]:
    """While making sharded state dicts, give parameters their places in the unpadded buffer.

    (0.16.1 to 0.19.2.) The distributed optimizer gathers its state bucket by bucket without the
    buckets' padding, and then cuts parameters out of it at offsets that count the padding. With
    several buckets every parameter behind the first one gets another's state, without an error.
    """
    if not _has_padded_offsets():
        yield
        return
    buffers = [buffer for part in _distributed_parts(optimizer) for buffer in part.buffers]
    padded = [buffer.param_index_map for buffer in buffers]
    for buffer in buffers:
        buffer.param_index_map = _unpadded_index_map(buffer)
    try:
        yield
    finally:
        for buffer, index_map in zip(buffers, padded, strict=True):
            buffer.param_index_map = index_map


@cache
def _has_padded_offsets() -> bool:
    """Whether the installed release has the fault: it is tried on two buckets of one parameter.

    Raises:
        ConfigurationError: the release works otherwise than any that is known.
    """
    parameters = [torch.nn.Parameter(torch.zeros(1, device="cpu")) for _ in range(2)]
    places = {parameters[0]: (0, 1, 0), parameters[1]: (2, 3, 1)}  # one element of padding
    moments = {"exp_avg": torch.tensor([1.0, 2.0, 0.0], device="cpu")}  # as gathered: without it
    sizes = torch.zeros(2, device="cpu"), torch.zeros(1, device="cpu")
    buckets = [SimpleNamespace(grad_data=size, numel_unpadded=1) for size in sizes]
    optimizer: Any = SimpleNamespace(
        gbuf_ranges=[{torch.float32: []}],
        buffers=[SimpleNamespace(param_index_map=places, numel_unpadded=3, buckets=buckets)],
        get_parameter_state_dp_zero=lambda **kwargs: {0: {torch.float32: moments}},
    )
    model = {
        name: ShardedTensor.from_rank_offsets(name, parameter, replica_id=(0, 0, 0))
        for name, parameter in zip("ab", parameters, strict=True)
    }
    make = DistributedOptimizer.sharded_param_state_fully_reshardable
    try:
        saved = make(optimizer, model, metadata={})
        return [float(state["exp_avg"].data) for state in saved.values()] != [1.0, 2.0]
    except Exception as error:
        raise ConfigurationError(
            "megatron-core",
            f"its distributed optimizer saves in an unknown way ({error!r})",
            "Install a release from 0.16.1 to 0.19.2",
        ) from error


def _unpadded_index_map(buffer: Any) -> dict[Any, tuple[int, int, int]]:
    ends = list(itertools.accumulate(bucket.numel_unpadded for bucket in buffer.buckets))
    shifts = [
        end - bucket.numel_unpadded - bucket.offset
        for end, bucket in zip(ends, buffer.buckets, strict=True)
    ]
    return {
        parameter: (start + shifts[bucket], end + shifts[bucket], bucket)
        for parameter, (start, end, bucket) in buffer.param_index_map.items()
    }


def _parts(optimizer: MegatronOptimizer) -> list[Any]:
    return getattr(optimizer, "chained_optimizers", [optimizer])


def _distributed_parts(optimizer: MegatronOptimizer) -> list[Any]:
    return [part for part in _parts(optimizer) if isinstance(part, DistributedOptimizer)]


def _torch_adams(optimizer: MegatronOptimizer) -> list[torch.optim.Optimizer]:
    inner = [part.optimizer for part in _parts(optimizer)]
    return [each for each in inner if _is_torch_adam(each)]


def state_tensors(optimizer: MegatronOptimizer) -> Iterator[Tensor]:
    """Main weights and state. Some main weights are views of the model's weights."""
    for part in _parts(optimizer):
        for group in part.optimizer.param_groups:
            yield from group["params"]
        for state in part.optimizer.state.values():
            yield from (value for value in state.values() if isinstance(value, Tensor))


def overflow_flags(optimizer: MegatronOptimizer) -> Iterator[Tensor]:
    """What says, in fp16, whether a gradient is infinite: 1 if so, else 0."""
    for part in _parts(optimizer):
        if isinstance(getattr(part, "found_inf", None), Tensor):
            yield part.found_inf


def _is_torch_adam(optimizer: object) -> bool:
    return isinstance(optimizer, torch.optim.Adam | torch.optim.AdamW)


class InfiniteNormError(Exception):
    """A gradient norm that is NaN or infinite, before it clips gradients.

    Attributes:
        norm: The norm.
    """

    def __init__(self, norm: float) -> None:
        super().__init__(f"the gradient norm is {norm}")
        self.norm = norm


def refuse_infinite_norms(optimizer: MegatronOptimizer) -> None:
    """Have `optimizer.step` raise before it changes weights by an infinite gradient.

    (0.16.1 to 0.19.2.) Megatron reports the norm only after the step. The method is replaced on
    this optimizer, once; in fp16 a step that overflows does not ask for the norm.

    Raises:
        InfiniteNormError: in `optimizer.step`, with the norm.
    """
    measure = optimizer.get_grad_norm

    def finite_norm() -> Any:
        norm = measure()
        if not math.isfinite(norm):
            raise InfiniteNormError(float(norm))
        return norm

    optimizer.get_grad_norm = finite_norm
