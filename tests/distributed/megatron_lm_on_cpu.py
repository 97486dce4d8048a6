"""Runs Megatron-LM's own trainer on the CPU, as a training script of a user does.

    python megatron_lm_on_cpu.py RUNS.json

Each run has the flags of its command line. With "parse", the arguments are written as NAME.json and
all flags of the parser as NAME.flags.json, and nothing is trained. There is no `__main__` guard, as
in many users' scripts.
"""

# ruff: noqa: E402 (the order matters here)

import json
import sys
from pathlib import Path

from tests.forked_runs import pretend_cuda, run_all

pretend_cuda()

import megatron.training.initialize

# On CUDA it draws from another generator than the one that the weights are drawn from on the CPU.
megatron.training.initialize._warmup_jit_function = lambda *args, **kwargs: None

from retro_mcore.training.providers import extra_args_provider, main


def call(run: dict) -> None:
    sys.argv = ["pretrain_retro.py", *run["flags"]]
    if not run["parse"]:
        main()
        return
    from megatron.training.arguments import parse_args

    parsers: list = []

    def provider(parser):
        parsers.append(extra_args_provider(parser))
        return parsers[0]

    text = json.dumps(vars(parse_args(provider)), default=str)
    Path(f"{run['name']}.json").write_text(text, encoding="utf-8")
    flags = json.dumps([*parsers[0]._option_string_actions])
    Path(f"{run['name']}.flags.json").write_text(flags, encoding="utf-8")


run_all(sys.argv[1], call)
