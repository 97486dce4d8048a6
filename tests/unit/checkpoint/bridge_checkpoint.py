"""A checkpoint of ours in the form that Megatron-Bridge saves."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import torch
import yaml

from retro_mcore.checkpoint.checksums import CHECKSUMS_FILE
from retro_mcore.model.options import ModelArguments


def give_bridges_configuration(checkpoint: Path) -> None:
    """Replace the arguments of a checkpoint by Bridge's configuration file."""
    common = torch.load(checkpoint / "common.pt", weights_only=False)
    saved = vars(common.pop("args"))
    torch.save(common, checkpoint / "common.pt")
    (checkpoint / CHECKSUMS_FILE).unlink()
    names = [*(field.name for field in fields(ModelArguments)), "seed", "document_tokens"]
    arguments = {name: saved[name] for name in names if name in saved}
    model = {
        "arguments": {**arguments, "trainer": "megatron-bridge"},
        "transformer": {name: saved[name] for name in ("bf16", "fp16")},
    }
    (checkpoint / "run_config.yaml").write_text(yaml.safe_dump({"model": model}))
