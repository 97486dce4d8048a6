"""Prevent idle connections from blocking others.

uvicorn waits forever for a request's headers, and its limit_concurrency counts idle connections.
Here a request's headers must arrive in time. If there are too many connections, the one that has
been idle longest is closed.
"""

from __future__ import annotations

import asyncio
import time
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol


def timed_protocol(receive_seconds: float, max_connections: int) -> type[H11Protocol]:
    """Create a protocol class for `uvicorn.Config(http=…)`.

    Args:
        receive_seconds: Time limit for the headers of a request, from the start of the connection
            or the request's first byte.
        max_connections: Number of connections above which idle ones are closed.
    """

    class TimedProtocol(H11Protocol):
        """HTTP/1.1 with a time limit for headers."""

        _timer: asyncio.TimerHandle | None = None
        _waits_since = 0.0

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self._wait()
            if len(self.connections) > max_connections:
                _close_longest_idle(self.connections, self)

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            if not self.is_between_requests:
                self._stop_timer()
            elif self._timer is None:
                self._wait()

        def connection_lost(self, exc: Exception | None) -> None:
            self._stop_timer()
            super().connection_lost(exc)

        @property
        def is_between_requests(self) -> bool:
            """Whether no headers have arrived yet, or the last request is answered."""
            return self.cycle is None or self.cycle.response_complete

        @property
        def is_receiving(self) -> bool:
            """Whether the server is waiting for the client to send."""
            return self.is_between_requests or self.cycle.more_body

        @property
        def waits_since(self) -> float:
            """Time since which the headers of a request are awaited."""
            return self._waits_since

        def _wait(self) -> None:
            self._waits_since = time.monotonic()
            self._timer = self.loop.call_later(receive_seconds, self._too_slow)

        def _stop_timer(self) -> None:
            if self._timer is not None:
                self._timer.cancel()
                self._timer = None

        def _too_slow(self) -> None:
            self._timer = None
            if self.is_between_requests and not self.transport.is_closing():
                self.transport.close()

    return TimedProtocol


def _close_longest_idle(connections: Any, newest: Any) -> None:
    idle = [
        one
        for one in connections
        if one is not newest and one.is_receiving and not one.transport.is_closing()
    ]
    if idle:
        min(idle, key=lambda one: one.waits_since).transport.abort()
