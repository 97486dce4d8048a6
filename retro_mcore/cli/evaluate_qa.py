"""`evaluate_qa`: answer the questions of a test file, and score the answers."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from retro_mcore.cli.command import run_command
from retro_mcore.cli.tables.qa import print_qa_table
from retro_mcore.distributed import get_rank, initialize, raise_together
from retro_mcore.evaluation.qa_config import EvaluateQaConfig
from retro_mcore.platform import distributed_backend, setup_device

if TYPE_CHECKING:
    from retro_mcore.evaluation.qa_run import EvaluateQaResult


@dataclass(kw_only=True)
class EvaluateQaOptions(EvaluateQaConfig):
    """Answer the questions of a test file, and score the answers.

    A run that was stopped goes on where it was. With --predictions nothing is generated.
    """

    verify: bool = False
    """Compare the checksums of all files that are read, however large; else of 8 GiB a process."""


def evaluate_qa(options: EvaluateQaOptions) -> EvaluateQaResult:
    """Answer, score, print a table and write scores.json.

    Raises:
        CorpusError: the test file or the predictions are malformed; names the line or record.
        RetroError: options, project and checkpoint do not fit together.
    """
    setup_device(options.device)
    initialize(distributed_backend(), options.distributed_timeout_minutes)
    from retro_mcore.evaluation.qa_run import run

    result = run(options)
    with raise_together():
        if get_rank() == 0:
            print_qa_table(
                result.num_questions,
                result.scores,
                result.difference,
                result.legacy,
                result.report,
            )
            result.write(options.confidence_level)
    return result


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    return run_command(EvaluateQaOptions, evaluate_qa, argv)


if __name__ == "__main__":
    sys.exit(main())
