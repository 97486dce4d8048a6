"""Batches of packed samples: nobody sees another segment, and positions start again."""

from __future__ import annotations

import numpy as np
import torch

from retro_mcore.model.documents import segment_mask, segment_positions
from retro_mcore.platform.context_parallel import ContextPart
from retro_mcore.samples.batch import RetroBatch, collate


def test_positions_start_again_with_every_segment():
    segments = torch.tensor([[0, 0, 0, 1, 1, -1], [0, 0, 1, 2, 2, 2]])
    expected = [[0, 1, 2, 0, 1, 0], [0, 1, 0, 0, 1, 2]]
    assert segment_positions(segments).tolist() == expected


def test_tokens_see_their_own_segment_up_to_themselves():
    visible = ~segment_mask(torch.tensor([[0, 0, 1, 1]]))[0, 0]
    assert visible.int().tolist() == [[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 1, 1]]


def test_a_packed_sample_computes_what_its_parts_compute_alone(megatron):
    from tests.unit.model.builders import VOCABULARY, build_model

    model = build_model(position_embedding_type="learned_absolute").eval()
    texts = [np.random.default_rng(i).integers(1, VOCABULARY - 6, n) for i, n in ((1, 9), (2, 15))]
    packed = collate(
        [
            {
                "text": np.append(np.concatenate(texts), 0),
                "segments": np.repeat([0, 1], [9, 15]),
                "loss_mask": np.ones(24, np.float32),
                "sample_id": 0,
            }
        ]
    )
    together = model(**packed.model_inputs())[0]
    alone = [
        model(**collate([{"text": np.append(text, 0), "sample_id": 0}]).model_inputs())[0]
        for text in texts
    ]
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-5, atol=1e-5)


def test_parts_with_unequal_numbers_of_tokens_give_the_mean_of_all():
    """As Megatron divides: each rank by its own number of tokens, then the mean over ranks."""
    from retro_mcore.training.loop.loss import share_of_tokens

    losses = torch.rand(2, 12, dtype=torch.float64)
    for mask in (torch.ones(2, 12), (torch.rand(2, 12) < 0.3).float(), torch.zeros(2, 12)):
        mask[:, 6:9] = 0  # the third rank has half of them
        mask[:, 2:4] = mask[:, 8:10] = 0  # the second rank has none
        whole = RetroBatch.from_text(torch.zeros(2, 13, dtype=torch.long), loss_mask=mask)
        found = torch.zeros((), dtype=torch.float64)
        for place in (ContextPart(rank, 3) for rank in range(3)):
            part = whole.part(place)
            loss = (place.take(losses, 1) * part.loss_mask).sum() / part.loss_mask.sum().clamp(
                min=1
            )
            found += loss * share_of_tokens(part, whole) / 3
        torch.testing.assert_close(found, (losses * mask).sum() / mask.sum().clamp(min=1))
