"""Functions that take the fields of a configuration as keyword arguments."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any, Concatenate, Generic, ParamSpec, Protocol, TypeVar, cast, overload

P = ParamSpec("P")
Config = TypeVar("Config")
First = TypeVar("First")
Second = TypeVar("Second")
Result = TypeVar("Result")


class _Decorator(Protocol, Generic[P, Config]):  # type: ignore[misc]
    @overload
    def __call__(self, function: Callable[[Config], Result]) -> Callable[P, Result]: ...
    @overload
    def __call__(
        self, function: Callable[[First, Config], Result]
    ) -> Callable[Concatenate[First, P], Result]: ...
    @overload
    def __call__(
        self, function: Callable[[First, Second, Config], Result]
    ) -> Callable[Concatenate[First, Second, P], Result]: ...


def takes_fields_of(
    config: Callable[P, Config],
    defaults: Callable[[Mapping[str, Any]], Mapping[str, Any]] | None = None,
) -> _Decorator[P, Config]:
    """Decorate a function whose last parameter is a configuration.

    The decorated function takes the configuration's fields as keyword arguments instead. Editors,
    type checkers and `help` see them with their types and defaults.

    Args:
        config: The configuration's dataclass.
        defaults: From the given fields, values for others.
    """

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def call(*first: Any, **fields: Any) -> Any:
            others = {} if defaults is None else defaults(fields)
            return function(*first, config(**{**others, **fields}))  # type: ignore[call-arg]

        signature = inspect.signature(function)
        leading = list(signature.parameters.values())[:-1]
        keywords = inspect.signature(config).parameters.values()
        call.__signature__ = signature.replace(  # type: ignore[attr-defined]
            parameters=[
                *leading,
                *(parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in keywords),
            ]
        )
        return call

    return cast("_Decorator[P, Config]", decorate)
