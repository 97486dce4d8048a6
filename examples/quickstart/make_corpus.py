"""Real text with no download: documentation that is installed beside this Python.

`--text models`: the docstrings of the models in Transformers, one document per model. Models
describe their arguments in one another's words, as documents do in the corpora that Retro is used
on. A model's files are one document, and each of its sections is kept once, so a held-out document
is a model that the database does not have.

`--text python`: one document per help topic (`pydoc_data.topics`, the language reference that
`help("yield")` prints) and one per module of the standard library (the docstrings of the module,
its classes and functions).

Source files are parsed, never imported, so nothing opens a window, prints or hangs; only modules
compiled into the interpreter, which have no source file, are inspected alive. Documents come in the
order of a hash of their names: always the same, and mixed, so that the held-out documents at the
end resemble the others.

    python examples/quickstart/make_corpus.py --output corpus.jsonl
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import importlib.util
import inspect
import json
import os
import sys
import sysconfig
import warnings
from collections.abc import Iterator
from importlib import import_module
from itertools import islice
from pathlib import Path
from typing import NamedTuple

#: Folders of the standard library that hold no documentation of it.
SKIPPED_FOLDERS = {"__pycache__", "idlelib", "lib2to3", "site-packages", "dist-packages", "test"}
#: A document shorter than this is left out.
MIN_CHARACTERS = 400

Definition = ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


class Document(NamedTuple):
    """One line of the JSONL file."""

    id: str
    title: str
    text: str


def topic_documents() -> Iterator[Document]:
    """The language reference, one document per help topic."""
    topics: dict[str, str] = import_module("pydoc_data.topics").topics
    for name, text in topics.items():
        yield Document(f"topic:{name}", f"Help on {name}", text.strip())


def source_documents(library: Path) -> Iterator[Document]:
    """The docstrings of every module of the standard library that has a source file."""
    for path in sorted(library.rglob("*.py")):
        parts = path.relative_to(library).with_suffix("").parts
        if SKIPPED_FOLDERS.intersection(parts) or "tests" in parts:
            continue
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        if sections := _file_sections(name, path):
            yield Document(f"module:{name}", f"Module {name}", "\n\n".join(sections))


def model_document(folder: Path) -> Document:
    """The docstrings of a model of Transformers, whose files are in `folder`.

    Equal sections are kept once: several files of a model are generated from one another.
    """
    sections: dict[str, None] = {}
    for path in sorted(folder.glob("*.py")):
        sections.update(dict.fromkeys(_file_sections(path.stem, path)))
    return Document(f"model:{folder.name}", f"Model {folder.name}", "\n\n".join(sections))


def _file_sections(name: str, path: Path) -> list[str]:
    """The sections of a source file; none if it does not parse as this Python."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # old escapes in strings are not our concern
        try:
            tree = ast.parse(path.read_bytes())
        except SyntaxError:
            return []  # a template, or a sample of another Python
    return list(_sections(name, tree))


def builtin_documents() -> Iterator[Document]:
    """The docstrings of the modules that are compiled into the interpreter."""
    for name in sorted(sys.builtin_module_names):
        if name.startswith("_"):
            continue
        module = import_module(name)
        sections = [_section(f"module {name}", inspect.getdoc(module))]
        for member, value in _public(module):
            sections.append(_section(member, inspect.getdoc(value)))
            if inspect.isclass(value):
                sections += [
                    _section(f"{member}.{method}", inspect.getdoc(routine))
                    for method, routine in _public(value)
                ]
        yield Document(f"module:{name}", f"Module {name}", "\n\n".join(filter(None, sections)))


def _public(owner: object) -> list[tuple[str, object]]:
    """The public classes and routines that a module or class itself defines."""
    return [
        (name, value)
        for name, value in sorted(vars(owner).items())
        if not name.startswith("_") and (inspect.isclass(value) or inspect.isroutine(value))
    ]


def _sections(module: str, tree: ast.Module) -> Iterator[str]:
    """`heading, docstring` of the module and of what it defines, in the order of the source."""
    if text := ast.get_docstring(tree):
        yield _section(f"module {module}", text)
    pending: list[tuple[str, Definition]] = _definitions(tree, "")
    while pending:
        name, node = pending.pop(0)
        if text := ast.get_docstring(node):
            yield _section(_signature(name, node), text)
        if isinstance(node, ast.ClassDef):
            pending = _definitions(node, f"{name}.") + pending


