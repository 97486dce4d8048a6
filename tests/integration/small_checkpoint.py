"""A small model trained for some steps on the small project, once."""

from __future__ import annotations

import atexit
import shutil
import tempfile
from functools import cache

from tests.unit.data.projects import built_project


@cache
def small_checkpoint(
    make_vocab_size_divisible_by: int = 128, max_position_embeddings: int | None = None
) -> str:
    """The directory of its checkpoint; do not change it."""
    from retro_mcore.cli.pretrain_retro import PretrainRetroOptions, pretrain_retro

    folder = tempfile.mkdtemp(prefix="retro_checkpoint_")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    pretrain_retro(
        PretrainRetroOptions(
            project_dir=str(built_project()),
            save=folder,
            num_layers=2,
            hidden_size=32,
            num_attention_heads=2,
            retro_decoder_layers=[2],
            retro_encoder_num_layers=1,
            position_embedding_type="rope",
            init_method_std=0.2,
            make_vocab_size_divisible_by=make_vocab_size_divisible_by,
            max_position_embeddings=max_position_embeddings,
            micro_batch_size=2,
            lr=1e-3,
            num_workers=0,
            device="cpu",
        )
    )
    return folder
