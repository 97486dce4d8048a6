"""The project's configuration: config.json in upstream's keys, and our settings beside it."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from retro_mcore.chunking import chunks_per_sample
from retro_mcore.errors import CorruptFileError, ProjectError, raise_problems
from retro_mcore.json_text import parse_json
from retro_mcore.project.atomic import write_json
from retro_mcore.project.config_values import config_problems, needed_keys, settings_problems
from retro_mcore.project.paths import ProjectPaths

Split = Literal["train", "valid", "test"]
SPLITS: tuple[Split, ...] = ("train", "valid", "test")
_MEND = "Restore the file"


@dataclass(frozen=True)
class OtherDatabase:
    """A database in the place of a project's own, and the neighbors that were found in it.

    Attributes:
        project_dir: The project that holds it, absolute or relative to this one.
        neighbor_dirs: Split to directory name under this project's `query/`.
    """

    project_dir: str
    neighbor_dirs: dict[str, str | None]


@dataclass
class ProjectConfig:
    """config.json: one field per key, named as Megatron's Retro names it.

    Paths of tokenizer files are relative to the project directory, data prefixes to its `data/`.

    Attributes:
        retro_gpt_data_path: weight, prefix, weight, prefix … (weights are strings), or one prefix.
        retro_block_size: Rows per file of embeddings and of neighbors.
        retro_neighbor_dirs: Split to directory name under `query/`, None where there is none.
        retro_database: The database that was put in the place of the project's own (update_db);
            None: its own. Other readers know nothing of it, and go on with the project's own.
        unknown: Keys of other writers, kept as they are.
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
            ProjectError: there is neither, or a key that is needed is missing.
            CorruptFileError: the file is not a JSON object, or a value cannot be.
            SeveralErrors: several of these; all of them are told.
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
            CorruptFileError(path, f"{name} {what}", _MEND)
            for name, what in config_problems(values, cls).items()
        ]
        if missing:
            found.insert(0, ProjectError(path, f"keys {', '.join(missing)} are missing", _MEND))
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
        """The project whose database, index and embedder are used: most often, this one."""
        root = Path(project_dir)
        return ProjectPaths(root / self.retro_database.project_dir if self.retro_database else root)

    def neighbor_dir(self, split: Split) -> str | None:
        """Name under `query/` of the split's neighbors in the database that is used."""
        other = self.retro_database
        return (other.neighbor_dirs if other else self.retro_neighbor_dirs).get(split)

    @property
    def chunks_per_sample(self) -> int:
        """L."""
        return chunks_per_sample(self.retro_gpt_seq_length, self.retro_gpt_chunk_length)

    @property
    def blend(self) -> tuple[list[float], list[str]]:
        """Weights as given (not normalized) and data prefixes."""
        path = self.retro_gpt_data_path
        if len(path) == 1:
            return [1.0], list(path)
        return [float(weight) for weight in path[::2]], list(path[1::2])

    @property
    def num_train_samples(self) -> int:
        """Samples of the training split."""
        return self.retro_gpt_train_samples

    @property
    def num_valid_samples(self) -> int:
        """Samples of all evaluations that training makes, the one before its end included."""
        batches = self.retro_gpt_train_samples // self.retro_gpt_global_batch_size
        evaluations = batches // self.retro_gpt_eval_interval + 1
        return evaluations * self.retro_gpt_eval_iters * self.retro_gpt_global_batch_size

    @property
    def num_test_samples(self) -> int:
        """Samples of the evaluation after training."""
        return self.retro_gpt_eval_iters * self.retro_gpt_global_batch_size

    def num_samples(self, split: Split) -> int:
        """Samples of `split`."""
        return {
            "train": self.num_train_samples,
            "valid": self.num_valid_samples,
            "test": self.num_test_samples,
        }[split]


def _refuse_lost_settings(paths: ProjectPaths) -> None:
    """Refuse a project of ours that lost retro_mcore.json, and with it BOS, EOD and the embedder.

    Our stages write that file before their record; another writer leaves neither.
    """
    if any(paths.stage_record(stage).is_file() for stage in ("preprocess_corpus", "update_db")):
        raise CorruptFileError(
            paths.settings,
            "no such file, and the project was made with one",
            "Restore the file, or run preprocess_corpus, build_index and query_neighbors again, "
            "with the options that they were run with",
        )


