"""Documents that clients add to a server, against the application in this process."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.integration.test_serve_requests import App
from tests.unit.data.projects import documents

TEXT = documents(60)[50]
KEY = {"authorization": "Bearer secret"}
PATH = "/v1/documents"


@pytest.fixture(scope="module")
def app():
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("RETRO_MCORE_API_KEY", "secret")
        app = App()
    yield app
    app.service.close()


@pytest.fixture(autouse=True)
def reset(app):
    yield
    assert send(app, "DELETE")[0] == 200


def send(app: App, method: str, body: Any = None, path: str = PATH, **headers: str) -> tuple:
    data = b"" if body is None else json.dumps(body).encode()
    status, content = app.send(method, path, data, **{**KEY, **headers})
    return status, json.loads(content)


def add(app: App, *texts: str) -> tuple:
    asked = [{"text": text, "id": f"note-{number}"} for number, text in enumerate(texts)]
    return send(app, "POST", {"documents": asked})


def neighbors(app: App) -> list[dict[str, Any]]:
    body = {"prompt": TEXT[:80], "max_tokens": 1, "temperature": 0, "echo": True}
    status, answer = app.post(body, **KEY)
    assert status == 200, answer
    (choice,) = answer["choices"]
    return [one for chunk in choice["neighbors"] for one in chunk["neighbors"]]


def test_added_documents_are_retrieved_until_they_are_reset(app) -> None:
    before = neighbors(app)
    assert not any("note-0" in one["source"] for one in before)
    status, answer = add(app, TEXT)
    assert (status, answer["added"], answer["documents"]) == (200, ["note-0"], 1)
    assert answer["chunks"] > 3
    assert send(app, "GET") == (
        200,
        {"object": "documents", "documents": 1, "chunks": answer["chunks"]},
    )
    found = neighbors(app)
    assert found[0]["source"] == "note-0 (added document 0)"
    assert found[0]["distance"] < 1e-4  # the prompt's first chunk is its first chunk
    status, exported = app.send("GET", f"{PATH}/export", **KEY)
    assert (status, json.loads(exported)) == (200, {"id": "note-0", "text": TEXT})
    status, answer = send(app, "DELETE")
    assert (status, answer["removed"], answer["chunks"]) == (200, 1, 0)
    assert neighbors(app) == before


@pytest.mark.parametrize("method", ["GET", "POST", "DELETE"])
def test_a_key_is_required(app, method) -> None:
    assert send(app, method, authorization="Bearer wrong")[0] == 401
    schema = app.app.openapi()["paths"]
    assert set(schema[PATH]) == {"get", "post", "delete"}
    assert schema[PATH]["post"]["requestBody"]["content"]["application/json"]["schema"]


def test_a_server_without_a_key_takes_none(app, monkeypatch) -> None:
    from retro_mcore.cli.serve import ServeOptions
    from retro_mcore.server.serving import build_server_app

    options = ServeOptions(project_dir="", load="", model_name="small")
    monkeypatch.setattr(app, "app", build_server_app(options, app.loaded, app.service))
    for method in ("GET", "POST", "DELETE"):
        status, answer = send(app, method)
        assert (status, "API key" in answer["error"]["message"]) == (403, True)
    monkeypatch.undo()


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({}, "documents: Field required"),
        ({"documents": []}, "documents: List should have at least 1 item"),
        ({"documents": [{"text": 1}]}, "documents.0.text: Input should be a valid string"),
        ({"documents": [{"text": "a", "url": "b"}]}, "documents.0.url: Extra inputs"),
        ({"documents": [{"text": TEXT}, {"text": " \n"}]}, "holds no words"),
        ({"documents": [{"text": TEXT, "id": "a"}] * 2}, "the id 'a' is there already"),
    ],
)
def test_what_cannot_be_added_is_refused_as_a_whole(app, body, message) -> None:
    status, answer = send(app, "POST", body)
    assert status == 400
    assert message in answer["error"]["message"]
    assert send(app, "GET")[1]["documents"] == 0
