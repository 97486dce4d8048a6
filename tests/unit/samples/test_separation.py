"""Documents of a sample kept apart: Megatron's meaning where they are packed, whole chunks where
they are aligned."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from retro_mcore.samples.separation import Separation

M, EOD = 4, 0
FLAGS = ("reset_position_ids", "reset_attention_mask", "eod_mask_loss")
TEXT = np.array([5, 6, 7, EOD, 1, 2, EOD, EOD, 3, 4, 5, 6, 7, 8, 9, EOD, 1])


@pytest.mark.parametrize("given", range(8))
def test_a_packed_sample_is_megatrons(megatron, given):
    """The function that Megatron's GPT dataset computes masks and positions with."""
    from megatron.core.datasets.gpt_dataset import _get_ltor_masks_and_position_ids

    from retro_mcore.samples.batch import collate

    flags = {name: bool(given >> place & 1) for place, name in enumerate(FLAGS)}
    batch = collate([{"text": TEXT, "sample_id": 0, **Separation(EOD, None, **flags).items(TEXT)}])
    mask, loss_mask, positions = _get_ltor_masks_and_position_ids(
        torch.from_numpy(TEXT[:-1]), EOD, *flags.values(), True
    )
    assert torch.equal(batch.position_ids[0], positions)
    assert torch.equal(batch.loss_mask[0], loss_mask)
    found = batch.model_inputs()["attention_mask"]
    assert (found is None) == (not flags["reset_attention_mask"])
    if found is not None:
        assert torch.equal(found[0, 0], mask.squeeze() > 0)


def test_padding_belongs_to_its_document():
    separation = Separation(EOD, M, reset_position_ids=True, reset_attention_mask=True)
    items = separation.items(TEXT)
    assert items["segments"].tolist() == [0] * 4 + [1] * 4 + [2] * 8
    assert items["position_ids"].tolist() == [0, 1, 2, 3, 0, 1, 2, 3, *range(8)]
    assert "loss_mask" not in items  # the project's padding decides
    assert not separation.mixed_chunks(TEXT[:-1], M).any()
    packed = Separation(EOD, None, reset_attention_mask=True)
    assert packed.mixed_chunks(np.roll(TEXT[:-1], 1), M).tolist() == [True, True, True, False]
