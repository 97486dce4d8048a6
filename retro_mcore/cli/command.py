"""Run a command: errors become exit codes, log records go to the terminal and a file."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch.distributed as dist

from retro_mcore import launcher
from retro_mcore.cli.flags import parse_command
from retro_mcore.cli.log_files import add_log_file, logged_run
from retro_mcore.cli.output import closed_pipe_ends_quietly
from retro_mcore.cli.project_options import verification_of
from retro_mcore.cli.quiet import ignore_unwanted
from retro_mcore.cli.utf8 import use_utf8, write_any_text
from retro_mcore.distributed import leave, print_error
from retro_mcore.errors import EXIT_CODE, RetroError, system_refusal
from retro_mcore.logs import CommandLogs, command_logs

Options = TypeVar("Options")


def run_command(
    options_type: type[Options],
    function: Callable[[Options], object],
    argv: Sequence[str] | None = None,
) -> int:
    """Parse the flags and run a command; returns its exit code.

    The exit code is 0, or the `exit_code` of what the function returns, if it has one. A user's
    mistake becomes one line on stderr and exit code 2. Process groups that the command
    joined are left before it returns. A process that runs this command alone is started again in
    UTF-8 mode if it must be; see `use_utf8`.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments == sys.argv[1:]:
        use_utf8()
    else:
        write_any_text()
    ignore_unwanted()
    joined_before = dist.is_initialized()
    with closed_pipe_ends_quietly(), command_logs() as logs:
        code = _exit_code(lambda: _run(options_type, function, arguments, logs))
        if not joined_before:
            leave()
    return code


def _run(
    options_type: type[Options],
    function: Callable[[Options], object],
    arguments: Sequence[str],
    logs: CommandLogs,
) -> int:
    options, level = parse_command(options_type, arguments)
    launcher.read()  # before log files are named by the rank
    logs.set_level(level)
    add_log_file(logs, function.__name__, options)
    with logged_run(function.__name__, arguments), verification_of(options):
        return getattr(function(options), "exit_code", 0)


def _exit_code(run: Callable[[], int]) -> int:
    try:
        return run()
    except RetroError as error:
        print_error(error)
        return EXIT_CODE
    except OSError as error:
        refusal = system_refusal(error)
        if refusal is None:
            raise
        print_error(refusal)
        return EXIT_CODE
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr, flush=True)
        return 130
