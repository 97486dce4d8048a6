"""Former home of `retro_mcore.checkpoint.conversion`, kept for code written for 0.1."""
