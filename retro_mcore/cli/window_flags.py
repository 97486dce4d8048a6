"""Megatron's spellings of the flags of sliding windows, in the form that our options have."""

from __future__ import annotations

import ast
from collections.abc import Sequence

from retro_mcore.errors import ConfigurationError

#: Length from which lists are no longer extended: more than any model has layers.
_DEEPEST = 10_000
_SIZE, _LAYERS = "--window-size", "--window-attn-skip-freq"


def with_windows(arguments: Sequence[str]) -> list[str]:
    """Replace `--window-size 127,0` by `--sliding-window 128`, and spell out lists of layers.

    Raises:
        ConfigurationError: a value is not in Megatron's form.
    """
    written: list[str] = []
    remaining = list(arguments)
    while remaining:
        flag, equals, attached = remaining.pop(0).partition("=")
        name = flag.replace("_", "-")
        if name not in (_SIZE, _LAYERS):
            written.append(flag + equals + attached)
            continue
        values = [attached] if equals else _values(remaining)
        written += _window(values) if name == _SIZE else _layers(values)
    return written


def _values(remaining: list[str]) -> list[str]:
    """Take the words up to the next flag."""
    taken = []
    while remaining and not remaining[0].startswith("--"):
        taken.append(remaining.pop(0))
    return taken


def _window(values: Sequence[str]) -> list[str]:
    found = " ".join(values)
    try:
        before, after = (int(each) for each in found.strip("()").replace(",", " ").split())
    except ValueError:
        before, after = -2, 0
    if before < -1 or after != 0:
        raise ConfigurationError(
            _SIZE, found, "Give the tokens before a position and 0, as 127,0 (or --sliding-window)"
        )
    return [] if before < 0 else ["--sliding-window", str(before + 1)]


def _layers(values: Sequence[str]) -> list[str]:
    if not any("[" in value for value in values):
        return [_LAYERS, *values]
    found = " ".join(values)
    try:
        layers = _list(ast.parse(found, mode="eval").body)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        layers = 0
    if not isinstance(layers, list):
        raise ConfigurationError(_LAYERS, found, "Give a number, or a list as ([1]*5+[0]*1)*4")
    return [_LAYERS, *map(str, layers)]


def _list(node: ast.expr) -> list[int] | int:
    """The value of an expression of lists of whole numbers, joined and repeated.

    Raises:
        ValueError: it is of another kind.
    """
    if isinstance(node, ast.Constant) and type(node.value) is int:
        return node.value
    if isinstance(node, ast.List):
        items = [_list(each) for each in node.elts]
        if all(isinstance(each, int) for each in items):
            return [each for each in items if isinstance(each, int)]
    if isinstance(node, ast.BinOp):
        left, right = _list(node.left), _list(node.right)
        if isinstance(left, list) and isinstance(right, list) and isinstance(node.op, ast.Add):
            return left + right
        if isinstance(left, list) and isinstance(right, int) and isinstance(node.op, ast.Mult):
            return left * min(right, 1 + _DEEPEST // max(1, len(left)))
    raise ValueError("not a list of whole numbers")
