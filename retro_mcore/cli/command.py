"""What every command shares: flags from a dataclass, errors to exit codes, a short summary."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import tyro
import yaml
from rich.console import Console
from rich.table import Table

from retro_mcore.distributed import get_rank
from retro_mcore.errors import EXIT_CODE, ConfigurationError, RetroError

Options = TypeVar("Options")


def parse_options(options_type: type[Options], argv: Sequence[str] | None = None) -> Options:
    """Flags (`--seq-length 512`) into a dataclass; `--config FILE.yaml` gives other defaults.

    A key of the YAML file is a field of the dataclass; a flag on the command line wins.

    Raises:
        ConfigurationError: the YAML file is missing, or holds a key that is no option.
        SystemExit: bad flags (code 2), `--help` (code 0).
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    default = None
    if "--config" in arguments:
        where = arguments.index("--config")
        if where + 1 == len(arguments):
            raise ConfigurationError("--config", "no file given", "Name a YAML file")
        default = _options_from_yaml(options_type, Path(arguments[where + 1]))
        del arguments[where : where + 2]
    return tyro.cli(
        options_type,
        args=arguments,
        default=default,
        description=options_type.__doc__,
        config=(tyro.conf.FlagCreatePairsOff,),
    )


def _options_from_yaml(options_type: type[Options], path: Path) -> Options:
    if not path.is_file():
        raise ConfigurationError(f"--config {path}", "no such file", "Name a YAML file")
    values = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    fields = getattr(options_type, "__dataclass_fields__", {})
    if not isinstance(values, dict):
        raise ConfigurationError(f"--config {path}", "not a mapping", "Write `option: value` lines")
    for key in values:
        if key not in fields:
            raise ConfigurationError(
                f"--config {path}", f"unknown option {key!r}", f"Known: {', '.join(sorted(fields))}"
            )
    return options_type(**values)


def run_command(
    options_type: type[Options],
    function: Callable[[Options], object],
    argv: Sequence[str] | None = None,
) -> int:
    """Parse, run, and turn a user's mistake into one line on stderr and exit code 2."""
    try:
        function(parse_options(options_type, argv))
    except RetroError as error:
        if get_rank() == 0:
            print(f"error: {error}", file=sys.stderr, flush=True)
        return EXIT_CODE
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr, flush=True)
        return 130
    return 0


def print_summary(title: str, rows: Mapping[str, object]) -> None:
    """A two-column table, on rank 0 only."""
    if get_rank() != 0:
        return
    table = Table(title=title, show_header=False, title_justify="left", title_style="bold")
    table.add_column(style="cyan")
    table.add_column()
    for name, value in rows.items():
        table.add_row(name, str(value))
    Console().print(table)
