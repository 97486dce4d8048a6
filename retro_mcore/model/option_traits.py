"""Facts about an option, stated in the metadata of the field that declares it.

    kv_channels: int | None = field(default=None, metadata=at_least(1) | decoder(sets="config"))

Checks of flags, building, conversion, resumption and Megatron-LM's parser all read them from
there, so no list of option names is kept elsewhere. This module imports neither torch nor
megatron: `--help` stays fast.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal, TypeAlias

from retro_mcore.errors import ConfigurationError, too_small

Metadata: TypeAlias = dict[str, Any]

#: Code that a checkpoint can be written for.
Implementation = Literal["megatron-gpt", "megatron-retro", "instructretro"]

MEGATRON: frozenset[Implementation] = frozenset({"megatron-gpt", "megatron-retro"})
EVERYWHERE: frozenset[Implementation] = MEGATRON | {"instructretro"}


@dataclass(frozen=True, kw_only=True)
class ModelTraits:
    """Facts about one option of the model.

    Attributes:
        sets: Where building passes it: "config" or "model" (a field of the configuration, an
            argument of DecoderModel), with a dot and its name there if it is another one. None:
            code works out what to pass.
        form: How Megatron-LM's arguments state it: under the same name, as its opposite, in
            another form (which conversion translates), or not at all (None).
        also: Other names of Megatron-LM's argument.
        gpt: How --load-gpt uses it. "same": taken from the checkpoint, and a flag given beside it
            must agree. "default": taken from the checkpoint unless a flag is given. None: not used.
        reuse: Whether another run may take over weights with another value. "same": no. "free":
            with --finetune. "texts": in instruction tuning, whose texts have another length.
            "padding": always; the checkpoint's padding is kept.
        absent: Value of a model whose checkpoint does not state it.
        computed_by: Implementations that compute with it.
        neutral: Whether the others compute the same with this value, given all flags.
            Default: with None and `absent`.
        needed: Which checkpoints must state it, because a wrong default would go unnoticed.
        our_trainer: Whether only our own trainer honours it.
    """

    sets: str | None
    form: Literal["same", "opposite", "other"] | None = "same"
    also: tuple[str, ...] = ()
    gpt: Literal["same", "default"] | None = None
    reuse: Literal["same", "free", "texts", "padding"] = "same"
    absent: Any = None
    computed_by: frozenset[Implementation] = EVERYWHERE
    neutral: Callable[[Any, Mapping[str, Any]], bool] | None = None
    needed: Literal["always", "rotary", "retrieval"] | None = None
    our_trainer: bool = False

    @property
    def ours_alone(self) -> bool:
        """Whether no other implementation has it."""
        return not self.computed_by

    def is_lost(self, value: Any, flags: Mapping[str, Any], code: Implementation) -> bool:
        """Whether `code` would compute something else, because it lacks the option."""
        if code in self.computed_by:
            return False
        if self.neutral is not None:
            return not self.neutral(value, flags)
        return value is not None and value != self.absent

    def read(self, name: str, arguments: Mapping[str, Any]) -> Any:
        """Its value from Megatron-LM's arguments; None if they do not state it."""
        if self.form == "opposite":
            (theirs,) = self.also
            value = arguments.get(theirs)
            return None if value is None else not value
        if self.form == "other" or (self.form is None and not self.ours_alone):
            return None
        values = (arguments.get(each) for each in (name, *self.also))
        return next((value for value in values if value is not None), None)

    def write(self, name: str, value: Any) -> dict[str, Any]:
        """Megatron-LM's arguments that state it."""
        if self.form == "opposite":
            return dict.fromkeys(self.also, not value)
        return dict.fromkeys((name, *self.also), value) if self.form == "same" else {}


def shared(*also: str, **traits: Any) -> Metadata:
    """An option of the model that Megatron-LM has under the same name (and others)."""
    return {"model": ModelTraits(also=also, **traits)}


def decoder(*also: str, **traits: Any) -> Metadata:
    """As `shared`, and it defines what a GPT computes."""
    return shared(*also, gpt="same", **traits)


