"""A project on the documentation inside Python, for benchmarks that retrieve."""

from __future__ import annotations

from pathlib import Path

from retro_mcore.cli import commands as retro


def build_project(folder: Path, chunk_length: int = 64) -> Path:
    """Make the project, with its database, index and neighbors: some hundred chunks."""
    from pydoc_data.topics import topics

    texts, project = folder / "texts", folder / "project"
    if (project / "config.json").is_file():
        return project
    texts.mkdir(parents=True)
    for name in sorted(topics, key=lambda name: -len(topics[name]))[:40]:
        (texts / f"{name}.txt").write_text(topics[name][:1500], encoding="utf-8")
    where = {"project_dir": str(project)}
    retro.preprocess_corpus(
        **where,
        input=[str(texts)],
        vocab_size=2000,
        split="90,10,0",
        seq_length=512,
        retro_chunk_length=chunk_length,
        global_batch_size=2,
        eval_iters=1,
        train_samples=4,
    )
    retro.build_db(**where)
    retro.build_index(**where)
    retro.query_neighbors(**where)
    return project


def train_model(folder: Path, project: Path, num_layers: int, hidden_size: int) -> Path:
    """A model of some size, two steps old: its texts mean nothing, its time does."""
    checkpoint = folder / "model"
    if not checkpoint.is_dir():
        retro.pretrain_retro(
            project_dir=str(project),
            save=str(checkpoint),
            num_layers=num_layers,
            hidden_size=hidden_size,
            num_attention_heads=hidden_size // 64,
            retro_decoder_layers=list(range(2, num_layers + 1, 2)),
            position_embedding_type="rope",
            micro_batch_size=1,
            train_iters=2,
            lr=1e-4,
            num_workers=0,
            device="cpu",
        )
    return checkpoint
