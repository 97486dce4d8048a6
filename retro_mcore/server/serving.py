"""Serve a loaded model over HTTP until a signal stops it. Import after `setup_device`."""

from __future__ import annotations

import logging
import signal
import socket
from typing import Any

from retro_mcore.checkpoint.arguments import read_arguments
from retro_mcore.data.tokenizers.loading import Tokenizer
from retro_mcore.distributed import raise_together
from retro_mcore.errors import ConfigurationError, RetroError
from retro_mcore.server.chat_template import ChatPrompt, chat_prompt
from retro_mcore.server.config import ServerConfig
from retro_mcore.server.documents import ServedDocuments
from retro_mcore.server.http import ServerLimits, ServerParts, build_app
from retro_mcore.server.http_connections import timed_protocol
from retro_mcore.server.service import GenerationService, is_first_rank
from retro_mcore.session import GenerationModel, warn_beyond_training

_LOG = logging.getLogger(__name__)


def serve(loaded: GenerationModel, config: ServerConfig) -> None:
    """Serve until SIGTERM or SIGINT. All ranks must call this; the first one listens.

    Args:
        loaded: The model.
        config: A configuration that passed `check`.

    Raises:
        ConfigurationError: --max-length is longer than the model's window, or the first rank cannot
            listen on --host and --port.
    """
    if config.max_length is not None and config.max_length > loaded.window:
        raise ConfigurationError(
            "--max-length",
            f"{config.max_length}, but the model's window is {loaded.window}",
            "Leave it out, or lower it",
        )
    longest = config.max_length or loaded.window
    warn_beyond_training(loaded.arguments, longest, "prompts and answers")
    with raise_together():
        _chat(config, loaded)  # a bad --chat-template stops all ranks, before they follow the first
        if is_first_rank(loaded.model):
            _require_free_address(config)
    service = GenerationService(
        loaded.model,
        loaded.tokenizer,
        config.max_batch_size,
        config.max_waiting,
        config.max_length,
    )
    if not is_first_rank(loaded.model):
        # torchrun signals every rank, but the first one stops the others.
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_IGN)
        service.follow()
        return
    _listen(config, build_server_app(config, loaded, service))


def _chat(config: ServerConfig, loaded: GenerationModel) -> ChatPrompt | None:
    """How conversations are written; None if nothing says it, or not in a way that works."""
    given, wording = config.chat_template, _prompt_format(loaded)
    try:
        return chat_prompt(loaded.tokenizer, loaded.tokenize, given, wording)
    except (RetroError, ValueError) as error:
        if given is not None:
            raise
        if is_first_rank(loaded.model):
            _LOG.warning("Chats are refused: the tokenizer's own template fails: %s", error)
        return None


def build_server_app(
    config: ServerConfig, loaded: GenerationModel, service: GenerationService
) -> Any:
    """Build the HTTP application."""
    parts = ServerParts(
        service=service,
        tokenize=loaded.tokenize,
        tokenizer=loaded.tokenizer,
        model_name=config.model_name or _name_of(loaded),
        chunk_length=loaded.arguments.retro_chunk_length,
        search=loaded.search,
        retriever=loaded.retriever,
        given=None if loaded.arguments.no_retrieval else loaded.given,
        two_chunks=loaded.two_chunks,
        chat=_chat(config, loaded),
        documents=_documents(config, loaded),
    )
    max_texts = min(config.max_texts, config.max_batch_size + config.max_waiting)
    limits = ServerLimits(
        config.max_body_bytes,
        max_texts,
        config.max_tokens,
        _most_chars(loaded.tokenizer, service.max_length),
        config.receive_seconds,
    )
    hosts = ["localhost", "127.0.0.1", "[::1]"] if config.is_loopback else ["*"]
    return build_app(parts, limits, config.api_key(), hosts)


def _documents(config: ServerConfig, loaded: GenerationModel) -> ServedDocuments | None:
    """Documents that clients may add; None without a search, or without a key to protect them."""
    if loaded.retriever is None or loaded.search is None or config.api_key() is None:
        return None
    try:
        return ServedDocuments(loaded.retriever, config.max_added_chunks)
    except RetroError as error:  # the project lacks the vocabulary, which nothing else needs here
        _LOG.warning("POST /v1/documents will be refused: %s", error)
        return None


def _name_of(loaded: GenerationModel) -> str:
    """Name of the checkpoint's directory."""
    return "retro" if loaded.checkpoint is None else loaded.checkpoint.parent.resolve().name


def _prompt_format(loaded: GenerationModel) -> Any:
    """Wording that finetune_retro tuned the model with; None if it did not."""
    if loaded.checkpoint is None:
        return None
    return read_arguments(loaded.checkpoint).get("prompt_format")


def _most_chars(tokenizer: Tokenizer, max_length: int) -> int:
    """Maximum number of characters in a prompt that fits the window."""
    texts = tokenizer.detokenize_batch([[token] for token in range(tokenizer.vocab_size)])
    # Some tokenizers drop spaces, so a short prompt may have many more characters.
    return max(10_000, max_length * max(map(len, texts)))


def _require_free_address(config: ServerConfig) -> None:
    """Bind the address once: uvicorn itself would end the process with another exit code."""
    try:
        socket.create_server((config.host, config.port), family=_family(config)).close()
    except OSError as error:
        reason = (error.strerror or str(error)).partition(" (")[0]  # Python repeats the address
        raise ConfigurationError(
            f"--host {config.host} --port {config.port}",
            f"cannot listen there ({reason})",
            "Choose another port, or 0 for a free one, and an address of this machine",
        ) from error


def _family(config: ServerConfig) -> socket.AddressFamily:
    return socket.getaddrinfo(config.host or None, config.port, type=socket.SOCK_STREAM)[0][0]


def _listen(config: ServerConfig, app: Any) -> None:
    import uvicorn  # an optional dependency

    max_connections = 4 * (config.max_batch_size + config.max_waiting)
    uvicorn_config = uvicorn.Config(
        app,
        host=config.host,
        port=config.port,
        log_level="info",
        access_log=False,
        timeout_graceful_shutdown=config.shutdown_seconds,
        http=timed_protocol(config.receive_seconds, max_connections),
        h11_max_incomplete_event_size=64 * 1024,
    )
    # uvicorn raises the signal again after shutdown, which must not kill this process.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: None)
    if not config.is_loopback and config.api_key() is None:
        _LOG.warning("warning: %s can be called from elsewhere, without a key", config.host)
    uvicorn.Server(uvicorn_config).run()