def opposite(of: str, **traits: Any) -> Metadata:
    """An option of the model that Megatron-LM states as the opposite."""
    return {"model": ModelTraits(form="opposite", also=(of,), **traits)}


def ours(neutral: Callable[[Any, Mapping[str, Any]], bool], **traits: Any) -> Metadata:
    """An option of the model that no other implementation computes with."""
    return {
        "model": ModelTraits(form=None, computed_by=frozenset(), neutral=neutral, **traits),
    }


def checked_separately(**traits: Any) -> Metadata:
    """An option of the model that Megatron-LM lacks and conversion checks separately."""
    return {"model": ModelTraits(form=None, **traits)}


def at_least(smallest: int) -> Metadata:
    """A number that must not be smaller; None is allowed."""
    return {"at_least": smallest}


def between(smallest: float, largest: float) -> Metadata:
    """A finite number in a closed range; None is allowed."""
    return {"between": (smallest, largest)}


def needs(option: str) -> Metadata:
    """An option that has no effect without another one."""
    return {"needs": option}


def of_project(key: str) -> Metadata:
    """An option that the project fixes, by its key in config.json."""
    return {"project": key}


def by_origin(values: Mapping[str, Any]) -> Metadata:
    """A field of the configuration that no flag sets: each origin has its value."""
    return {"origins": values}


def not_an_option(why: Literal["derived", "project"]) -> Metadata:
    """A field of the configuration that is no option: derived, or a record of the project."""
    return {"why": why}


def model_traits(options: type) -> dict[str, ModelTraits]:
    """The facts about every option in a dataclass of model options, by name.

    Raises:
        TypeError: a field states none.
    """
    traits = {field.name: field.metadata.get("model") for field in fields(options)}
    without = [name for name, found in traits.items() if found is None]
    if without:
        raise TypeError(
            f"{options.__name__}: {', '.join(without)} without metadata. State in the field what "
            "other implementations make of it: shared, decoder, opposite, ours, checked_separately"
        )
    return {name: found for name, found in traits.items() if found is not None}


def unclassified(config: type, known: type) -> list[str]:
    """Fields of a configuration, beyond those of its base, that state nothing about themselves."""
    inherited = {field.name for field in fields(known)}
    kinds = ("model", "origins", "why")
    return [
        field.name
        for field in fields(config)
        if field.name not in inherited and not any(kind in field.metadata for kind in kinds)
    ]


def passed_to(part: str, options: type, values: Any) -> dict[str, Any]:
    """What building passes to "config" or "model", by the name there.

    Args:
        part: "config" or "model".
        options: A dataclass of model options.
        values: An object that holds them; options that it lacks have their default.
    """
    defaults = {field.name: field.default for field in fields(options)}
    names = names_there(part, options).items()
    return {there: getattr(values, name, defaults[name]) for name, there in names}


def names_there(part: str, options: type) -> dict[str, str]:
    """Names of what building passes to "config" or "model", by the option's name."""
    names = {}
    for option, traits in model_traits(options).items():
        where, _, name = (traits.sets or "").partition(".")
        if where == part:
            names[option] = name or option
    return names


def stated(key: str, options: type) -> dict[str, Any]:
    """What fields state under a key of their metadata ("at_least", "needs", ...), by name."""
    return {field.name: field.metadata[key] for field in fields(options) if key in field.metadata}


def below_minimum(options: Any) -> Iterator[ConfigurationError]:
    """An error for every number below its minimum, naming the flag."""
    return too_small(options, stated("at_least", type(options)))


def out_of_range(values: Any, options: type) -> Iterator[ConfigurationError]:
    """An error for every number outside its range, naming the field.

    Args:
        values: An object that holds them.
        options: The dataclass that states the ranges.
    """
    for name, (smallest, largest) in stated("between", options).items():
        value = getattr(values, name)
        if value is None or (smallest <= value <= largest and math.isfinite(value)):
            continue
        bounded = math.isfinite(largest)
        remedy = f"number from {smallest} to {largest}" if bounded else f"{smallest} or more"
        yield ConfigurationError(name, f"{value}", f"Give {'a ' if bounded else ''}{remedy}")
