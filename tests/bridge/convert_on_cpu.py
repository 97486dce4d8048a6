"""Loads directories of RetroForCausalLM into Megatron-Bridge on the CPU, and writes them again.

    python convert_on_cpu.py RUNS.json

A run has directories that are compared and written to DIRECTORY.RANKS, or refused ones, with the
layout that is asked for; what they are refused with goes to refused.json.
"""

# ruff: noqa: E402 (the order matters here)

import json
import os
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from tests.bridge import stand_ins
from tests.forked_runs import pretend_cuda, run_all

os.environ["HF_HUB_CACHE"] = str(Path("hub").resolve())
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
    if not parallel_state.model_parallel_is_initialized():
        config.tensor_model_parallel_size = torch.distributed.get_world_size()
        config.initialize_model_parallel(seed=0)
    for name, value in layout.items():
        setattr(config, name, value)
    return bridge, config.provide_distributed_model(wrap_with_ddp=False)


def has_tokenizer(directory: str) -> bool:
    return (Path(directory) / "tokenizer.json").exists()


def exports_in_other_dtypes(directory: str) -> None:
    """Write a directory's weights after a step in another dtype."""
    bridge, models = built(directory)
    other = torch.float32 if directory == "bf16" else torch.bfloat16
    models = [model.to(other) for model in models]
    bridge.save_hf_weights(models, f"{directory}.as {other}", show_progress=False)


def unsupported_exports(directory: str) -> dict[str, Callable[[], Any]]:
    bridge, models = built(directory)
    return {
        "adapters": lambda: list(bridge.export_adapter_weights(models)),
        "quantized": lambda: list(bridge.export_hf_weights_quant(models, bool, print)),
        "fp8": lambda: bridge._model_bridge.build_export_fp8_tasks(bridge.hf_pretrained, models),
        "without a model": lambda: RetroBridge().mapping_registry(),
        "rounded": lambda: exports_in_other_dtypes("bf16"),
    }


def refusal(call: Callable[[], Any]) -> str:
    try:
        call()
    except RetroError as error:
        return str(error)
    return "not refused"


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
    refused = {
        directory: refusal(partial(built, directory, **changes))
        for directory, changes in run.get("refused", {}).items()
    }
    if refused:
        exports_in_other_dtypes("gpt")
        refused |= {name: refusal(each) for name, each in unsupported_exports("gpt").items()}
    if refused:
        Path("refused.json").write_text(json.dumps(refused), encoding="utf-8")


if __name__ == "__main__":
    run_all(sys.argv[1], call)
