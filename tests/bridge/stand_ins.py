"""Empty packages for what Megatron-Bridge imports without a guard and does not use on the CPU."""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
from abc import ABCMeta
from types import ModuleType
from typing import Any

NAMES = ("transformer_engine", "nvidia_resiliency_ext", "modelopt", "megatron.energon")


class _Names:
    """Has every public name, as an empty class that has them, too."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Empty(name, (), {"is_stand_in": True})


class _Empty(_Names, ABCMeta):
    """The type of such classes. Called, they decorate."""

    def __getitem__(cls, parameters: Any) -> _Empty:
        return cls

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        if "is_stand_in" not in vars(cls):  # a class that derives from one
            return super().__call__(*args, **kwargs)
        return args[0] if args and callable(args[0]) else lambda function=None: function


class _Module(_Names, ModuleType):
    pass


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if any(name == each or name.startswith(f"{each}.") for each in NAMES):
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        return _Module(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        pass


def install() -> None:
    """Let packages that are not installed be imported.

    Megatron-Core is imported before: it uses these packages where it finds them.
    """
    import megatron.training.training  # noqa: F401

    sys.meta_path.append(_Finder())
