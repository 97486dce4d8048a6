"""Model card of a converted checkpoint: what is known of its data, settings and perplexities."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from retro_mcore.checkpoint.conversion.formats import Checkpoint
from retro_mcore.checkpoint.conversion.model_fields import Flags
from retro_mcore.errors import RetroError
from retro_mcore.project.config import ProjectConfig, ProjectSettings
from retro_mcore.project.paths import ProjectPaths
from retro_mcore.retrieval.database import ChunkDatabase
from retro_mcore.training.reporting.metrics import METRICS_FILE, losses, read_metrics

_TRAINING = {
    "train_iters": "iterations asked for",
    "global_batch_size": "samples per iteration",
    "lr": "learning rate",
    "min_lr": "lowest learning rate",
    "lr_decay_style": "schedule",
    "weight_decay": "weight decay",
    "seed": "seed",
}

_USE_RETRO = """\
```python
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained(DIRECTORY, trust_remote_code=True)
# Without neighbors the model is its decoder.
logits = model(input_ids).logits
# [batch, chunks of {chunk}, {neighbors}, {length}]; -1 is padding or a missing neighbor.
logits = model(input_ids, retrieved_input_ids=neighbors).logits
# A function of chunks [n, {chunk}] to neighbors [n, {neighbors}, {length}].
tokens = model.generate(input_ids, retriever=function)
```

`retro_mcore.project_retriever(PROJECT, model.config)` is such a function.
"""
_USE_DECODER = """\
```python
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained(DIRECTORY)
```
"""


def model_card(
    checkpoint: Checkpoint, flags: Flags, config: Mapping[str, Any], project_dir: str | None
) -> str:
    """The text of README.md.

    Args:
        checkpoint: The original.
        flags: The model's options, resolved.
        config: The content of config.json.
        project_dir: The model's project, if it is known.
    """
    retro = config["model_type"] == "retro" and not flags["no_retrieval"]
    use = _USE_DECODER
    if config["model_type"] == "retro":
        use = _USE_RETRO.format(
            chunk=flags["retro_chunk_length"],
            neighbors=flags["retro_num_neighbors"],
            length=flags["retro_num_retrieved_chunks"] * flags["retro_chunk_length"],
        )
    sections = {
        "Use": use,
        "Model": _table(_model_rows(checkpoint, flags, retro)),
        "Training": _table(_training_rows(checkpoint, flags)),
        "Data": _table(_data_rows(flags, project_dir)),
        "Perplexity": _table(_perplexity_rows(checkpoint)),
    }
    tags = "\n".join(f"- {tag}" for tag in ("retro", "retrieval")) if retro else "- text-generation"
    head = f"---\nlibrary_name: transformers\npipeline_tag: text-generation\ntags:\n{tags}\n---\n"
    title = "A Retro model" if retro else "A language model"
    body = "".join(f"\n## {name}\n\n{text}" for name, text in sections.items() if text)
    return f"{head}\n# {title}\n\nWritten by retro-mcore's `convert_checkpoint`.\n{body}"


def _table(rows: Iterator[tuple[str, object]]) -> str:
    lines = [f"| {name} | {_plain(value)} |" for name, value in rows]
    return "\n".join(["| | |", "|---|---|", *lines, ""]) if lines else ""


def _plain(value: object) -> str:
    return " ".join(str(value).replace("|", "\\|").split())


def _model_rows(checkpoint: Checkpoint, flags: Flags, retro: bool) -> Iterator[tuple[str, object]]:
    yield "parameters", f"{sum(weight.numel for weight in checkpoint.weights.values()):,}"
    yield "layers", f"{flags['num_layers']} of width {flags['hidden_size']}"
    yield "attention heads", flags["num_attention_heads"]
    yield "trained on texts of", f"{flags['seq_length']} tokens"
    if retro:
        yield "chunk length", flags["retro_chunk_length"]
        yield "neighbors per chunk", flags["retro_num_neighbors"]
        yield "chunks per neighbor", flags["retro_num_retrieved_chunks"]
        yield "computes as", flags.get("retro_origin") or "Borgeaud et al. 2022"
    yield "converted from", checkpoint.source


def _training_rows(checkpoint: Checkpoint, flags: Flags) -> Iterator[tuple[str, object]]:
    saved = {**vars(checkpoint.common["args"])} if "args" in checkpoint.common else {}
    iteration = checkpoint.common.get("iteration")
    if isinstance(iteration, int) and iteration:
        yield "iterations", f"{iteration:,}"
    if samples := checkpoint.common.get("consumed_samples"):
        yield "samples", f"{samples:,}"
        yield "tokens", f"{samples * flags['seq_length']:,}"
    for name, label in _TRAINING.items():
        if saved.get(name) is not None:
            yield label, saved[name]


def _data_rows(flags: Flags, project_dir: str | None) -> Iterator[tuple[str, object]]:
    yield "tokenizer", f"{flags['tokenizer_type']}, {flags['vocab_size']:,} tokens"
    if project_dir is None:
        return
    project = ProjectConfig.load(project_dir)
    settings = ProjectSettings.load(ProjectPaths(project_dir).root)
    yield "datasets", ", ".join(project.retro_gpt_data_path)
    yield "split into train, valid and test", project.retro_gpt_split
    yield "documents in samples", settings.samples
    try:
        yield "chunks in the database", f"{len(ChunkDatabase.open(project_dir)):,}"
    except RetroError:  # not built, or elsewhere
        return
    yield "embedder of the chunks", settings.embedder
    yield "index", settings.index_string


def _perplexity_rows(checkpoint: Checkpoint) -> Iterator[tuple[str, object]]:
    """The last losses that the run reported up to the checkpoint."""
    file = checkpoint.path.parent / METRICS_FILE
    if checkpoint.source != "retro-mcore" or not Path(file).is_file():
        return
    last = checkpoint.common.get("iteration") or math.inf
    for kind, label in (("train", "training"), ("valid", "validation"), ("test", "test")):
        found = [(i, loss) for i, loss in losses(read_metrics(file), kind) if i <= last]
        if found:
            iteration, loss = found[-1]
            yield f"{label}, iteration {iteration:,}", f"{math.exp(loss):.2f}"
