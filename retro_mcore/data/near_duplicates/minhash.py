"""Keys of documents by MinHash: similar sets of shingles share a key with high probability.

The signature of a set is cut into bands (locality-sensitive hashing; Leskovec et al. 2014, section
3.4). Two sets of Jaccard similarity s agree in a band of r hashes with probability s^r.
"""

from __future__ import annotations

from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

import numpy as np

from retro_mcore.errors import MissingDependencyError

#: Hashes of a signature.
NUM_HASHES = 128
#: Least probability with which a pair at the threshold shares a key.
_RECALL = 0.99
#: Shingles hashed in one call, which bounds the memory of a long document.
_BATCH = 4096
_SEED, _SCHEME = 1, "affine32"


@dataclass(frozen=True)
class Bands:
    """Bands of a signature.

    Attributes:
        count: Number of bands, and so of a document's keys.
        rows: Hashes of each.
    """

    count: int
    rows: int

    @classmethod
    def of(cls, threshold: float) -> Bands:
        """The bands of the fewest candidates that find 99% of the pairs at the threshold.

        Candidates are verified, so more bands than in pipelines without verification cost time
        only.
        """
        fitting = (cls(NUM_HASHES // rows, rows) for rows in range(NUM_HASHES, 1, -1))
        found = (bands for bands in fitting if bands.probability(threshold) >= _RECALL)
        return next(found, cls(NUM_HASHES, 1))

    def probability(self, similarity: float) -> float:
        """Probability that two sets of this similarity share a key."""
        return float(1 - (1 - similarity**self.rows) ** self.count)


class MinHasher:
    """Computes keys of sets of shingles. The same on every machine.

    Args:
        bands: How the signature is cut.

    Raises:
        MissingDependencyError: datasketch is not installed.
    """

    def __init__(self, bands: Bands) -> None:
        self._bands, self._class = bands, _load_datasketch()
        self._permutations = self._class(NUM_HASHES, _SEED, scheme=_SCHEME).permutations

    def keys(self, shingles: np.ndarray) -> np.ndarray:
        """The set's key in each band, u64 [bands]."""
        minhash = self._class(
            NUM_HASHES, _SEED, hashfunc=int, permutations=self._permutations, scheme=_SCHEME
        )
        hashes = (shingles >> np.uint64(32)).tolist()
        for first in range(0, len(hashes), _BATCH):
            minhash.update_batch(hashes[first : first + _BATCH])
        used = minhash.hashvalues[: self._bands.count * self._bands.rows].astype("<u4")
        bands = used.reshape(self._bands.count, self._bands.rows)
        keys = b"".join(blake2b(band.tobytes(), digest_size=8).digest() for band in bands)
        return np.frombuffer(keys, "<u8").astype(np.uint64)


def require_datasketch() -> None:
    """Reject a search for near-duplicates without the library that it needs.

    Raises:
        MissingDependencyError: datasketch is not installed, or too old.
    """
    _load_datasketch()


def _load_datasketch() -> Any:
    try:
        import datasketch
    except ImportError as error:
        raise _missing("not installed, and --near-duplicates needs it") from error
    try:
        datasketch.MinHash(1, scheme=_SCHEME)
    except TypeError as error:
        raise _missing(f"version {datasketch.__version__}, and 2.0 is needed") from error
    return datasketch.MinHash


def _missing(found: str) -> MissingDependencyError:
    return MissingDependencyError("datasketch", found, "Install retro-mcore[dedup]")
