"""`preprocess_corpus`: text to tokens, and the configuration that later stages read."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass

from retro_mcore.cli.command import run_command
from retro_mcore.cli.output import print_summary
from retro_mcore.cli.project_options import ProjectOptions
from retro_mcore.data.corpus.counts import loss_rows
from retro_mcore.stages.preprocess_corpus import (
    STAGE,
    PreprocessCorpusConfig,
    PreprocessCorpusReport,
    run,
)

#: From this share of padding on, the summary warns.
_MUCH_PADDING = 0.25


@dataclass
class PreprocessCorpusOptions(PreprocessCorpusConfig, ProjectOptions):
    """Turn text into a project directory: tokens, tokenizer and configuration."""

    project_dir: str
    """Directory to make, or to go on with."""


def preprocess_corpus(options: PreprocessCorpusOptions) -> PreprocessCorpusReport:
    """Run the stage and print its summary; see `retro_mcore.stages.preprocess_corpus.run`."""
    report = run(options.project_dir, options)
    print_report(report, options)
    return report


def print_report(report: PreprocessCorpusReport, options: PreprocessCorpusOptions) -> None:
    """Print the summary of a run."""
    vocab = f"{report.vocab_size} pieces"
    if options.trains_tokenizer and report.vocab_size < options.trained_vocab_size:
        vocab += f" (lowered from {options.trained_vocab_size}: the corpus has no more)"
    bos = "no BOS"
    if report.bos_id is not None:
        bos = f"{report.bos_token} (token {report.bos_id})"
    rows = {
        "project": options.project_dir,
        "documents": f"{report.num_documents}{' (reused)' if report.reused else ''}",
        "tokens": report.num_tokens,
        **({"near-duplicates": options.near} if options.near.are_searched else {}),
        **loss_rows(report.report),
        **_padding_rows(report),
        "tokenizer": f"{report.tokenizer_type}, {vocab}",
        "documents end with": f"{report.eod_token} (token {report.eod_id})",
        "documents begin with": bos,
        "samples": ", ".join(split.samples_text for split in report.passes),
        **{f"warning, {split.name}": split.warning for split in report.passes if split.warning},
        "chunks per sample": report.config.chunks_per_sample,
    }
    for prefix, counts in report.report["datasets"].items():
        for name, examples in counts.get("such_as", {}).items():
            rows[f"{name.replace('_', ' ')} of {prefix}"] = ", ".join(examples)
    print_summary(STAGE, rows)


def _padding_rows(report: PreprocessCorpusReport) -> dict[str, str]:
    """The share of padding, and what to do if it is large."""
    padding = report.report.get("padding_tokens", 0)
    if not padding:
        return {}
    share = padding / report.num_tokens
    rows = {"padding tokens": f"{padding} ({share:.1%} of the tokens)"}
    if share > _MUCH_PADDING:
        length = report.config.retro_gpt_chunk_length
        rows["warning, padding"] = (
            f"documents are short for chunks of {length} tokens: a smaller --retro-chunk-length or "
            "--samples packed wastes less"
        )
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    return run_command(PreprocessCorpusOptions, preprocess_corpus, argv)


if __name__ == "__main__":
    sys.exit(main())
