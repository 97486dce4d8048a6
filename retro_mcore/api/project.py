"""A project directory and its stages, from Python."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from retro_mcore.api.signatures import takes_fields_of
from retro_mcore.project.config import ProjectConfig
from retro_mcore.stages.build_db import BuildDbConfig
from retro_mcore.stages.build_index import BuildIndexConfig
from retro_mcore.stages.preprocessing.config import PreprocessCorpusConfig
from retro_mcore.stages.query_neighbors import QueryNeighborsConfig
from retro_mcore.stages.set_samples import SetSamplesConfig
from retro_mcore.stages.update_db import UpdateDbConfig

if TYPE_CHECKING:
    from retro_mcore.stages.build_db import BuildDbReport
    from retro_mcore.stages.build_index import BuildIndexReport
    from retro_mcore.stages.query_neighbors import QueryNeighborsReport
    from retro_mcore.stages.set_samples import SetSamplesReport
    from retro_mcore.stages.update_db import UpdateDbReport


class Project:
    """A project directory: tokens, chunk database, index and neighbors.

    A stage that is finished is not repeated, and one that was interrupted resumes. Under torchrun
    all ranks call a stage together.

    Args:
        directory: The project directory; see also `Project.create` and `Project.open`.
    """

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory)

    def __repr__(self) -> str:
        return f"Project({str(self.directory)!r})"

    def __fspath__(self) -> str:
        return str(self.directory)

    @classmethod
    def open(cls, directory: str | Path) -> Project:
        """Open an existing project.

        Raises:
            ProjectError: the directory is no project, or its config.json is malformed.
        """
        ProjectConfig.load(directory)
        return cls(directory)

    @staticmethod
    @takes_fields_of(PreprocessCorpusConfig)
    def create(directory: str | Path, config: PreprocessCorpusConfig) -> Project:
        """Turn text into a project: tokenize the inputs and write its configuration.

        Takes the fields of `PreprocessCorpusConfig` as keyword arguments: the flags of
        preprocess_corpus with underscores.

        Args:
            directory: The project directory, which is made if there is none.

        Raises:
            RetroError: an input, the tokenizer or an argument is at fault, or the directory holds
                a project that was made otherwise.
        """
        from retro_mcore.stages import preprocess_corpus

        preprocess_corpus.run(directory, config)
        return Project(directory)

    @property
    def config(self) -> ProjectConfig:
        """The contents of config.json."""
        return ProjectConfig.load(self.directory)

    @takes_fields_of(BuildDbConfig)
    def build_db(self, config: BuildDbConfig) -> BuildDbReport:
        """Cut the training documents into the chunks that are retrieved from.

        Takes the fields of `BuildDbConfig` as keyword arguments.

        Raises:
            RetroError: an earlier stage is missing, or an argument or a file is at fault.
        """
        from retro_mcore.stages import build_db

        return build_db.run(self.directory, config)

    @takes_fields_of(BuildIndexConfig)
    def build_index(self, config: BuildIndexConfig) -> BuildIndexReport:
        """Embed the chunk database and build the index that neighbors are searched in.

        Takes the fields of `BuildIndexConfig` as keyword arguments.

        Raises:
            RetroError: an earlier stage is missing, or an argument or a file is at fault.
        """
        from retro_mcore.stages import build_index

        return build_index.run(self.directory, config)

    @takes_fields_of(QueryNeighborsConfig)
    def query_neighbors(self, config: QueryNeighborsConfig) -> QueryNeighborsReport:
        """Search the neighbors of every chunk of every sample, and save them.

        Takes the fields of `QueryNeighborsConfig` as keyword arguments.

        Raises:
            RetroError: an earlier stage is missing, or an argument or a file is at fault.
        """
        from retro_mcore.stages import query_neighbors

        return query_neighbors.run(self.directory, config)

    @takes_fields_of(UpdateDbConfig)
    def update(self, config: UpdateDbConfig) -> UpdateDbReport:
        """Retrieve from more or fewer documents, or from another project's, for the same samples.

        Takes the fields of `UpdateDbConfig` as keyword arguments.

        Raises:
            RetroError: an earlier stage is missing, or an argument or a file is at fault.
        """
        from retro_mcore.stages import update_db

        return update_db.run(self.directory, config)

    @takes_fields_of(SetSamplesConfig)
    def set_samples(self, config: SetSamplesConfig) -> SetSamplesReport:
        """Change the length, number, order or batch size of the samples, without a new search.

        Takes the fields of `SetSamplesConfig` as keyword arguments.

        Raises:
            RetroError: the project is packed and its neighbors are searched, or an argument or a
                file is at fault.
        """
        from retro_mcore.stages import set_samples

        return set_samples.run(self.directory, config)
