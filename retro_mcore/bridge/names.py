"""Errors about options, with the names that they have in Megatron-Bridge."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields

from retro_mcore.errors import RetroError, raise_problems
from retro_mcore.model.options import ModelOptions

_LAYOUT = (
    *("tensor_model_parallel_size", "sequence_parallel", "pipeline_model_parallel_size"),
    *("decoder_first_pipeline_num_layers", "decoder_last_pipeline_num_layers"),
    *("pipeline_model_parallel_layout", "context_parallel_size", "cp_comm_type"),
)
#: Options of the recipe, by the names that our trainer's flags have. Others are not given here.
_NAMES = {field.name: field.name for field in fields(ModelOptions)} | {
    "project_dir": "project_dir",
    "micro_batch_size": "micro_batch_size",
    "lr": "lr",
    "min_lr": "min_lr",
    **{name: name for name in _LAYOUT},
    "save": "save",
    "load": "huggingface",
}


@contextmanager
def names_of_recipe() -> Iterator[None]:
    """Let errors name options as the recipe does: `num_layers` for our trainer's `--num-layers`."""
    try:
        yield
    except RetroError as error:
        problems = [
            type(each)(*map(_without_flags, (each.subject, each.found, each.hint)))
            for each in error.problems
        ]
        raise_problems(problems)


def _without_flags(text: str) -> str:
    return re.sub(r"--([a-z][a-z0-9-]*)", _name, text)


def _name(flag: re.Match[str]) -> str:
    return _NAMES.get(flag[1].replace("-", "_"), flag[0])
