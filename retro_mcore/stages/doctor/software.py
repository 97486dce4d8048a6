"""Versions of packages, and whether they import."""

from __future__ import annotations

import importlib
import importlib.util
import warnings
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from retro_mcore.stages.doctor.findings import Finding, error, note, ok, warning

AREA = "software"
#: Requirements whose absence shows late: what happens then.
_CONSEQUENCES = {"psutil": "saving a checkpoint would hang"}
#: Import names of packages that must import, not only be installed.
_IMPORTED = {"torch": "torch", "megatron-core": "megatron.core", "h5py": "h5py"}
_FAISS = ("faiss-gpu", "faiss-gpu-cuvs", "faiss-cpu")


def check_software(cuda: bool) -> list[Finding]:
    """Check the package's requirements, and optional packages.

    Args:
        cuda: Whether the run uses GPUs.
    """
    return [*_required(), *_imports(), *_optional(cuda), *_faiss(cuda)]


def installed(name: str) -> str | None:
    """The version of a package; None if it is not installed."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def stated_requirements() -> list[Requirement] | None:
    """This package's requirements without extras, installed or in a clone; None: not known."""
    found = _all_requirements()
    if found is None:
        return None
    return [each for each in found if each.marker is None or each.marker.evaluate({"extra": ""})]


def optional_range(name: str) -> SpecifierSet:
    """The releases of a package that this package's extras allow; all if that is not known."""
    stated = [each for each in _all_requirements() or [] if each.name == name]
    return stated[0].specifier if stated else SpecifierSet()


def _all_requirements() -> list[Requirement] | None:
    """With those of extras, whose markers name them."""
    clone = Path(__file__).parents[3] / "pyproject.toml"
    try:
        texts = requires("retro-mcore") or []
    except PackageNotFoundError:
        if not clone.is_file() or importlib.util.find_spec("tomllib") is None:
            return None
        project = importlib.import_module("tomllib").loads(clone.read_text("utf-8"))["project"]
        texts = list(project["dependencies"])
        for extra, optional in project["optional-dependencies"].items():
            texts += [f'{text}; extra == "{extra}"' for text in optional]
    return [Requirement(text) for text in texts]


def _required() -> Iterator[Finding]:
    stated = stated_requirements()
    if stated is None:
        yield note(AREA, "retro-mcore", "is not installed as a package: versions are not compared")
    yield from map(_compared, stated or [])


def _compared(requirement: Requirement) -> Finding:
    name, found = requirement.name, installed(requirement.name)
    install = f"pip install '{requirement}'"
    if found is None:
        why = f", so {_CONSEQUENCES[name]}" if name in _CONSEQUENCES else ""
        return error(AREA, name, f"is not installed{why}", install)
    if not requirement.specifier.contains(found, prereleases=True):
        return error(AREA, name, f"{found}, not {requirement.specifier}", install)
    return ok(AREA, name, found)


def _imports() -> Iterator[Finding]:
    for package, module in _IMPORTED.items():
        if installed(package) and (failure := _failure(module)):
            yield error(AREA, package, f"does not import: {failure}", f"Reinstall {package}")


def _failure(module: str) -> str | None:
    """Why a module does not import; None if it does."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # advice about packages that are reported here
            importlib.import_module(module)
    except Exception as caught:  # a broken extension may raise anything
        return f"{type(caught).__name__}: {' '.join(str(caught).split())[:200]}"
    return None


def _optional(cuda: bool) -> Iterator[Finding]:
    if not cuda:
        return
    engine = installed("transformer-engine")
    if engine is None:
        fix = 'pip install "retro-mcore[gpu]", or use an image that has it'
        yield warning(AREA, "transformer-engine", "is not installed: layers are local, no fp8", fix)
    elif not optional_range("transformer-engine").contains(engine, prereleases=True):
        found = f"{engine}, not {optional_range('transformer-engine')}"
        fix = "Use an image that has it, or --transformer-impl local"
        yield error(AREA, "transformer-engine", found, fix)
    elif failure := _failure("transformer_engine.pytorch"):
        fix = "Install the build for this version of torch and CUDA, or --transformer-impl local"
        yield error(AREA, "transformer-engine", f"{engine} does not import: {failure}", fix)
    else:
        yield ok(AREA, "transformer-engine", engine)
    for name in ("apex", "flash-attn"):
        yield note(AREA, name, installed(name) or "is not installed (optional)")


def _faiss(cuda: bool) -> Iterator[Finding]:
    found = [name for name in _FAISS if installed(name)]
    if len(found) > 1:
        fix = f"Keep one: pip uninstall {' '.join(found)}, then install it again"
        yield error(AREA, "Faiss", f"{' and '.join(found)} are installed over each other", fix)
        return
    failure = _failure("faiss")
    if failure is not None:
        extra = "gpu" if cuda else "cpu"
        fix = f'pip install "retro-mcore[{extra}]" for build_index and query_neighbors'
        yield warning(AREA, "Faiss", f"does not import: {failure}", fix)
        return
    if found and not optional_range(found[0]).contains(installed(found[0]) or "", True):
        told = f"{found[0]} {installed(found[0])}, not {optional_range(found[0])}"
        fix = f"pip install '{found[0]}{optional_range(found[0])}'"
        yield warning(AREA, "Faiss", told, fix)
        return
    gpus = getattr(importlib.import_module("faiss"), "get_num_gpus", lambda: 0)()
    built = f"sees {gpus} GPUs" if gpus else "CPU build, or no GPU"
    yield ok(AREA, "Faiss", f"{found[0] if found else ''} {_faiss_version()}, {built}".strip())


def _faiss_version() -> str:
    return str(getattr(importlib.import_module("faiss"), "__version__", "of unknown version"))
