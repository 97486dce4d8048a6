"""Common runs of tokens, against a search over all substrings."""

import numpy as np

from retro_mcore.retrieval.overlap import longest_common_runs, shared_positions


def slow_longest(first: list[int], second: list[int]) -> int:
    runs = {
        tuple(second[i : i + n]) for i in range(len(second)) for n in range(1, len(second) - i + 1)
    }
    return max(
        (
            n
            for i in range(len(first))
            for n in range(1, len(first) - i + 1)
            if tuple(first[i : i + n]) in runs
        ),
        default=0,
    )


def test_longest_common_runs_of_random_pairs():
    generator = np.random.default_rng(0)
    first, second = generator.integers(0, 4, (2, 60, 12))
    second[:5] = first[:5]
    second[5:10] += 10
    second[10:15, 7:] = -1
    found = longest_common_runs(first, second)
    padded = [[token for token in row.tolist() if token >= 0] for row in second]
    assert found.tolist() == [
        slow_longest(a.tolist(), b) for a, b in zip(first, padded, strict=True)
    ]
    assert found[:5].tolist() == [12] * 5
    assert found[5:10].tolist() == [0] * 5
    nothing = np.full((1, 4), -1)
    assert longest_common_runs(nothing, nothing).tolist() == [0]


def test_shared_positions():
    first = np.array([1, 2, 3, 4, 9, 2, 3])
    second = np.array([7, 2, 3, 4, 8, 8, 1, 2])
    marked = shared_positions(first, second, 3)
    assert marked[0].tolist() == [0, 1, 1, 1, 0, 0, 0]
    assert marked[1].tolist() == [0, 1, 1, 1, 0, 0, 0, 0]
    marked = shared_positions(first, second, 2)
    assert marked[0].tolist() == [1, 1, 1, 1, 0, 1, 1]
    assert marked[1].tolist() == [0, 1, 1, 1, 0, 0, 1, 1]
    assert not shared_positions(first, second, 4)[0].any()
