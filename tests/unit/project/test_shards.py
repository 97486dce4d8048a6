"""Dividing rows into shards and shards into groups."""

from __future__ import annotations

import pytest

from retro_mcore.project.shards import cut, group_shards


@pytest.mark.parametrize(
    ("rows", "least", "sizes"),
    [
        (100, 1, [4]),
        (100, 3, [1, 1, 1, 1]),
        (60, 1, [2, 2]),
        (30, 1, [1, 1, 1, 1]),
        (0, 1, [1] * 4),
    ],
)
def test_shards_are_grouped_by_their_rows(tmp_path, rows, least, sizes):
    groups = group_shards(cut(tmp_path, 100, 27), rows, least)
    assert [len(group) for group in groups] == sizes


def test_a_group_has_few_enough_files_to_be_open_together(tmp_path):
    groups = group_shards(cut(tmp_path, 10_000, 10), 10_000)
    assert max(map(len, groups)) <= 64
    assert sum(map(len, groups)) == 1000
