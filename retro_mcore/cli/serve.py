"""`serve`: completions over HTTP, with live retrieval."""

from __future__ import annotations

import ipaddress
import logging
import os
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from retro_mcore.cli.command import run_command
from retro_mcore.cli.generation_model import (
    GenerationModel,
    GenerationModelOptions,
    check_retrieval_flags,
    load_generation_model,
)
from retro_mcore.data.tokenizers.loading import Tokenizer
from retro_mcore.errors import (
    ConfigurationError,
    MissingDependencyError,
    RetroError,
    check_all,
    raise_problems,
)

if TYPE_CHECKING:
    from retro_mcore.server.service import GenerationService

_LOG = logging.getLogger(__name__)

_KEY_VARIABLE = "RETRO_MCORE_API_KEY"
_MAX_PORT = 65535


@dataclass(kw_only=True)
class ServeOptions(GenerationModelOptions):
    """Serve completions over HTTP: OpenAI's /v1/completions, and a page to try it.

    If the environment variable RETRO_MCORE_API_KEY is set, or --api-key-file given, clients must
    send that key as a bearer token.
    """

    host: str = "127.0.0.1"
    """Address to listen on; by default this machine alone can call."""
    port: int = 8000
    """Port to listen on; 0 takes a free one."""
    api_key_file: str | None = None
    """File whose first line is the key."""
    model_name: str | None = None
    """What clients call the model; by default the name of the --load directory."""
    max_batch_size: int = 8
    """Texts that grow together."""
    max_waiting: int = 64
    """Texts that may wait for room; more are answered 429."""
    max_length: int | None = None
    """Most tokens of a text, prompt and answer; by default the model's window."""
    max_tokens: int = 2048
    """Most new tokens that a request may ask for."""
    max_texts: int = 32
    """Most texts (prompts times n) of a request; never more than can grow and wait."""
    max_body_bytes: int = 1 << 20
    """Largest request."""
    receive_seconds: int = 30
    """Within which a request must have arrived."""
    shutdown_seconds: int = 10
    """How long requests may go on after a signal to stop."""


def serve(options: ServeOptions) -> None:
    """Serve until a signal stops it (SIGTERM, SIGINT); under torchrun the first rank listens.

    Raises:
        RetroError: a flag, the project or the checkpoint is at fault.
    """
    _check(options)
    loaded = load_generation_model(options)
    from retro_mcore.server.service import GenerationService, is_first_rank
    from retro_mcore.session import warn_beyond_training

    if options.max_length is not None and options.max_length > loaded.model.max_sequence_length:
        raise ConfigurationError(
            "--max-length",
            f"{options.max_length}, but the model's window is {loaded.model.max_sequence_length}",
            "Leave it out, or lower it",
        )
    longest = options.max_length or loaded.window
    warn_beyond_training(loaded.arguments, longest, "prompts and answers")
    service = GenerationService(
        loaded.model,
        loaded.tokenizer,
        options.max_batch_size,
        options.max_waiting,
        options.max_length,
    )
    if not is_first_rank(loaded.model):
        # torchrun's signal goes to every rank; the first one stops the others.
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_IGN)
        service.follow()
        return
    _listen(options, build_server_app(options, loaded, service))


def build_server_app(
    options: ServeOptions, loaded: GenerationModel, service: GenerationService
) -> Any:
    """The application that answers."""
    from retro_mcore.server.http import ServerLimits, ServerParts, build_app

    parts = ServerParts(
        service=service,
        tokenize=loaded.tokenize,
        tokenizer=loaded.tokenizer,
        model_name=options.model_name or Path(options.load).resolve().name,
        chunk_length=loaded.arguments.retro_chunk_length,
        search=loaded.search,
        retriever=loaded.retriever,
        given=None if loaded.arguments.no_retrieval else loaded.given,
        two_chunks=options.two_chunks,
    )
    max_texts = min(options.max_texts, options.max_batch_size + options.max_waiting)
    limits = ServerLimits(
        options.max_body_bytes,
        max_texts,
        options.max_tokens,
        _most_chars(loaded.tokenizer, service.max_length),
        options.receive_seconds,
    )
    hosts = ["localhost", "127.0.0.1", "[::1]"] if _is_loopback(options.host) else ["*"]
    return build_app(parts, limits, _api_key(options), hosts)


def _most_chars(tokenizer: Tokenizer, max_length: int) -> int:
    """Characters that a prompt of the window's length may have, if all tokens were the longest."""
    texts = tokenizer.detokenize_batch([[token] for token in range(tokenizer.vocab_size)])
    # Some tokenizers drop spaces, of which a short text may have many.
    return max(10_000, max_length * max(map(len, texts)))


def _listen(options: ServeOptions, app: Any) -> None:
    import uvicorn

    from retro_mcore.server.http_connections import timed_protocol

    max_connections = 4 * (options.max_batch_size + options.max_waiting)
    config = uvicorn.Config(
        app,
        host=options.host,
        port=options.port,
        log_level="info",
        access_log=False,
        timeout_graceful_shutdown=options.shutdown_seconds,
        http=timed_protocol(options.receive_seconds, max_connections),
        h11_max_incomplete_event_size=64 * 1024,
    )
    # uvicorn raises the signal again when it has shut down; that must not kill us.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: None)
    if not _is_loopback(options.host) and _api_key(options) is None:
        _LOG.warning("warning: %s can be called from elsewhere, without a key", options.host)
    uvicorn.Server(config).run()


def _check(options: ServeOptions) -> None:
    try:
        import fastapi  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise MissingDependencyError(
            "serve", f"FastAPI and uvicorn are needed ({error})", "Install the `serve` extra"
        ) from error
    check_all(
        partial(raise_problems, _out_of_range(options)),
        partial(check_retrieval_flags, options),
        partial(_api_key, options),
    )


def _out_of_range(options: ServeOptions) -> list[RetroError]:
    least = {
        **dict.fromkeys(("max_batch_size", "max_tokens", "max_texts", "max_body_bytes"), 1),
        **dict.fromkeys(("receive_seconds", "max_length"), 1),
        **dict.fromkeys(("max_waiting", "shutdown_seconds", "port"), 0),
    }
    problems: list[RetroError] = []
    for field, smallest in least.items():
        value, flag = getattr(options, field), f"--{field.replace('_', '-')}"
        if value is not None and value < smallest:
            at_least = f"Give at least {smallest}" if smallest else "Give 0 or more"
            problems.append(ConfigurationError(flag, str(value), at_least))
    if options.port > _MAX_PORT:
        problems.append(ConfigurationError("--port", str(options.port), f"At most {_MAX_PORT}"))
    return problems


def _api_key(options: ServeOptions) -> str | None:
    if options.api_key_file is None:
        return os.environ.get(_KEY_VARIABLE) or None
    try:
        key = Path(options.api_key_file).read_text(encoding="utf-8").split("\n", 1)[0].strip()
    except OSError as error:
        raise ConfigurationError("--api-key-file", str(error), "Name a file") from error
    if not key:
        raise ConfigurationError("--api-key-file", "its first line is empty", "Write the key there")
    return key


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    return run_command(ServeOptions, serve, argv)


if __name__ == "__main__":
    sys.exit(main())
