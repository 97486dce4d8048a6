"""Runs Megatron-Bridge's pretraining of Retro on the CPU.

    python bridge_on_cpu.py RUNS.json

Each run has the arguments of the recipe and changes of the configuration, by dotted name.
"""

# ruff: noqa: E402 (the order matters here)

import sys
from functools import reduce

from tests.bridge import stand_ins
from tests.forked_runs import pretend_cuda, run_all

pretend_cuda()
stand_ins.install()

import modelopt.torch.distill.plugins.megatron as distillation

distillation.get_tensor_shapes_adjust_fn_for_distillation = lambda *args, **kwargs: None

from megatron.bridge.training import setup
from megatron.bridge.training.pretrain import pretrain

# On CUDA it draws from another generator than the one that the weights are drawn from on the CPU.
setup.set_jit_fusion_options = lambda *args, **kwargs: None

from retro_mcore.bridge import forward_step, pretrain_config
from retro_mcore.platform.compatibility import results_through_a_file
from retro_mcore.training.providers import end_refusals_in_one_line

ON_CPU = {
    "dist.distributed_backend": "gloo",
    "ddp.use_distributed_optimizer": False,
    "optimizer.use_distributed_optimizer": False,
    "optimizer.bf16": False,
    "optimizer.adam_beta2": 0.999,
    "optimizer.adam_eps": 1e-8,
    "optimizer.weight_decay": 0.01,
    "scheduler.lr_decay_style": "constant",
    "scheduler.lr_warmup_iters": 0,
    "scheduler.start_weight_decay": 0.01,
    "scheduler.end_weight_decay": 0.01,
    "logger.log_interval": 1,
    "dataset.num_workers": 0,
}


def call(run: dict) -> None:
    end_refusals_in_one_line()
    config = pretrain_config(**{"mixed_precision": None, **run["recipe"]})
    for name, value in {**ON_CPU, **run["changes"]}.items():
        *parts, last = name.split(".")
        setattr(reduce(getattr, parts, config), last, value)
    with results_through_a_file():
        pretrain(config, forward_step)


if __name__ == "__main__":
    run_all(sys.argv[1], call)
