"""Continuous batching for many clients: one thread steps a batch that requests join.

A request joins the running batch at the next token, or waits in a queue if the batch is full. Under
tensor and pipeline parallelism, the first rank tells the others before each step which requests
join and leave.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.distributed as dist

from retro_mcore.distributed import broadcast_object, get_rank, get_world_size
from retro_mcore.errors import RetroError
from retro_mcore.inference.batch import TextBatch
from retro_mcore.inference.requests import GenerationRequest, check_request
from retro_mcore.inference.texts import GeneratedText, TokenLogprobs
from retro_mcore.platform.parallel import model_parallel_group
from retro_mcore.retrieval.neighbors import Prefetching

_LOG = logging.getLogger(__name__)

#: Interval of heartbeats from an idle service to the other ranks, in seconds.
_HEARTBEAT = 5.0


class BusyError(RuntimeError):
    """The maximum number of requests is already running and waiting."""


class ClosedError(RuntimeError):
    """The service is shutting down, or has failed."""


@dataclass(frozen=True)
class TokenEvent:
    """A new token of a text, or its end (`token` is None), or its failure (`error`).

    Attributes:
        text: The text, which may keep growing.
        token: The token.
        logprobs: Log-probabilities of the token, if requested.
        num_neighbors: Number of chunks with neighbors at the time of the token.
        error: The failure; there is no text then.
    """

    text: GeneratedText | None
    token: int | None = None
    logprobs: TokenLogprobs | None = None
    num_neighbors: int = 0
    error: Exception | None = None


@dataclass(eq=False)
class Job:
    """A submitted request.

    Attributes:
        request: The request; the service assigns its number.
        on_event: Called in the service's thread for each token, and once at the end.
    """

    request: GenerationRequest
    on_event: Callable[[TokenEvent], None]
    text: GeneratedText | None = None


@dataclass
class _Commands:
    """Commands that all ranks execute before a step."""

    add: list[GenerationRequest] = field(default_factory=list)
    drop: list[int] = field(default_factory=list)
    close: bool = False


class _FirstRankOnly(Prefetching):
    """Placeholder for a source of neighbors on ranks that never search."""

    def __init__(self, lead: int) -> None:
        self.lead = lead

    def expect(self, chunks: Any) -> None:
        """Do nothing; only the first rank searches."""

    def neighbors_of(self, chunks: Any) -> Any:
        """Never called, since only the first rank searches."""
        raise AssertionError("neighbors were asked for on a rank that is not the first")


class GenerationService:
    """Runs requests of many clients in one batch, in its own thread.

    Args:
        model: The model, in eval mode and on whole sequences
            (`platform.parallel.whole_sequences`).
        tokenizer: The model's tokenizer.
        max_batch_size: Maximum number of running requests.
        max_waiting: Maximum number of waiting requests.
        max_length: Maximum tokens of a text; the model's window by default.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        max_batch_size: int = 8,
        max_waiting: int = 64,
        max_length: int | None = None,
    ) -> None:
        self._model, self._tokenizer = model, tokenizer
        self._max_batch_size, self._max_waiting = max_batch_size, max_waiting
        self.max_length = max_length or model.max_sequence_length
        self._group: dist.ProcessGroup | None = model_parallel_group(model)
        self._batch = self._new_batch()
        self._changed = threading.Condition()
        self._waiting: deque[Job] = deque()
        self._running: dict[int, Job] = {}
        self._texts: dict[int, GeneratedText] = {}
        self._dropped: list[int] = []
        self._closing = self._failed = False
        self._next_number = 0
        self._thread: threading.Thread | None = None

    def _new_batch(self) -> TextBatch:
        return TextBatch(self._model, self._tokenizer, self._max_batch_size, self.max_length)

    def start(self) -> None:
        """Start the thread, on the first rank."""
        self._thread = threading.Thread(target=self._serve, name="generation", daemon=True)
        self._thread.start()

    @property
    def is_alive(self) -> bool:
        """Whether requests are being served."""
        return self._thread is not None and self._thread.is_alive() and not self._closing

    @property
    def has_failed(self) -> bool:
        """Whether the service failed: its thread died, or a rank of the model is gone."""
        return self._failed

    @property
    def load(self) -> tuple[int, int]:
        """Numbers of running and waiting requests."""
        return len(self._running), len(self._waiting)

    def submit(self, jobs: list[Job]) -> None:
        """Submit jobs, all or none.

        Raises:
            RetroError: one of the requests cannot be generated.
            BusyError: there is no room for them.
            ClosedError: the service is shutting down.
        """
        for job in jobs:
            check_request(job.request, self._model, self._tokenizer, self.max_length)
        with self._changed:
            if not self.is_alive:
                raise ClosedError(self._why_closed())
            room = self._max_batch_size + self._max_waiting
            if len(self._running) + len(self._waiting) + len(jobs) > room:
                raise BusyError(f"{room} requests are running or waiting")
            for job in jobs:
                job.request = replace(job.request, number=self._next_number)
                self._next_number += 1
                self._waiting.append(job)
            self._changed.notify()

    def cancel(self, job: Job) -> None:
        """Cancel a running or waiting job; no effect if it has ended."""
        with self._changed:
            if job in self._waiting:
                self._waiting.remove(job)
            elif job.request.number in self._running:
                self._dropped.append(job.request.number)
                self._changed.notify()

    def close(self, timeout: float | None = None) -> None:
        """Stop the service on every rank; running requests end with an error. Idempotent."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        if self._thread is not None:
            self._thread.join(timeout)

    def follow(self) -> None:
        """Follow the first rank's commands on another rank, until it stops."""
        while True:
            commands = broadcast_object(None, self._group)
            assert isinstance(commands, _Commands)
            if not self._obey(commands):
                return

    def _serve(self) -> None:
        try:
            self._serve_until_closed()
        except BaseException:  # the thread is lost, so waiting clients must be notified
            self._failed = True
            _LOG.critical("generation has stopped", exc_info=True)
        with self._changed:
            self._closing = True
        self._fail_all(ClosedError(self._why_closed()))

    def _why_closed(self) -> str:
        return "generation has failed; see the log" if self._failed else "the server shuts down"

    def _serve_until_closed(self) -> None:
        device = next(self._model.parameters()).device
        if device.type == "cuda":
            torch.cuda.set_device(device)  # the current CUDA device is per thread
        alive = True
        while alive:
            commands = self._next_commands()
            told = replace(commands, add=[self._for_others(request) for request in commands.add])
            broadcast_object(told, self._group)
            alive = self._obey(commands)

    def _next_commands(self) -> _Commands:
        """Wait for work, and take the commands that can be executed."""
        with self._changed:
            if not (self._waiting or self._running or self._dropped or self._closing):
                self._changed.wait(_HEARTBEAT)
            commands = _Commands(drop=self._dropped, close=self._closing)
            self._dropped = []
            while self._waiting and len(self._running) < self._max_batch_size:
                job = self._waiting.popleft()
                self._running[job.request.number] = job
                commands.add.append(job.request)
            return commands

    @staticmethod
    def _for_others(request: GenerationRequest) -> GenerationRequest:
        source = request.neighbors
        if source is None:
            return request
        lead = source.lead if isinstance(source, Prefetching) else 0
        return replace(request, neighbors=_FirstRankOnly(lead))

    def _obey(self, commands: _Commands) -> bool:
        """Execute the commands and a step; False if that was the last one."""
        if commands.close:
            return False
        for number in commands.drop:
            self._drop(number)
        for request in commands.add:
            self._add(request)
        try:
            added = self._batch.step()
        except Exception as error:
            # Not the failure of a single text. Only a single rank can recover, since other ranks
            # may have advanced.
            if get_world_size(self._group) > 1:
                raise
            _LOG.exception("generation failed")
            self._fail_running(error)
            self._texts.clear()
            self._batch = self._new_batch()
        else:
            self._notify(added)
        return True

    def _add(self, request: GenerationRequest) -> None:
        try:
            self._texts[request.number] = self._batch.add(request)
        except Exception as error:  # affects only this request, on every rank
            _LOG.exception("a request could not join")
            job = self._running.pop(request.number, None)
            if job is not None:
                job.on_event(TokenEvent(None, error=error))

    def _drop(self, number: int) -> None:
        self._running.pop(number, None)
        text = self._texts.pop(number, None)
        if text is not None:
            self._batch.drop(text)

    def _notify(self, added: list[tuple[GeneratedText, int]]) -> None:
        """Send events to the clients; on other ranks there are none."""
        tokens = dict(added)
        for number, text in list(self._texts.items()):
            job = self._running.get(number)
            if job is not None and text in tokens:
                logprobs = text.logprobs[-1] if text.logprobs else None
                job.on_event(
                    TokenEvent(text, tokens[text], logprobs, num_neighbors=len(text.neighbors))
                )
            if text.finish_reason is not None:
                del self._texts[number]
                self._running.pop(number, None)
                if job is not None:
                    job.on_event(_ending(text))

    def _fail_running(self, error: Exception) -> None:
        for job in self._running.values():
            job.on_event(TokenEvent(None, error=error))
        self._running.clear()

    def _fail_all(self, error: Exception) -> None:
        self._fail_running(error)
        with self._changed:
            while self._waiting:
                self._waiting.popleft().on_event(TokenEvent(None, error=error))


def _ending(text: GeneratedText) -> TokenEvent:
    if text.error is not None:
        if not isinstance(text.error, RetroError):
            _LOG.error("a text failed", exc_info=text.error)
        return TokenEvent(None, error=text.error)
    return TokenEvent(text, num_neighbors=len(text.neighbors))


def is_first_rank(model: Any) -> bool:
    """Whether this rank serves, while the others follow."""
    return get_rank(model_parallel_group(model)) == 0
