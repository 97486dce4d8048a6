"""The project's configuration: config.json with upstream's keys, and our own retro_mcore.json."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from retro_mcore.chunking import SampleLayout, chunks_per_sample
from retro_mcore.errors import CorruptFileError, ProjectError, raise_problems
from retro_mcore.json_text import parse_json
from retro_mcore.project.atomic import write_json
from retro_mcore.project.config_values import config_problems, needed_keys, settings_problems
from retro_mcore.project.paths import ProjectPaths

Split = Literal["train", "valid", "test"]
#: What is done with near-duplicate documents; see `preprocess_corpus`.
NearDuplicateMode = Literal["keep", "count", "exclude-neighbors", "decontaminate", "drop"]
SPLITS: tuple[Split, ...] = ("train", "valid", "test")
_REPAIR = "Restore the file"
#: Settings that are written only if set: older versions refuse a project that has them.
_REFUSED_BY_OLDER = ("compacted_from", "removed_documents")


@dataclass(frozen=True)
class OtherDatabase:
    """A database used instead of the project's own, and the neighbors found in it.

    Attributes:
        project_dir: The project that holds the database, absolute or relative to this one.
        neighbor_dirs: Directory name under this project's `query/`, by split.
    """

    project_dir: str
    neighbor_dirs: dict[str, str | None]


@dataclass
class ProjectConfig:
    """config.json: one field per key, with the names of Megatron's Retro.

    Tokenizer paths are relative to the project directory, data prefixes to its `data/`.

    Attributes:
        retro_gpt_data_path: weight, prefix, weight, prefix … (weights are strings), or one prefix.
        retro_block_size: Rows per file of embeddings and of neighbors.
        retro_neighbor_dirs: Directory name under `query/` by split; None for a split without one.
        retro_database: The database that replaces the project's own (update_db); None: its own.
            Other readers ignore this key and use the project's own.
        unknown: Keys written by other programs, preserved unchanged.
    """

    retro_block_size: int
    retro_gpt_chunk_length: int
    retro_gpt_seq_length: int
    retro_gpt_global_batch_size: int
    retro_gpt_train_samples: int
    retro_gpt_eval_interval: int
    retro_gpt_eval_iters: int
    retro_gpt_split: str
    retro_gpt_seed: int
    retro_gpt_data_path: list[str]
    retro_gpt_tokenizer_type: str
    retro_gpt_data_cache_path: str | None = None
    retro_gpt_tokenizer_model: str | None = None
    retro_gpt_vocab_file: str | None = None
    retro_gpt_merge_file: str | None = None
    retro_bert_tokenizer_type: str | None = None
    retro_bert_vocab_file: str | None = None
    retro_neighbor_dirs: dict[str, str | None] = field(default_factory=dict)
    retro_database: OtherDatabase | None = None
    unknown: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def load(cls, project_dir: Path | str) -> ProjectConfig:
        """Read config.json, or args.json in older directories.

        Raises:
            ProjectError: there is neither, or a required key is missing.
            CorruptFileError: the file is not a JSON object, or a value is invalid.
            SeveralErrors: several of these; all are reported.
        """
        paths = ProjectPaths(project_dir)
        path = paths.written_config
        if not path.is_file():
            raise ProjectError(
                paths.config,
                "no such file, so this is not a project directory",
                "Run preprocess_corpus, or check --project-dir",
            )
        values = read_json_object(path)
        missing = sorted(needed_keys(cls) - values.keys())
        found: list[ProjectError] = [
            CorruptFileError(path, f"{name} {what}", _REPAIR)
            for name, what in config_problems(values, cls).items()
        ]
        if missing:
            found.insert(0, ProjectError(path, f"keys {', '.join(missing)} are missing", _REPAIR))
        raise_problems(found)
        known = {field_.name for field_ in fields(cls)} - {"unknown"}
        unknown = {key: value for key, value in values.items() if key not in known}
        values = {key: value for key, value in values.items() if key in known}
        values.setdefault("retro_block_size", 100_000)
        values["retro_neighbor_dirs"] = values.get("retro_neighbor_dirs") or {}
        if isinstance(other := values.get("retro_database"), dict):
            values["retro_database"] = OtherDatabase(**other)
        values["retro_gpt_data_path"] = [str(item) for item in values["retro_gpt_data_path"]]
        return cls(**values, unknown=unknown)

    def save(self, project_dir: Path | str) -> None:
        """Write config.json (indented by 4, sorted keys), atomically."""
        values = asdict(self)
        unknown = values.pop("unknown")
        if self.retro_database is None:
            del values["retro_database"]
        write_json(ProjectPaths(project_dir).config, {**unknown, **values}, sort_keys=True)

    def database_paths(self, project_dir: Path | str) -> ProjectPaths:
        """Paths of the project whose database, index and embedder are used; usually this one."""
        root = Path(project_dir)
        return ProjectPaths(root / self.retro_database.project_dir if self.retro_database else root)

    def neighbor_dir(self, split: Split) -> str | None:
        """Directory name under `query/` of the split's neighbors in the current database."""
        other = self.retro_database
        return (other.neighbor_dirs if other else self.retro_neighbor_dirs).get(split)

    def neighbor_dirs(self, settings: ProjectSettings) -> dict[Split, str]:
        """Directory names under `query/` of the neighbors in the current database.

        By split; in an aligned project, by merged database ("train", "valid").
        """
        other = self.retro_database
        own = self.retro_neighbor_dirs
        if settings.samples == "aligned":
            own = dict(settings.chunk_neighbor_dirs or {})
        names = other.neighbor_dirs if other else own
        return {split: name for split in SPLITS if (name := names.get(split)) is not None}

    @property
    def chunks_per_sample(self) -> int:
        """L, the number of chunks per sample."""
        return chunks_per_sample(self.retro_gpt_seq_length, self.retro_gpt_chunk_length)

    @property
    def blend(self) -> tuple[list[float], list[str]]:
        """Weights (as given, not normalized) and data prefixes."""
        path = self.retro_gpt_data_path
        if len(path) == 1:
            return [1.0], list(path)
        return [float(weight) for weight in path[::2]], list(path[1::2])

    @property
    def num_train_samples(self) -> int:
        """Number of training samples."""
        return self.retro_gpt_train_samples

    @property
    def num_valid_samples(self) -> int:
        """Number of validation samples of all evaluations during training, the last included."""
        batches = self.retro_gpt_train_samples // self.retro_gpt_global_batch_size
        evaluations = batches // self.retro_gpt_eval_interval + 1
        return evaluations * self.retro_gpt_eval_iters * self.retro_gpt_global_batch_size

    @property
    def num_test_samples(self) -> int:
        """Number of samples of the evaluation after training."""
        return self.retro_gpt_eval_iters * self.retro_gpt_global_batch_size

    def num_samples(self, split: Split) -> int:
        """Number of samples of `split`."""
        return {
            "train": self.num_train_samples,
            "valid": self.num_valid_samples,
            "test": self.num_test_samples,
        }[split]


