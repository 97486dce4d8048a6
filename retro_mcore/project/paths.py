"""Paths of the files in a project directory (see docs/data_formats.md)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from retro_mcore.errors import ProjectError
from retro_mcore.json_text import has_surrogates

#: The retired pipeline's name for an index filled from per-shard codes. It is a directory name:
#: readers of both pipelines look for the added index below it.
INDEX_TYPE = "faiss-par-add"


@dataclass(frozen=True)
class ProjectPaths:
    """The paths of one project directory.

    Attributes:
        root: The project directory, absolute.

    Raises:
        ProjectError: the path is not UTF-8, in which Faiss and SentencePiece read paths.
    """

    root: Path

    def __init__(self, root: Path | str) -> None:
        object.__setattr__(self, "root", Path(root).absolute())
        if has_surrogates(str(self.root)):
            raise ProjectError(
                self.root, "a path that is not UTF-8", "Rename the folder, or use another"
            )

    @property
    def config(self) -> Path:
        """The configuration, which Megatron's Retro reads too."""
        return self.root / "config.json"

    @property
    def legacy_config(self) -> Path:
        """The configuration's name in older directories."""
        return self.root / "args.json"

    @property
    def written_config(self) -> Path:
        """The existing one of the two; `config` if both exist."""
        return self.config if self.config.is_file() else self.legacy_config

    @property
    def settings(self) -> Path:
        """Our own settings: embedder, index, search."""
        return self.root / "retro_mcore.json"

    @property
    def data(self) -> Path:
        """Tokens: <prefix>.bin and <prefix>.idx."""
        return self.root / "data"

    @property
    def data_cache(self) -> Path:
        """Sample indexes of Megatron's datasets."""
        return self.data / "cache"

    @property
    def tokenizer(self) -> Path:
        """Tokenizer files named in the configuration."""
        return self.root / "tokenizer"

    @property
    def db(self) -> Path:
        """The chunk database."""
        return self.root / "db"

    @property
    def dataset_infos(self) -> Path:
        """Numbers of documents and chunks per dataset."""
        return self.db / "indexed_dataset_infos.json"

    def individual_db(self, prefix: str) -> Path:
        """Directory of one dataset's chunks, a file per range of documents."""
        return self.db / "individual" / prefix

    def merged_db(self, name: str) -> Path:
        """The merged database `name`: "train" (the one retrieved from), "valid" or "sampled"."""
        return self.db / "merged" / f"{name}.hdf5"

    @property
    def removed_documents(self) -> Path:
        """Directory of the documents that the database holds but that are not retrieved."""
        return self.db / "removed"

    @property
    def left_out_documents(self) -> Path:
        """Documents whose chunks build_db leaves out of the database."""
        return self.db / "left_out.npy"

    @property
    def index(self) -> Path:
        """Embeddings and indexes."""
        return self.root / "index"

    @property
    def embeddings(self) -> Path:
        """Embeddings of the rows of train.hdf5, a file per range."""
        return self.index / "embeddings"

    @property
    def embedder_record(self) -> Path:
        """Digests of the files of the embedder that the embeddings were begun with."""
        return self.index / "embedder.json"

    @property
    def lexical_weights(self) -> Path:
        """Weights of the lexical embedder's buckets."""
        return self.index / "lexical_weights.npy"

    @property
    def held_out(self) -> Path:
        """Embedded queries used to measure recall."""
        return self.index / "held_out.hdf5"

    @property
    def index_choice(self) -> Path:
        """Record of the chosen index and the reason."""
        return self.index / "choice.json"

    def index_dir(self, index_string: str) -> Path:
        """Directory of one index."""
        return self.index / INDEX_TYPE / index_string

    def empty_index(self, index_string: str) -> Path:
        """The trained index, without vectors."""
        return self.index_dir(index_string) / "empty_1.000.faissindex"

    def added_index(self, index_string: str) -> Path:
        """The index with all vectors."""
        return self.index_dir(index_string) / "added_1.000_1.000.faissindex"

    def index_parts(self, index_string: str) -> Path:
        """Directory of the added vectors, one file per range of rows."""
        return self.index_dir(index_string) / "parts"

    def recall_report(self, index_string: str) -> Path:
        """Measured recall of the index."""
        return self.index_dir(index_string) / "recall.json"

    @property
    def query(self) -> Path:
        """Neighbors, one directory per split."""
        return self.root / "query"

    def grown(self, name: str) -> Path:
        """A project inside this one, whose database extends this one's."""
        return self.root / "updates" / name

    @property
    def token_counts(self) -> Path:
        """Number of database chunks in which each token occurs, for BM25."""
        return self.query / "token_counts.npy"

    @property
    def lock(self) -> Path:
        """Lock file of the current run; absent if there is none."""
        return self.root / ".lock"

    @property
    def stages(self) -> Path:
        """Directory of the stage records."""
        return self.root / "stages"

    def stage_record(self, stage: str) -> Path:
        """Record of the options and inputs of one stage."""
        return self.stages / f"{stage}.json"

    def relative(self, path: Path) -> str:
        """`path` as written in the configuration: relative to the project directory.

        Unchanged if it is elsewhere, as tokens of other programs may be.
        """
        inside = path.is_relative_to(self.root)
        return (path.relative_to(self.root) if inside else path).as_posix()
