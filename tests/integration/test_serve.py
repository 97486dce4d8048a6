"""The command `serve`, as a process of its own that is called over HTTP."""

from __future__ import annotations

import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from retro_mcore.cli.generate import GenerateOptions, generate
from retro_mcore.cli.serve import main as serve_main
from tests.integration.browser import browser
from tests.integration.small_checkpoint import small_checkpoint
from tests.unit.data.projects import built_project, documents

ROOT = Path(__file__).resolve().parents[2]
KEY = "a key"
PROMPT = documents()[0][:100]


class Server:
    """A running server."""

    def __init__(self, process: subprocess.Popen, port: int) -> None:
        self.process, self.port = process, port

    def request(self, method: str, path: str, body: Any = None, **headers: str):
        """Status and parsed body of an answer."""
        connection = self.send(method, path, body, **headers)
        answer = connection.getresponse()
        content = answer.read().decode()
        connection.close()
        is_json = "json" in answer.headers.get("content-type", "")
        return answer.status, json.loads(content) if is_json else content

    def send(self, method: str, path: str, body: Any = None, **headers: str):
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=120)
        defaults = {"Content-Type": "application/json", "Authorization": f"Bearer {KEY}"}
        data = body if isinstance(body, (bytes, type(None))) else json.dumps(body).encode()
        connection.request(method, path, data, {**defaults, **headers})
        return connection

    def complete(self, **body: Any):
        """A completion that succeeds."""
        status, answer = self.request("POST", "/v1/completions", {"prompt": PROMPT, **body})
        assert status == 200, answer
        return answer

    def stream(self, **body: Any) -> list[Any]:
        """The events of a stream."""
        status, answer = self.request(
            "POST", "/v1/completions", {"prompt": PROMPT, "stream": True, **body}
        )
        assert status == 200, answer
        events = [line.removeprefix("data: ") for line in answer.split("\n\n") if line]
        assert events.pop() == "[DONE]"
        return [json.loads(event) for event in events]

    def load(self) -> tuple[int, int]:
        health = self.request("GET", "/health")[1]
        return health["running"], health["waiting"]


