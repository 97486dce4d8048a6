"""Check the values of config.json and retro_mcore.json."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import fields
from pathlib import PurePath
from typing import Any

from retro_mcore.project.fields import is_text, percentages_of, problems_of, show

_OPTIONAL = {
    "retro_gpt_data_cache_path",
    "retro_gpt_tokenizer_model",
    "retro_gpt_vocab_file",
    "retro_gpt_merge_file",
}
_LONGEST = 1 << 24  # tokens
_MOST = (1 << 63) - 1
_RANGES = {
    "retro_block_size": (1, _MOST),
    "retro_gpt_chunk_length": (1, _LONGEST),
    "retro_gpt_seq_length": (1, _LONGEST),
    "retro_gpt_global_batch_size": (1, _MOST),
    "retro_gpt_train_samples": (1, _MOST),
    "retro_gpt_eval_interval": (1, _MOST),
    "retro_gpt_eval_iters": (0, _MOST),
    "retro_gpt_seed": (0, (1 << 32) - 1),
}
_SETTINGS_RANGES = {
    "embedding_dimension": (1, 1 << 20),
    "nprobe": (1, (1 << 31) - 1),
    "ef_search": (1, (1 << 31) - 1),
    "num_neighbors_query": (1, (1 << 31) - 1),
    "num_neighbors_save": (1, (1 << 31) - 1),
    "removed_documents": (0, _MOST),
}
_LENGTHS = ("retro_gpt_seq_length", "retro_gpt_chunk_length")
_PATHS = (
    "retro_gpt_tokenizer_model",
    "retro_gpt_vocab_file",
    "retro_gpt_merge_file",
    "retro_bert_vocab_file",
)


def needed_keys(kind: type) -> set[str]:
    """Required keys of config.json, derived from `ProjectConfig`."""
    names = {field.name for field in fields(kind) if field.name.startswith("retro_gpt_")}
    return names - _OPTIONAL


def config_problems(values: Mapping[str, Any], kind: type) -> dict[str, str]:
    """Problems of config.json, by key. Missing and unknown keys are ignored.

    Args:
        values: Content of the file.
        kind: `ProjectConfig`.
    """
    known = {field.name for field in fields(kind)} - {"unknown"}
    given = {name: value for name, value in values.items() if name in known}
    if given.get("retro_neighbor_dirs", ...) is None:  # as an empty one
        del given["retro_neighbor_dirs"]
    blend = _blend_problem(given.pop("retro_gpt_data_path", None))
    problems = problems_of(given, kind, _RANGES)
    if blend is not None and "retro_gpt_data_path" in values:
        problems["retro_gpt_data_path"] = blend
    for name, check in _CHECKS.items():
        if name in given and name not in problems and (problem := check(given[name])):
            problems[name] = f"is {show(given[name])}, {problem}"
    if all(name in given and name not in problems for name in _LENGTHS):
        sequence, chunk = (given[name] for name in _LENGTHS)
        if sequence % chunk:
            problems[_LENGTHS[0]] = f"is {sequence}, not a multiple of the chunk length {chunk}"
    return problems


def settings_problems(values: Mapping[str, Any], kind: type) -> dict[str, str]:
    """Problems of retro_mcore.json, by key. Unknown keys are ignored.

    Args:
        values: Content of the file.
        kind: `ProjectSettings`.
    """
    problems = problems_of(values, kind, _SETTINGS_RANGES)
    index = values.get("index_string")
    if isinstance(index, str) and (not index.strip() or "/" in index or index in (".", "..")):
        problems["index_string"] = f"is {show(index)}, not a Faiss factory string"
    names = values.get("chunk_neighbor_dirs")
    of_names = None if "chunk_neighbor_dirs" in problems else _neighbor_dirs_problem(names or {})
    if of_names is not None:
        problems["chunk_neighbor_dirs"] = f"is {show(names)}, {of_names}"
    return problems


def _blend_problem(blend: Any) -> str | None:
    """The problem of a list of weights and prefixes, or of one prefix; None if it is valid."""
    if not isinstance(blend, list) or not (len(blend) == 1 or (blend and len(blend) % 2 == 0)):
        return f"is {show(blend)}, not a list of weight, prefix, weight, prefix …, or of one prefix"
    prefixes = blend if len(blend) == 1 else blend[1::2]
    for prefix in prefixes:
        if problem := _prefix_problem(prefix):
            return f"has the prefix {show(prefix)}, {problem}"
    for weight in blend[::2] if len(blend) > 1 else []:
        if not _is_weight(weight):
            return f"has the weight {show(weight)}, not a number above 0"
    return None


def _prefix_problem(prefix: Any) -> str | None:
    if not is_text(prefix):
        return "not a text"
    return _path_problem(prefix) if PurePath(prefix).name else "which names nothing"


def _is_weight(weight: Any) -> bool:
    if isinstance(weight, bool):
        return False
    try:
        return 0 < float(weight) < math.inf
    except (TypeError, ValueError, OverflowError):
        return False


def _path_problem(path: str | None) -> str | None:
    """The problem of a path. Absolute paths are valid; paths that leave the project are not."""
    if path is None:
        return None
    if not path.strip():
        return "which names nothing"
    return "which leads out of the project" if ".." in PurePath(path).parts else None


def _leaves(path: str) -> bool:
    return PurePath(path).is_absolute() or ".." in PurePath(path).parts


def _neighbor_dirs_problem(names: Mapping[str, str | None]) -> str | None:
    for name in names.values():
        if name is not None and (not name.strip() or _leaves(name)):
            return "one of which is not a directory under query/"
    return None


def _database_problem(database: Mapping[str, Any] | None) -> str | None:
    if database is None:
        return None
    if not database["project_dir"].strip():
        return "which names no project"
    return _neighbor_dirs_problem(database["neighbor_dirs"])


def _bert_problem(name: str | None) -> str | None:
    known = ("BertWordPieceLowerCase", "BertWordPieceCase")
    return None if name is None or name in known else f"not {' or '.join(known)}"


_NO_SPLIT = "not three percentages that sum to 100, the first above 0, such as 98,2,0"
#: Checks beyond the values' types. Each returns the problem, or None.
_CHECKS: dict[str, Callable[[Any], str | None]] = {
    **dict.fromkeys(_PATHS, _path_problem),
    "retro_bert_tokenizer_type": _bert_problem,
    "retro_gpt_split": lambda split: None if percentages_of(split) else _NO_SPLIT,
    "retro_neighbor_dirs": _neighbor_dirs_problem,
    "retro_database": _database_problem,
}
