"""Reranking over HTTP: Cohere's and Jina's request, with images as documents."""

from __future__ import annotations

import secrets
from typing import Annotated

from fastapi import Request
from pydantic import BaseModel, Field

from sightloop.apps.server import work
from sightloop.apps.server.chat_fields import ImagePart, TextPart
from sightloop.apps.server.embedding_routes import JinaImage, JinaText, embedded
from sightloop.apps.server.errors import ApiError, JsonResponse
from sightloop.apps.server.examples import RERANK
from sightloop.apps.server.fields import Name, Text, Words
from sightloop.apps.server.limits import MAX_IMAGES, MAX_TEXTS
from sightloop.apps.server.native_routes import floats
from sightloop.apps.server.routing import new_router
from sightloop.apps.server.service import client_of, service_of
from sightloop.types import JsonDict

router = new_router("", "cohere")


class ContentDocument(BaseModel):
    """vLLM's form of a document: one text or one image."""

    content: Annotated[list[TextPart | ImagePart], Field(min_length=1, max_length=1)]


Document = Text | JinaImage | JinaText | ContentDocument


class RerankRequest(BaseModel):
    """A text, and documents to order by how well they fit it."""

    model: Name | None = None
    query: Words
    documents: Annotated[list[Document], Field(min_length=1, max_length=MAX_TEXTS)]
    top_n: Annotated[int, Field(ge=1, le=1 << 20)] | None = None
    return_documents: bool | None = None


class RerankResult(BaseModel):
    """A document's place in the request, and its score."""

    index: int
    relevance_score: float
    document: dict[str, object] | None = None


class RerankAnswer(BaseModel):
    """The best documents, best first."""

    id: str
    model: str
    results: list[RerankResult]
    meta: dict[str, object]


@router.post("/v1/rerank", response_model=RerankAnswer, response_model_exclude_none=True)
@router.post("/v2/rerank", response_model=RerankAnswer, response_model_exclude_none=True)
async def rerank(request: Request, body: Annotated[RerankRequest, RERANK]) -> JsonResponse:
    """Documents by relevance, from 0 to 1.

    Images alone, by a model that judges pairs: the probability that the query fits (ITM). Otherwise the cosine of query
    and document, moved from -1..1 to 0..1.
    """
    inputs = [_input(document) for document in body.documents]
    name, scores = await _scores(request, body, inputs)
    best = sorted(range(len(scores)), key=lambda i: (-scores[i], i))[: body.top_n]
    results: list[JsonDict] = []
    for i in best:
        result: JsonDict = {"index": i, "relevance_score": scores[i]}
        if body.return_documents:
            result["document"] = {inputs[i][0]: inputs[i][1]}
        results.append(result)
    meta: JsonDict = {"api_version": {"version": "2"}, "billed_units": {"search_units": 1}}
    return JsonResponse({"id": secrets.token_hex(16), "model": name, "results": results, "meta": meta})


async def _scores(
    request: Request, body: RerankRequest, inputs: list[tuple[str, str]]
) -> tuple[str, list[float]]:
    """The model's id, and the score of each document."""
    service = service_of(request)
    images = [value for kind, value in inputs if kind == "image"]
    if len(images) > MAX_IMAGES:
        raise ApiError(400, f"{len(images)} images: at most {MAX_IMAGES} in one request", param="documents")
    async with service.pool.lease(body.model) as served:
        if len(images) == len(inputs) and "match" in served.model.capabilities:
            data = [await service.images.text(url, "documents") for url in images]
            pixels = await service.decode(served, data, "documents")
            rows = [(each, (body.query,)) for each in pixels]
            results = await service.run(client_of(request), work.match_kind(served), rows)
            return served.id, [row[0] for row in results]
        name, vectors, _ = await embedded(request, body.model, [("text", body.query), *inputs], None)
    query, *rest = (floats(vector) for vector in vectors)
    return name, [0.5 + 0.5 * sum(a * b for a, b in zip(query, row, strict=True)) for row in rest]


def _input(document: Document) -> tuple[str, str]:
    match document:
        case str():
            return "text", document
        case JinaImage():
            return "image", document.image
        case JinaText():
            return "text", document.text
        case ContentDocument():
            part = document.content[0]
            if isinstance(part, TextPart):
                return "text", part.text
            return "image", part.image_url if isinstance(part.image_url, str) else part.image_url.url
