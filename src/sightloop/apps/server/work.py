"""Work of the verbs: for each verb the kind of its items, which the scheduler batches, and what a batch calls.

An item is an image with all that is asked about it, so that no batch splits the texts of an image.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from itertools import accumulate, chain
from typing import TypeAlias, TypeVar

from sightloop.apps.server.errors import ApiError
from sightloop.apps.server.model_pool import LoadedModel
from sightloop.apps.server.scheduler import Kind
from sightloop.protocols import Embedder
from sightloop.types import Box, JsonDict, JsonMapping, LogitActivation, Pixels, Region

T = TypeVar("T")
R = TypeVar("R")
QueryT = TypeVar("QueryT", bound="str | Box")

PhraseOrBox: TypeAlias = "str | Box"
Captions = list[str]
Vector: TypeAlias = "list[float]"

_TEXTS_AT_ONCE = 128
# Options that hold token ids of the model's vocabulary.
_IDS = ("forced_bos_id", "end_ids", "suppress_tokens", "begin_suppress_tokens")


def need(served: LoadedModel, capability: str) -> None:
    """Raises ApiError (400) if a model lacks a capability."""
    if capability not in served.model.capabilities:
        own = ", ".join(sorted(served.model.capabilities))
        raise ApiError(
            400, f"{served.id} cannot {capability}; it can: {own}", param="model", code="unsupported"
        )


def caption_kind(
    served: LoadedModel, *, prompted: bool, length: str | None, region: Box | None, decoding: JsonMapping
) -> Kind[tuple[Pixels, str | None], Captions]:
    """Captions of (image, prompt): `num_return` of them each."""
    need(served, "caption")
    options = _options(served, decoding)
    extra: JsonDict = {"length": length, "region": region}

    def run(items: list[tuple[Pixels, str | None]]) -> list[Captions]:
        prompts = [prompt or "" for _, prompt in items] if prompted else None
        texts = served.model.caption([pixels for pixels, _ in items], prompts, **extra, **options)
        return _split(texts, len(items))

    return _kind(served, "caption", (prompted, length, region), options, run)


def answer_kind(
    served: LoadedModel, *, candidates: tuple[str, ...] | None, top_candidates: int, decoding: JsonMapping
) -> Kind[tuple[Pixels, tuple[str, ...]], Captions]:
    """Answers to (image, questions): `num_return` of them to each question, flat."""
    need(served, "answer")
    options = _options(served, decoding)

    def run(items: list[tuple[Pixels, tuple[str, ...]]]) -> list[Captions]:
        images, questions = _pairs(items)
        chosen = None if candidates is None else list(candidates)
        texts = served.model.answer(images, questions, chosen, top_candidates=top_candidates, **options)
        each = len(texts) // len(questions)
        return _cut(texts, [each * len(own) for _, own in items])

    return _kind(served, "answer", (candidates, top_candidates), options, run)


def match_kind(served: LoadedModel) -> Kind[tuple[Pixels, tuple[str, ...]], Vector]:
    """Probabilities that each of the texts fits the image, for (image, texts)."""
    need(served, "match")

    def run(items: list[tuple[Pixels, tuple[str, ...]]]) -> list[Vector]:
        images, texts = _pairs(items)
        probabilities: list[float] = served.model.match(images, texts).tolist()
        return _cut(probabilities, [len(own) for _, own in items])

    return _kind(served, "match", (), {}, run)


def classify_kind(
    served: LoadedModel,
    *,
    labels: tuple[str, ...] | None,
    templates: tuple[str, ...],
    activation: LogitActivation | None,
) -> Kind[Pixels, tuple[Vector, str]]:
    """Class probabilities of images, each with its activation."""
    need(served, "classify")

    def run(items: list[Pixels]) -> list[tuple[Vector, str]]:
        names = None if labels is None else list(labels)
        rows = served.model.classify(items, names, list(templates), activation=activation)
        return [(row, rows.activation) for row in rows.tolist()]

    return _kind(served, "classify", (labels, templates, activation), {}, run)


def detect_kind(
    served: LoadedModel,
    *,
    phrases: tuple[str, ...] | None,
    describe: bool,
    region: Box | None,
    decoding: JsonMapping,
) -> Kind[Pixels, list[Region]]:
    """Objects of images."""
    need(served, "detect")
    options = _options(served, decoding)

    def run(items: list[Pixels]) -> list[list[Region]]:
        names = None if phrases is None else list(phrases)
        return served.model.detect(items, names, describe=describe, region=region, **options)

    return _kind(served, "detect", (phrases, describe, region), options, run)


def find_kind(
    served: LoadedModel, verb: str, decoding: JsonMapping
) -> Kind[tuple[Pixels, tuple[PhraseOrBox, ...]], list[list[Region]]]:
    """Regions of (image, phrases), for each phrase; verb: "locate" or "segment"."""
    need(served, verb)
    options = _options(served, decoding)

    def run(items: list[tuple[Pixels, tuple[PhraseOrBox, ...]]]) -> list[list[list[Region]]]:
        images = [pixels for pixels, own in items for _ in own]
        queries = list(chain(*(own for _, own in items)))
        if verb == "segment":
            regions = served.model.segment(images, queries, **options)
        else:
            regions = served.model.locate(images, [str(query) for query in queries], **options)
        return _cut(regions, [len(own) for _, own in items])

    # Texts and boxes have different prompts, and `segment` takes one of them at a time.
    return _kind(served, verb, (), options, run)


def read_kind(
    served: LoadedModel, *, region: Box | None, decoding: JsonMapping
) -> Kind[Pixels, list[Region]]:
    """Texts in images."""
    need(served, "read")
    options = _options(served, decoding)

    def run(items: list[Pixels]) -> list[list[Region]]:
        return served.model.read_text(items, region=region, **options)

    return _kind(served, "read", (region,), options, run)


def explain_kind(
    served: LoadedModel, word: str | None
) -> Kind[tuple[Pixels, tuple[str, ...]], list[list[list[float]]]]:
    """Heat maps of (image, texts), for each text; the images are decoded for people, not for the model."""
    if not served.model.capabilities & {"match", "similarity"}:
        need(served, "match")

    def run(items: list[tuple[Pixels, tuple[str, ...]]]) -> list[list[list[list[float]]]]:
        return [
            [
                heat.as_rows()
                for heat in served.model.explain(pixels.values.transpose(1, 2, 0), list(texts), word)
            ]
            for pixels, texts in items
        ]

    return _kind(served, "explain", (word,), {}, run)


def embed_images_kind(served: LoadedModel) -> Kind[Pixels, bytes]:
    """Embeddings of images, float32 in little-endian bytes; several vectors of an image one after the other."""
    need(served, "embed")

    def run(items: list[Pixels]) -> list[bytes]:
        return [row.astype("<f4").tobytes() for row in served.model.embed_images(items)]

    return Kind((served, "embed_images"), "embed_images", run, 4 * served.model.sizer.default)


def embed_texts_kind(served: LoadedModel) -> Kind[str, bytes]:
    """Embeddings of texts, likewise."""
    need(served, "embed")

    def run(items: list[str]) -> list[bytes]:
        return [row.astype("<f4").tobytes() for row in served.model.embed_texts(items)]

    return Kind((served, "embed_texts"), "embed_texts", run, _TEXTS_AT_ONCE)


def dimensions(served: LoadedModel) -> int | None:
    """Length of an embedding, None if a model makes none."""
    if "embed" not in served.model.capabilities:
        return None
    network = served.model.network
    return network.embed_dim if isinstance(network, Embedder) else None


def count_tokens(served: LoadedModel, texts: Sequence[str]) -> int:
    """Tokens of texts, for the usage that answers report."""
    if not texts:
        return 0
    lengths = served.model.tokenizer.encode(["", *texts]).lengths  # of "": the tokens around every text
    return int((lengths[1:] - lengths[0]).sum())


def _kind(
    served: LoadedModel,
    verb: str,
    arguments: Hashable,
    options: JsonMapping,
    run: Callable[[list[T]], Sequence[R]],
) -> Kind[T, R]:
    key = (served, verb, arguments, tuple(sorted(options.items())))
    return Kind(key, verb, run, served.model.sizer.default)


def _options(served: LoadedModel, decoding: JsonMapping) -> JsonDict:
    """Options of decoding as the verbs take them, lists as tuples. Raises ApiError for ids beyond the vocabulary."""
    options = {name: tuple(value) if isinstance(value, list) else value for name, value in decoding.items()}
    vocabulary = served.model.network.config.text.vocab
    for name in _IDS:
        value = options.get(name, ())
        if any(index >= vocabulary for index in (value if isinstance(value, tuple) else (value,))):
            raise ApiError(400, f"{name}: the vocabulary has {vocabulary} tokens", param=name)
    return options


def _pairs(items: Sequence[tuple[Pixels, tuple[str, ...]]]) -> tuple[list[Pixels], list[str]]:
    """Images and texts one by one; an image of several texts stays one object, which is encoded once."""
    return [pixels for pixels, own in items for _ in own], [text for _, own in items for text in own]


def _split(values: Sequence[T], parts: int) -> list[list[T]]:
    """As many lists, of equal lengths."""
    each = len(values) // parts
    return [list(values[i : i + each]) for i in range(0, len(values), each)]


def _cut(values: Sequence[T], lengths: Sequence[int]) -> list[list[T]]:
    """Lists of these lengths."""
    ends = list(accumulate(lengths))
    return [list(values[end - length : end]) for end, length in zip(ends, lengths, strict=True)]