@contextmanager
def running_server(*flags: str, key: str | None = KEY) -> Iterator[Server]:
    command = [sys.executable, str(ROOT / "tools" / "serve.py"), "--project-dir"]
    command += [str(built_project()), "--load", small_checkpoint(), "--port", "0", *flags]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    environment.pop("RETRO_MCORE_API_KEY", None)
    if key is not None:
        environment["RETRO_MCORE_API_KEY"] = key
    process = subprocess.Popen(
        [*command, "--device", "cpu"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
    )
    try:
        yield Server(process, _port(process))
    finally:
        process.kill()
        process.wait()


def _port(process: subprocess.Popen) -> int:
    lines = []
    for line in process.stdout:
        lines.append(line)
        found = re.search(r"running on http://[^:]+:(\d+)", line)
        if found:
            threading.Thread(target=process.stdout.read, daemon=True).start()
            return int(found[1])
    raise AssertionError("".join(lines))


def test_a_taken_port_is_one_line_and_exit_code_2(capfd):
    flags = ["--project-dir", str(built_project()), "--load", small_checkpoint()]
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert serve_main([*flags, "--device", "cpu", "--port", port]) == 2
    errors = [line for line in capfd.readouterr().err.splitlines() if "error" in line]
    assert len(errors) == 1
    found = f"error: --host 127.0.0.1 --port {port}: cannot listen there (Address already in use)."
    assert errors[0].startswith(found)


@pytest.fixture(scope="module")
def server():
    flags = ["--max-batch-size", "2", "--max-waiting", "2", "--max-body-bytes", "4000"]
    with running_server(*flags, "--model-name", "small") as server:
        yield server


@pytest.fixture(scope="module")
def expected():
    """What `generate` writes."""
    options = GenerateOptions(
        project_dir=str(built_project()),
        load=small_checkpoint(),
        prompt=PROMPT,
        max_new_tokens=16,
        temperature=0.0,
        logprobs=2,
        device="cpu",
    )
    return generate(options)[0]


def test_a_completion_is_what_generate_writes_with_its_sources(server, expected):
    answer = server.complete(max_tokens=16, temperature=0)
    assert (answer["object"], answer["model"]) == ("text_completion", "small")
    (choice,) = answer["choices"]
    assert (choice["text"], choice["finish_reason"]) == (expected.text, "length")
    read = expected.generated.prompt_length
    assert answer["usage"] == {
        "prompt_tokens": read,
        "completion_tokens": 16,
        "total_tokens": read + 16,
    }
    chunks = choice["neighbors"]
    assert len(chunks) == len(expected.generated.neighbors)
    ids = [[one["id"] for one in chunk["neighbors"]] for chunk in chunks]
    assert ids == [found.ids[0].tolist() for found in expected.generated.neighbors]
    assert "corpus_text_document" in chunks[0]["neighbors"][0]["source"]
    assert PROMPT.startswith(chunks[0]["text"])


def test_a_stream_adds_up_to_the_whole(server, expected):
    events = server.stream(max_tokens=16, temperature=0, stream_options={"include_usage": True})
    choices = [event["choices"][0] for event in events[:-1]]
    assert "".join(choice["text"] for choice in choices) == expected.text
    assert [choice["finish_reason"] for choice in choices if choice["finish_reason"]] == ["length"]
    whole = server.complete(max_tokens=16, temperature=0)
    chunks = [chunk for choice in choices for chunk in choice.get("neighbors", [])]
    assert chunks == whole["choices"][0]["neighbors"]
    assert events[-1]["usage"] == whole["usage"]
    # Each token is sent as it comes; bytes that are no whole letter wait for the next ones, whose
    # text they are part of.
    scored = server.complete(max_tokens=16, temperature=0, logprobs=0)["choices"][0]
    tokens = scored["logprobs"]["tokens"]
    whole_tokens = [token for token in tokens if token and "\ufffd" not in token]
    assert len(whole_tokens) > 2
    assert len([choice for choice in choices if choice["text"]]) >= len(whole_tokens)


def test_log_probabilities_and_echo(server, expected):
    choice = server.complete(max_tokens=16, temperature=0, logprobs=2, echo=True)["choices"][0]
    logprobs, text = choice["logprobs"], choice["text"]
    assert text == PROMPT + expected.text
    assert logprobs["token_logprobs"][0] is None
    length = expected.generated.prompt_length
    assert logprobs["token_logprobs"][length:] == pytest.approx(
        [entry.logprob for entry in expected.generated.logprobs], abs=1e-4
    )
    assert all(len(top) <= 2 for top in logprobs["top_logprobs"][1:])
    assert logprobs["text_offset"] == sorted(logprobs["text_offset"])
    places = zip(logprobs["tokens"], logprobs["text_offset"], strict=True)
    for token, offset in list(places)[1:length]:
        assert text[offset:].lstrip().startswith(token.lstrip())
    scored = server.complete(max_tokens=0, logprobs=0, echo=True)["choices"][0]
    assert scored["text"] == PROMPT
    assert scored["logprobs"]["token_logprobs"][1:] == pytest.approx(
        logprobs["token_logprobs"][1:length], abs=1e-4
    )


def test_a_stop_string_ends_text_and_stream(server, expected):
    stop = expected.text[5:8]
    cut = expected.text[: expected.text.index(stop)]
    body = {"max_tokens": 16, "temperature": 0, "stop": ["never", stop]}
    choice = server.complete(**body)["choices"][0]
    assert (choice["text"], choice["finish_reason"]) == (cut, "stop")
    events = server.stream(**body)
    assert "".join(event["choices"][0]["text"] for event in events) == cut


def test_given_neighbors_and_none(server, expected):
    given = ["Something to read.", "Something else."]
    body = {"max_tokens": 16, "temperature": 0}
    own = server.complete(neighbors=given, **body)["choices"][0]
    off = server.complete(retrieve=False, **body)["choices"][0]
    assert len({own["text"], off["text"], expected.text}) == 3
    assert [one["source"] for one in own["neighbors"][0]["neighbors"]] == ["given", "given"]
    assert [one["text"].strip() for one in own["neighbors"][0]["neighbors"]] == given
    assert off["neighbors"] == []
    both = server.complete(prompt=[PROMPT, PROMPT], neighbors=[given, []], **body)["choices"]
    assert both[0]["text"] == own["text"] != both[1]["text"]


def test_several_prompts_and_texts_draw_by_seed(server):
    body = {"prompt": [PROMPT, "Another"], "n": 2, "seed": 5, "max_tokens": 8}  # four: all it takes
    choices = server.complete(**body)["choices"]
    assert [choice["index"] for choice in choices] == [0, 1, 2, 3]
    assert choices == server.complete(**body)["choices"]
    assert choices[0]["text"] != choices[1]["text"]
    assert server.complete(seed=6, max_tokens=8)["choices"][0]["text"] == choices[1]["text"]


def test_tokens_as_a_prompt(server, expected):
    tokens = expected.generated.tokens[: expected.generated.prompt_length]
    answer = server.complete(prompt=tokens, max_tokens=16, temperature=0)
    assert answer["choices"][0]["text"] == expected.text


def test_simultaneous_requests_get_what_they_get_alone(server):
    bodies = [{"max_tokens": 12, "seed": seed, "prompt": PROMPT[: 40 + seed]} for seed in range(4)]
    alone = [server.complete(**body)["choices"] for body in bodies]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda body: server.complete(**body)["choices"], bodies))
    assert together == alone


