"""The commands as Python functions: `build_db(project_dir="project")`.

    from retro_mcore.cli.commands import preprocess_corpus, build_db

Options are the command's flags with underscores; each returns what the command's own function
returns. (The modules of this package hold the same under their dataclasses of options.)
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from importlib import import_module
from typing import Any

from retro_mcore.cli.main import COMMANDS
from retro_mcore.errors import ConfigurationError


def __getattr__(name: str) -> Callable[..., Any]:
    if name not in COMMANDS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

    def command(**options: Any) -> Any:
        # Imported at the call: the device is chosen before megatron is loaded.
        module = import_module(f"retro_mcore.cli.{name}")
        options_type = getattr(module, "".join(map(str.title, name.split("_"))) + "Options")
        known = [field.name for field in dataclasses.fields(options_type)]
        for option in options:
            if option not in known:
                raise ConfigurationError(
                    f"{name}({option}=...)", "unknown option", f"Known: {', '.join(known)}"
                )
        from retro_mcore.cli.command import command_in_python
        from retro_mcore.cli.flags import model_options

        options = {**model_options(options_type, options), **options}
        made = options_type(**options)
        with command_in_python(name, made):
            return getattr(module, name)(made)

    command.__name__ = command.__qualname__ = name
    command.__doc__ = COMMANDS[name]
    return command
