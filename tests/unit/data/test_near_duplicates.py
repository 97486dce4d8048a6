"""Shingles, keys and groups of near-duplicates, and which of them are dropped."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from retro_mcore.data.near_duplicates.dropping import (
    choose_dropped,
    choose_dropped_of_corpus,
    training_documents,
)
from retro_mcore.data.near_duplicates.grouping import (
    _ALL,
    _ANCHORS,
    candidate_pairs,
    group_documents,
)
from retro_mcore.data.near_duplicates.minhash import Bands, MinHasher
from retro_mcore.data.near_duplicates.shingles import (
    digest_of,
    shingles_of,
    similarity,
    words_of,
)
from tests.unit.data.near_copies import ALIKE, near, planted, text

BANDS = Bands.of(0.8)


def group(texts: list[str], words: int = 5, threshold: float = 0.8) -> np.ndarray:
    bands = Bands.of(threshold)
    shingles = [shingles_of(each, words) for each in texts]
    hasher = MinHasher(bands)
    keys = np.stack([hasher.keys(each) for each in shingles], axis=1)
    digests = np.array([digest_of(each) for each in shingles], np.uint64)

    def similar(pairs: np.ndarray) -> np.ndarray:
        found = [similarity(shingles[a], shingles[b]) >= threshold for a, b in pairs.tolist()]
        return np.array(found, bool)

    return group_documents(digests, list(keys), similar)


def test_words_have_no_case_punctuation_or_width():
    assert words_of("\uff34he “Quick” brown-fox,\tSTRASSE_2 straße!") == [
        *("the", "quick", "brown", "fox", "strasse", "2", "strasse")
    ]
    assert words_of("漢字かな ok") == [*"漢字かな", "ok"]
    assert words_of("… -- \n") == []


SHINGLES = ["0x53acd4cb60ba9980", "0x949c0feb10aa26a0"]
KEYS = ["0x268146c170cc30ab", "0xe58358957e9a7c16"]


def test_shingles_are_the_same_on_every_machine():
    assert [hex(value) for value in shingles_of("The cat sat.", 2).tolist()] == SHINGLES
    keys = MinHasher(Bands(2, 4)).keys(shingles_of("the cat sat on the mat", 2))
    assert [hex(value) for value in keys.tolist()] == KEYS


def test_short_and_empty_texts():
    texts = ["one two", "One, two!", "one two three", "one", "", "…", "two one"]
    assert group(texts).tolist() == [0, 0, 2, 3, 4, 5, 6]


def test_similarity_counts_shingles():
    words = text(0)
    first, second = (shingles_of(" ".join(each), 5) for each in (words, near(words, 1)))
    assert similarity(first, second) == 186 / 206
    assert similarity(first, first) == 1
    assert similarity(first, first[:0]) == 0


@pytest.mark.parametrize("threshold", [0.1, 0.3, 0.5, 0.8, 0.95, 1.0])
def test_bands_find_pairs_at_the_threshold(threshold):
    bands = Bands.of(threshold)
    assert bands.probability(threshold) >= 0.99
    assert bands.count * bands.rows <= 128
    fewer = Bands(128 // (bands.rows + 1), bands.rows + 1)
    assert threshold == 1 or fewer.probability(threshold) < 0.99


def test_planted_near_duplicates_are_found_and_no_others():
    wanted = np.arange(20)
    for alike in ALIKE:
        wanted[list(alike)] = alike[0]
    assert group(planted()).tolist() == wanted.tolist()


def test_groups_are_connected_through_their_members():
    words = text(0)
    chain = [words, near(words, 1, (20, 60)), near(near(words, 1, (20, 60)), 2, (100, 140))]
    texts = [" ".join(each) for each in chain]
    first, last = (shingles_of(texts[i], 5) for i in (0, 2))
    assert similarity(first, last) < 0.85
    assert group([*texts, " ".join(text(9))], threshold=0.85).tolist() == [0, 0, 0, 3]


@settings(deadline=None, derandomize=True, max_examples=30)
@given(st.lists(st.text("ab ", max_size=12), min_size=1, max_size=24), st.randoms())
def test_the_order_of_documents_does_not_matter(texts, random):
    order = list(range(len(texts)))
    random.shuffle(order)
    groups = group(texts, 2, 0.5)
    moved = group([texts[number] for number in order], 2, 0.5)
    assert (groups <= np.arange(len(texts))).all()
    back = moved[np.argsort(order)]
    for a, b in itertools.combinations(range(len(texts)), 2):
        assert (groups[a] == groups[b]) == (back[a] == back[b])


@settings(deadline=None, derandomize=True, max_examples=30)
@given(st.lists(st.integers(0, 3), max_size=60))
def test_candidates_are_all_pairs_of_a_key_unless_it_is_frequent(keys):
    found = {tuple(sorted(pair)) for pair in candidate_pairs(np.array(keys, np.uint64)).tolist()}
    wanted = set()
    for key in set(keys):
        rows = [row for row, value in enumerate(keys) if value == key]
        anchors = rows if len(rows) <= _ALL else rows[:_ANCHORS]
        wanted |= {tuple(sorted((a, b))) for a in anchors for b in rows if a != b}
    assert found == wanted


def test_more_copies_than_are_compared_with_one_another():
    texts = [" ".join(near(text(0), number)) for number in range(3 * _ALL)]
    assert group(texts).tolist() == [0] * len(texts)


SIZES = st.lists(st.integers(3, 30), min_size=1, max_size=3)


@settings(deadline=None, derandomize=True, max_examples=30)
@given(SIZES, st.data(), st.booleans(), st.sampled_from(["60,20,20", "90,5,5", "98,2,0"]))
def test_no_training_document_is_like_a_held_out_one(sizes, data, first_survives, split):
    number = sum(sizes)
    labels = data.draw(st.lists(st.integers(0, number), min_size=number, max_size=number))
    _, first, place = np.unique(labels, return_index=True, return_inverse=True)
    groups = first[place]
    dropped = choose_dropped_of_corpus(groups, sizes, split, first_survives)
    kept, bounds = dropped.kept, np.cumsum(sizes)[:-1]
    assert set(groups[kept]) == set(groups)  # one of each group is always left
    left = [int(part.sum()) for part in np.split(kept, bounds)]
    training = training_documents(left, split)
    trained, held_out = groups[kept][training], groups[kept][~training]
    assert not set(trained) & set(held_out)
    assert not first_survives or len(set(trained)) == len(trained)
    assert not (dropped.of_held_out & dropped.of_earlier).any()
    assert first_survives or not dropped.of_earlier.any()


def test_held_out_documents_win_and_the_first_survives():
    groups = np.array([0, 0, 2, 3, 2, 0, 6, 3])
    training = np.array([True] * 6 + [False] * 2)
    dropped = choose_dropped(groups, training, ~training, True)
    assert np.flatnonzero(dropped.of_held_out).tolist() == [3]
    assert np.flatnonzero(dropped.of_earlier).tolist() == [1, 4, 5]
    dropped = choose_dropped(groups, training, ~training, False)
    assert np.flatnonzero(~dropped.kept).tolist() == [3]
