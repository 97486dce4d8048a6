"""Former home of `retro_mcore.checkpoint.conversion.upstream`, kept for code written for 0.1."""

from retro_mcore.checkpoint.conversion.upstream import export_state_dict, load_state_dict

__all__ = ["export_state_dict", "load_state_dict"]
