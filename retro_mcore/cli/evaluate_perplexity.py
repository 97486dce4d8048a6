"""`evaluate_perplexity`: perplexity on held-out documents, with and without neighbors."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from retro_mcore.cli.command import run_command
from retro_mcore.cli.tables.perplexity import print_tables
from retro_mcore.distributed import get_rank, initialize, raise_together
from retro_mcore.evaluation.perplexity_config import EvaluatePerplexityConfig
from retro_mcore.platform import distributed_backend, setup_device

if TYPE_CHECKING:
    from retro_mcore.evaluation.perplexity_run import EvaluatePerplexityResult


@dataclass(kw_only=True)
class EvaluatePerplexityOptions(EvaluatePerplexityConfig):
    """Measure perplexity on held-out documents with real, shuffled, random and no neighbors.

    Shuffled: each chunk is given the neighbors of a chunk of another text. Random: chunks of the
    database. The model is rebuilt from its checkpoint alone.
    """

    verify: bool = False
    """Compare the checksums of all files that are read, however large; else of 8 GiB a process."""


def evaluate_perplexity(options: EvaluatePerplexityOptions) -> EvaluatePerplexityResult:
    """Measure, print tables and write them as JSON.

    Raises:
        RetroError: options, project and checkpoint do not fit together.
    """
    setup_device(options.device)
    initialize(distributed_backend(), options.distributed_timeout_minutes)
    from retro_mcore.evaluation.perplexity_run import run

    result = run(options)
    with raise_together():
        if get_rank() == 0:
            print_tables(result.perplexities, result.bits_per_byte, result.leakage, result.gains)
            result.write()
    return result


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    return run_command(EvaluatePerplexityOptions, evaluate_perplexity, argv)


if __name__ == "__main__":
    sys.exit(main())
