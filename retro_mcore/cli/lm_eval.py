"""The lm-evaluation-harness' own command line, with the model `retro_mcore` registered.

`python -m retro_mcore.cli.lm_eval run --model retro_mcore --model_args project_dir=…,load=… …`
"""

from __future__ import annotations

import sys

from retro_mcore.cli.utf8 import use_utf8
from retro_mcore.errors import EXIT_CODE, MissingDependencyError, RetroError


def main() -> int:
    """Run the harness on this process's arguments; returns its exit code."""
    use_utf8()
    try:
        try:
            from lm_eval.__main__ import cli_evaluate

            import retro_mcore.evaluation.lm_eval  # noqa: F401 (registers the model)
        except ImportError as error:
            raise MissingDependencyError(
                "lm_eval", f"not installed ({error})", "Install retro-mcore[lm-eval]"
            ) from error
        cli_evaluate()
    except RetroError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_CODE
    return 0


if __name__ == "__main__":
    sys.exit(main())
