"""Fields of megatron-core's configuration dataclasses, read from its source without importing it.

Importing megatron takes seconds, which every `--help` would cost.
"""

from __future__ import annotations

import ast
import importlib.util
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

_FILES = {
    "TransformerConfig": "transformer/transformer_config.py",
    "ModelParallelConfig": "model_parallel_config.py",
    "DistributedDataParallelConfig": "distributed/distributed_data_parallel_config.py",
    "OptimizerConfig": "optimizer/optimizer_config.py",
}

_TYPES = {name: getattr(typing, name) for name in ("List", "Literal", "Optional", "Tuple", "Union")}
_TYPES |= {kind.__name__: kind for kind in (bool, int, float, str, list, tuple)}


class ConfigField(NamedTuple):
    """A field of a configuration dataclass.

    Attributes:
        name: Its name.
        type: Its type.
        default: Its default.
        help: The first sentence of its documentation.
    """

    name: str
    type: Any
    default: Any
    help: str


def config_fields(dataclass: str) -> list[ConfigField]:
    """Read the fields of one of megatron-core's dataclasses that have a plain type and default.

    Args:
        dataclass: TransformerConfig, ModelParallelConfig, DistributedDataParallelConfig or
            OptimizerConfig.
    """
    tree = ast.parse((_megatron_core() / _FILES[dataclass]).read_text(encoding="utf-8"))
    (node,) = (n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == dataclass)
    return list(_fields_of_class(node))


def _megatron_core() -> Path:
    spec = importlib.util.find_spec("megatron")  # a namespace package: nothing is imported
    folders = [] if spec is None else list(spec.submodule_search_locations or [])
    return next(path for folder in folders if (path := Path(folder) / "core").is_dir())


def _fields_of_class(node: ast.ClassDef) -> Iterator[ConfigField]:
    for statement, following in zip(node.body, [*node.body[1:], ast.Pass()], strict=True):
        if not isinstance(statement, ast.AnnAssign) or not isinstance(statement.target, ast.Name):
            continue
        try:
            kind, default = _type(statement.annotation), _default(statement.value)
        except ValueError:
            continue  # a type or default that no flag can give
        yield ConfigField(statement.target.id, kind, default, _first_sentence(following))


def _type(node: ast.expr) -> Any:
    """The type that an annotation names.

    Raises:
        ValueError: it is not made of `_TYPES`.
    """
    if isinstance(node, ast.Name) and node.id in _TYPES:
        return _TYPES[node.id]
    if isinstance(node, ast.Constant) and node.value is None:
        return None
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitOr):
        return typing.Union[_type(node.left), _type(node.right)]  # noqa: UP007 (of objects)
    if isinstance(node, ast.Subscript):
        outer = _type(node.value)
        read = ast.literal_eval if outer is typing.Literal else _type
        if isinstance(node.slice, ast.Tuple):
            return outer[tuple(read(part) for part in node.slice.elts)]
        return outer[read(node.slice)]
    raise ValueError(f"{ast.unparse(node)} is no plain type")


def _default(value: ast.expr | None) -> Any:
    if isinstance(value, ast.Call):  # field(default=..., metadata=...)
        values = (keyword.value for keyword in value.keywords if keyword.arg == "default")
        value = next(values, None)
    if value is None:
        raise ValueError("no default")
    if isinstance(value, ast.BinOp) and isinstance(value.op, ast.Pow):  # 2**32
        return ast.literal_eval(value.left) ** ast.literal_eval(value.right)
    return ast.literal_eval(value)


def _first_sentence(node: ast.stmt) -> str:
    if not isinstance(node, ast.Expr) or not isinstance(node.value, ast.Constant):
        return ""
    text = " ".join(str(node.value.value).split())
    return text.split(". ")[0].rstrip(".") + "."
