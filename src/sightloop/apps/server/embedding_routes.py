"""Embeddings over HTTP: OpenAI's endpoint with the image forms of Infinity, Jina and vLLM, and Cohere's."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from typing import Annotated, Literal

from fastapi import Request
from pydantic import BaseModel, Field

from sightloop.apps.server import work
from sightloop.apps.server.chat_fields import ChatMessage, ImagePart, TextPart
from sightloop.apps.server.errors import ApiError, JsonResponse
from sightloop.apps.server.examples import EMBED_V2, EMBEDDINGS
from sightloop.apps.server.fields import ImageText, Name, Text, check_texts
from sightloop.apps.server.image_sources import to_base64
from sightloop.apps.server.limits import MAX_IMAGES, MAX_TEXT, MAX_TEXTS
from sightloop.apps.server.native_routes import floats
from sightloop.apps.server.routing import new_router
from sightloop.apps.server.service import client_of, service_of
from sightloop.types import JsonDict

router = new_router()


class JinaImage(BaseModel):
    """Jina's form of an image."""

    image: ImageText


class JinaText(BaseModel):
    """Jina's form of a text."""

    text: Text


Input = ImageText | JinaImage | JinaText
Inputs = Annotated[list[Input], Field(min_length=1, max_length=MAX_TEXTS)]
# For the message that they are not read; clients that send them have an option to send texts.
TokenInputs = Annotated[list[int], Field(min_length=1, max_length=1 << 16)]
ManyTokenInputs = Annotated[list[TokenInputs], Field(min_length=1, max_length=MAX_TEXTS)]


class EmbeddingsRequest(BaseModel):
    """Texts or images to embed."""

    model: Name | None = None
    input: ImageText | JinaImage | JinaText | Inputs | TokenInputs | ManyTokenInputs | None = None
    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=1)] | None = None
    modality: Literal["text", "image"] | None = None
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Annotated[int, Field(ge=1, le=1 << 16)] | None = None


class Embedding(BaseModel):
    """A vector: numbers, or float32 in little-endian base64."""

    object: Literal["embedding"]
    index: int
    embedding: list[float] | str


class EmbeddingsAnswer(BaseModel):
    """Vectors in the order of the input."""

    object: Literal["list"]
    data: list[Embedding]
    model: str
    usage: dict[str, int]


class EmbedContent(BaseModel):
    """Cohere's form of an input: one text or one image."""

    content: Annotated[list[TextPart | ImagePart], Field(min_length=1, max_length=1)]


class CohereEmbedRequest(BaseModel):
    """Cohere's request: one of `texts`, `images` and `inputs`."""

    model: Name | None = None
    texts: Annotated[list[Text], Field(min_length=1, max_length=MAX_TEXTS)] | None = None
    images: Annotated[list[ImageText], Field(min_length=1, max_length=MAX_IMAGES)] | None = None
    inputs: Annotated[list[EmbedContent], Field(min_length=1, max_length=MAX_TEXTS)] | None = None
    input_type: Annotated[str, Field(max_length=40)] | None = None
    embedding_types: Annotated[list[Annotated[str, Field(max_length=20)]], Field(max_length=8)] | None = None
    output_dimension: Annotated[int, Field(ge=1, le=1 << 16)] | None = None
    truncate: Annotated[str, Field(max_length=10)] | None = None


class CohereEmbeddings(BaseModel):
    """Cohere's answer."""

    id: str
    embeddings: dict[str, list[list[float]] | list[str]]
    texts: list[str]
    meta: dict[str, object]


async def embedded(
    request: Request, model: str | None, inputs: Sequence[tuple[str, str]], dimensions: int | None
) -> tuple[str, list[bytes], int]:
    """Embeddings of texts and images in their order.

    Args:
        request: of the client.
        model: id of the model.
        inputs: ("text", words) or ("image", data URL) each.
        dimensions: how long the client wants them, None for as they are.

    Returns:
        The model's id, float32 bytes of each input, and the number of text tokens.

    Raises:
        ApiError: the model makes vectors of another length, or several for an image.
    """
    service, client = service_of(request), client_of(request)
    texts = [value for kind, value in inputs if kind == "text"]
    urls = [value for kind, value in inputs if kind == "image"]
    check_texts(texts, "input")
    if len(urls) > MAX_IMAGES:
        raise ApiError(400, f"{len(urls)} images: at most {MAX_IMAGES} in one request", param="input")
    data = [await service.images.text(url, "input") for url in urls]
    async with service.pool.lease(model) as served:
        work.need(served, "embed")
        width = work.dimensions(served)
        if dimensions is not None and dimensions != width:
            message = f"dimensions={dimensions}: {served.id} makes vectors of {width}; leave it out"
            raise ApiError(400, message, param="dimensions", code="invalid_dimensions")
        rows: dict[str, list[bytes]] = {"text": [], "image": []}
        if data:
            pixels = await service.decode(served, data, "input")
            rows["image"] = await service.run(client, work.embed_images_kind(served), pixels)
            if width is not None and len(rows["image"][0]) != 4 * width:
                message = f"{served.id} makes several vectors an image: use POST /api/embed"
                raise ApiError(400, message, param="model", code="unsupported")
        if texts:
            rows["text"] = await service.run(client, work.embed_texts_kind(served), texts)
        order = {kind: iter(own) for kind, own in rows.items()}
        return served.id, [next(order[kind]) for kind, _ in inputs], work.count_tokens(served, texts)


