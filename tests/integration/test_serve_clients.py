"""Clients of OpenAI's API, unchanged, against the server."""

from __future__ import annotations

import pytest

from tests.integration.test_serve import KEY, PROMPT, running_server

pytestmark = pytest.mark.slow

MESSAGES = [{"role": "user", "content": PROMPT[:60]}]


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    template = tmp_path_factory.mktemp("template") / "template.jinja"
    text = "{% for each in messages %}{{ each.content }}\n{% endfor %}"
    template.write_text(text, encoding="utf-8")
    with running_server("--model-name", "small", "--chat-template", str(template)) as server:
        yield server


@pytest.fixture(scope="module")
def expected(server):
    """The reply, and its sources."""
    body = {"messages": MESSAGES, "temperature": 0, "max_tokens": 12}
    status, answer = server.request("POST", "/v1/chat/completions", body)
    assert status == 200, answer
    return answer["choices"][0]


def package(name: str):
    return pytest.importorskip(name, reason=f"{name}, an optional package, is not installed")


def test_openais_client(server, expected):
    openai = package("openai")
    client = openai.OpenAI(base_url=f"http://127.0.0.1:{server.port}/v1", api_key=KEY)
    asked = {"model": "small", "temperature": 0, "max_tokens": 12}
    whole = client.chat.completions.create(
        messages=MESSAGES, **asked, logprobs=True, top_logprobs=1, n=1, seed=1, stop=None
    )
    (choice,) = whole.choices
    assert choice.message.content == expected["message"]["content"]
    assert choice.model_extra["sources"] == expected["sources"]
    assert len(choice.logprobs.content[0].top_logprobs) == 1
    stream = client.chat.completions.create(
        messages=MESSAGES, **asked, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    assert chunks[-1].usage == whole.usage
    deltas = [chunk.choices[0].delta for chunk in chunks[:-1]]
    assert "".join(delta.content or "" for delta in deltas) == expected["message"]["content"]
    text = client.completions.create(
        prompt=f"{MESSAGES[0]['content']}\n", **asked, extra_body={"top_k": 0}
    )
    assert text.choices[0].text == expected["message"]["content"]
    tool = {"type": "function", "function": {"name": "f", "parameters": {}}}
    with pytest.raises(openai.BadRequestError, match="tools is not supported") as caught:
        client.chat.completions.create(messages=MESSAGES, **asked, tools=[tool])
    assert caught.value.param == "tools"
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(messages=MESSAGES, model="other")


def test_langchains_classes(server, expected):
    langchain = package("langchain_openai")
    where = {"base_url": f"http://127.0.0.1:{server.port}/v1", "api_key": KEY, "model": "small"}
    chat = langchain.ChatOpenAI(**where, temperature=0, max_tokens=12)
    content = MESSAGES[0]["content"]
    assert chat.invoke([("human", content)]).content == expected["message"]["content"]
    pieces = [piece.content for piece in chat.stream([("human", content)])]
    assert "".join(pieces) == expected["message"]["content"]
    text = langchain.OpenAI(**where, temperature=0, max_tokens=12).invoke(f"{content}\n")
    assert text == expected["message"]["content"]


def test_llama_indexs_classes(server, expected):
    package("llama_index.llms.openai_like")
    from llama_index.core.llms import ChatMessage
    from llama_index.llms.openai_like import OpenAILike

    where = {"api_base": f"http://127.0.0.1:{server.port}/v1", "api_key": KEY, "model": "small"}
    asked = {"temperature": 0, "max_tokens": 12, "context_window": 64}
    content = MESSAGES[0]["content"]
    chat = OpenAILike(**where, **asked, is_chat_model=True)
    message = ChatMessage(role="user", content=content)
    assert chat.chat([message]).message.content == expected["message"]["content"]
    *_, last = chat.stream_chat([message])
    assert last.message.content == expected["message"]["content"]
    text = OpenAILike(**where, **asked, is_chat_model=False).complete(f"{content}\n")
    assert text.text == expected["message"]["content"]


def test_the_page_chats(server, expected):
    import json

    from tests.integration.browser import browser

    with browser() as page:
        page.open(f"http://127.0.0.1:{server.port}/")
        fields = {"prompt": MESSAGES[0]["content"], "max_tokens": "12", "temperature": "0",
                  "key": KEY}  # fmt: skip
        for name, value in fields.items():
            page.evaluate(f"document.getElementById('{name}').value = {json.dumps(value)}")
        page.evaluate("document.getElementById('go').click()")
        page.wait("document.querySelector('#status').textContent.startsWith('done')")
        shown = "[...document.querySelectorAll('#text > div')].map(each => each.textContent)"
        said = [MESSAGES[0]["content"], expected["message"]["content"]]
        assert page.evaluate(shown) == said
        page.evaluate("document.getElementById('prompt').value = 'And?'")
        page.evaluate("document.getElementById('max_tokens').value = 2")
        page.evaluate("document.getElementById('go').click()")
        page.wait("document.querySelector('#status').textContent.startsWith('done')")
        assert page.evaluate(shown)[:3] == [*said, "And?"]
        page.evaluate("document.getElementById('new').click()")
        assert page.evaluate(shown) == []
