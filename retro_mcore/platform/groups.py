"""Megatron's process groups, given up so that their threads end."""

from __future__ import annotations

import gc
import sys
from contextlib import suppress

import torch.distributed as dist

from retro_mcore.distributed import before_leaving


def leave_model_parallel() -> None:
    """Give up megatron's groups, and their threads: megatron forgets them without ending them.

    Does nothing where megatron-core was not imported.
    """
    parallel_state = sys.modules.get("megatron.core.parallel_state")
    if parallel_state is None:
        return
    groups = getattr(parallel_state, "_global_process_group_list", None) or []
    parallel_state.destroy_model_parallel()
    for name, value in vars(parallel_state).items():
        if isinstance(value, dist.ProcessGroup):  # it forgets to forget some
            setattr(parallel_state, name, None)
    for group in groups:
        if group is not None:  # the default group stays
            with suppress(ValueError, AssertionError):  # megatron did end some
                dist.destroy_process_group(group)
    gc.collect()  # models of the last layout hold groups, in cycles, and those keep their threads


before_leaving(leave_model_parallel)
