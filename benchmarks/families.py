"""Logit differences to transformers' own forward pass, by family, as a Markdown table.

    python -m benchmarks.families

The models are those of tests/unit/checkpoint/families.py: tiny, with random weights, on texts of
120 tokens. Each is loaded with `--load-gpt DIR` alone, from fp32 weights, from bf16 weights in
shards, and from its conversion to our format. That conversion is then written for transformers, as
a model of the family (`--decoder-only`) and as `RetroForCausalLM`, and its logits are compared too.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from retro_mcore.cli.command import run_command
from retro_mcore.errors import ConfigurationError
from retro_mcore.platform import setup_device

HEADER = (
    *("model", "model_type", "logits' deviation", "fp32", "bf16 weights", "converted to ours"),
    *("written back", "RetroForCausalLM"),
)


@dataclass
class Options:
    """Compare every family's logits with transformers'."""

    output: str | None = None
    """File for the table. Default: standard output."""


def compare(options: Options) -> None:
    """Write the table."""
    setup_device("cpu")
    from tests.processes import join_megatron

    join_megatron()
    lines = ["| " + " | ".join(row) + " |" for row in (HEADER, ["---"] * len(HEADER), *_rows())]
    text = "\n".join(lines) + "\n"
    if options.output is None:
        print(text, end="")
    else:
        Path(options.output).write_text(text, encoding="utf-8")


def _rows() -> Iterator[tuple[str, ...]]:
    from tests.unit.checkpoint.families import CASES

    for name, (family, _) in CASES.items():
        with tempfile.TemporaryDirectory() as folder:
            deviation, *differences = _differences(name, Path(folder))
            assert deviation is not None
        shown = ("refused" if each is None else f"{each:.0e}" for each in differences)
        yield name, f"`{family}`", f"{deviation:.2f}", *shown


def _differences(name: str, folder: Path) -> Iterator[float | None]:
    import torch

    from retro_mcore.training.setup.conversion import convert
    from tests.unit.checkpoint import families

    families.save_model(name, folder / "fp32")
    families.save_model(name, folder / "bf16", torch.bfloat16, max_shard_size="20KB")
    convert(str(folder / "fp32"), str(folder / "ours"), "retro-mcore", {})
    wanted = {kind: _theirs(folder / kind) for kind in ("fp32", "bf16")}
    yield float(wanted["fp32"].std())
    for kind, source in (("fp32", "fp32"), ("bf16", "bf16"), ("ours", "fp32")):
        model, _ = families.load_alone(folder / kind)
        yield float((families.ours(model) - wanted[source]).abs().max())
    for decoder_only in (True, False):
        yield _written(folder, decoder_only, wanted["fp32"])


def _written(folder: Path, decoder_only: bool, wanted: Any) -> float | None:
    """Difference after our checkpoint was written for transformers; None if that is refused."""
    import retro_mcore.huggingface  # noqa: F401 (registers the model)
    from retro_mcore.training.setup.conversion import convert
    from retro_mcore.training.setup.huggingface_export import HuggingFaceOptions

    target, how = folder / f"written {decoder_only}", HuggingFaceOptions(decoder_only)
    try:
        convert(str(folder / "ours"), str(target), "huggingface", {}, huggingface=how)
    except ConfigurationError:
        return None
    return float((_theirs(target)[..., : wanted.size(-1)] - wanted).abs().max())


def _theirs(path: Path) -> Any:
    import torch
    import transformers

    from tests.unit.checkpoint import families

    model = transformers.AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.float32, attn_implementation="eager"
    )
    return families.theirs(model.eval())


def main(argv: Sequence[str] | None = None) -> int:
    """Run it; returns the exit code."""
    return run_command(Options, compare, argv)


if __name__ == "__main__":
    sys.exit(main())
