"""The server under load: requests per second, latencies, and what it does with malformed ones.

    python -m benchmarks.server                         # CPU, about two minutes

The server is a process of its own; the clients are threads of this one, each with one request at a
time, over real connections.
"""

from __future__ import annotations

import http.client
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.small_project import build_project, train_model
from retro_mcore.cli.command import run_command

ROOT = Path(__file__).resolve().parents[1]


@dataclass
class Options:
    """Measure the server: load, latency, malformed requests."""

    clients: list[int] = field(default_factory=lambda: [1, 8, 32])
    """Numbers of simultaneous clients."""
    requests_per_client: int = 5
    """Requests that each of them sends, one after another."""
    new_tokens: int = 32
    """Tokens per request."""
    malformed: int = 1000
    """Requests that are no requests."""
    hidden_size: int = 256
    """Width of the model."""
    num_layers: int = 6
    """Its layers."""
    max_batch_size: int = 16
    """Texts that the server lets grow together."""
    work_dir: str | None = None
    """Keeps project and model; by default they are made anew."""
    json: str | None = None
    """Also write the figures into this file."""


@dataclass
class Load:
    """What some clients saw.

    Attributes:
        clients: How many.
        seconds: Until all had all answers.
        latencies: Seconds of each answer.
        errors: Answers that were not 200.
    """

    clients: int
    seconds: float
    latencies: list[float]
    errors: int

    def percentile(self, percent: int) -> float:
        """A latency, in seconds."""
        ordered = sorted(self.latencies)
        return ordered[min(len(ordered) - 1, len(ordered) * percent // 100)]


@contextmanager
def running_server(options: Options, project: Path, model: Path) -> Iterator[int]:
    """The port of a server."""
    command = [sys.executable, str(ROOT / "tools" / "serve.py"), "--port", "0", "--device", "cpu"]
    command += ["--project-dir", str(project), "--load", str(model)]
    command += ["--max-batch-size", str(options.max_batch_size)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    environment.pop("RETRO_MCORE_API_KEY", None)
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
    )
    assert process.stdout is not None
    port, lines = None, []
    for line in process.stdout:
        lines.append(line)
        if found := re.search(r"running on http://[^:]+:(\d+)", line):
            port = int(found[1])
            break
    if port is None:
        raise RuntimeError("".join(lines))
    threading.Thread(target=process.stdout.read, daemon=True).start()
    try:
        yield port
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(60)


def post(port: int, body: bytes, path: str = "/v1/completions", **headers: str) -> int:
    """Send a request; its answer's status."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=300)
    connection.request("POST", path, body, {"Content-Type": "application/json", **headers})
    answer = connection.getresponse()
    answer.read()
    connection.close()
    return answer.status


def put_under_load(port: int, clients: int, options: Options) -> Load:
    """Let clients send their requests at the same time."""

    def client(number: int) -> list[tuple[float, int]]:
        answers = []
        for request in range(options.requests_per_client):
            body = {
                "prompt": f"Statement {number} of chapter {request} is used to wrap the",
                "max_tokens": options.new_tokens,
                "min_tokens": options.new_tokens,
                "seed": number,
            }
            start = time.perf_counter()
            status = post(port, json.dumps(body).encode())
            answers.append((time.perf_counter() - start, status))
        return answers

    start = time.perf_counter()
    with ThreadPoolExecutor(clients) as pool:
        answers = [answer for one in pool.map(client, range(clients)) for answer in one]
    return Load(
        clients,
        time.perf_counter() - start,
        [latency for latency, _ in answers],
        sum(status != 200 for _, status in answers),
    )


def malformed_request(random_: random.Random) -> tuple[bytes, dict[str, str]]:
    """Something that is no request."""
    good = {"prompt": "x", "max_tokens": 2}
    wrong: list[Any] = [
        {**good, "max_tokens": random_.choice([-1, "many", 10**9, None, 1.5])},
        {**good, "temperature": random_.choice([-1, "hot", [], {}])},
        {**good, "prompt": random_.choice(["", [], {}, [10**9], [[]], 5, None])},
        {**good, f"field{random_.randrange(100)}": 1},
        {**good, "neighbors": random_.choice([5, [[["x"]]], ["a"] * 50])},
        {**good, "stop": random_.choice([5, [""], {"a": 1}])},
        {"max_tokens": 2},
        [good],
    ]
    kind = random_.randrange(len(wrong) + 3)
    if kind < len(wrong):
        return json.dumps(wrong[kind]).encode(), {}
    if kind == len(wrong):
        return random_.randbytes(random_.randrange(200)), {}
    if kind == len(wrong) + 1:
        return json.dumps(good).encode()[: random_.randrange(1, 20)], {}
    return json.dumps(good).encode(), {"Content-Type": "text/plain"}


def send_malformed(port: int, options: Options) -> Counter[int]:
    """How often the server gave which status."""
    random_ = random.Random(0)
    return Counter(
        post(port, body, **headers)
        for body, headers in (malformed_request(random_) for _ in range(options.malformed))
    )


def run(options: Options) -> tuple[list[Load], Counter[int]]:
    """Measure and print."""
    folder = tempfile.TemporaryDirectory() if options.work_dir is None else None
    with folder or nullcontext(options.work_dir) as work_dir:
        project = build_project(Path(str(work_dir)))
        model = train_model(Path(str(work_dir)), project, options.num_layers, options.hidden_size)
        with running_server(options, project, model) as port:
            put_under_load(port, 1, options)  # the embedder and the index are loaded
            loads = [put_under_load(port, clients, options) for clients in options.clients]
            statuses = send_malformed(port, options)
            after = post(port, b'{"prompt": "x", "max_tokens": 2}')
    table = Table(title="Server", title_justify="left")
    for column in ("clients", "requests/s", "p50 s", "p99 s", "errors"):
        table.add_column(column, justify="right")
    for load in loads:
        table.add_row(
            str(load.clients),
            f"{len(load.latencies) / load.seconds:.2f}",
            f"{load.percentile(50):.2f}",
            f"{load.percentile(99):.2f}",
            str(load.errors),
        )
    console = Console(width=100)
    console.print(table)
    answers = ", ".join(f"{count} x {status}" for status, count in sorted(statuses.items()))
    console.print(f"{options.malformed} malformed requests: {answers}; a good one then: {after}")
    if options.json is not None:
        figures = {
            "loads": [vars(load) for load in loads],
            "malformed": dict(statuses),
            "after": after,
        }
        Path(options.json).write_text(json.dumps(figures, indent=1), encoding="utf-8")
    return loads, statuses


if __name__ == "__main__":
    sys.exit(run_command(Options, run))
