"""Log files of commands, beside their outputs."""

from __future__ import annotations

import logging
import os
import platform
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from retro_mcore import __version__, launcher, watch
from retro_mcore.cli.quiet import ignore_unwanted
from retro_mcore.cli.utf8 import write_any_text
from retro_mcore.errors import RetroError
from retro_mcore.logs import CONTEXT, PRINTED, CommandLogs, command_logs
from retro_mcore.project.paths import ProjectPaths

_LOG = logging.getLogger(__name__)

#: The option that names the folder whose `logs` a command's log files go into, by command.
_LOG_FOLDERS = {
    "preprocess_corpus": "project_dir",
    "build_db": "project_dir",
    "build_index": "project_dir",
    "query_neighbors": "project_dir",
    "update_db": "project_dir",
    "set_samples": "project_dir",
    "pretrain_retro": "save",
    "finetune_retro": "save",
    "evaluate_perplexity": "output",
    "evaluate_qa": "output",
}


def add_log_file(logs: CommandLogs, command: str, options: Any) -> None:
    """Log to a file per rank beside the outputs, if the command writes any.

    Training and question answering log to `logs/rank_0000.log` in their own folder. Where several
    commands or results share a folder, the file's name begins with theirs.
    """
    option = _LOG_FOLDERS.get(command)
    if option is None or (command == "pretrain_retro" and options.dry_run):
        return
    value = getattr(options, option)
    if command == "evaluate_perplexity" and not value:
        value = Path(options.load) / "perplexity.json"
    if not value:
        return
    folder = Path(str(value))
    if command == "evaluate_perplexity":
        logs.add_file(folder.parent, folder.stem)
    elif option == "project_dir":
        shard = options.shard if command == "build_index" else None  # a job of an array
        name = f"{command}_{shard.replace('/', '_of_')}" if shard else command
        # A stage writes into projects only; the first one makes its project.
        made = folder if command == "preprocess_corpus" else ProjectPaths(folder).written_config
        logs.add_file(folder, name, made)
    else:
        logs.add_file(folder)


@contextmanager
def command_in_python(command: str, options: object) -> Iterator[None]:
    """Log a command that is called from Python, as `run_command` does.

    Lines go to the terminal unless the caller has configured logging.

    Raises:
        ConfigurationError: the launcher's variables are wrong.
    """
    launcher.read()
    ignore_unwanted()
    write_any_text()
    with command_logs(terminal=not logging.getLogger().hasHandlers()) as logs:
        add_log_file(logs, command, options)
        with logged_run(command, ()):
            yield


@contextmanager
def logged_run(command: str, arguments: Sequence[str]) -> Iterator[None]:
    """Keep start and end of a command in the log file."""
    started = time.monotonic()
    watch.begin(command)
    where = f"retro-mcore {__version__} on {platform.node()}, process {os.getpid()}"
    _LOG.info("%s %s started: %s", command, " ".join(arguments), where, extra=CONTEXT)
    try:
        yield
    except BaseException as error:
        user = isinstance(error, RetroError) or not isinstance(error, Exception)
        text = f"{command} ended by {type(error).__name__}: {error}"
        _LOG.error("%s", text, exc_info=not user, extra=CONTEXT if user else PRINTED)
        watch.explain(error)
        raise
    seconds = time.monotonic() - started
    _LOG.info("%s finished in %.1f seconds", command, seconds, extra=PRINTED)
