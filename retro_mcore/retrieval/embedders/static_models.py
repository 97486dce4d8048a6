"""Files of static models: a vector per token, and a tokenizer.

Three layouts are known: the installed wordllama package (https://github.com/dleemiller/WordLlama),
folders that model2vec saves (https://github.com/MinishLab/model2vec), and folders of a
sentence-transformers StaticEmbedding. All are read without those libraries.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from retro_mcore.errors import MissingDependencyError

#: The static model that is installed as a package.
STATIC_EMBEDDER = "static"
_PACKAGE = "wordllama"
_WEIGHTS, _TOKENIZER = "model.safetensors", "tokenizer.json"
#: Names of the token vectors: sentence-transformers', and model2vec's with what may lie beside it.
_TABLE, _MODEL2VEC_TABLE = "embedding.weight", "embeddings"
_NAMES = ({_TABLE}, {_MODEL2VEC_TABLE, "weights", "mapping"})
_MODULES = ("StaticEmbedding", "Normalize")


@dataclass(frozen=True)
class StaticFiles:
    """The files of a static model.

    Attributes:
        weights: A safetensors file.
        tokenizer: The file of a `tokenizers` tokenizer.
        normalize: Whether the mean is L2-normalized.
        settings: Files that say so.
    """

    weights: Path
    tokenizer: Path
    normalize: bool
    settings: tuple[Path, ...] = ()


def installed_files() -> StaticFiles:
    """The files in the wordllama package, which is not imported.

    Raises:
        MissingDependencyError: it is not installed.
    """
    spec = find_spec(_PACKAGE)
    if spec is None or spec.origin is None:
        raise MissingDependencyError(
            _PACKAGE, "not installed", "Run pip install wordllama, or name another --embedder"
        )
    folder = Path(spec.origin).parent
    weights = folder / "weights" / "l2_supercat_256.safetensors"
    # The package compares vectors by their cosine.
    return StaticFiles(weights, folder / "tokenizers" / "l2_supercat_tokenizer_config.json", True)


def find_static_files(name: str) -> StaticFiles | None:
    """The files in a static model's folder; None if it is a folder of something else, or none."""
    folder = Path(name)
    for place in (folder, folder / "0_StaticEmbedding"):
        files = place / _WEIGHTS, place / _TOKENIZER
        if all(file.is_file() for file in files) and _tensor_names(files[0]) is not None:
            modules = [module.get("type", "").split(".")[-1] for module in modules_of(folder)]
            if not set(modules) <= set(_MODULES):
                return None  # more is computed than a mean
            normalize = _read_json(folder / "config.json", {}).get("normalize")
            normalizes = bool("Normalize" in modules if normalize is None else normalize)
            settings = (folder / "config.json", folder / "modules.json")
            return StaticFiles(*files, normalizes, tuple(filter(Path.is_file, settings)))
    return None


def is_static(name: str) -> bool:
    """Whether a name is "static", or the folder of a static model; see `retrieval.embedders`."""
    return name == STATIC_EMBEDDER or find_static_files(name) is not None


def modules_of(folder: Path) -> Iterable[dict[str, Any]]:
    """The modules of a sentence-transformers model, as modules.json lists them."""
    return _read_json(folder / "modules.json", [])


def _read_json(path: Path, default: Any) -> Any:
    """The content of a file; `default` if it is missing or of another type."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return default
    return found if isinstance(found, type(default)) else default


def _tensor_names(weights: Path) -> set[str] | None:
    """Names of a static model's tensors; None if the file holds something else."""
    try:
        with safe_open(weights, framework="np") as file:
            names = set(file.keys())
    except (SafetensorError, OSError):
        return None
    return names if any(names <= known and names & known for known in _NAMES) else None


def read_token_vectors(weights: Path) -> tuple[np.ndarray, bool]:
    """Read a vector per token of the vocabulary, f32 [tokens, dimension].

    Returns:
        The vectors, and whether the unknown token is left out of a mean, as model2vec does it.

    Raises:
        KeyError, SafetensorError, IndexError, ValueError: the file is damaged.
    """
    with safe_open(weights, framework="np") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    ours = _MODEL2VEC_TABLE in tensors
    table = tensors[_MODEL2VEC_TABLE if ours else _TABLE].astype(np.float32)
    if table.ndim != 2:
        raise ValueError(f"its token vectors have the shape {list(table.shape)}")
    if "mapping" in tensors:
        table = table[tensors["mapping"].astype(np.int64)]
    if "weights" in tensors:
        table = table * tensors["weights"].astype(np.float32)[:, None]
    return np.ascontiguousarray(table), ours
