"""Groups of near-duplicates, from the documents' keys.

Documents that share a key are candidates. A pair is verified, and the groups are the connected
components of the verified pairs. Sets of equal shingles count as one document throughout. Neither
the order of the documents nor the number of processes changes the groups.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np

#: Documents of one key that are all compared with one another. Of more, each is compared with the
#: first of them, by digest.
_ALL, _ANCHORS = 16, 8


def group_documents(
    digests: np.ndarray,
    bands: Iterable[np.ndarray],
    similar: Callable[[np.ndarray], np.ndarray],
) -> np.ndarray:
    """Group documents; a group's number is that of its first document.

    Args:
        digests: Digest of each document's shingles, u64 [documents]; 0 for documents without words,
            which are alone.
        bands: Key of each document in each band, u64 [documents].
        similar: Verifies pairs of documents, i64 [n, 2] to bool [n].

    Returns:
        Group of each document, i64 [documents].
    """
    with_words = np.flatnonzero(digests)
    _, first, number = np.unique(digests[with_words], return_index=True, return_inverse=True)
    chosen = with_words[first]
    labels = np.arange(len(chosen))
    for keys in bands:
        pairs = candidate_pairs(keys[chosen])
        pairs = pairs[labels[pairs[:, 0]] != labels[pairs[:, 1]]]
        labels = _joined(labels, pairs[similar(chosen[pairs])])
    groups = np.arange(len(digests))
    leaders = np.full(len(chosen), len(digests))
    np.minimum.at(leaders, labels, chosen)
    groups[with_words] = leaders[labels[number]]
    return groups


def candidate_pairs(keys: np.ndarray) -> np.ndarray:
    """Pairs of rows with the same key, i64 [n, 2].

    Args:
        keys: u64 [rows]. The rows' order decides which ones a row of a frequent key is compared
            with.
    """
    order = np.argsort(keys, kind="stable")
    changes = np.flatnonzero(np.diff(keys[order])) + 1
    starts = np.concatenate([[0], changes])[: len(keys)]
    sizes = np.diff(np.append(starts, len(keys)))
    shared = np.repeat(sizes > 1, sizes)
    start, size = (np.repeat(each, sizes)[shared] for each in (starts, sizes))
    place = np.flatnonzero(shared)
    anchors = np.where(size <= _ALL, size, _ANCHORS)
    pairs = [np.empty((0, 2), np.int64)]
    for anchor in range(int(anchors.max(initial=0))):
        later = (place - start > anchor) & (anchor < anchors)
        pairs.append(np.stack([order[start[later] + anchor], order[place[later]]], axis=1))
    return np.concatenate(pairs)


def _joined(labels: np.ndarray, pairs: np.ndarray) -> np.ndarray:
    """Labels of the components after pairs were joined, i64 [nodes]."""
    if not len(pairs):
        return labels
    from scipy.sparse import coo_matrix
    from scipy.sparse.csgraph import connected_components

    edges = labels[pairs].T
    shape = (len(labels), len(labels))
    graph = coo_matrix((np.ones(len(pairs), np.int8), (edges[0], edges[1])), shape)
    _, components = connected_components(graph, directed=False)
    return components.astype(np.int64)[labels]
