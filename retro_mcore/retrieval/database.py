"""The chunk database: random access to every document's chunks of M tokens.

The retrieval database is db/merged/train.hdf5, made from training documents only. A chunk's id is
its row in that file.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.lib.stride_tricks import as_strided

from retro_mcore.chunking import NO_NEIGHBOR
from retro_mcore.data.tokenizers.loading import Tokenizer
from retro_mcore.data.tokens.token_file import TokenSource, open_token_files
from retro_mcore.distributed import get_rank
from retro_mcore.errors import CorruptFileError, ProjectError
from retro_mcore.project.config import ProjectConfig
from retro_mcore.project.hdf5 import map_dataset
from retro_mcore.project.markers import verify
from retro_mcore.project.paths import ProjectPaths
from retro_mcore.project.records import require_stage
from retro_mcore.retrieval.document_groups import DocumentGroups
from retro_mcore.retrieval.removed import RemovedChunks, find_removed, removed_documents

#: Rows checked in one call.
_ROWS = 1 << 20
#: Maximum number of calls; of a larger database, only evenly spaced batches are checked.
_BATCHES = 64


class ChunkDatabase:
    """Random access to the chunks of a merged database. Memory-mapped, picklable.

    Args:
        path: A merged database, such as db/merged/train.hdf5.
        token_sources: The datasets, in the order of the project's data path.
        groups: Groups of documents that do not retrieve one another; None: each is alone.
        removed: Chunks of removed documents, which must not be retrieved; None: there are none.

    Raises:
        CorruptFileError: the file is damaged.
    """

    def __init__(
        self,
        path: Path | str,
        token_sources: Sequence[TokenSource],
        groups: DocumentGroups | None = None,
        removed: RemovedChunks | None = None,
    ) -> None:
        self.path, self.token_sources, self.groups = Path(path), token_sources, groups
        self.removed = removed
        #: u32 [n, 5]: dataset, document, first token, end token, BERT tokens.
        self.chunks = map_dataset(self.path, "chunks", "i", 2, 5)

    @classmethod
    def open(cls, project_dir: Path | str, name: str = "train", own: bool = False) -> ChunkDatabase:
        """Open the merged database `name` that a project uses.

        Args:
            project_dir: The project.
            name: Name of the database: "train", "valid" or "sampled".
            own: Open the project's own database even if another one is used in its place.

        Raises:
            ProjectError: the database has not been built; names the command.
            CorruptFileError: the database is damaged.
        """
        config = ProjectConfig.load(project_dir)
        paths = ProjectPaths(project_dir) if own else config.database_paths(project_dir)
        if not own:
            config = ProjectConfig.load(paths.root)
        path = paths.merged_db(name)
        require_stage(paths, path, "build_db")
        hint = f"Run build_db --project-dir {paths.root} again"
        if get_rank() == 0:  # one rank reads all of it
            verify(path, hint)
        files = open_token_files(config, paths)
        groups = DocumentGroups.open(paths, [len(file) for file in files])
        database = cls(path, files, groups)
        if get_rank() == 0:
            database._require_rows(config.retro_gpt_chunk_length, hint)
        if name == "train":
            database.removed = find_removed(database.chunks, removed_documents(paths))
        return database

    def _require_rows(self, chunk_length: int, hint: str) -> None:
        """Reject chunks that the datasets do not have.

        In a database of hundreds of millions of chunks, only evenly spaced batches are checked.
        """
        counts = [len(source.lengths) for source in self.token_sources]
        batches = range(0, len(self), _ROWS)
        for first in batches[:: max(1, len(batches) // _BATCHES)]:
            dataset, document, start, end, _ = self.chunks[first : first + _ROWS].T.astype(np.int64)
            wrong = (dataset < 0) | (dataset >= len(counts)) | (document < 0)
            wrong |= (start < 0) | (end <= start) | (end > start + chunk_length)
            # A dataset's chunks are adjacent, so a batch covers only a few datasets.
            for index in np.flatnonzero(np.bincount(dataset[~wrong])).tolist():
                source = self.token_sources[index]
                mine = ~wrong & (dataset == index)
                wrong[mine] = document[mine] >= counts[index]
                mine &= ~wrong
                wrong[mine] = end[mine] > source.lengths[document[mine]]
            if wrong.any():
                row = int(np.flatnonzero(wrong)[0])
                raise CorruptFileError(
                    self.path,
                    f"chunk {first + row} is {self.chunks[first + row, :4].tolist()} (dataset, "
                    f"document, first token, end), which is not in the data",
                    hint,
                )

    def __len__(self) -> int:
        return len(self.chunks)

    @property
    def num_retrieved(self) -> int:
        """Number of chunks that may be retrieved: all but those of removed documents."""
        return len(self) - (0 if self.removed is None else len(self.removed))

    def __reduce__(self) -> tuple:
        return type(self), (self.path, self.token_sources, self.groups, self.removed)

    def documents(self, ids: np.ndarray) -> np.ndarray:
        """Dataset and document of each chunk, u32 [..., 2]; ids must be valid."""
        return self.chunks[ids, :2]

    def continuation(self, ids: np.ndarray) -> np.ndarray:
        """The next chunk of the same document, i64 [...]; NO_NEIGHBOR if there is none."""
        ids = np.asarray(ids, np.int64)
        exists = (ids >= 0) & (ids + 1 < len(self))
        here = self.documents(np.where(exists, ids, 0))
        following = self.documents(np.where(exists, ids + 1, 0))
        return np.where(exists & (here == following).all(-1), ids + 1, NO_NEIGHBOR)

    def retrieved_ids(self, ids: np.ndarray, num_retrieved_chunks: int) -> np.ndarray:
        """Each neighbor and its continuations, i64 [..., num_retrieved_chunks]."""
        columns = [np.asarray(ids, np.int64)]
        while len(columns) < num_retrieved_chunks:
            columns.append(self.continuation(columns[-1]))
        return np.stack(columns, axis=-1)

    def padded_tokens(
        self, ids: np.ndarray, chunk_length: int, pad_id: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Tokens of chunks, padded to M.

        Args:
            ids: Chunk ids of any shape; NO_NEIGHBOR gives padding only.
            chunk_length: M.
            pad_id: Token that fills short chunks.

        Returns:
            Tokens i64 [..., M] and mask bool [..., M], True where padded.
        """
        shape, ids = np.shape(ids), np.asarray(ids, np.int64).ravel()
        dataset, document, start, end, _ = self.chunks[np.maximum(ids, 0)].T.astype(np.int64)
        lengths = np.where(ids >= 0, end - start, 0)
        mask = np.arange(chunk_length) >= lengths[:, None]
        tokens = np.empty(mask.shape, np.int64)
        for index, source in enumerate(self.token_sources):
            mine = slice(None) if len(self.token_sources) == 1 else np.flatnonzero(dataset == index)
            first = source.starts[document[mine]] + start[mine]
            tokens[mine] = _windows(source.tokens, first, chunk_length)
        tokens[mask] = pad_id
        return tokens.reshape(*shape, chunk_length), mask.reshape(*shape, chunk_length)

    def retrieved_tokens(
        self, ids: np.ndarray, num_retrieved_chunks: int, chunk_length: int, pad_id: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Tokens of neighbors with their continuations.

        Args:
            ids: Neighbor ids of any shape.
            num_retrieved_chunks: Chunks per neighbor, itself included.
            chunk_length: M.
            pad_id: Token that fills short and missing chunks (upstream: end of document).

        Returns:
            Tokens i64 [..., R] and mask bool [..., R], True where padded or missing;
            R = num_retrieved_chunks · M.
        """
        retrieved = self.retrieved_ids(ids, num_retrieved_chunks)
        tokens, mask = self.padded_tokens(retrieved, chunk_length, pad_id)
        shape = (*np.shape(ids), num_retrieved_chunks * chunk_length)
        return tokens.reshape(shape), mask.reshape(shape)

    def tokens(self, ids: Sequence[int] | np.ndarray) -> list[np.ndarray]:
        """Tokens of each chunk, without padding.

        Raises:
            ProjectError: an id is not in the database.
        """
        rows = np.asarray(ids, np.int64).ravel()
        outside = rows[(rows < 0) | (rows >= len(self))]
        if len(outside):
            raise ProjectError(self.path, f"has no chunk {outside[0]}", f"It has {len(self)}")
        found = []
        for dataset, document, start, end, _ in self.chunks[rows].tolist():
            source = self.token_sources[dataset]
            offset = int(source.starts[document])
            found.append(source.tokens[offset + start : offset + end])
        return found

    def texts(self, ids: Sequence[int] | np.ndarray, tokenizer: Tokenizer) -> list[str]:
        """Text of each chunk."""
        return tokenizer.detokenize_batch([chunk.tolist() for chunk in self.tokens(ids)])


def _windows(tokens: np.ndarray, first: np.ndarray, length: int) -> np.ndarray:
    """`length` tokens from each position in `first`, [n, length]; arbitrary beyond the last
    token."""
    count = len(tokens) - length + 1
    if len(first) and count > first.max():
        # Whole rows are copied, not tokens one by one.
        return as_strided(tokens, (count, length), tokens.strides * 2, writeable=False)[first]
    return tokens[np.minimum(first[:, None] + np.arange(length), len(tokens) - 1)]
