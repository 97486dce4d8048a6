"""The parts of a batch that context parallel ranks read."""

from __future__ import annotations

import pytest
import torch

from retro_mcore.errors import ShapeError
from retro_mcore.model.documents import segment_mask
from retro_mcore.platform.context_parallel import ContextPart
from retro_mcore.samples.batch import RetroBatch

B, L, M, K, R = 2, 8, 4, 3, 5


def make_batch(**changes):
    text = torch.arange(B * (L * M + 1)).view(B, -1)
    rows = torch.arange(B * L * K)[:, None].expand(-1, R)
    batch = {"text": text, "neighbors": (rows.view(B, L, K, R), (rows % 7 == 0).view(B, L, K, R))}
    return RetroBatch.from_text(**{**batch, **changes})


@pytest.mark.parametrize("size", [1, 2, 4])
def test_parts_are_the_whole_in_other_order(size):
    whole = torch.arange(2 * 16).view(2, 16)
    parts = [ContextPart(rank, size).take(whole, 1) for rank in range(size)]
    assert torch.equal(ContextPart(0, size).restore(torch.cat(parts, 1), 1), whole)


def test_a_part_has_its_own_neighbors_and_the_mask_of_the_chunks_before():
    batch = make_batch()
    for rank, chunks in enumerate([(0, 1, 6, 7), (2, 3, 4, 5)]):
        part = batch.part(ContextPart(rank, 2), M)
        positions = torch.cat([torch.arange(M) + M * chunk for chunk in chunks])
        for name in ("tokens", "labels", "loss_mask", "position_ids"):
            assert torch.equal(getattr(part, name), getattr(batch, name)[:, positions]), name
        tokens, mask = (
            rows.view(B, L, K, R) for rows in (batch.retrieved_tokens, batch.retrieved_mask)
        )
        assert torch.equal(part.retrieved_tokens, tokens[:, chunks].flatten(0, 2))
        masks = part.retrieved_mask.view(B, len(chunks) + 2, K, R)
        before = [0, 1, 5, 6, 7] if rank == 0 else [1, 2, 3, 3, 4, 5]
        assert torch.equal(masks[:, 1 if rank == 0 else 0 :], mask[:, before])
        assert rank == 1 or masks[:, 0].all()  # nothing comes before the first chunk


def test_a_part_of_packed_examples_masks_the_keys_of_whole_samples():
    segments = torch.arange(L * M).div(10, rounding_mode="floor").expand(B, -1)
    batch = make_batch(segments=segments)
    inputs = batch.part(ContextPart(1, 2), M).model_inputs()
    assert torch.equal(inputs["attention_mask"], segment_mask(segments)[:, :, 2 * M : 6 * M])


def test_pieces_that_split_a_chunk_are_refused():
    with pytest.raises(ShapeError, match="--context-parallel-size: samples of 32 tokens"):
        make_batch().part(ContextPart(0, 8), M)
    assert make_batch(neighbors=None).part(ContextPart(0, 8)).tokens.shape == (B, 4)
