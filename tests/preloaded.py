"""Imported once, by the server from which tests fork their processes: what most of them need."""

from __future__ import annotations

import gc

import matplotlib.backends.backend_agg
import matplotlib.figure  # noqa: F401
import torch
import torch._dynamo  # by the optimizer's first step

from retro_mcore.platform.cpu import disable_compilation

if not torch.cuda.is_available():
    disable_compilation()  # before megatron is imported

import megatron.core.dist_checkpointing.strategies.torch  # noqa: F401

import retro_mcore.training.loop.trainer  # noqa: F401

gc.freeze()  # a collection in a process need not visit all this
