"""Open a search over the database that a project retrieves from.

Used by query_neighbors (`neighbor_search`), live retrieval (`retriever`) and the evaluation of
held-out documents. The search uses the embedder, index and breadth with which the database's index
was built, and the same order of candidates as the project's saved neighbors.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

from retro_mcore.data.tokenizers.loading import Tokenizer
from retro_mcore.data.tokens.token_file import bin_path, idx_path
from retro_mcore.errors import ProjectError
from retro_mcore.project.config import ProjectConfig, ProjectSettings
from retro_mcore.project.paths import ProjectPaths
from retro_mcore.project.records import input_digests
from retro_mcore.retrieval.database import ChunkDatabase
from retro_mcore.retrieval.document_groups import group_files
from retro_mcore.retrieval.embedders import default_batch_tokens, load_project_embedder
from retro_mcore.retrieval.embedders.base import BATCH_SIZE, Embedder
from retro_mcore.retrieval.embedders.identity import require_same_model
from retro_mcore.retrieval.embedders.precision import Precision, obstacle
from retro_mcore.retrieval.index.project import ProjectIndex
from retro_mcore.retrieval.neighbor_search import NUM_QUERY
from retro_mcore.retrieval.removed import INPUT, digest_of_documents, removed_documents
from retro_mcore.retrieval.rerank import BM25, load_reranker

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ProjectSearch:
    """A project and the database that it retrieves from, which may be another project's.

    Attributes:
        paths: The project.
        config: Its configuration.
        settings: Its settings: number of candidates, order of candidates.
        source: The project that the database belongs to; usually the same project.
        source_config: Its configuration.
        source_settings: Its settings: embedder, index, breadth of search.
        database: The chunk database.
        index: The index, not opened yet.
    """

    paths: ProjectPaths
    config: ProjectConfig
    settings: ProjectSettings
    source: ProjectPaths
    source_config: ProjectConfig
    source_settings: ProjectSettings
    database: ChunkDatabase
    index: ProjectIndex

    @property
    def precision(self) -> Precision:
        """Precision that the database was embedded in; fp32 if it was not recorded."""
        return self.source_settings.embed_precision or "fp32"

    @property
    def rescore(self) -> bool:
        """Whether candidates are sorted by the stored vectors: as for the saved neighbors, and
        always in an index that was built for it."""
        return self.settings.rescore or self.source_settings.index_rescored

    def usable_precision(self, device: str | None) -> Precision:
        """The database's precision; fp32, with a warning, where this machine lacks it.

        Args:
            device: "cpu", "cuda" …; None: CUDA if available.
        """
        lacks = obstacle(self.precision, device)
        if lacks is None:
            return self.precision
        logger.warning(
            "queries are embedded in fp32, the database in %s, which does not run %s",
            self.precision,
            lacks,
        )
        return "fp32"

    def batch_tokens(self, device: str | None) -> int | None:
        """Tokens of a batch for queries, as in a new project of this layout; None: 16 chunks.

        Args:
            device: "cpu", "cuda" …; None: CUDA if available.
        """
        settings = self.source_settings
        if settings.samples != "aligned":
            return None
        return default_batch_tokens(str(settings.embedder), device or "auto")

    def load_embedder(
        self,
        batch_size: int | None = None,
        device: str | None = None,
        precision: Precision | None = None,
        batch_tokens: int | None = None,
        compare: bool = True,
    ) -> Embedder:
        """Load the embedder that the index was built with; see `build_embedder`.

        Args:
            batch_size: Texts per forward pass; None, without `batch_tokens`: those of
                `self.batch_tokens`.
            device: "cpu", "cuda" …; None: CUDA if available.
            precision: Precision to compute in; None: the database's.
            batch_tokens: Tokens per forward pass instead of `batch_size`.
            compare: Whether to compare its files with those that the database was embedded with.

        Raises:
            ProjectError: its files are other ones, or its vectors have another dimension than those
                of the index.
            ConfigurationError: this machine cannot compute in the precision.
        """
        settings = self.source_settings
        if batch_size is None and batch_tokens is None:
            batch_tokens = self.batch_tokens(device)
        embedder = load_project_embedder(
            settings,
            self.source,
            batch_size or BATCH_SIZE,
            device,
            precision or self.precision,
            batch_tokens,
        )
        if compare and settings.embedder_digests:
            require_same_model(embedder, settings.embedder_digests, self.source.root)
        if settings.embedding_dimension != embedder.dimension:
            raise ProjectError(
                self.source.index,
                f"the index holds vectors of {settings.embedding_dimension}, the embedder "
                f"{embedder.name} gives {embedder.dimension}",
                f"Restore its model, or run build_index --project-dir {self.source.root} again",
            )
        return embedder

    def load_reranker(self, rerank: str | None, tokenizer: Tokenizer) -> BM25 | None:
        """Load the reranker, if any; see `rerank.load_reranker`."""
        chunk_length = self.config.retro_gpt_chunk_length
        return load_reranker(rerank, self.source, self.database, chunk_length, tokenizer.vocab_size)

    def num_candidates(self, wanted: int | None) -> int:
        """Number of candidates to search per chunk; None: the default for the database."""
        return wanted or min(NUM_QUERY, len(self.database))

    def token_digests(self) -> dict[str, str]:
        """Digests of the project's tokens, whose chunks are the queries."""
        prefixes = [self.paths.data / prefix for prefix in self.config.blend[1]]
        files = [path for prefix in prefixes for path in (bin_path(prefix), idx_path(prefix))]
        return input_digests(self.paths, files)

    def database_digests(self, rescore: bool) -> dict[str, str]:
        """Digests of the database, its removed documents and the index, and with `rescore` of the
        stored vectors.

        Raises:
            ProjectError: stored vectors are missing.
        """
        files = [self.source.merged_db("train"), *group_files(self.source)]
        merged = input_digests(self.source, files)
        vectors = self.index.vector_files().digests() if rescore else {}
        removed = removed_documents(self.source)
        left_out = {INPUT: digest_of_documents(removed)} if len(removed) else {}
        return merged | self.index.digests() | vectors | left_out


def open_search(
    project: ProjectPaths | Path | str, source: ProjectPaths | None = None
) -> ProjectSearch:
    """Open a project's database and find its index.

    Args:
        project: A project, after build_index.
        source: The project whose database is searched; None: the one that the project retrieves
            from.

    Raises:
        ProjectError: a stage has not run.
        CorruptFileError: a file is damaged.
    """
    paths = project if isinstance(project, ProjectPaths) else ProjectPaths(project)
    config = ProjectConfig.load(paths.root)
    source = source or config.database_paths(paths.root)
    source_config = ProjectConfig.load(source.root)
    source_settings = ProjectSettings.load(source.root)
    database = ChunkDatabase.open(source.root, own=True)
    index = ProjectIndex(source, source_settings, len(database), source_config.retro_block_size)
    settings = ProjectSettings.load(paths.root)
    return ProjectSearch(
        paths=paths,
        config=config,
        settings=settings,
        source=source,
        source_config=source_config,
        source_settings=source_settings,
        database=database,
        index=index,
    )
