"""Loads directories of RetroForCausalLM into Megatron-Bridge on the CPU, and writes them again.

    python convert_on_cpu.py RUNS.json

A run has directories that are compared and written to DIRECTORY.RANKS, or refused ones, with the
layout that is asked for; what they are refused with goes to refused.json.
"""

# ruff: noqa: E402 (the order matters here)

import json
import sys
from pathlib import Path
from typing import Any

from tests.bridge import stand_ins
from tests.forked_runs import pretend_cuda, run_all

pretend_cuda()
stand_ins.install()

import torch
from megatron.bridge import AutoBridge
from megatron.bridge.models.conversion.utils import unwrap_model
from megatron.core import parallel_state

from retro_mcore.bridge import RetroBridge
from retro_mcore.checkpoint.conversion.model_weights import gather_weights
from retro_mcore.checkpoint.conversion.retro_huggingface import read_retro_huggingface
from retro_mcore.errors import RetroError


def built(directory: str, **layout: Any) -> tuple[AutoBridge, list[Any]]:
    # Bridge copies the model's code, with the tokenizer, where it trusts it.
    bridge = AutoBridge.from_hf_pretrained(directory, trust_remote_code=has_tokenizer(directory))
    config = bridge.to_megatron_provider()
    written = json.dumps(RetroBridge.megatron_to_hf_config(config))
    assert json.loads(written) == json.loads((Path(directory) / "config.json").read_text())
    for name, value in layout.items():
        setattr(config, name, value)
    config.finalize()
    if not parallel_state.model_parallel_is_initialized():
        config.initialize_model_parallel(seed=0)
    return bridge, config.provide_distributed_model(wrap_with_ddp=False)


def has_tokenizer(directory: str) -> bool:
    return (Path(directory) / "tokenizer.json").exists()


def call(run: dict) -> None:
    torch.distributed.init_process_group("gloo")
    ranks = run["ranks"]
    layout = {"tensor_model_parallel_size": ranks, "sequence_parallel": ranks > 1}
    for directory in run.get("directories", ()):
        bridge, models = built(directory, **layout)
        _flags, wanted, _notes = read_retro_huggingface(Path(directory))
        found = gather_weights(unwrap_model(models))
        assert found.keys() == wanted.keys()
        different = [name for name in wanted if not torch.equal(found[name], wanted[name].load())]
        assert not different, (directory, different)
        save = bridge.save_hf_pretrained if has_tokenizer(directory) else bridge.save_hf_weights
        save(models, f"{directory}.{ranks}", show_progress=False)
        print(directory, "written")
    refused = {}
    for directory, changes in run.get("refused", {}).items():
        try:
            built(directory, **changes)
        except RetroError as error:
            refused[directory] = str(error)
    if refused:
        Path("refused.json").write_text(json.dumps(refused), encoding="utf-8")


if __name__ == "__main__":
    run_all(sys.argv[1], call)
