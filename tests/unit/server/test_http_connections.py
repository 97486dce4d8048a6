"""Connections that send nothing, or little, while others want to be served."""

from __future__ import annotations

import asyncio
import http.client
import socket
import threading
import time

import pytest

uvicorn = pytest.importorskip("uvicorn", reason="uvicorn, an optional package, is not installed")

MOST = 4


async def slow_app(scope, receive, send):
    """Reads the body, and answers after longer than a request may take to arrive."""
    while (await receive()).get("more_body"):
        pass
    await asyncio.sleep(0.6 if scope["path"] == "/slow" else 0)
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"served"})


@pytest.fixture
def port():
    from retro_mcore.server.http_connections import timed_protocol

    config = uvicorn.Config(
        slow_app,
        port=0,
        lifespan="off",
        log_level="error",
        http=timed_protocol(0.3, MOST),
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    end = time.monotonic() + 60
    while not server.started and time.monotonic() < end:
        time.sleep(0.01)
    yield server.servers[0].sockets[0].getsockname()[1]
    server.should_exit = True
    thread.join(60)


def connect(port: int, sent: bytes = b"") -> socket.socket:
    connection = socket.create_connection(("127.0.0.1", port), timeout=60)
    connection.sendall(sent)
    return connection


def get(port: int, path: str = "/", connection: http.client.HTTPConnection | None = None) -> bytes:
    connection = connection or http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request("GET", path)
    answer = connection.getresponse()
    assert answer.status == 200
    return answer.read()


@pytest.mark.parametrize("sent", [b"", b"GET / HTTP/1.1\r\nHost: "])
def test_whoever_sends_no_request_is_disconnected(port, sent):
    with connect(port, sent) as connection:
        assert connection.recv(1) == b""


def test_a_second_request_must_arrive_too(port):
    request = b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n"
    with connect(port, request) as connection:
        received = b""
        while b"0\r\n\r\n" not in received:
            received += connection.recv(4096)
        connection.sendall(request[:20])
        assert connection.recv(4096) == b""


@pytest.mark.parametrize(
    "sent",
    [b"", b"GET / HT", b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n\r\n1"],
)
def test_idle_connections_make_room_for_others(port, sent):
    idle = [connect(port, sent) for _ in range(5 * MOST)]
    assert get(port) == b"served"
    for connection in idle:
        connection.close()


def test_an_answer_may_take_longer_than_a_request(port):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    assert get(port, "/slow", connection) == b"served"
    assert get(port, "/slow", connection) == b"served"
