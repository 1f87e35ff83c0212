"""The native API: every verb of a model, with the options that it has in Python, and the same results."""

from __future__ import annotations

from array import array
from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager
from typing import Annotated, Literal

from fastapi import Request
from pydantic import BaseModel, Field

from sightloop.apps.server import work
from sightloop.apps.server.errors import ApiError, JsonResponse
from sightloop.apps.server.examples import NATIVE
from sightloop.apps.server.fields import (
    BoxField,
    DecodingFields,
    ImageField,
    ImagesField,
    Name,
    Text,
    Words,
    as_box,
    check_texts,
    read_images,
)
from sightloop.apps.server.limits import MAX_IMAGES, MAX_PAIRS, MAX_PROMPTS, MAX_TEXTS
from sightloop.apps.server.model_pool import LoadedModel
from sightloop.apps.server.routing import new_router
from sightloop.apps.server.service import client_of, service_of
from sightloop.types import JsonDict, Pixels, Region

router = new_router("/api", "native")

ManyWords = Words | Annotated[list[Words], Field(min_length=1, max_length=MAX_TEXTS)]
Labels = Annotated[list[Words], Field(min_length=1, max_length=MAX_TEXTS)]


class ImagesRequest(BaseModel):
    """Images for a model."""

    model: Name | None = None
    images: ImagesField


class CaptionRequest(DecodingFields):
    """Images to caption."""

    model: Name | None = None
    images: ImagesField
    prompt: Text | Annotated[list[Text], Field(min_length=1, max_length=MAX_IMAGES)] | None = None
    length: Literal["short", "detailed", "long"] | None = None
    region: BoxField | None = None


class AnswerRequest(DecodingFields):
    """Questions about images: pairs, or one of either with all of the other."""

    model: Name | None = None
    images: ImagesField
    questions: ManyWords
    candidates: Labels | None = None
    top_candidates: Annotated[int, Field(ge=1, le=MAX_TEXTS)] = 128


class ClassifyRequest(BaseModel):
    """Images to classify."""

    model: Name | None = None
    images: ImagesField
    labels: Labels | None = None
    templates: Words | Annotated[list[Words], Field(min_length=1, max_length=256)] = "a photo of a {}."
    activation: Literal["softmax", "sigmoid"] | None = None


class MatchRequest(BaseModel):
    """Texts to judge: pairs of an image and a text, or one of either with all of the other."""

    model: Name | None = None
    images: ImagesField
    texts: ManyWords


class DetectRequest(DecodingFields):
    """Images to find objects in."""

    model: Name | None = None
    images: ImagesField
    phrases: Words | Annotated[list[Words], Field(min_length=1, max_length=64)] | None = None
    describe: bool = False
    region: BoxField | None = None


class LocateRequest(DecodingFields):
    """Phrases to find: pairs of an image and a phrase, or one of either with all of the other."""

    model: Name | None = None
    images: ImagesField
    phrases: Words | Annotated[list[Words], Field(min_length=1, max_length=64)]


class SegmentRequest(DecodingFields):
    """Phrases or boxes to outline; pairs, or one of either with all of the other."""

    model: Name | None = None
    images: ImagesField
    phrases: Words | Annotated[list[Words | BoxField], Field(min_length=1, max_length=64)]


class ReadRequest(DecodingFields):
    """Images to read texts in."""

    model: Name | None = None
    images: ImagesField
    region: BoxField | None = None


class ExplainRequest(BaseModel):
    """An image, texts, and a word of them: what the score of a text looks at."""

    model: Name | None = None
    images: ImageField
    texts: Words | Annotated[list[Words], Field(min_length=1, max_length=16)]
    word: Words | None = None


class EmbedVerbRequest(BaseModel):
    """Images, texts, or both, to embed."""

    model: Name | None = None
    images: ImagesField | None = None
    texts: ManyWords | None = None


class ExplainAnswer(BaseModel):
    """A heat map of each text: rows of numbers that sum to 1, at most 64 on the longer side."""

    model: str
    maps: list[list[list[float]]]


