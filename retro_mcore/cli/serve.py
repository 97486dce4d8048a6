"""`serve`: completions over HTTP, with live retrieval."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from retro_mcore.cli.command import run_command
from retro_mcore.cli.generation_options import (
    GenerationModelOptions,
    check_generation_flags,
    load_generation_model,
)
from retro_mcore.errors import check_all
from retro_mcore.server.config import ServerConfig, require_server_libraries


@dataclass(kw_only=True)
class ServeOptions(ServerConfig, GenerationModelOptions):
    """Serve completions over HTTP: OpenAI's /v1/completions, and a page to try it.

    If the environment variable RETRO_MCORE_API_KEY is set, or --api-key-file given, clients must
    send that key as a bearer token.
    """


def serve(options: ServeOptions) -> None:
    """Serve until a signal stops it (SIGTERM, SIGINT); under torchrun the first rank listens.

    Raises:
        RetroError: a flag, the project or the checkpoint is at fault.
    """
    require_server_libraries()
    check_all(options.check, partial(check_generation_flags, options), options.api_key)
    loaded = load_generation_model(options)
    from retro_mcore.server import serving

    serving.serve(loaded, options)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    return run_command(ServeOptions, serve, argv)


if __name__ == "__main__":
    sys.exit(main())