@pytest.mark.parametrize(
    ("body", "param", "message"),
    [
        ({"suffix": "the end"}, "suffix", "suffix is not supported"),
        ({"best_of": 1, "n": 2}, "best_of", "best_of is less than n"),
        ({"best_of": 2, "stream": True}, "best_of", "cannot be streamed"),
        ({"best_of": 5}, "best_of", "at most 4 texts"),
        ({"unheard_of": 1}, "unheard_of", "not supported"),
        ({"max_tokens": -1}, "max_tokens", "greater than or equal to 0"),
        ({"max_tokens": 99999}, "max_tokens", "at most 2048"),
        ({"max_tokens": 500}, "max_tokens", "window of 64"),
        ({"temperature": "hot"}, "temperature", "valid number"),
        ({"prompt": [[1], []]}, "prompt", "no tokens"),
        ({"prompt": []}, "prompt", "prompt is empty"),
        ({"prompt": [99999]}, "prompt", "token ids from 99999"),
        ({"prompt": {"a": 1}}, "prompt", ""),
        ({"n": 5}, "n", "at most 4 texts"),
        ({"stop": ""}, "stop", "an empty string"),
        ({"neighbors": ["a", "b", "c"]}, "neighbors", "3 texts, but the model reads 2"),
        ({"neighbors": [["a"], ["b"]]}, "neighbors", "2 lists for 1 prompts"),
        ({"logprobs": 21}, "logprobs", "less than or equal to 20"),
        ({"stream_options": {}}, "stream_options", "needs stream"),
        ({"model": "other"}, "model", "no model 'other'"),
    ],
)
def test_mistakes_are_named(server, body, param, message):
    status, answer = server.request("POST", "/v1/completions", {"prompt": PROMPT, **body})
    assert status == (404 if param == "model" else 400)
    error = answer["error"]
    assert (error["type"], error["param"]) == ("invalid_request_error", param)
    assert message in error["message"]


def test_what_is_no_request_is_refused(server):
    post = ("POST", "/v1/completions")
    body = {"prompt": PROMPT}
    assert server.request(*post, b"{not json")[0] == 400
    assert server.request(*post, b"\xff\xfe")[0] == 400
    assert server.request(*post, b"[1, 2]")[0] == 400
    assert server.request(*post, {"prompt": "x" * 5000})[0] == 413
    assert server.request(*post, body, **{"Content-Type": "text/plain"})[0] == 415
    assert server.request("GET", "/v1/completions")[0] == 405
    assert server.request("GET", "/v1/nothing")[0] == 404
    assert server.request("GET", "/health", Host="evil.example")[0] == 400
    for path in ("/v1/nothing", "/v1/models"):
        status, answer = server.request("GET", path, Authorization="Bearer other")
        assert status == (401 if path == "/v1/models" else 404)
        assert set(answer["error"]) == {"message", "type", "param", "code"}
    assert server.request(*post, body, Authorization="")[0] == 401
    assert server.request("GET", "/health", Authorization="")[0] == 200
    assert server.request("GET", "/v1/models")[1]["data"][0]["id"] == "small"


def test_beyond_its_limits_the_server_is_busy_and_recovers(server):
    # Four texts fill it, two that grow and two that wait; until all have ended no four fit.
    body = {"prompt": PROMPT[:20], "max_tokens": 50, "n": 4}
    for _ in range(5):  # the first four may have ended, on a machine that is busy itself
        connection = server.send("POST", "/v1/completions", {**body, "stream": True})
        answer = connection.getresponse()
        answer.read(10)
        status, refused = server.request("POST", "/v1/completions", body)
        answer.read()
        connection.close()
        if status == 429:
            break
    assert refused["error"]["code"] == "rate_limit_exceeded"
    server.complete(max_tokens=4)