class CaptionAnswer(BaseModel):
    """Captions, one an image, or `num_return` of them, together."""

    model: str
    captions: list[str]


class AnswerAnswer(BaseModel):
    """Answers, one a pair, or `num_return` of them, together."""

    model: str
    answers: list[str]


class ClassifyAnswer(BaseModel):
    """For each image the probability of each label."""

    model: str
    labels: list[str]
    activation: str
    probabilities: list[list[float]]


class MatchAnswer(BaseModel):
    """The probability of each pair."""

    model: str
    probabilities: list[float]


class RegionBody(BaseModel):
    """A region; box and outlines in pixels of the upright image."""

    label: str
    box: list[float]
    polygons: list[list[float]]
    score: float | None


class RegionsAnswer(BaseModel):
    """For each image, or pair, its regions."""

    model: str
    regions: list[list[RegionBody]]


class EmbedAnswer(BaseModel):
    """Unit vectors; several an image for models that make several."""

    model: str
    images: list[list[float]] | list[list[list[float]]] | None
    texts: list[list[float]] | None


@asynccontextmanager
async def opened(
    request: Request, model: str | None, sources: ImagesField, capability: str
) -> AsyncGenerator[tuple[LoadedModel, list[Pixels]]]:
    """The model of a request, and its images as the model takes them."""
    service = service_of(request)
    listed: Sequence[ImageField] = sources if isinstance(sources, list) else [sources]
    data = await read_images(service.images, listed, "images")
    async with service.pool.lease(model) as served:
        work.need(served, capability)
        yield served, await service.decode(served, data, "images")


