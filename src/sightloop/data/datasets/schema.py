"""What field names mean: a table's row, a JSON member or a sidecar -> Sample, and back.

    captions, caption, texts, text, title   one text or a list of them; the first of these that is there
    qa, questions                           [{"question": ..., "answer": ... or "answers": [...]}, ...]
    question, answer, answers               one question
    regions                                 [{"label": ..., "box": [left, top, right, bottom], "polygons": [...],
                                            "score": 0.9, "mask": as COCO's run lengths}]
    label, class, category                  a text or a whole number
    extra                                   an object; so does every other field become a part of `Sample.extra`

Names count without regard to case. All functions raise ValueError with the reason, as the end of a sentence.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import replace
from functools import reduce
from pathlib import Path
from typing import Any

from sightloop.data.datasets.rle import decode_rle, encode_rle
from sightloop.types import JsonDict, JsonMapping, Question, Region, Sample

IMAGE_FIELDS = tuple(
    "image image filepath file_path file file_name filename path image_path img jpg jpeg png webp name".split()
)
CAPTION_FIELDS = ("captions", "caption", "texts", "text", "title")
_QUESTIONS, _LABELS = ("qa", "questions"), ("label", "class", "category")
_OTHERS = ("key", "question", "answer", "answers", "regions", "extra")
_TAKEN = frozenset((*IMAGE_FIELDS, *CAPTION_FIELDS, *_QUESTIONS, *_LABELS, *_OTHERS))
_IN_CELLS = frozenset((*CAPTION_FIELDS, *_QUESTIONS, "answers", "regions", "extra")) - {
    "caption",
    "text",
    "title",
}


def first_field(fields: JsonMapping, names: Iterable[str]) -> str | None:
    """The field that goes by the first of `names` under which there is something."""
    present = {field.lower(): field for field, value in fields.items() if value is not None}
    return next((present[name] for name in names if name in present), None)


def key_hash(key: str) -> int:
    """A hash of a key from which that of the key with "#2" behind it can be made: hash((key_hash(key), "2"))."""
    first, *numbers = key.split("#")
    return reduce(lambda before, number: hash((before, number)), numbers, hash(first))


def sample_from_fields(key: str, picture: bytes | Path, fields: JsonMapping) -> Sample:
    """The sample that the fields describe; nothing in them is taken for the image or the key."""
    left = dict(fields)

    def take(names: tuple[str, ...], default: Any = None) -> Any:
        field = first_field(left, names)
        return default if field is None else left.pop(field)

    captions, questions = _texts(take(CAPTION_FIELDS, ()), "caption"), _questions(take(_QUESTIONS, ()))
    question = take(("question",))
    if question is not None:
        answers = take(("answers", "answer"))
        questions += _questions([{"question": question, "answers": answers}])
    regions = tuple(region_from_fields(region) for region in _objects(take(("regions",), ()), "regions"))
    label = take(_LABELS)
    if label is not None and not isinstance(label, str | int):
        raise ValueError("its label is neither a text nor a whole number")
    if left.get("key") == key:
        del left["key"]
    inner = take(("extra",), {})
    left.update(inner if isinstance(inner, Mapping) else {"extra": inner})
    return Sample(
        key, picture, captions, questions, regions, None if label in (None, "") else str(label), left
    )


def fields_from_sample(sample: Sample) -> JsonDict:
    """The fields from which `sample_of` makes the same sample; what is empty is left out."""
    fields: JsonDict = {}
    if sample.captions:
        fields["captions"] = list(sample.captions)
    if sample.questions:
        fields["qa"] = [_plain_question(question) for question in sample.questions]
    if sample.regions:
        fields["regions"] = [fields_from_region(region) for region in sample.regions]
    if sample.label is not None:
        fields["label"] = sample.label
    hidden = {name: value for name, value in sample.extra.items() if name.lower() in _TAKEN or value is None}
    fields |= {name: value for name, value in sample.extra.items() if name not in hidden}
    return fields | ({"extra": hidden} if hidden else {})


def region_from_fields(fields: JsonMapping) -> Region:
    """A region from its `label`, `box`, and if there are any `polygons`, `score` and `mask`. Raises ValueError."""
    try:
        left, top, right, bottom = (float(edge) for edge in fields["box"])
        polygons = tuple(tuple(float(x) for x in polygon) for polygon in fields.get("polygons") or ())
        score = None if fields.get("score") is None else float(fields["score"])
        mask = None if fields.get("mask") is None else decode_rle(fields["mask"])
    except (KeyError, TypeError, ValueError):
        raise ValueError(
            "a region has no box of four numbers, or a polygon, score or mask that is none"
        ) from None
    label = _text(fields.get("label"), "region's label")
    return Region(label, (left, top, right, bottom), polygons, score, mask)


def fields_from_region(region: Region) -> JsonDict:
    """The fields from which `region_of` makes the same region."""
    fields: JsonDict = {"label": region.label, "box": list(region.box)}
    fields |= {"polygons": [list(p) for p in region.polygons]} if region.polygons else {}
    fields |= {"score": region.score} if region.score is not None else {}
    return fields if region.mask is None else fields | {"mask": encode_rle(region.mask)}


def merged(first: Sample, second: Sample) -> Sample:
    """What two rows about one image say together; equal questions pool their answers."""
    questions = {question.question: question for question in second.questions}
    pooled = [
        replace(known, answers=known.answers + more.answers)
        if (more := questions.pop(known.question, None))
        else known
        for known in first.questions
    ]
    return replace(
        first,
        captions=first.captions + second.captions,
        questions=(*pooled, *questions.values()),
        regions=first.regions + second.regions,
        label=first.label if first.label is not None else second.label,
        extra={**second.extra, **first.extra},
    )


def cells(row: Mapping[str, str]) -> JsonDict:
    """The fields of a table whose cells are texts: empty ones are no fields, lists and objects are JSON."""
    fields: JsonDict = {name: cell for name, cell in row.items() if cell}
    for name, cell in fields.items():
        if name.lower() in _IN_CELLS and cell[0] in "[{":
            with suppress(ValueError):  # a text that begins with a bracket
                fields[name] = json.loads(cell)
    return fields


def lines(data: bytes, name: str) -> tuple[str, ...]:
    """One caption a line of UTF-8 text; blank lines, and blanks around a caption, do not count."""
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise ValueError(f"{name} is not UTF-8: convert it first") from None
    return tuple(stripped for line in re.split(r"[\r\n]", text) if (stripped := line.strip()))


def as_lines(captions: tuple[str, ...]) -> bytes | None:
    """The captions as `lines` reads them, or None where that cannot hold them."""
    data = "".join(f"{caption}\n" for caption in captions).encode()
    return data if lines(data, "") == captions else None


def json_object(data: bytes, name: str) -> JsonDict:
    """The object that a JSON text holds."""
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{name} is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{name} is not a JSON object")
    return value


def json_text(value: Any) -> str:
    """JSON on one line, also for `str.splitlines`, that UTF-8 can hold, also where a name is not valid Unicode."""
    text = json.dumps(value, ensure_ascii=False)
    plain = text.isascii() or not re.search("[\x85\u2028\u2029\ud800-\udfff]", text)
    return text if plain else json.dumps(value)


def _is_unicode(text: str) -> bool:
    return text.isascii() or not re.search("[\ud800-\udfff]", text)


def _text(value: Any, what: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"a {what} is no text: {value!r}")
    if not _is_unicode(value):
        raise ValueError(f"a {what} is not valid Unicode (is the file UTF-8?)")
    return value


def _texts(value: Any, what: str) -> tuple[str, ...]:
    return tuple(_text(text, what) for text in (value if isinstance(value, list | tuple) else (value,)))


def _objects(value: Any, what: str) -> list[JsonMapping]:
    if not isinstance(value, list | tuple) or not all(isinstance(item, Mapping) for item in value):
        raise ValueError(f"its {what} are not a list of objects")
    return list(value)


def _questions(value: Any) -> tuple[Question, ...]:
    found: list[Question] = []
    for item in _objects(value, "questions"):
        answers = item.get("answers")
        answers = item.get("answer") if answers is None else answers
        answers = answers if isinstance(answers, list | tuple) else (answers,)
        answers = [answer.get("answer") if isinstance(answer, Mapping) else answer for answer in answers]
        if not answers or None in answers:
            raise ValueError(f"a question has no answer: {item.get('question')!r}")
        plain = tuple(_text(str(a) if isinstance(a, int | float) else a, "answer") for a in answers)
        found.append(Question(_text(item.get("question"), "question"), plain))
    return tuple(found)


def _plain_question(question: Question) -> JsonDict:
    if len(question.answers) == 1:
        return {"question": question.question, "answer": question.answers[0]}
    return {"question": question.question, "answers": list(question.answers)}


def portable_name(name: str) -> str:
    """A file name as text that every reader of UTF-8 takes: bytes that are not UTF-8 become `\\xNN`."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
