"""The arguments of a model that `retro_mcore.bridge` trained in Megatron-Bridge."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import Any

import yaml

from retro_mcore.errors import CheckpointError

#: Bridge's configuration, in the directory of each checkpoint.
BRIDGE_FILE = "run_config.yaml"


def bridge_arguments(checkpoint: Path) -> Namespace | None:
    """Arguments in our own form; None if Bridge did not write the checkpoint, or another model.

    Raises:
        CheckpointError: the configuration is damaged.
    """
    path = checkpoint / BRIDGE_FILE
    if not path.is_file():
        return None
    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, RecursionError, yaml.YAMLError) as error:
        problem = str(error).splitlines()[0]
        raise CheckpointError(path, f"cannot be read ({problem})", "Restore it") from error
    model = _mapping(_mapping(config).get("model"))
    arguments = _mapping(model.get("arguments"))
    if not arguments:
        return None
    transformer = _mapping(model.get("transformer"))
    precision = {name: bool(transformer.get(name)) for name in ("bf16", "fp16")}
    return Namespace(**{str(name): value for name, value in arguments.items()}, **precision)


def _mapping(value: Any) -> dict[Any, Any]:
    return value if isinstance(value, dict) else {}