@router.post("/caption", response_model=CaptionAnswer)
async def caption(request: Request, body: Annotated[CaptionRequest, NATIVE["caption"]]) -> JsonResponse:
    """A caption of each image."""
    if (body.prompt is not None) + (body.length is not None) + (body.region is not None) > 1:
        raise ApiError(400, "prompt, length and region exclude each other; give one", param="prompt")
    async with opened(request, body.model, body.images, "caption") as (served, pixels):
        prompts = [body.prompt] if body.prompt is None or isinstance(body.prompt, str) else body.prompt
        if len(prompts) not in (1, len(pixels)):
            message = f"{len(prompts)} prompts for {len(pixels)} images: give one, or one an image"
            raise ApiError(400, message, param="prompt")
        kind = work.caption_kind(
            served,
            prompted=body.prompt is not None,
            length=body.length,
            region=as_box(body.region, "region"),
            decoding=body.decoding(),
        )
        rows = list(zip(pixels, prompts * (len(pixels) // len(prompts)), strict=True))
        texts = await service_of(request).run(client_of(request), kind, rows)
        return JsonResponse({"model": served.id, "captions": [text for own in texts for text in own]})


@router.post("/answer", response_model=AnswerAnswer)
async def answer(request: Request, body: Annotated[AnswerRequest, NATIVE["answer"]]) -> JsonResponse:
    """The answer to a question about each image."""
    questions = listed(body.questions)
    check_texts(questions, "questions")
    async with opened(request, body.model, body.images, "answer") as (served, pixels):
        kind = work.answer_kind(
            served,
            candidates=None if body.candidates is None else tuple(body.candidates),
            top_candidates=body.top_candidates,
            decoding=body.decoding(),
        )
        rows, order = grouped(pixels, questions, "questions")
        results = await service_of(request).run(client_of(request), kind, rows)
        each = len(results[0]) // len(rows[0][1])
        split = [[own[i : i + each] for i in range(0, len(own), each)] for own in results]
        answers = [text for texts in in_order(split, order) for text in texts]
        return JsonResponse({"model": served.id, "answers": answers})


@router.post("/classify", response_model=ClassifyAnswer)
async def classify(request: Request, body: Annotated[ClassifyRequest, NATIVE["classify"]]) -> JsonResponse:
    """Probabilities over labels: zero-shot, or over the classes that the model was fine-tuned on."""
    templates = listed(body.templates)
    if len(body.labels or ()) * len(templates) > MAX_PROMPTS:
        raise ApiError(400, f"labels times templates: at most {MAX_PROMPTS}", param="labels")
    async with opened(request, body.model, body.images, "classify") as (served, pixels):
        kind = work.classify_kind(
            served,
            labels=None if body.labels is None else tuple(body.labels),
            templates=tuple(templates),
            activation=body.activation,
        )
        rows = await service_of(request).run(client_of(request), kind, pixels)
        answer: JsonDict = {"model": served.id, "labels": body.labels or list(served.model.labels)}
        answer |= {"activation": rows[0][1], "probabilities": [row for row, _ in rows]}
        return JsonResponse(answer)


@router.post("/match", response_model=MatchAnswer)
async def match(request: Request, body: Annotated[MatchRequest, NATIVE["match"]]) -> JsonResponse:
    """The probability that a text fits an image (ITM)."""
    texts = listed(body.texts)
    async with opened(request, body.model, body.images, "match") as (served, pixels):
        rows, order = grouped(pixels, texts, "texts")
        results = await service_of(request).run(client_of(request), work.match_kind(served), rows)
        return JsonResponse({"model": served.id, "probabilities": in_order(results, order)})


@router.post("/explain", response_model=ExplainAnswer)
async def explain(request: Request, body: Annotated[ExplainRequest, NATIVE["explain"]]) -> JsonResponse:
    """What the match, or the similarity, of a text and an image depends on (Grad-CAM)."""
    service = service_of(request)
    texts = listed(body.texts)
    check_texts(texts, "texts")
    data = await read_images(service.images, [body.images], "images")
    async with service.pool.lease(body.model) as served:
        kind = work.explain_kind(served, body.word)
        pixels = await service.thumbnails.decode(data[0])
        maps = await service.run(client_of(request), kind, [(pixels, tuple(texts))])
        return JsonResponse({"model": served.id, "maps": maps[0]})


@router.post("/detect", response_model=RegionsAnswer)
async def detect(request: Request, body: Annotated[DetectRequest, NATIVE["detect"]]) -> JsonResponse:
    """Objects of each image: all, those that phrases name, or what a box holds."""
    async with opened(request, body.model, body.images, "detect") as (served, pixels):
        kind = work.detect_kind(
            served,
            phrases=None if body.phrases is None else tuple(listed(body.phrases)),
            describe=body.describe,
            region=as_box(body.region, "region"),
            decoding=body.decoding(),
        )
        regions = await service_of(request).run(client_of(request), kind, pixels)
        return regions_answer(served, regions)


@router.post("/locate", response_model=RegionsAnswer)
async def locate(request: Request, body: Annotated[LocateRequest, NATIVE["locate"]]) -> JsonResponse:
    """Boxes of what each phrase refers to."""
    async with opened(request, body.model, body.images, "locate") as (served, pixels):
        rows, order = grouped(pixels, listed(body.phrases), "phrases")
        kind = work.find_kind(served, "locate", body.decoding())
        results = await service_of(request).run(client_of(request), kind, rows)
        return regions_answer(served, in_order(results, order))


@router.post("/segment", response_model=RegionsAnswer)
async def segment(request: Request, body: Annotated[SegmentRequest, NATIVE["segment"]]) -> JsonResponse:
    """Outlines of what each phrase refers to, or of what each box holds."""
    phrases = [body.phrases] if isinstance(body.phrases, str) else body.phrases
    queries = [each if isinstance(each, str) else as_box(each, "phrases") or "" for each in phrases]
    if len({isinstance(query, str) for query in queries}) > 1:
        raise ApiError(400, "phrases: give texts or boxes, not both", param="phrases")
    async with opened(request, body.model, body.images, "segment") as (served, pixels):
        rows, order = grouped(pixels, queries, "phrases")
        kind = work.find_kind(served, "segment", body.decoding())
        results = await service_of(request).run(client_of(request), kind, rows)
        return regions_answer(served, in_order(results, order))


@router.post("/read", response_model=RegionsAnswer)
async def read(request: Request, body: Annotated[ReadRequest, NATIVE["read"]]) -> JsonResponse:
    """Texts in each image (OCR)."""
    async with opened(request, body.model, body.images, "read") as (served, pixels):
        kind = work.read_kind(served, region=as_box(body.region, "region"), decoding=body.decoding())
        regions = await service_of(request).run(client_of(request), kind, pixels)
        return regions_answer(served, regions)


@router.post("/embed", response_model=EmbedAnswer)
async def embed(request: Request, body: Annotated[EmbedVerbRequest, NATIVE["embed"]]) -> JsonResponse:
    """Embeddings of images and of texts, in one space."""
    if body.images is None and body.texts is None:
        raise ApiError(400, "give images, texts, or both", param="images")
    service, client = service_of(request), client_of(request)
    answer: JsonDict = {"images": None, "texts": None}
    async with service.pool.lease(body.model) as served:
        answer["model"] = served.id
        if body.images is not None:
            async with opened(request, body.model, body.images, "embed") as (_, pixels):
                rows = await service.run(client, work.embed_images_kind(served), pixels)
                answer["images"] = [vectors_of(row, work.dimensions(served)) for row in rows]
        if body.texts is not None:
            texts = listed(body.texts)
            rows = await service.run(client, work.embed_texts_kind(served), texts)
            answer["texts"] = [floats(row) for row in rows]
    return JsonResponse(answer)


# Parts of the routes.


def listed(texts: str | list[str]) -> list[str]:
    """One text as a list of one."""
    return [texts] if isinstance(texts, str) else texts


def floats(data: bytes) -> list[float]:
    """Numbers of float32 bytes."""
    values = array("f")
    values.frombytes(data)
    return values.tolist()


def vectors_of(data: bytes, width: int | None) -> list[float] | list[list[float]]:
    """One vector, or several of `width` where there are more numbers."""
    values = floats(data)
    if width is None or len(values) == width:
        return values
    return [values[i : i + width] for i in range(0, len(values), width)]


def grouped(
    images: Sequence[Pixels], queries: Sequence[work.QueryT], param: str
) -> tuple[list[tuple[Pixels, tuple[work.QueryT, ...]]], list[tuple[int, int]]]:
    """Pairs of images and queries, those of one image together.

    Args:
        images: n, or one for all queries.
        queries: as many, or one for all images.
        param: name of the queries' field.

    Returns:
        (image, its queries) for each distinct image, and for each pair its image and its place there.

    Raises:
        ApiError: the numbers differ, or there are too many pairs.
    """
    count = max(len(images), len(queries))
    if len(images) not in (1, count) or len(queries) not in (1, count):
        message = f"{len(images)} images and {len(queries)} {param}: give as many, or one of either"
        raise ApiError(400, message, param=param)
    if count > MAX_PAIRS:
        raise ApiError(400, f"{count} pairs: at most {MAX_PAIRS} in one request", param=param)
    rows: dict[int, tuple[Pixels, list[work.QueryT]]] = {}
    places: dict[int, int] = {}
    order: list[tuple[int, int]] = []
    for i in range(count):
        pixels, query = images[i % len(images)], queries[i % len(queries)]
        place = places.setdefault(id(pixels), len(places))
        own = rows.setdefault(place, (pixels, []))[1]
        order.append((place, len(own)))
        own.append(query)
    return [(pixels, tuple(own)) for pixels, own in rows.values()], order


def in_order(results: Sequence[Sequence[work.T]], order: Sequence[tuple[int, int]]) -> list[work.T]:
    """The results of `grouped` rows, pair by pair."""
    return [results[row][place] for row, place in order]


def regions_answer(served: LoadedModel, regions: Sequence[Sequence[Region]]) -> JsonResponse:
    """The answer of the verbs that find regions."""
    rows = [[_region(region) for region in own] for own in regions]
    return JsonResponse({"model": served.id, "regions": rows})


def _region(region: Region) -> JsonDict:
    return {
        "label": region.label,
        "box": list(region.box),
        "polygons": [list(polygon) for polygon in region.polygons],
        "score": region.score,
    }
