"""Former home of `retro_mcore.training.setup.initialize`, kept for code written for 0.1."""

from retro_mcore.training.setup.initialize import initialize_parallel, set_seeds

__all__ = ["initialize_parallel", "set_seeds"]
