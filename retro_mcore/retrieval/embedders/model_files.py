"""The files of a sentence-transformers, Hugging Face or model2vec model that decide its vectors.

They are its weights, its settings and its tokenizer. A description, or a copy of the weights in
another format, may change.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from retro_mcore.retrieval.embedders.base import DEFAULT_EMBEDDER
from retro_mcore.retrieval.embedders.static_models import modules_of

_SETTINGS = ("config.json", "*_config.json", "config_*.json", "modules.json")
_TOKENIZER = (
    "tokenizer.json", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt",
    "*.model",
)  # fmt: skip
#: Formats of weights; only files of the first that a folder has are loaded.
_WEIGHTS = ("*.safetensors", "*.bin")
#: Variable that names sentence-transformers' own cache.
_PLACE = "SENTENCE_TRANSFORMERS_HOME"


def model_files(name: str) -> list[Path]:
    """The files of a model, by folder or hub name; empty if they are not found."""
    folder = Path(name) if Path(name).is_dir() else _cached(name, "modules.json", "config.json")
    if folder is None:
        return []
    inner = {str(module.get("path") or "") for module in modules_of(folder)} - {"", "."}
    return sorted({*_files_in(folder, ""), *_files_of_modules(folder, inner)})


def _files_of_modules(folder: Path, names: set[str]) -> Iterator[Path]:
    for name in names:
        yield from _files_in(folder / name, "**/")


def _files_in(folder: Path, below: str) -> Iterator[Path]:
    for pattern in (*_SETTINGS, *_TOKENIZER):
        yield from (file for file in folder.glob(below + pattern) if file.is_file())
    for pattern in _WEIGHTS:
        if found := [file for file in folder.glob(below + pattern) if file.is_file()]:
            yield from found
            return


def begins_with_transformer(name: str) -> bool:
    """Whether a model begins with a transformer, as one does that has no list of modules.

    The list of a hub's model is downloaded, as it is when the model is loaded. False if the hub
    cannot be reached.

    Args:
        name: A model's folder or hub name.
    """
    modules = _modules(name)
    if modules is None:
        return False
    first = next(iter(modules), None)
    return first is None or str(first.get("type", "")).endswith("Transformer")


def _modules(name: str) -> Iterable[dict[str, Any]] | None:
    """The list of modules in a model's folder or on its hub; None if the hub is out of reach."""
    from huggingface_hub import _CACHED_NO_EXIST, hf_hub_download, try_to_load_from_cache
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    if name == DEFAULT_EMBEDDER or Path(name).is_dir():
        return modules_of(Path(name))
    if (folder := _cached(name, "modules.json")) is not None:
        return modules_of(folder)
    place = os.environ.get(_PLACE)
    for each in _hub_names(name):
        if try_to_load_from_cache(each, "modules.json", cache_dir=place) is _CACHED_NO_EXIST:
            return []
        try:
            file = hf_hub_download(each, "modules.json", cache_dir=place)
            return modules_of(Path(file).parent)
        except LocalEntryNotFoundError:  # out of reach: what is here is loaded, without a list
            if _cached(each, "config.json") is not None:
                return []
        except EntryNotFoundError:
            return []
        except Exception:  # whatever a hub or a proxy answers: loading the model says it
            continue
    return None


def _hub_names(name: str) -> list[str]:
    return [name] if "/" in name else [f"sentence-transformers/{name}", name]


def _cached(name: str, *files: str) -> Path | None:
    """The folder that a hub name was loaded from, found by one of its files."""
    from huggingface_hub import try_to_load_from_cache

    for place in (os.environ.get(_PLACE), None):
        for each in _hub_names(name):
            for file in files:
                found = try_to_load_from_cache(each, file, cache_dir=place)
                if isinstance(found, str):
                    return Path(found).parent
    return None
