"""The first step of build_index: embed the chunk database, and the queries for measuring recall."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from retro_mcore.data.tokenizers.loading import Tokenizer, load_project_tokenizer
from retro_mcore.distributed import get_rank, is_first_on_host, raise_together
from retro_mcore.platform import choose_device
from retro_mcore.project.atomic import write_json
from retro_mcore.project.config import ProjectConfig, ProjectSettings, read_json_object
from retro_mcore.project.markers import read_marker
from retro_mcore.project.paths import ProjectPaths
from retro_mcore.project.records import recorded_options
from retro_mcore.project.shards import ShardReport, Share, cut
from retro_mcore.retrieval.database import ChunkDatabase
from retro_mcore.retrieval.embedders import build_embedder
from retro_mcore.retrieval.embedders.base import LEXICAL_EMBEDDER, Embedder, Pooling
from retro_mcore.retrieval.embedders.identity import digests_of, require_same_model
from retro_mcore.retrieval.embedders.lexical_weights import save_lexical_weights
from retro_mcore.retrieval.index import embed_database, embed_held_out
from retro_mcore.retrieval.index.embeddings import EmbeddingFiles, count_embedded
from retro_mcore.retrieval.stored_types import StoredCounts
from retro_mcore.stages.embedding_choice import EmbeddedAs, Wanted


@dataclass(frozen=True, kw_only=True)
class EmbedderOptions:
    """The embedder and where it runs; see `build_embedder`. `device` is auto, cpu or cuda."""

    name: str
    pooling: Pooling | None
    device: str


@dataclass(frozen=True)
class EmbeddedDatabase:
    """The result of embedding a database, or one job's part of it.

    Attributes:
        files: Files that were built or reused.
        num_chunks: Chunks of the database.
        counts: What happened to the chunks.
        embedded_as: Precision, and type that the vectors are stored in.
        max_tokens: Maximum number of tokens that the embedder reads; None: no limit.
    """

    files: ShardReport
    num_chunks: int
    counts: StoredCounts
    embedded_as: EmbeddedAs
    max_tokens: int | None


class DatabaseEmbedding:
    """Embeds a project's database into the files of index/embeddings.

    Args:
        paths: The project.
        config: Its configuration.
        settings: Its settings.
        database: Its chunk database.
        wanted: Precision, type of the stored vectors and batches, as far as flags say.
        options: The other options that embeddings depend on, by flag.
        inputs: Digests of the files that they are made from.

    Attributes:
        embedded: The files, with the fingerprint of their inputs.
        embedded_as: Precision, type of the stored vectors, text for ends of documents, batches.
        options: All options that the embeddings depend on, by flag.
    """

    def __init__(
        self,
        paths: ProjectPaths,
        config: ProjectConfig,
        settings: ProjectSettings,
        database: ChunkDatabase,
        wanted: Wanted,
        options: Mapping[str, Any],
        inputs: Mapping[str, str],
    ) -> None:
        self._paths, self._config, self._database = paths, config, database
        self._recorded = settings.embedder_digests
        count, length = len(database), config.retro_block_size
        shards = cut(paths.embeddings, count, length, settings.growth)
        record = recorded_options(paths, "build_index")
        if not record and settings.embedder != options["--embedder"]:
            settings = replace(settings, embedder=None)  # begun anew, with another embedder
        self.embedded_as = wanted.choose(settings, record, shards, options, inputs)
        self.options = {**options, **self.embedded_as.options}
        self.embedded = EmbeddingFiles(shards, self.embedded_as.fingerprint(options, inputs))

    def run(self, options: EmbedderOptions, share: Share | None) -> EmbeddedDatabase:
        """Embed the database, or one job's part of it; all ranks call it.

        The first job also embeds the queries for measuring recall.
        """
        fingerprint = self.embedded.fingerprint
        with raise_together():
            device = str(choose_device(options.device))  # type: ignore[arg-type]
            tokenizer = load_project_tokenizer(self._config, self._paths)
        if options.name == LEXICAL_EMBEDDER:
            weights = self._paths.lexical_weights
            save_lexical_weights(self._database, tokenizer, weights, fingerprint)
        with raise_together():
            embedder = self._build_embedder(options, device)
            if get_rank() == 0:
                self._require_same_model(embedder)
        with raise_together():
            if get_rank() != 0 and is_first_on_host():
                self._require_same_model(embedder)
        shards = self.embedded.shards if share is None else share.of(self.embedded.shards)
        made_as = self.embedded_as
        files = embed_database(
            self._database,
            tokenizer,
            embedder,
            shards,
            fingerprint=fingerprint,
            document_ends=made_as.document_ends,
            dtype=made_as.dtype,
        )
        with raise_together():
            if get_rank() == 0 and (share is None or share.index == 0):
                self._embed_held_out(tokenizer, embedder)
            counts = count_embedded(shards)
        return EmbeddedDatabase(files, len(self._database), counts, made_as, embedder.max_tokens)

    @property
    def digests(self) -> dict[str, str] | None:
        """Digests of the files of the embedder that the embeddings were begun with; None if an
        earlier version began them, or nothing has."""
        path = self._paths.embedder_record
        if path.is_file():
            begun = read_json_object(path)
            if begun.get("fingerprint") == self.embedded.fingerprint:
                return dict(begun["digests"])
        return self._recorded if self._is_begun() else None

    def _is_begun(self) -> bool:
        if recorded_options(self._paths, "build_index"):
            return True
        markers = (read_marker(shard.path) or {} for shard in self.embedded.shards)
        return any(marker.get("fingerprint") == self.embedded.fingerprint for marker in markers)

    def _require_same_model(self, embedder: Embedder) -> None:
        """Compare the embedder with the one that embedding was begun with, or record it.

        Raises:
            ProjectError: its files differ.
        """
        if (digests := self.digests) is not None:
            require_same_model(embedder, digests, self._paths.root)
        elif get_rank() == 0 and not self._is_begun():
            begun = {"fingerprint": self.embedded.fingerprint, "digests": digests_of(embedder)}
            write_json(self._paths.embedder_record, begun)

    def _build_embedder(self, options: EmbedderOptions, device: str) -> Embedder:
        batches = self.embedded_as.batches
        return build_embedder(
            options.name,
            batch_size=batches.size,
            device=device,
            pooling=options.pooling,
            weights=self._paths.lexical_weights,
            precision=self.embedded_as.precision,
            batch_tokens=batches.tokens,
        )

    def _embed_held_out(self, tokenizer: Tokenizer, embedder: Embedder) -> None:
        held_out = None
        if self._paths.merged_db("valid").is_file():
            held_out = ChunkDatabase.open(self._paths.root, "valid", own=True)
        embed_held_out(
            database=self._database,
            held_out=held_out,
            tokenizer=tokenizer,
            embedder=embedder,
            path=self._paths.held_out,
            fingerprint=self.embedded.fingerprint,
            document_ends=self.embedded_as.document_ends,
        )
