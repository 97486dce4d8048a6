"""Checkpoints on disk, exchanged live with megatron-core 0.15.3, both ways."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.parity import environment
from tests.parity.upstream_checkpoints import FORMS, NAMES, chosen_cases, logits
from tests.unit.checkpoint.test_convert_checkpoint import convert

pytestmark = pytest.mark.parity

# Of fp32 over 18 layers; TP 2 adds in another order.
ROUNDING = {"atol": 5e-5, "rtol": 1e-5}
SCRIPT = str(environment.ROOT / "tests" / "parity" / "upstream_checkpoints.py")


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of checkpoints that the retired Retro wrote."""
    folder = tmp_path_factory.mktemp("theirs")
    environment.run([SCRIPT, "write", str(folder)])
    return folder


def our_logits(directory: Path, name: str) -> torch.Tensor:
    from retro_mcore.training.setup.load_model import load_model_from_checkpoint

    model, arguments = load_model_from_checkpoint(directory)
    assert arguments.retro_origin == "mcore-0.15"
    return logits(model, next(case for case in chosen_cases() if case.name == name))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", NAMES)
def test_what_is_written_there_computes_the_same_here(
    megatron: None, theirs: Path, tmp_path: Path, name: str, form: str
) -> None:
    convert(theirs / name / form, tmp_path / "ours")
    wanted = torch.load(theirs / "answers.pt")[name, form]
    assert wanted.std() > 0.1
    torch.testing.assert_close(our_logits(tmp_path / "ours", name), wanted, **ROUNDING)


def test_what_is_written_here_computes_the_same_there(
    megatron: None, theirs: Path, tmp_path: Path
) -> None:
    for name in NAMES:
        convert(theirs / name / "torch TP2", tmp_path / name / "ours")
        for target in ("megatron", "megatron-torch"):
            convert(tmp_path / name / "ours", tmp_path / name / target, target=target)
    environment.run([SCRIPT, "read", str(tmp_path)])
    read: dict[Any, torch.Tensor] = torch.load(tmp_path / "read.pt")
    answers = torch.load(theirs / "answers.pt")
    assert len(read) == 2 * len(NAMES)
    for (name, _), found in read.items():
        torch.testing.assert_close(found, answers[name, "torch TP2"], **ROUNDING)
