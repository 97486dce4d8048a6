"""The Python API that `retro_mcore` exports: projects, training, evaluation and generation."""