def _definitions(node: ast.Module | ast.ClassDef, prefix: str) -> list[tuple[str, Definition]]:
    return [(prefix + child.name, child) for child in node.body if isinstance(child, Definition)]


def _signature(name: str, node: Definition) -> str:
    if isinstance(node, ast.ClassDef):
        bases = ", ".join(ast.unparse(base) for base in node.bases)
        return f"class {name}({bases})" if bases else f"class {name}"
    return f"{name}({ast.unparse(node.args)})"


def _section(heading: str, text: str | None) -> str:
    return f"{heading}\n\n{text.strip()}" if text else ""


def python_documentation(
    max_modules: int | None = None, max_documents: int | None = None
) -> list[Document]:
    """The documents, in the order of a hash of their ids.

    Args:
        max_modules: At most so many modules. The help topics, whose chapters and sections repeat
            one another, are always there: repetition is what a small model retrieves best.
        max_documents: At most so many documents.
    """
    modules = in_order(
        [*source_documents(Path(sysconfig.get_paths()["stdlib"])), *builtin_documents()]
    )
    return in_order([*topic_documents(), *modules[:max_modules]])[:max_documents]


def models_documentation(max_documents: int | None = None) -> list[Document]:
    """A document per model of Transformers, in the order of a hash of their ids.

    Raises:
        ModuleNotFoundError: Transformers is not installed.
    """
    found = importlib.util.find_spec("transformers")
    if found is None or not found.submodule_search_locations:
        raise ModuleNotFoundError("transformers is not installed: pip install transformers")
    models = Path(found.submodule_search_locations[0]) / "models"
    folders = [path for path in models.iterdir() if path.is_dir()]
    folders.sort(key=lambda path: _place(f"model:{path.name}"))
    documents = (model_document(path) for path in folders)
    return list(islice((one for one in documents if _says_something(one)), max_documents))


def in_order(documents: list[Document]) -> list[Document]:
    """Those that say something, each once, in the order of a hash of their ids."""
    found = {one.id: one for one in documents if _says_something(one)}
    return sorted(found.values(), key=lambda one: _place(one.id))


def _says_something(document: Document) -> bool:
    return len(document.text) >= MIN_CHARACTERS


def _place(name: str) -> bytes:
    return hashlib.sha256(name.encode()).digest()


def write_jsonl(documents: list[Document], output: Path) -> int:
    """One JSON object per document, written whole or not at all; returns the bytes written."""
    output.parent.mkdir(parents=True, exist_ok=True)
    temporary = output.with_name(f"{output.name}.{os.getpid()}.tmp")
    with temporary.open("w", encoding="utf-8") as lines:
        for document in documents:
            lines.write(json.dumps(document._asdict(), ensure_ascii=False) + "\n")
    temporary.replace(output)
    return output.stat().st_size


def main() -> int:
    parser = argparse.ArgumentParser(description="Write installed documentation as JSONL.")
    parser.add_argument("--output", type=Path, required=True, help="the .jsonl file to write")
    parser.add_argument(
        "--text",
        choices=("models", "python"),
        default="models",
        help="of Transformers' models, or of Python",
    )
    parser.add_argument(
        "--max-modules", type=int, help="modules beside the help topics (--text python)"
    )
    parser.add_argument("--max-documents", type=int, help="stop after so many documents")
    options = parser.parse_args()
    for flag, value, least in (
        ("--max-modules", options.max_modules, 0),
        ("--max-documents", options.max_documents, 1),
    ):
        if value is not None and value < least:
            parser.error(f"{flag} {value}: must be at least {least}")
    if options.max_modules is not None and options.text != "python":
        parser.error("--max-modules: only --text python has modules")
    try:
        documents = (
            models_documentation(options.max_documents)
            if options.text == "models"
            else python_documentation(options.max_modules, options.max_documents)
        )
    except ModuleNotFoundError as error:
        parser.error(str(error))
    size = write_jsonl(documents, options.output)
    print(f"{options.output}: {len(documents)} documents, {size:,} bytes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
