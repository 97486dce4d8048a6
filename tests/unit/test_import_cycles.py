"""Files of the package import one another in one direction, also inside a layer."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import retro_mcore

ROOT = Path(retro_mcore.__file__).parent
MODULES = {
    ".".join(path.relative_to(ROOT.parent).with_suffix("").parts).removesuffix(".__init__"): path
    for path in ROOT.rglob("*.py")
}


def imported(module: str) -> set[str]:
    """Modules of the package that a module imports, in functions too, but not for types alone."""
    tree = ast.parse(MODULES[module].read_text(encoding="utf-8"))
    names = {name for node in run_time_nodes(tree) for name in names_of(node)}
    return {name for name in names if name in MODULES} - {module}


def run_time_nodes(node: ast.AST) -> Iterator[ast.AST]:
    for child in ast.iter_child_nodes(node):
        if not (isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING"):
            yield child
            yield from run_time_nodes(child)


def names_of(node: ast.AST) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom) and node.module:
        inside = [f"{node.module}.{alias.name}" for alias in node.names]
        return [name if name in MODULES else node.module for name in inside]
    return []


def test_no_file_imports_itself_through_others():
    try:
        TopologicalSorter({name: imported(name) for name in MODULES}).prepare()
    except CycleError as error:
        raise AssertionError(" <- ".join(error.args[1])) from None