def test_a_client_that_goes_away_makes_room(server):
    body = {"prompt": PROMPT[:20], "max_tokens": 50, "stream": True}
    for _ in range(3):
        connection = server.send("POST", "/v1/completions", body)
        connection.getresponse().read(10)
        connection.sock.close() if connection.sock else None
        connection.close()
    end = time.monotonic() + 30
    while server.load() != (0, 0):
        assert time.monotonic() < end
        time.sleep(0.1)


@pytest.mark.slow
def test_the_page_shows_the_text_beside_its_neighbors(server, expected):
    with browser() as page:
        page.open(f"http://127.0.0.1:{server.port}/")
        fields = {"prompt": PROMPT, "max_tokens": "16", "temperature": "0", "key": "wrong"}
        for name, value in fields.items():
            page.evaluate(f"document.getElementById('{name}').value = {json.dumps(value)}")
        page.evaluate("document.getElementById('go').click()")
        page.wait("document.querySelector('#status').textContent.includes('bearer token')")
        page.evaluate(f"document.getElementById('key').value = {json.dumps(KEY)}")
        page.evaluate("document.getElementById('go').click()")
        page.wait("document.querySelector('#status').textContent.startsWith('done')")
        assert page.evaluate("document.querySelector('#text').textContent") == (
            PROMPT + expected.text
        )
        shown = page.evaluate(
            "[...document.querySelectorAll('.neighbor > .text:not(.continuation)')]"
            ".map(element => element.textContent)"
        )
        whole = server.complete(max_tokens=16, temperature=0)["choices"][0]["neighbors"]
        assert shown == [one["text"] for chunk in whole for one in chunk["neighbors"]]
        boxes = page.evaluate(
            "['#text', '#neighbors'].map(name => document.querySelector(name)"
            ".getBoundingClientRect().left)"
        )
        assert boxes[0] < boxes[1]


@pytest.mark.slow
def test_markup_in_a_prompt_stays_text(server):
    evil = "<img src=x onerror=document.title=1>"
    with browser() as page:
        page.open(f"http://127.0.0.1:{server.port}/")
        page.evaluate(f"document.getElementById('key').value = {json.dumps(KEY)}")
        page.evaluate(f"document.getElementById('prompt').value = {json.dumps(evil)}")
        page.evaluate(f"document.getElementById('given').value = {json.dumps(evil)}")
        page.evaluate("document.getElementById('max_tokens').value = 16")
        page.evaluate("document.getElementById('go').click()")
        page.wait("document.querySelector('#status').textContent.startsWith('done')")
        assert page.evaluate("document.images.length") == 0
        assert page.evaluate("document.querySelector('#text').textContent").startswith(evil)


@pytest.mark.slow
def test_sigterm_ends_the_server_cleanly():
    with running_server("--shutdown-seconds", "1", key=None) as server:
        connection = server.send("POST", "/v1/completions", {"prompt": "x", "max_tokens": 60})
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(60) == 0
        connection.close()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--max-batch-size", "0"], "--max-batch-size: 0"),
        (["--api-key-file", "nowhere"], "--api-key-file: "),
        (["--project-dir", "nowhere"], "nowhere"),
    ],
)
def test_impossible_flags_are_one_line_and_exit_code_2(flags, message, capsys):
    from retro_mcore.cli.serve import main

    defaults = ["--project-dir", str(built_project()), "--load", small_checkpoint()]
    assert main([*defaults, "--device", "cpu", *flags]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_impossible_flags_are_reported_together(capsys):
    from retro_mcore.cli.serve import main

    flags = ["--project-dir", "project", "--load", "model"]
    flags += ["--max-batch-size", "0", "--max-waiting", "-1", "--port", "70000"]
    flags += ["--max-length", "0", "--api-key-file", "nowhere"]
    flags += ["--retro-neighbors", "none", "--retrieval-lead", "4"]
    assert main([*flags, "--device", "cpu"]) == 2
    lines = capsys.readouterr().err.splitlines()
    named = [line.removeprefix("error: ").split(":")[0] for line in lines]
    assert named == [
        *("--max-batch-size", "--max-length", "--max-waiting", "--port"),
        *("--retrieval-lead", "--api-key-file"),
    ]