@router.post("/v1/embeddings", response_model=EmbeddingsAnswer, tags=["openai"])
async def embeddings(request: Request, body: Annotated[EmbeddingsRequest, EMBEDDINGS]) -> JsonResponse:
    """Embeddings of texts and images, in one space."""
    name, rows, tokens = await embedded(request, body.model, _inputs(body), body.dimensions)
    encode = to_base64 if body.encoding_format == "base64" else floats
    data = [{"object": "embedding", "index": i, "embedding": encode(row)} for i, row in enumerate(rows)]
    usage = {"prompt_tokens": tokens, "total_tokens": tokens}
    return JsonResponse({"object": "list", "data": data, "model": name, "usage": usage})


def _inputs(body: EmbeddingsRequest) -> list[tuple[str, str]]:
    """What is to be embedded, in order. Raises ApiError."""
    if (body.input is None) == (body.messages is None):
        raise ApiError(400, "give input, or messages", param="input")
    if body.messages is not None:
        return [_of_message(body.messages[0])]
    items = body.input if isinstance(body.input, list) else [body.input]
    inputs: list[tuple[str, str]] = []
    for item in items:
        match item:
            case str():
                if body.modality != "image" and len(item) > MAX_TEXT:
                    message = (
                        f'input: a text has at most {MAX_TEXT} characters; for images add "modality": "image"'
                    )
                    raise ApiError(400, message, param="input")
                inputs.append((body.modality or "text", item))
            case JinaImage():
                inputs.append(("image", item.image))
            case JinaText():
                inputs.append(("text", item.text))
            case _:
                message = (
                    "input: token ids are not read; send texts (LangChain: check_embedding_ctx_length=False)"
                )
                raise ApiError(400, message, param="input", code="unsupported")
    return inputs


def _of_message(message: ChatMessage) -> tuple[str, str]:
    """vLLM's form: the one text or image of a message."""
    contents = [("image", url) for url in message.images] + (
        [("text", message.text)] if message.text.strip() else []
    )
    if len(contents) != 1:
        text = "messages: one text or one image is embedded at a time; text and image together are not"
        raise ApiError(400, text, param="messages", code="unsupported")
    return contents[0]


@router.post("/v2/embed", response_model=CohereEmbeddings, tags=["cohere"])
async def embed(request: Request, body: Annotated[CohereEmbedRequest, EMBED_V2]) -> JsonResponse:
    """Embeddings as Cohere's clients ask for them; `input_type` and `truncate` change nothing here."""
    if sum(field is not None for field in (body.texts, body.images, body.inputs)) != 1:
        raise ApiError(400, "give one of texts, images and inputs", param="texts")
    types = body.embedding_types or ["float"]
    if unknown := set(types) - {"float", "base64"}:
        message = f"embedding_types: {', '.join(sorted(unknown))} is not made; use float or base64"
        raise ApiError(400, message, param="embedding_types", code="unsupported")
    inputs = [("text", text) for text in body.texts or ()] + [("image", url) for url in body.images or ()]
    for item in body.inputs or ():
        part = item.content[0]
        if isinstance(part, TextPart):
            inputs.append(("text", part.text))
        else:
            inputs.append(
                ("image", part.image_url if isinstance(part.image_url, str) else part.image_url.url)
            )
    _, rows, tokens = await embedded(request, body.model, inputs, body.output_dimension)
    images = sum(kind == "image" for kind, _ in inputs)
    billed: JsonDict = {"input_tokens": tokens} | ({"images": images} if images else {})
    answer: JsonDict = {
        "id": secrets.token_hex(16),
        "embeddings": {
            kind: [floats(row) if kind == "float" else to_base64(row) for row in rows] for kind in types
        },
        "texts": body.texts or [],
        "meta": {"api_version": {"version": "2"}, "billed_units": billed},
    }
    return JsonResponse(answer)
