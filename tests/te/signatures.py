"""Arguments that a release of Transformer Engine takes (from its sources), and those it gets."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from inspect import isclass
from itertools import chain
from pathlib import Path
from typing import Any
from unittest import mock

#: Where a class or function is defined, under `pytorch` unless it says otherwise; releases moved
#: some. More than one at a time: what the first does not take itself, it hands to the next.
HOMES = {
    "Linear": [["module/linear.py"]],
    "LayerNormLinear": [["module/layernorm_linear.py"]],
    "LayerNorm": [["module/layernorm.py", "ops/basic/layer_norm.py"]],
    "RMSNorm": [["module/rmsnorm.py", "ops/basic/rmsnorm.py"]],
    "DotProductAttention": [
        ["attention/dot_product_attention/dot_product_attention.py"],
        ["dot_product_attention/dot_product_attention.py"],
        ["attention.py"],
    ],
    "apply_rotary_pos_emb": [
        ["attention/rope.py"],
        ["dot_product_attention/rope.py"],
        ["attention.py"],
    ],
    "FusedAdam": [["optimizers/fused_adam.py"]],
    "DelayedScaling": [["../common/recipe/__init__.py"]],
    "Float8CurrentScaling": [["../common/recipe/__init__.py"]],
    "MXFP8BlockScaling": [["../common/recipe/__init__.py"]],
    "Float8BlockScaling": [["../common/recipe/__init__.py"]],
    "fp8_autocast": [["fp8.py"], ["quantization.py"]],
}  # fmt: skip


def arguments(package: Path, name: str, method: str | None = None) -> list[str] | None:
    """Names of the arguments of a class's method, or of a function; None: it has none such.

    Args:
        package: Folder of `transformer_engine`.
        name: Of the class or function, one of `HOMES`.
        method: Of the class; a dataclass's fields are those of `__init__`.
    """
    for files in HOMES[name]:
        paths = [package / "pytorch" / file for file in files]
        trees = [ast.parse(path.read_text(encoding="utf-8")) for path in paths if path.exists()]
        found = [each for tree in trees for each in _defined(tree, name, method)]
        if found:
            return list(dict.fromkeys(chain.from_iterable(found)))
    return None


def _defined(tree: ast.Module, name: str, method: str | None) -> Iterator[list[str]]:
    for node in tree.body:
        if getattr(node, "name", None) != name:
            continue
        if isinstance(node, ast.FunctionDef):
            yield _parameters(node)
        elif isinstance(node, ast.ClassDef):
            methods = [each for each in node.body if getattr(each, "name", None) == method]
            yield from (_parameters(each) for each in methods)
            if method == "__init__" and not methods:
                yield [each.target.id for each in node.body if isinstance(each, ast.AnnAssign)]


def _parameters(node: ast.FunctionDef) -> list[str]:
    given = node.args
    names = [each.arg for each in (*given.posonlyargs, *given.args, *given.kwonlyargs)]
    return [name for name in names if name != "self"]


@dataclass
class Calls:
    """How a callable was called: keywords, and the largest number of positional arguments."""

    keywords: set[str] = field(default_factory=set)
    positional: int = 0


@contextmanager
def recorded(places: dict[str, tuple[Any, str]], instead: Any = None) -> Iterator[dict[str, Calls]]:
    """Record calls within the context.

    Args:
        places: (object, attribute) of each callable, by the name to record under.
        instead: What to call in place of each; None: itself.
    """
    calls = {name: Calls() for name in places}
    with ExitStack() as patched:
        for name, (owner, attribute) in places.items():
            wrapper = _recording(instead or getattr(owner, attribute), calls[name], isclass(owner))
            patched.enter_context(mock.patch.object(owner, attribute, wrapper))
        yield calls


def _recording(original: Any, calls: Calls, is_method: bool) -> Any:
    def call(*args: Any, **kwargs: Any) -> Any:
        calls.keywords.update(kwargs)
        calls.positional = max(calls.positional, len(args) - is_method)
        return original(*args, **kwargs)

    return call
