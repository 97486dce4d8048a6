"""Stage `preprocess_corpus`: tokenize text, and write the configuration that later stages read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from retro_mcore.chunking import SampleLayout
from retro_mcore.data.near_duplicates.files import read_groups
from retro_mcore.data.near_duplicates.minhash import require_datasketch
from retro_mcore.data.tokenizers.base import Tokenizer
from retro_mcore.data.tokenizers.loading import SpecialTokenChoice
from retro_mcore.data.tokens.splits import check_documents
from retro_mcore.data.tokens.token_file import TokenFile, bin_path
from retro_mcore.distributed import barrier, get_rank, initialize, raise_together
from retro_mcore.errors import raise_problems
from retro_mcore.project.lock import stage_lock
from retro_mcore.project.markers import fingerprint_of
from retro_mcore.project.paths import ProjectPaths
from retro_mcore.project.records import check_stage, finish_stage, recorded_inputs, recorded_options
from retro_mcore.samples.passes import count_passes
from retro_mcore.stages.configuration import Project, project_paths
from retro_mcore.stages.preprocessing.config import (
    PreprocessCorpusConfig,
    near_duplicate_options,
    problems_of,
    sample_options,
    text_options,
)
from retro_mcore.stages.preprocessing.corpora import Corpora
from retro_mcore.stages.preprocessing.near_duplicates import (
    CorpusDatasets,
    NearDuplicateCounts,
    count_near_duplicates,
    drop_of_corpus,
)
from retro_mcore.stages.preprocessing.project_config import make_project_config, save_project
from retro_mcore.stages.preprocessing.report import PreprocessCorpusReport, count_all, count_padding
from retro_mcore.stages.preprocessing.tokenizer import (
    TokenizerSetup,
    require_tokenizer,
    special_token_choice,
    tokenizer_digests,
)

__all__ = ["STAGE", "PreprocessCorpusConfig", "PreprocessCorpusReport", "run"]

STAGE = "preprocess_corpus"
#: For options that `set_samples` changes, too.
_HINTS = dict.fromkeys(
    (
        *("--input-weights", "--seq-length", "--train-samples", "--train-epochs"),
        *("--global-batch-size", "--eval-interval", "--eval-iters", "--seed"),
    ),
    "Give it as set_samples or this command set it last, change it with set_samples, or use "
    "another --project-dir",
)
#: Part of the fingerprint of tokens. In earlier versions, special tokens mentioned in a text became
#: special tokens, and no document had BOS.
_TEXT_VERSION = "text is never special"


def run(project: Project, config: PreprocessCorpusConfig) -> PreprocessCorpusReport:
    """Tokenize the inputs and write config.json, on all ranks together.

    Args:
        project: Project directory, created if it does not exist.
        config: Configuration of this stage.

    Raises:
        CorpusError: an input is missing, empty or malformed.
        TokenizerError: the tokenizer cannot be loaded or trained.
        ConfigurationError: the configuration is invalid.
        ProjectError: the project was built with another configuration or other inputs, another
            run works on it, or the disk is full.
    """
    initialize(
        timeout_minutes=config.distributed_timeout_minutes,
        stall_minutes=config.stall_timeout_minutes,
    )
    with raise_together():
        raise_problems(list(problems_of(config)))
    paths = project_paths(project)
    with stage_lock(paths, STAGE, create=True):
        return _preprocess(paths, config)


def _preprocess(paths: ProjectPaths, config: PreprocessCorpusConfig) -> PreprocessCorpusReport:
    with raise_together():
        if config.near.are_searched:
            require_datasketch()
        config = replace(config, samples=config.samples or _layout_of(paths))
        inputs = _Inputs.open(paths, config)
    corpora, choice = inputs.corpora, inputs.choice
    setup = TokenizerSetup(config, paths, corpora, choice, inputs.fingerprint)
    tokenizer, files = setup.prepare()
    multiple = config.document_multiple
    reused = inputs.make_datasets(paths, config, tokenizer)
    with raise_together():
        datasets = [TokenFile(paths.data / prefix) for prefix in corpora.prefixes]
        for source, dataset in zip(corpora.sources, datasets, strict=True):
            check_documents(config.split, len(dataset), source)
        made = make_project_config(config, paths, corpora.prefixes, datasets, files)
        passes = count_passes(made, datasets)
        padding = (
            count_padding(datasets, config.split, multiple, tokenizer.eod) if multiple > 1 else {}
        )
        near = _near_duplicates(paths, config, datasets)
        counts = count_all(paths, corpora.prefixes, datasets, passes, padding, near)
        if get_rank() == 0:
            save_project(made, config, paths, None if choice.first_known_eod else tokenizer)
            finish_stage(paths, STAGE, inputs.options, inputs.digests, counts)
    barrier()
    bos = tokenizer.bos if tokenizer.adds_bos else None
    return PreprocessCorpusReport(
        config=made,
        num_documents=sum(len(dataset) for dataset in datasets),
        num_tokens=sum(len(dataset.tokens) for dataset in datasets),
        vocab_size=tokenizer.vocab_size,
        reused=reused,
        report=counts,
        passes=tuple(passes),
        tokenizer_type=tokenizer.name,
        eod_id=tokenizer.eod,
        eod_token=tokenizer.token_name(tokenizer.eod),
        bos_id=bos,
        bos_token=None if bos is None else tokenizer.token_name(bos),
    )


def _layout_of(paths: ProjectPaths) -> SampleLayout:
    """Layout of the samples of a project that exists; aligned if it is new."""
    if not paths.stage_record(STAGE).is_file():
        return "aligned"
    recorded = recorded_options(paths, STAGE).get("--samples", "packed")
    return "aligned" if recorded == "aligned" else "packed"


def _near_duplicates(
    paths: ProjectPaths, config: PreprocessCorpusConfig, datasets: Sequence[TokenFile]
) -> NearDuplicateCounts | None:
    """Counts of near-duplicates that are in the project; None if they are not searched."""
    if not config.near.are_searched:
        return None
    sizes = [len(dataset) for dataset in datasets]
    return count_near_duplicates(read_groups(paths.data, sum(sizes)), sizes, config.split)


@dataclass(frozen=True)
class _Inputs:
    """Everything that determines the tokens, compared with an earlier run's."""

    corpora: Corpora
    choice: SpecialTokenChoice
    options: dict[str, object]
    digests: dict[str, str]
    fingerprint: str

    @classmethod
    def open(cls, paths: ProjectPaths, config: PreprocessCorpusConfig) -> _Inputs:
        corpora = Corpora.of(config)
        digests = corpora.digests(recorded_inputs(paths, STAGE))
        choice = special_token_choice(config, paths, STAGE)
        digests.update(tokenizer_digests(config, choice))
        require_tokenizer(config, corpora)
        text = text_options(config)
        near = near_duplicate_options(config)
        options = {**text, **sample_options(config), **near}
        output = bin_path(paths.data / corpora.prefixes[0])
        check_stage(paths, STAGE, options, digests, output, _HINTS)
        version = [] if choice.first_known_eod else [_TEXT_VERSION]
        fingerprint = fingerprint_of([text, digests, *version])
        return cls(corpora, choice, options, digests, fingerprint)

    def make_datasets(
        self, paths: ProjectPaths, config: PreprocessCorpusConfig, tokenizer: Tokenizer
    ) -> bool:
        """Write all datasets, on all ranks; returns whether they existed already."""
        near, multiple = config.near, config.document_multiple
        made_from = fingerprint_of([self.fingerprint, near_duplicate_options(config), config.split])
        datasets = CorpusDatasets(
            paths.data, self.corpora.prefixes, near, tokenizer, multiple, made_from
        )

        def tokenize(folder: Path) -> bool:
            return self.corpora.tokenize(folder, tokenizer, self.fingerprint, multiple)

        return datasets.make(tokenize, drop_of_corpus(near, config.split, self.corpora.sources))
