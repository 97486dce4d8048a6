"""Batches of packed samples: nobody sees another segment, and positions start again."""

from __future__ import annotations

import numpy as np
import torch

from retro_mcore.model.documents import segment_mask, segment_positions
from retro_mcore.samples.batch import collate


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
