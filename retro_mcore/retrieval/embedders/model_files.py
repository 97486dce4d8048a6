"""The files of a sentence-transformers, Hugging Face or model2vec model that decide its vectors.

They are its weights, its settings and its tokenizer. A description, or a copy of the weights in
another format, may change.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from retro_mcore.retrieval.embedders.static_models import modules_of

_SETTINGS = ("config.json", "*_config.json", "config_*.json", "modules.json")
_TOKENIZER = (
    "tokenizer.json", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt",
    "*.model",
)  # fmt: skip
#: Formats of weights; only files of the first that a folder has are loaded.
_WEIGHTS = ("*.safetensors", "*.bin")


def model_files(name: str) -> list[Path]:
    """The files of a model, by folder or hub name; empty if they are not found."""
    folder = Path(name) if Path(name).is_dir() else _cached(name)
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


def _cached(name: str) -> Path | None:
    """The folder that a hub name was loaded from."""
    from huggingface_hub import try_to_load_from_cache

    names = [name] if "/" in name else [f"sentence-transformers/{name}", name]
    for place in (os.environ.get("SENTENCE_TRANSFORMERS_HOME"), None):
        for each in names:
            for file in ("modules.json", "config.json"):
                found = try_to_load_from_cache(each, file, cache_dir=place)
                if isinstance(found, str):
                    return Path(found).parent
    return None
