"""Configuration of the server. Imports no megatron, so that `--help` is fast."""

from __future__ import annotations

import ipaddress
import os
from dataclasses import dataclass
from pathlib import Path

from retro_mcore.errors import (
    ConfigurationError,
    MissingDependencyError,
    RetroError,
    raise_problems,
    too_small,
)

_KEY_VARIABLE = "RETRO_MCORE_API_KEY"
_MAX_PORT = 65535
#: Minimum value of each option.
_LEAST = {
    **dict.fromkeys(("max_batch_size", "max_tokens", "max_texts", "max_body_bytes"), 1),
    **dict.fromkeys(("receive_seconds", "max_length"), 1),
    **dict.fromkeys(("max_waiting", "max_added_chunks", "shutdown_seconds", "port"), 0),
}


def require_server_libraries() -> None:
    """Check that FastAPI and uvicorn are installed.

    Raises:
        MissingDependencyError: one is missing. Names the extra to install.
    """
    try:
        import fastapi  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise MissingDependencyError(
            "serve", f"FastAPI and uvicorn are needed ({error})", "Install the `serve` extra"
        ) from error


@dataclass(kw_only=True)
class ServerConfig:
    """Configuration of the server."""

    host: str = "127.0.0.1"
    """Address to listen on. The default accepts connections from this machine only."""
    port: int = 8000
    """Port to listen on; 0 chooses a free one."""
    api_key_file: str | None = None
    """File with the API key in its first line."""
    model_name: str | None = None
    """Model name for clients. Default: the name of the --load directory."""
    chat_template: str | None = None
    """Jinja file with the chat template of /v1/chat/completions. Default: the wording that
    finetune_retro tuned the model with, else the template of the project's tokenizer."""
    max_batch_size: int = 8
    """Maximum number of texts generated at the same time."""
    max_waiting: int = 64
    """Maximum number of waiting texts; further requests are answered with 429."""
    max_length: int | None = None
    """Maximum tokens of a text, prompt and answer together. Default: the model's window."""
    max_tokens: int = 2048
    """Maximum number of new tokens that a request may ask for."""
    max_texts: int = 32
    """Maximum texts (prompts times n) per request, at most as many as can be generated and wait."""
    max_body_bytes: int = 1 << 20
    """Maximum size of a request body, in bytes."""
    max_added_chunks: int = 100_000
    """Maximum chunks of documents that clients add with POST /v1/documents, in total."""
    receive_seconds: int = 30
    """Time limit for receiving a request, in seconds."""
    shutdown_seconds: int = 10
    """Time for running requests to finish after a stop signal, in seconds."""

    def check(self) -> None:
        """Reject values out of range.

        Raises:
            ConfigurationError: a value is out of range. Names the flag.
            SeveralErrors: several values are out of range.
        """
        problems: list[RetroError] = list(too_small(self, _LEAST))
        if self.port > _MAX_PORT:
            problems.append(ConfigurationError("--port", str(self.port), f"At most {_MAX_PORT}"))
        raise_problems(problems)

    def api_key(self) -> str | None:
        """The key that clients must send; None if no key is required.

        Raises:
            ConfigurationError: --api-key-file cannot be read, or its first line is empty.
        """
        if self.api_key_file is None:
            return os.environ.get(_KEY_VARIABLE) or None
        try:
            text = Path(self.api_key_file).read_text(encoding="utf-8")
        except OSError as error:
            raise ConfigurationError("--api-key-file", str(error), "Name a file") from error
        key = text.split("\n", 1)[0].strip()
        if not key:
            raise ConfigurationError(
                "--api-key-file", "its first line is empty", "Write the key there"
            )
        return key

    @property
    def is_loopback(self) -> bool:
        """Whether only clients on this machine can connect."""
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return self.host == "localhost"
