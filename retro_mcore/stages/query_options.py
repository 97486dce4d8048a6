"""What saved neighbors depend on: the options and inputs in the record of query_neighbors."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING, Any

from retro_mcore.project.markers import read_marker
from retro_mcore.project.paths import ProjectPaths
from retro_mcore.project.records import input_digests, recorded_options, require_stage
from retro_mcore.retrieval.embedders import takes_batches
from retro_mcore.retrieval.embedders.precision import FLAG, Precision
from retro_mcore.retrieval.project_search import ProjectSearch
from retro_mcore.stages.embedding_choice import Batches, precision_options, refuse_unused_batches
from retro_mcore.stages.extended_search import MERGED

if TYPE_CHECKING:
    from retro_mcore.stages.query_neighbors import QueryNeighborsConfig

#: Keys of config.json that decide which samples are cut, but no chunk of an aligned project.
_OF_SAMPLES = (
    "retro_gpt_seed", "retro_gpt_seq_length", "retro_gpt_train_samples", "retro_gpt_data_path",
    "retro_gpt_global_batch_size", "retro_gpt_eval_interval", "retro_gpt_eval_iters",
)  # fmt: skip


def options_of(
    config: QueryNeighborsConfig,
    search: ProjectSearch,
    num_query: int,
    precision: Precision,
    batches: Batches,
) -> dict[str, Any]:
    """The options that the neighbors depend on, by flag or by key of config.json."""
    settings, project = search.source_settings, search.config
    return {
        "--num-neighbors-query": num_query,
        "--num-neighbors-save": config.num_neighbors_save,
        **batches.options,
        "--nprobe of build_index": settings.nprobe,
        "--ef-search of build_index": settings.ef_search,
        # The following only if set, so that projects built before they existed remain valid.
        **_precision_options(precision, search.precision),
        **({"--rerank": config.rerank} if config.rerank else {}),
        **({"--rescore": True} if config.rescore else {}),
        **(
            {"document_ends of build_index": settings.document_ends}
            if settings.document_ends != "line break"
            else {}
        ),
        **{key: getattr(project, key) for key in _recorded_keys(search)},
    }


def possible_batches(
    config: QueryNeighborsConfig, search: ProjectSearch, record: str, stage: str
) -> list[Batches]:
    """How a search may batch chunks for the embedder, the default first.

    A finished search goes on as it was run, a new one as the project's own search with the same
    embedder, or as the database was embedded. Older versions began every search with 16 chunks, and
    every other database's with the batches of the project's own.

    Args:
        config: Configuration of the search.
        search: The project and the database that is searched.
        record: Name of the search's record.
        stage: Name of the record of the project's own search.

    Raises:
        ConfigurationError: flags name a number of chunks, and the embedder takes none.
    """
    finished = Batches.recorded(recorded_options(search.paths, record))
    given = Batches.of(config.embed_batch_size, config.embed_batch_tokens)
    name = str(search.source_settings.embedder)
    refuse_unused_batches(name, given, finished)
    if known := given or finished:
        return [known]
    own = Batches.recorded(recorded_options(search.paths, stage))
    database = Batches.recorded(recorded_options(search.source, "build_index"))
    same = search.settings.embedder == search.source_settings.embedder
    order = [own, database] if same else [database, own]
    # What a model counts in tokens, an embedder without one cannot.
    usable = [each for each in order if each and (each.tokens is None or takes_batches(name))]
    return list(dict.fromkeys([*usable, Batches()]))


def is_begun(paths: ProjectPaths, fingerprints: Collection[str]) -> bool:
    """Whether a file of neighbors has one of these fingerprints."""
    files = paths.query.glob("*/*.hdf5")
    return any((read_marker(path) or {}).get("fingerprint") in fingerprints for path in files)


def _precision_options(precision: Precision, of_database: Precision) -> dict[str, Any]:
    """The precision as it is recorded; fp32 only where the database has another."""
    if precision == "fp32" != of_database:
        return {FLAG: precision}
    return precision_options(precision)


def _recorded_keys(search: ProjectSearch) -> list[str]:
    """Keys of config.json that the neighbors depend on."""
    # In an aligned project, the chunks are those of the documents, whatever the samples are.
    of_samples = _OF_SAMPLES if search.settings.samples == "aligned" else ()
    return [
        key
        for key in vars(search.config)
        if key.startswith(("retro_gpt_", "retro_block_size"))
        and not key.endswith("cache_path")
        and key not in of_samples
    ]


def database_digests(paths: ProjectPaths) -> dict[str, str]:
    """Digests of the project's own databases, whose chunks are searched for."""
    files = [paths.merged_db(name) for name in MERGED]
    for file in files:
        require_stage(paths, file, "build_db")
    found = input_digests(paths, files)
    return {f"{name} (searched for)": digest for name, digest in found.items()}