@dataclass
class ProjectSettings:
    """retro_mcore.json: what the pipeline needs to know and config.json has no key for.

    Attributes:
        json_keys: Keys of a JSONL line that hold the text.
        id_key: Key of a JSONL line that holds its id; None: a project of before it was kept here.
        clean_text: Whether texts are mended with ftfy; None: likewise.
        eod_id: The token that ends a document; None: by the tokenizer's well-known names, as
            projects of earlier versions did.
        bos_id: The token that begins a text; None: as the tokenizer's files say.
        add_bos: Whether every document begins with it, and so every prompt.
        whole_datasets: Datasets whose documents are all retrieved from, whatever the split says:
            those that were appended, of which no sample is made.
        grown_from: The project whose database this one's begins with, relative to this one.
        growth: Chunks of the database each time that it was grown, without the last.
        embedder: Name or path that the embedder was loaded by.
        embedder_pooling: How its hidden states are pooled; None: as the model itself says.
        embedding_dimension: Its dimension.
        document_ends: What the embedder reads for an end of document inside a chunk. Projects that
            were indexed before it was recorded keep the line break of that time.
        index_string: Faiss factory string.
        index_split: Whether the index stays in its parts, for ranks to share.
        nprobe: Lists searched per query; None where the index has no lists.
        ef_search: Breadth of a graph search; None where the index has no graph.
        num_neighbors_query: Candidates searched per chunk, before the same-document filter.
        num_neighbors_save: Neighbors saved per chunk.
        rerank: What the candidates were ordered by; None: their distance.
    """

    json_keys: list[str] = field(default_factory=lambda: ["text"])
    id_key: str | None = None
    clean_text: bool | None = None
    eod_id: int | None = None
    bos_id: int | None = None
    add_bos: bool = False
    whole_datasets: list[str] = field(default_factory=list)
    grown_from: str | None = None
    growth: list[int] = field(default_factory=list)
    embedder: str | None = None
    embedder_pooling: Literal["mean", "cls"] | None = None
    embedding_dimension: int | None = None
    document_ends: Literal["line break", "detokenized"] = "line break"
    index_string: str | None = None
    index_split: bool = False
    nprobe: int | None = None
    ef_search: int | None = None
    num_neighbors_query: int | None = None
    num_neighbors_save: int | None = None
    rerank: Literal["bm25"] | None = None

    @classmethod
    def load(cls, project_dir: Path | str) -> ProjectSettings:
        """Read retro_mcore.json; the defaults where there is none (another writer's directory).

        Raises:
            CorruptFileError: the file is not a JSON object, holds an unknown key, or a value that
                cannot be; or it is missing in a directory that we made.
            SeveralErrors: several of these; all of them are told.
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
        found += [CorruptFileError(path, f"{key} {what}", _MEND) for key, what in problems.items()]
        raise_problems(found)
        return cls(**values)

    def save(self, project_dir: Path | str) -> None:
        """Write retro_mcore.json, atomically."""
        write_json(ProjectPaths(project_dir).settings, asdict(self))


def read_json_object(path: Path) -> dict[str, Any]:
    """The JSON object in `path`.

    Raises:
        CorruptFileError: it holds something else, or is missing.
    """
    values = _read_json(path)
    if not isinstance(values, dict):
        raise CorruptFileError(path, "not a JSON object", _MEND)
    return values


def read_json_list(path: Path) -> list[dict[str, Any]]:
    """The JSON list of objects in `path`.

    Raises:
        CorruptFileError: it holds something else, or is missing.
    """
    values = _read_json(path)
    if not isinstance(values, list) or not all(isinstance(value, dict) for value in values):
        raise CorruptFileError(path, "not a list of JSON objects", _MEND)
    return values


def _read_json(path: Path) -> Any:
    try:
        return parse_json(path.read_bytes(), unique_keys=True)
    except FileNotFoundError as error:
        raise CorruptFileError(path, "no such file", _MEND) from error
    except ValueError as error:
        raise CorruptFileError(path, str(error), _MEND) from error
