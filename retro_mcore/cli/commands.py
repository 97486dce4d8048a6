"""The commands as Python functions of their flags: `build_db(project_dir="project")`.

Each parses nothing, runs the command with its printed output, and returns what the command's own
function returns. `retro_mcore.Project`, `retro_mcore.pretrain` and the like are the typed API.
"""

from __future__ import annotations

import dataclasses
from importlib import import_module
from typing import Any

from retro_mcore.cli.log_files import command_in_python
from retro_mcore.cli.project_options import verification_of
from retro_mcore.errors import ConfigurationError
from retro_mcore.training.options.run import model_options


def _run(name: str, options: dict[str, Any]) -> Any:
    module = import_module(f"retro_mcore.cli.{name}")
    options_type = getattr(module, "".join(map(str.title, name.split("_"))) + "Options")
    known = [field.name for field in dataclasses.fields(options_type)]
    for option in options:
        if option not in known:
            raise ConfigurationError(
                f"{name}({option}=...)", "unknown option", f"Known: {', '.join(known)}"
            )
    made = options_type(**{**model_options(options_type, options), **options})
    with command_in_python(name, made), verification_of(made):
        return getattr(module, name)(made)


def preprocess_corpus(**options: Any) -> Any:
    """Turn JSONL or text files into an indexed dataset."""
    return _run("preprocess_corpus", options)


def build_db(**options: Any) -> Any:
    """Build the chunk database."""
    return _run("build_db", options)


def build_index(**options: Any) -> Any:
    """Build the Faiss index over the embeddings of the database."""
    return _run("build_index", options)


def query_neighbors(**options: Any) -> Any:
    """Find the neighbors of every training, validation and test chunk."""
    return _run("query_neighbors", options)


def update_db(**options: Any) -> Any:
    """Retrieve from more documents or from another database, for the same samples."""
    return _run("update_db", options)


def set_samples(**options: Any) -> Any:
    """Change the length, number, order or batch size of a project's samples."""
    return _run("set_samples", options)


def plan_scale(**options: Any) -> Any:
    """Estimate chunks, disk, memory and hours of a database before it is built."""
    return _run("plan_scale", options)


def inspect_neighbors(**options: Any) -> Any:
    """Write a page of samples, their neighbors and the overlap of both."""
    return _run("inspect_neighbors", options)


def pretrain_retro(**options: Any) -> Any:
    """Train a Retro model."""
    return _run("pretrain_retro", options)


def convert_checkpoint(**options: Any) -> Any:
    """Convert checkpoints of Megatron's Retro and of GPT models into ours, and back."""
    return _run("convert_checkpoint", options)


def finetune_retro(**options: Any) -> Any:
    """Tune a Retro model on instructions and questions."""
    return _run("finetune_retro", options)


def evaluate_perplexity(**options: Any) -> Any:
    """Measure perplexity, bits per byte and leakage by kind of neighbors."""
    return _run("evaluate_perplexity", options)


def evaluate_qa(**options: Any) -> Any:
    """Answer a test file's questions and score the answers."""
    return _run("evaluate_qa", options)


def generate(**options: Any) -> Any:
    """Continue prompts with live retrieval."""
    return _run("generate", options)


def serve(**options: Any) -> Any:
    """Serve completions with live retrieval over HTTP."""
    return _run("serve", options)


def doctor(**options: Any) -> Any:
    """Check whether a node, or all ranks of a job, are ready for a long run."""
    return _run("doctor", options)


def verify(**options: Any) -> Any:
    """Check whether the files of a project or of checkpoints are what was written."""
    return _run("verify", options)
