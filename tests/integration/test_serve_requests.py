"""What strangers send to the server, against the application in this process."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from retro_mcore.errors import ProjectError
from tests.integration.small_checkpoint import small_checkpoint
from tests.unit.data.projects import built_project, documents

PROMPT = documents()[0][:60]
POST = ("POST", "/v1/completions")
KEY = "schlüssel"
#: A chat template.
TEMPLATE = "{% for each in messages %}{{ each.content }}\n{% endfor %}"
MESSAGES = [{"role": "user", "content": PROMPT}]
GREEDY = {"prompt": PROMPT, "max_tokens": 4, "temperature": 0}


class App:
    """The application of a small trained model; calls it without a socket."""

    def __init__(self, template: Path | None = None) -> None:
        from retro_mcore.cli.generation_options import load_generation_model
        from retro_mcore.cli.serve import ServeOptions
        from retro_mcore.server.service import GenerationService
        from retro_mcore.server.serving import build_server_app

        options = ServeOptions(
            project_dir=str(built_project()),
            load=small_checkpoint(),
            model_name="small",
            max_batch_size=2,
            max_waiting=6,
            device="cpu",
            chat_template=None if template is None else str(template),
        )
        self.loaded = load_generation_model(options)
        self.tokenizer = self.loaded.tokenizer
        self.service = GenerationService(self.loaded.model, self.tokenizer, 2, 6)
        self.service.start()
        self.app = build_server_app(options, self.loaded, self.service)

    def send(
        self, method: str, path: str, body: bytes = b"", more_body: bool = False, **headers: str
    ) -> tuple[int, bytes]:
        """Status and body of an answer; it must come within a minute."""
        given = {"host": "localhost", "content_type": "application/json", **headers}
        scope = {
            "type": "http",
            "http_version": "1.1",
            "method": method,
            "path": path,
            "raw_path": path.encode(),
            "query_string": b"",
            "root_path": "",
            "scheme": "http",
            "server": ("localhost", 80),
            "client": ("localhost", 1),
            "headers": [
                (name.replace("_", "-").encode(), value.encode()) for name, value in given.items()
            ],
        }
        messages: list[Any] = [{"type": "http.request", "body": body, "more_body": more_body}]
        status, content = 0, b""

        async def receive() -> Any:
            return messages.pop() if messages else await asyncio.sleep(3600)

        async def answer(message: Any) -> None:
            nonlocal status, content
            status = message.get("status", status)
            content += message.get("body", b"")

        asyncio.run(asyncio.wait_for(self.app(scope, receive, answer), 60))
        return status, content

    def post(self, body: Any, **headers: str) -> tuple[int, Any]:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        status, content = self.send(*POST, data, **headers)
        return status, json.loads(content) if content.startswith(b"{") else content.decode()

    def chat(self, **body: Any) -> tuple[int, Any]:
        """Status and answer of a chat; of a stream, its events."""
        data = json.dumps({"messages": MESSAGES, "temperature": 0, **body}).encode()
        status, content = self.send("POST", "/v1/chat/completions", data)
        if content.startswith(b"{"):
            return status, json.loads(content)
        events = [line.removeprefix("data: ") for line in content.decode().split("\n\n") if line]
        assert events.pop() == "[DONE]"
        return status, [json.loads(event) for event in events]

    def complete(self, **body: Any) -> list[dict[str, Any]]:
        """The choices of a request that succeeds."""
        status, answer = self.post({**GREEDY, **body})
        assert status == 200, answer
        return answer["choices"]

    def text(self, **body: Any) -> str:
        return self.complete(**body)[0]["text"]

    def stream(self, **body: Any) -> list[dict[str, Any]]:
        """What a stream adds up to, by choice."""
        status, answer = self.post({**GREEDY, **body, "stream": True})
        assert status == 200, answer
        assert answer.endswith("data: [DONE]\n\n")
        choices: dict[int, dict[str, Any]] = {}
        for line in answer.split("\n\n")[:-2]:
            (piece,) = json.loads(line.removeprefix("data: "))["choices"]
            whole = choices.setdefault(piece["index"], {"text": "", "tokens": 0, "logprobs": {}})
            whole["text"] += piece["text"]
            whole["finish_reason"] = piece["finish_reason"]
            whole["neighbors_cut"] = piece.get("neighbors_cut")
            whole["neighbor_credit"] = piece.get("neighbor_credit")
            for name, values in (piece["logprobs"] or {}).items():
                whole["logprobs"].setdefault(name, []).extend(values)
            told = "".join(whole["logprobs"].get("tokens", []))
            assert whole["text"].startswith(told)  # no token before its text
        return [choices[index] for index in sorted(choices)]


@pytest.fixture(scope="module")
def app(tmp_path_factory):
    template = tmp_path_factory.mktemp("template") / "template.jinja"
    template.write_text(TEMPLATE, encoding="utf-8")
    app = App(template)
    yield app
    app.service.close()


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("echo", [False, True])
def test_null_is_a_fields_default(app, stream, echo):
    # Clients in typed languages send every field.
    names = ["temperature", "top_p", "n", "stop", "logprobs", "best_of", "logit_bias", "user"]
    names += ["frequency_penalty", "presence_penalty", "suffix", "stream_options", "model"]
    nulls: dict[str, Any] = dict.fromkeys(names)
    for name, value in {"echo": echo, "stream": stream}.items():
        nulls[name] = value or None
    status, answer = app.post({"prompt": PROMPT, "seed": 1, "max_tokens": None, **nulls})
    assert status == 200
    if not stream:
        expected = app.complete(seed=1, max_tokens=16, temperature=1, echo=echo)
        assert answer["choices"] == expected


@pytest.mark.parametrize("path", ["/", "/health", "/v1/models", "/v1/models/small", "/nowhere"])
def test_head_is_answered_like_get_without_a_body(app, path):
    status, body = app.send("GET", path)
    assert app.send("HEAD", path) == (status, b"")
    assert body


def test_head_of_completions_is_refused_like_get(app):
    assert app.send("HEAD", "/v1/completions") == (405, b"")


def test_two_spellings_of_a_token_in_logit_bias_are_refused(app):
    status, answer = app.post({**GREEDY, "logit_bias": {"1": 5, "01": -5}})
    assert status == 400
    assert answer["error"]["param"] == "logit_bias"
    assert "token 1 twice: '1', '01'" in answer["error"]["message"]


@pytest.mark.parametrize("prompt", [{"prompt": ""}, {"prompt": None}, {}, {"prompt": [""]}])
def test_an_empty_prompt_begins_with_the_start_token(app, prompt):
    status, answer = app.post({"max_tokens": 4, "temperature": 0, "echo": True, **prompt})
    assert status == 200
    start = app.tokenizer.eod if app.tokenizer.bos is None else app.tokenizer.bos
    assert answer["choices"][0]["text"] == app.text(prompt=[start])
    assert answer["usage"]["prompt_tokens"] == 1


@pytest.mark.parametrize("setting", ["top_p", "temperature"])
@pytest.mark.parametrize("value", [0, 1e-9, 1e-320, 5e-324])
def test_small_and_zero_values_are_greedy(app, setting, value):
    assert app.text(**{"temperature": 1, "seed": 3, setting: value}) == app.text()


def test_seeds_are_openais(app):
    """Any number of 64 bits, negative ones too."""
    asked = {"temperature": 1, "max_tokens": 12, "logprobs": 0}
    texts = [app.complete(seed=seed, **asked) for seed in (-1, -1, 1, -(2**63))]
    assert texts[0] == texts[1]
    assert texts[0] not in texts[2:]
    pair = app.complete(seed=-1, n=2, **asked)
    assert pair[1]["text"] == app.text(seed=0, **asked)  # the next seed, whatever the sign


@pytest.mark.parametrize("top_k", [0, -1, 10**6, 10**30])
def test_top_k_of_all_tokens(app, top_k):
    asked = {"temperature": 1, "seed": 3}
    assert app.text(top_k=top_k, **asked) == app.text(**asked)


def test_penalties_and_biases_change_the_logits_as_openai_defines(app):
    free = app.complete(logprobs=2, max_tokens=6)[0]
    first, second = free["logprobs"]["top_logprobs"][0].items()
    (other,) = [
        token
        for token in range(app.tokenizer.vocab_size)
        if app.tokenizer.detokenize([token]) == second[0]
    ][:1]
    gap = first[1] - second[1]
    assert app.text(logit_bias={str(other): gap + 0.1}).startswith(second[0])
    assert app.text(logit_bias={str(other): gap - 0.1}).startswith(first[0])
    banned = {str(token): -100 for token in range(app.tokenizer.vocab_size)}
    assert app.text(logit_bias=banned) == app.text()  # all alike
    only = {str(other): 100}
    repeated = app.complete(logit_bias=only, logprobs=0)[0]["logprobs"]["tokens"]
    assert len(set(repeated)) == 1
    # What is answered are the model's own log-probabilities.
    assert free["logprobs"]["token_logprobs"][0] == pytest.approx(first[1])
    penalized = app.complete(logit_bias={str(other): 1.0}, frequency_penalty=2, max_tokens=12)
    assert penalized != app.complete(logit_bias={str(other): 1.0}, max_tokens=12)


def test_the_best_of_several_texts_are_those_of_the_highest_mean(app):
    asked = {"temperature": 1, "seed": 7, "logprobs": 0, "max_tokens": 6}
    status, answer = app.post({"prompt": PROMPT, **asked, "best_of": 5, "n": 2})
    assert status == 200
    every = app.complete(**asked, n=5)
    assert all(len(one["logprobs"]["tokens"]) == 6 for one in every)  # none ended by itself

    def mean(choice):
        return sum(choice["logprobs"]["token_logprobs"]) / 6

    best = sorted(every, key=mean, reverse=True)[:2]
    assert [one["text"] for one in answer["choices"]] == [one["text"] for one in best]
    assert [one["index"] for one in answer["choices"]] == [0, 1]
    assert answer["usage"]["completion_tokens"] == 30


@pytest.mark.parametrize("echo", [False, True])
@pytest.mark.parametrize("stop", [None, ["e", "st"]])
def test_streamed_log_probabilities_are_those_of_the_whole(app, echo, stop):
    # Two prompts, two texts each, of which random ones hold half characters.
    cut = app.tokenizer.tokenize("日本語")[:4]
    asked = {
        "prompt": [app.tokenizer.tokenize(PROMPT), [*app.tokenizer.tokenize("a"), *cut]],
        **{"n": 2, "temperature": 2, "seed": 11, "max_tokens": 20, "logprobs": 3},
        **{"echo": echo, "stop": stop},
    }
    whole, streamed = app.complete(**asked), app.stream(**asked)
    for one, other in zip(whole, streamed, strict=True):
        assert (one["text"], one["finish_reason"]) == (other["text"], other["finish_reason"])
        logprobs = one["logprobs"]
        assert "".join(logprobs["tokens"]) == one["text"]
        for token, offset in zip(logprobs["tokens"], logprobs["text_offset"], strict=True):
            assert one["text"][offset : offset + len(token)] == token
        given = other["logprobs"]
        assert (given["tokens"], given["text_offset"]) == (
            logprobs["tokens"],
            logprobs["text_offset"],
        )
        assert given["token_logprobs"] == pytest.approx(logprobs["token_logprobs"], abs=1e-4)
        assert logprobs["token_logprobs"].count(None) == int(echo)
        assert all(top is None or len(top) == 3 for top in logprobs["top_logprobs"])


def test_a_prompt_may_be_echoed_alone(app):
    (choice,) = app.complete(echo=True, max_tokens=0)
    assert (choice["text"], choice["logprobs"], choice["finish_reason"]) == (PROMPT, None, "length")


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"max_tokens": 4, "min_tokens": 2, "stop_token_ids": [99999999]}, "stop_token_ids"),
        ({"stop_token_ids": [-1]}, "stop_token_ids"),
        ({"stop_token_ids": [2**70]}, "stop_token_ids"),
        ({"min_tokens": 1, "stop_token_ids": list(range(500))}, "stop_token_ids"),
        ({"min_tokens": 9}, "min_tokens"),
        ({"max_tokens": 10**30}, "max_tokens"),
        ({"n": 128}, "n"),
        ({"logit_bias": {"99999999": 1}}, "logit_bias"),
        ({"logit_bias": {"-1": 1}}, "logit_bias"),
        ({"logit_bias": {"one": 1}}, "logit_bias"),
        ({"logit_bias": {"1": 101}}, "logit_bias"),
        ({"stop": [""]}, "stop"),
        ({"frequency_penalty": 2.5}, "frequency_penalty"),
        ({"temperature": True}, "temperature"),
        ({"temperature": 10**400}, "temperature"),
        ({"top_k": -2}, "top_k"),
        ({"seed": 2**63}, "seed"),
        ({"seed": -(2**63) - 1}, "seed"),
        ({"prompt": [500]}, "prompt"),
        ({"prompt": [10**40]}, "prompt"),
        ({"prompt": [1.0]}, "prompt"),
        ({"prompt": [True]}, "prompt"),
        ({"prompt": [[1], [[2]]]}, "prompt"),
        ({"prompt": [[]]}, "prompt"),
        ({"prompt": "x" * 20_000}, "prompt"),
        ({"prompt": "\ud83d"}, "prompt"),
        ({"stop": ["\udc00"]}, "stop"),
        ({"stop": ["a"] * 65}, "stop"),
        ({"stop": ["a" * 1001]}, "stop"),
        ({"model": "\ud83d"}, "model"),
        ({"neighbors": ["\ud83d"]}, "neighbors"),
    ],
)
def test_what_cannot_be_generated_is_refused_at_the_door(app, body, param):
    status, answer = app.post({**GREEDY, **body})
    assert (status, answer["error"]["param"]) == (400, param)
    assert app.service.is_alive


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"content_type": "Application/JSON; Charset=UTF-8"}, 200),
        ({"content_type": 'application/json; charset="utf-8"'}, 200),
        ({"content_type": "application/json; charset=utf-16"}, 415),
        ({"content_type": "text/json"}, 415),
        ({"content_type": ""}, 415),
        ({"content_length": "9" * 30}, 413),
        ({"content_length": str(1 << 21)}, 413),
        ({"content_length": "-1"}, 200),
    ],
)
def test_headers(app, headers, status):
    assert app.post(GREEDY, **headers)[0] == status


@pytest.mark.parametrize("scheme", ["Bearer", "bearer", "BEARER"])
def test_the_scheme_of_the_key_is_written_in_any_case(app, scheme, monkeypatch):
    from retro_mcore.server.http import build_app

    app_with_key = build_app(_parts(app), api_key=KEY, allowed_hosts=["localhost"])
    monkeypatch.setattr(app, "app", app_with_key)
    assert app.send("GET", "/v1/models", authorization=f"{scheme} {KEY}")[0] == 200
    for wrong in (KEY, f"Basic {KEY}", "Bearer other", f"{scheme}{KEY}", ""):
        assert app.send("GET", "/v1/models", authorization=wrong)[0] == 401


def _parts(app: App) -> Any:
    from retro_mcore.server.http import ServerParts

    return ServerParts(
        service=app.service,
        tokenize=app.loaded.tokenize,
        tokenizer=app.tokenizer,
        model_name="small",
        chunk_length=app.loaded.arguments.retro_chunk_length,
    )


def test_a_body_that_does_not_come_is_not_waited_for(app, monkeypatch):
    from retro_mcore.server.http import ServerLimits, build_app

    impatient = build_app(_parts(app), ServerLimits(receive_seconds=0.1))
    monkeypatch.setattr(app, "app", impatient)
    status, content = app.send(*POST, b'{"prompt": ', more_body=True, content_length="100")
    assert (status, json.loads(content)["error"]["type"]) == (408, "invalid_request_error")


LONG = "A river is a stream of water. " * 40


@pytest.mark.parametrize(
    ("body", "cut"),
    [
        ({}, [None]),
        ({"retrieve": False}, [None]),
        ({"neighbors": []}, [0]),
        ({"neighbors": ["short", LONG]}, [1]),
        ({"neighbors": [LONG, LONG], "n": 2}, [2, 2]),
        ({"prompt": [PROMPT, PROMPT], "n": 2, "neighbors": [["a"], [LONG]]}, [0, 0, 1, 1]),
        ({"neighbors": [LONG], "two_chunks": True}, [1]),
        ({"neighbors": [LONG], "max_tokens": 0, "echo": True}, [1]),
    ],
)
def test_given_neighbors_that_are_cut_are_counted(app, body, cut):
    """Who sends whole articles as neighbors would think that the model had read them."""
    choices = app.complete(**body)
    assert [choice.get("neighbors_cut") for choice in choices] == cut
    assert all(("neighbors_cut" in choice) == (cut[0] is not None) for choice in choices)
    assert [choice["neighbors_cut"] for choice in app.stream(**body)] == cut


@pytest.mark.parametrize("echo", [False, True])
def test_credit_says_which_neighbors_lowered_the_loss_of_each_token(app, echo):
    body = {"max_tokens": 20, "echo": echo, "neighbor_credit": True}
    (choice,) = app.complete(**body)
    credit = choice["neighbor_credit"]
    start = len(PROMPT) if echo else 0
    assert "".join(credit["tokens"]) == choice["text"][start:]
    assert credit["text_offset"][0] == start
    assert len(credit["chunk"]) == len(credit["gain"]) == len(credit["tokens"])
    first = len(app.loaded.tokenize([PROMPT])[0])
    read = [(first + place) // 16 - 1 for place in range(len(credit["tokens"]))]
    assert credit["chunk"] == [None if chunk < 0 else chunk for chunk in read]
    assert read[-1] < len(choice["neighbors"])
    assert all(len(gains) == 2 for gains in credit["gain"])
    assert any(abs(gain) > 1e-4 for gains in credit["gain"] for gain in gains)
    assert app.stream(**body)[0]["neighbor_credit"] == credit


def test_without_neighbors_or_unasked_there_is_no_credit(app):
    assert app.complete(retrieve=False, neighbor_credit=True)[0]["neighbor_credit"] is None
    assert "neighbor_credit" not in app.complete()[0]


def test_of_the_best_texts_too_it_is_told_which_prompts_neighbors_are_cut(app):
    body = {"prompt": [PROMPT, PROMPT], "best_of": 2, "neighbors": [["a"], [LONG]]}
    assert [choice["neighbors_cut"] for choice in app.complete(**body)] == [0, 1]


def test_models_and_the_description_of_the_interface(app):
    models = json.loads(app.send("GET", "/v1/models")[1])["data"]
    assert json.loads(app.send("GET", "/v1/models/small")[1]) == models[0]
    assert isinstance(models[0]["created"], int)
    assert models[0]["owned_by"]
    status, content = app.send("GET", "/v1/models/other/one")
    assert (status, json.loads(content)["error"]["code"]) == (404, "model_not_found")
    described = json.loads(app.send("GET", "/openapi.json")[1])
    body = described["paths"]["/v1/completions"]["post"]["requestBody"]["content"]
    properties = body["application/json"]["schema"]["properties"]
    assert {"prompt", "max_tokens", "logit_bias", "neighbors"} <= set(properties)
    assert "$ref" not in json.dumps(body)


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"[" * 100_000, 400),
        (b'{"a":' * 100_000, 400),
        (b'{"seed":' + b"9" * 5000 + b"}", 400),
        (b'{"seed":' + b"9" * 4000 + b"}", 400),
        (b'{"prompt": NaN}', 400),
        (b"\xff\xfe{}", 400),
        (json.dumps(GREEDY).encode("utf-16"), 400),
        (b"\xef\xbb\xbf" + json.dumps(GREEDY).encode(), 200),
        (b'{"prompt": "a", "prompt": "b", "max_tokens": 1}', 200),
        (b"", 400),
        (b"null", 400),
        (b'{"\\ud83d": 1}', 400),
        (b'{"a\\u0000b": 1}', 400),
    ],
)
def test_bodies_that_no_client_of_ours_writes(app, body, status):
    assert app.post(body)[0] == status


VALUES: st.SearchStrategy[Any] = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**80), 2**80)
    | st.sampled_from([0, 1, 2, 3, 499, 500, 511, 512, -1, 0.0, 1e-320, 5e-324, 1e308, 0.5])
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=8),
    lambda children: (
        st.lists(children, max_size=4) | st.dictionaries(st.text(max_size=4), children, max_size=3)
    ),
    max_leaves=6,
)


def fields() -> list[str]:
    from retro_mcore.server.completions import FIELDS

    return sorted(FIELDS)


def never_a_server_error(app: App, body: bytes) -> None:
    status, answer = app.post(body)
    assert 200 <= status < 500, (status, answer)
    assert app.service.is_alive


SOME = settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@SOME
@given(data=st.data())
def test_changed_requests_never_fail_the_server(app, data):
    start = {"prompt": PROMPT[:20], "max_tokens": 2, "seed": 1}
    changes = data.draw(st.dictionaries(st.sampled_from(fields()), VALUES, max_size=3))
    never_a_server_error(app, json.dumps({**start, **changes}).encode())


@SOME
@given(body=st.binary(max_size=60) | VALUES.map(lambda value: json.dumps(value).encode()))
def test_arbitrary_bodies_never_fail_the_server(app, body):
    never_a_server_error(app, body)


def test_after_all_that_a_healthy_request_is_answered_as_before(app):
    before = app.complete(logprobs=2)
    for changes in ({"temperature": 5e-324}, {"stop_token_ids": [-5]}, {"prompt": "\ud83d"}):
        app.post({**GREEDY, **changes})
    assert app.complete(logprobs=2) == before


class Failing:
    """A search that fails for chunks that begin with this token."""

    def __init__(self, source: Any, token: int) -> None:
        self._source, self._token = source, token

    def neighbors_of(self, chunks):
        if any(chunk.tokens[0] == self._token for chunk in chunks):
            raise ProjectError("index", "gone", "Build it")
        return self._source.neighbors_of(chunks)


def test_a_text_that_fails_is_answered_alone(app, monkeypatch):
    from dataclasses import replace

    from retro_mcore.server.http import build_app

    bad, good = app.tokenizer.tokenize("An" * 40)[:30], app.tokenizer.tokenize(PROMPT)
    assert bad[0] != good[0]
    search = Failing(app.loaded.retriever, bad[0])
    parts = replace(_parts(app), search=search, retriever=app.loaded.retriever)
    monkeypatch.setattr(app, "app", build_app(parts))
    expected = app.complete(prompt=good, max_tokens=12)

    async def both():
        from concurrent.futures import ThreadPoolExecutor

        loop = asyncio.get_running_loop()
        with ThreadPoolExecutor(2) as pool:
            bodies = [{**GREEDY, "prompt": one, "max_tokens": 12} for one in (bad, good)]
            return await asyncio.gather(
                *[loop.run_in_executor(pool, app.post, body) for body in bodies]
            )

    for _ in range(3):
        (failed, error), (status, answer) = asyncio.run(both())
        assert (failed, error["error"]["message"]) == (500, "index: gone. Build it")
        assert (status, answer["choices"]) == (200, expected)


def test_health_says_when_generation_has_stopped(app, monkeypatch):
    from dataclasses import replace

    from retro_mcore.server.http import build_app
    from retro_mcore.server.service import GenerationService

    service = GenerationService(app.loaded.model, app.tokenizer, 2, 2)
    monkeypatch.setattr(service, "_next_commands", lambda: 1 / 0)
    service.start()
    service.close()
    monkeypatch.setattr(app, "app", build_app(replace(_parts(app), service=service)))
    status, content = app.send("GET", "/health")
    assert (status, json.loads(content)["status"]) == (503, "failed")
    assert app.post(GREEDY)[0] == 503


def test_a_chat_is_the_completion_of_its_prompt_with_its_sources(app):
    asked = {"max_tokens": 20, "n": 2, "temperature": 1, "seed": 3}
    status, answer = app.chat(**asked, logprobs=True, top_logprobs=2)
    assert status == 200, answer
    whole = app.complete(prompt=f"{PROMPT}\n", **asked, logprobs=2)
    assert answer["object"] == "chat.completion"
    for choice, wanted in zip(answer["choices"], whole, strict=True):
        message = {"role": "assistant", "content": wanted["text"], "refusal": None}
        assert choice["message"] == message
        for name in ("index", "finish_reason", "neighbors"):
            assert choice[name] == wanted[name]
        content = choice["logprobs"]["content"]
        assert [one["token"] for one in content] == wanted["logprobs"]["tokens"]
        assert [one["logprob"] for one in content] == wanted["logprobs"]["token_logprobs"]
        assert all(len(one["top_logprobs"]) == 2 for one in content)
        sources = [one["source"] for chunk in wanted["neighbors"] for one in chunk["neighbors"]]
        assert choice["sources"] == list(dict.fromkeys(sources)) != []


def test_a_streamed_chat_adds_up_to_the_whole(app):
    asked = {"max_completion_tokens": 20, "stop": ["e"], "logprobs": True}
    (whole,) = app.chat(**asked)[1]["choices"]
    usage = app.chat(**asked)[1]["usage"]
    events = app.chat(**asked, stream=True, stream_options={"include_usage": True})[1]
    assert {event["object"] for event in events} == {"chat.completion.chunk"}
    assert [event["usage"] for event in events] == [None] * (len(events) - 1) + [usage]
    assert events.pop()["choices"] == []
    choices = [event["choices"][0] for event in events]
    assert choices[0]["delta"]["role"] == "assistant"
    assert all("role" not in choice["delta"] for choice in choices[1:])
    text = "".join(choice["delta"].get("content", "") for choice in choices)
    assert text == whole["message"]["content"]
    scores = [one for choice in choices for one in (choice["logprobs"] or {}).get("content", [])]
    assert [one["token"] for one in scores] == [
        one["token"] for one in whole["logprobs"]["content"]
    ]
    chunks = [chunk for choice in choices for chunk in choice.get("neighbors", [])]
    assert chunks == whole["neighbors"]
    assert (choices[-1]["finish_reason"], choices[-1]["sources"]) == (
        whole["finish_reason"],
        whole["sources"],
    )


def test_a_reply_may_fill_the_window(app):
    answer = app.chat()[1]
    usage, reason = answer["usage"], answer["choices"][0]["finish_reason"]
    window = app.loaded.window
    assert usage["total_tokens"] == window if reason == "length" else usage["total_tokens"] < window


@pytest.mark.parametrize(
    ("body", "param", "message"),
    [
        ({"messages": [{"role": "user", "content": "long " * 300}]}, "messages", "window"),
        ({"messages": "x"}, "messages", "messages: "),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages", "role 'tool'"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages", "text"),
        ({"messages": [{"role": "user", "content": "\ud83d"}]}, "messages", "surrogate"),
        ({"messages": [{"role": "user", "content": ""}], "max_tokens": 0}, "max_tokens", "1"),
        ({"tools": [{"type": "function"}]}, "tools", "tools is not supported"),
        ({"max_tokens": 10**6}, "max_tokens", "at most"),
        ({"n": 9}, "n", "at most"),
        ({"top_logprobs": 1}, "top_logprobs", "needs logprobs"),
        ({"stream_options": {}}, "stream_options", "needs stream"),
        ({"stop": ["a"] * 65}, "stop", "at most 64"),
        ({"logit_bias": {"x": 1}}, "logit_bias", "not a token id"),
        ({"model": "other"}, "model", "no model 'other'"),
    ],
)
def test_a_chat_that_cannot_be_answered_is_refused_by_name(app, body, param, message):
    status, answer = app.chat(**body)
    assert status == (404 if param == "model" else 400)
    assert set(answer["error"]) == {"message", "type", "param", "code"}
    assert answer["error"]["param"] == param, answer
    assert message in answer["error"]["message"]
    assert app.service.is_alive


def test_a_model_without_a_chat_template_does_not_chat(app, monkeypatch):
    from retro_mcore.server.http import build_app

    monkeypatch.setattr(app, "app", build_app(_parts(app)))
    status, answer = app.chat()
    assert (status, answer["error"]["param"]) == (400, "messages")
    assert "--chat-template" in answer["error"]["message"]
    hidden = '<p id="mode" hidden>'
    assert hidden in app.send("GET", "/")[1].decode()
    monkeypatch.undo()
    assert hidden not in app.send("GET", "/")[1].decode()