def _refuse_lost_settings(paths: ProjectPaths) -> None:
    """Reject a project of ours that lost retro_mcore.json, and with it BOS, EOD and the embedder.

    Our stages write that file before their record; other programs write neither.
    """
    if any(paths.stage_record(stage).is_file() for stage in ("preprocess_corpus", "update_db")):
        raise CorruptFileError(
            paths.settings,
            "no such file, but the project was created with one",
            "Restore the file, or run preprocess_corpus, build_index and query_neighbors again, "
            "with the options that they were run with",
        )


@dataclass
class ProjectSettings:
    """retro_mcore.json: pipeline settings that have no key in config.json.

    Attributes:
        json_keys: Keys of a JSONL line that hold text.
        id_key: Key of a JSONL line that holds its id; None in projects of versions that did not
            record it.
        clean_text: Whether texts are cleaned with ftfy; None likewise.
        eod_id: Id of the end-of-document token; None: chosen by the tokenizer's well-known names,
            as in earlier versions.
        bos_id: Id of the beginning-of-sequence token; None: as declared by the tokenizer's files.
        add_bos: Whether every document, and so every prompt, begins with BOS.
        samples: "aligned": every document begins a chunk, so a sample's chunks are chunks of the
            database. "packed": documents follow one another without gaps.
        chunk_neighbor_dirs: In an aligned project, the directories under `query/` that hold the
            neighbors of all chunks of the merged databases, by database ("train", "valid"); None
            until they are searched.
        near_duplicates: What was done with near-duplicate documents, and is done with those that
            are appended.
        near_duplicate_threshold: Least Jaccard similarity of near-duplicates; None: not searched.
        near_duplicate_words: Words per sequence that documents are compared by; None likewise.
        whole_datasets: Datasets whose documents are all in the database, regardless of the split.
            These are appended datasets, from which no samples are drawn.
        grown_from: The project whose database this one extends, relative to this one.
        growth: Number of chunks in the database before each extension.
        compacted_from: The project whose database this one is, without its removed documents,
            relative to this one.
        removed_documents: Number of documents in db/removed/, which are not retrieved although the
            database holds them. Versions that do not know this key refuse the project.
        embedder: Name or path that the embedder was loaded from.
        embedder_pooling: Pooling of the embedder's hidden states; None: the model's own setting.
        embedder_digests: Digests of the embedder's files, by part; None in projects of versions
            that did not record them.
        embed_precision: Precision that the embedder computes in; None in projects of versions
            that did not record it.
        embeddings_dtype: Type that the embeddings are stored in.
        embedding_dimension: Dimension of the embeddings.
        document_ends: Text that the embedder reads in place of an end of document inside a chunk.
            Projects indexed before this was recorded keep the line break used then.
        index_string: Faiss factory string.
        index_split: Whether the index is kept in parts for ranks to share.
        index_rescored: Whether the index was measured with candidates sorted by the stored vectors,
            and is searched so by default.
        index_faiss_gpu: Whether the index was built on GPUs if Faiss supported them.
        nprobe: Lists searched per query; None if the index has no lists.
        ef_search: Breadth of a graph search; None if the index has no graph.
        num_neighbors_query: Candidates searched per chunk, before the same-document filter.
        num_neighbors_save: Neighbors saved per chunk.
        rerank: Method that ordered the candidates; None: by distance.
        rescore: Whether the candidates' distances are those of the stored vectors, not the index's.
        faiss_gpu: Whether neighbors were searched on GPUs if Faiss supported them.
    """

    json_keys: list[str] = field(default_factory=lambda: ["text"])
    id_key: str | None = None
    clean_text: bool | None = None
    eod_id: int | None = None
    bos_id: int | None = None
    add_bos: bool = False
    samples: SampleLayout = "packed"
    chunk_neighbor_dirs: dict[str, str] | None = None
    near_duplicates: NearDuplicateMode = "keep"
    near_duplicate_threshold: float | None = None
    near_duplicate_words: int | None = None
    whole_datasets: list[str] = field(default_factory=list)
    grown_from: str | None = None
    growth: list[int] = field(default_factory=list)
    compacted_from: str | None = None
    removed_documents: int = 0
    embedder: str | None = None
    embedder_pooling: Literal["mean", "cls"] | None = None
    embedder_digests: dict[str, str] | None = None
    embed_precision: Literal["fp32", "fp16", "bf16", "int8"] | None = None
    embeddings_dtype: Literal["fp16", "fp32"] = "fp32"
    embedding_dimension: int | None = None
    document_ends: Literal["line break", "detokenized"] = "line break"
    index_string: str | None = None
    index_split: bool = False
    index_rescored: bool = False
    index_faiss_gpu: bool = True
    nprobe: int | None = None
    ef_search: int | None = None
    num_neighbors_query: int | None = None
    num_neighbors_save: int | None = None
    rerank: Literal["bm25"] | None = None
    rescore: bool = False
    faiss_gpu: bool = True

    @classmethod
    def load(cls, project_dir: Path | str) -> ProjectSettings:
        """Read retro_mcore.json, or use defaults in a directory made by another program.

        Raises:
            CorruptFileError: the file is not a JSON object, or has an unknown key or an invalid
                value; or it is missing from a directory that our stages made.
            SeveralErrors: several of these; all are reported.
        """
        paths = ProjectPaths(project_dir)
        path = paths.settings
        if not path.is_file():
            _refuse_lost_settings(paths)
            return cls()
        values = read_json_object(path)
        found: list[CorruptFileError] = []
        if unknown := sorted(set(values) - {field_.name for field_ in fields(cls)}):
            found.append(
                CorruptFileError(
                    path, f"unknown keys {', '.join(unknown)}", "Update retro-mcore, or remove them"
                )
            )
        problems = settings_problems(values, cls)
        found += [
            CorruptFileError(path, f"{key} {what}", _REPAIR) for key, what in problems.items()
        ]
        raise_problems(found)
        return cls(**values)

    def save(self, project_dir: Path | str) -> None:
        """Write retro_mcore.json, atomically."""
        values = asdict(self)
        for name in _REFUSED_BY_OLDER:
            if not values[name]:
                del values[name]
        write_json(ProjectPaths(project_dir).settings, values)


def read_json_object(path: Path) -> dict[str, Any]:
    """Read the JSON object in `path`.

    Raises:
        CorruptFileError: the file holds something else, or is missing.
    """
    values = _read_json(path)
    if not isinstance(values, dict):
        raise CorruptFileError(path, "not a JSON object", _REPAIR)
    return values


def read_json_list(path: Path) -> list[dict[str, Any]]:
    """Read the JSON list of objects in `path`.

    Raises:
        CorruptFileError: the file holds something else, or is missing.
    """
    values = _read_json(path)
    if not isinstance(values, list) or not all(isinstance(value, dict) for value in values):
        raise CorruptFileError(path, "not a list of JSON objects", _REPAIR)
    return values


def _read_json(path: Path) -> Any:
    try:
        return parse_json(path.read_bytes(), unique_keys=True)
    except FileNotFoundError as error:
        raise CorruptFileError(path, "no such file", _REPAIR) from error
    except ValueError as error:
        raise CorruptFileError(path, str(error), _REPAIR) from error
