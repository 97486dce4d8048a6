"""Documents that clients add to what a running server retrieves from."""

from __future__ import annotations

import asyncio
import itertools
import json
import threading
from collections.abc import Sequence
from typing import Annotated, Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel, ConfigDict, Field, Strict, ValidationError

from retro_mcore.errors import ConfigurationError, RetroError
from retro_mcore.retrieval.added_documents import AddedChunks, AddedDocuments
from retro_mcore.retrieval.retriever import Retriever
from retro_mcore.server.http_requests import check_key, check_text, read_json
from retro_mcore.server.streams import RequestError

_PATH = "/v1/documents"
_MOST_DOCUMENTS, _LONGEST_ID = 1000, 1000


class DocumentText(BaseModel):
    """A document."""

    model_config = ConfigDict(extra="forbid")

    text: Annotated[str, Strict(), Field(min_length=1)]
    id: Annotated[str, Strict(), Field(min_length=1, max_length=_LONGEST_ID)] | None = None
    """Shown as the neighbor's source. Default: a number."""


class DocumentsRequest(BaseModel):
    """Documents to add, all or none."""

    model_config = ConfigDict(extra="forbid")

    documents: Annotated[list[DocumentText], Field(min_length=1, max_length=_MOST_DOCUMENTS)]


class ServedDocuments:
    """The documents that clients have added, and how they are made.

    Args:
        retriever: The server's search.
        most_chunks: Maximum number of chunks of added documents.
    """

    def __init__(self, retriever: Retriever, most_chunks: int) -> None:
        self._added: AddedDocuments = retriever.accept_documents(most_chunks)
        self._maker = retriever.maker
        self._numbers = itertools.count(1)
        self._adding = threading.Lock()

    @property
    def now(self) -> AddedChunks:
        """The documents at this time."""
        return self._added.now

    def add(self, asked: Sequence[DocumentText]) -> dict[str, Any]:
        """Cut, embed and add documents; one call at a time.

        Raises:
            ConfigurationError: an id is taken, a document holds no words, or they are too many.
        """
        with self._adding:
            # Cutting is cheap, so too many chunks are refused before any is embedded.
            cut = [self._maker.cut(document.text) for document in asked]
            count = sum(len(chunks) + without for chunks, _, without in cut)
            self._added.require_room(count)
            made = [self._maker.make(self._name(document), document.text) for document in asked]
            now = self._added.add(made)
        without = sum(document.num_without_words for document in made)
        return {
            "added": [document.id for document in made],
            "chunks_without_words": without,
            **counts_of(now),
        }

    def _name(self, document: DocumentText) -> str:
        return document.id or f"added-{next(self._numbers)}"

    def reset(self) -> dict[str, Any]:
        """Forget all added documents."""
        before = self._added.reset()
        return {"removed": len(before.documents), **counts_of(self.now)}

    def export(self) -> str:
        """JSON lines that `update_db --append --json-keys text --id-key id` reads."""
        lines = [
            json.dumps({"id": document.id, "text": document.text}, ensure_ascii=False)
            for document in self.now.documents
        ]
        return "".join(f"{line}\n" for line in lines)


def counts_of(added: AddedChunks) -> dict[str, Any]:
    """Numbers of documents and chunks."""
    return {"object": "documents", "documents": len(added.documents), "chunks": len(added)}


def add_document_routes(
    app: FastAPI,
    documents: ServedDocuments | None,
    api_key: str | None,
    max_body_bytes: int,
    receive_seconds: float,
) -> None:
    """Add the routes below /v1/documents to the application.

    Args:
        app: The application.
        documents: The documents; None if the server does not search.
        api_key: The server's key. Without one, all routes refuse.
        max_body_bytes: Maximum size of a request.
        receive_seconds: Time limit for receiving it.
    """

    busy = asyncio.Lock()  # embedding takes long, and threads are shared with all other requests

    def opened(request: Request) -> ServedDocuments:
        check_key(request, api_key)
        if api_key is None:
            message = "documents need an API key, and this server has none (--api-key-file)"
            raise RequestError(403, message)
        if documents is None:
            message = "this server takes no documents: it does not search, or cannot cut them"
            raise RequestError(400, message)
        return documents

    @app.post(_PATH, openapi_extra=_request_body())
    async def add(request: Request) -> JSONResponse:
        served = opened(request)
        value = await read_json(request, max_body_bytes, receive_seconds)
        asked = _parse(value)
        if busy.locked():
            message = "other documents are being added: send these afterwards"
            raise RequestError(429, message, "rate_limit_error", code="rate_limit_exceeded")
        try:
            async with busy:
                return JSONResponse(await asyncio.to_thread(served.add, asked.documents))
        except RetroError as error:
            status = 400 if isinstance(error, ConfigurationError) else 500
            raise RequestError(status, str(error), param="documents") from None

    @app.get(_PATH)
    async def count(request: Request) -> dict[str, Any]:
        return counts_of(opened(request).now)

    @app.delete(_PATH)
    async def reset(request: Request) -> dict[str, Any]:
        return opened(request).reset()

    @app.get(f"{_PATH}/export")
    async def export(request: Request) -> Response:
        return Response(opened(request).export(), media_type="application/jsonl")


def _parse(value: Any) -> DocumentsRequest:
    check_text(value, ("documents",))
    try:
        return DocumentsRequest.model_validate(value)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        place = ".".join(str(part) for part in first["loc"])[:80] or "the request"
        raise RequestError(400, f"{place}: {first['msg']}", param="documents") from None


def _request_body() -> dict[str, Any]:
    schema = DocumentsRequest.model_json_schema()
    documents = schema["properties"]["documents"]
    # Definitions are in the schema itself, where OpenAPI readers do not look for them.
    documents["items"] = schema.pop("$defs")["DocumentText"]
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}
