"""Field names of table rows, JSON objects and sidecars, and their conversion to and from `Sample`.

    captions, caption, texts, text, title,  a string or a list of strings; the first of these fields that is present
    comment                                 (a `title` that is the name of an image file is no caption)
    qa, questions                           [{"question": ..., "answer": ... or "answers": [...]}, ...]
    question, answer, answers               a single question
    regions                                 [{"label": ..., "box": [left, top, right, bottom], "polygons": [...],
                                            "score": 0.9, "mask": COCO's run-length encoding}]
    label, class, category                  a string or an integer
    dialogues                               [{"caption": ..., "rounds": [{"question": ..., "answer": ...,
                                            "candidates": [...], "truth": 0, "relevance": [...]}]}]
    extra                                   an object; its members and all other fields become `Sample.extra`

Names are case-insensitive. All functions raise ValueError with the reason, as the end of a sentence.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import replace
from functools import reduce
from pathlib import Path

from sightloop.data.datasets.foreign_fields import own_fields
from sightloop.data.datasets.rle import decode_rle, encode_rle
from sightloop.data.datasets.values import check_corners, check_text, finite_numbers
from sightloop.data.image_names import is_image_name
from sightloop.data.json_members import parse_strict
from sightloop.types import Dialogue, JsonDict, JsonMapping, Question, Region, Round, Sample

IMAGE_FIELDS = tuple(
    "image picture filepath file_path file file_name filename path image_path imagepath image_name imagefilename "
    "img_path img_name img "
    "jpg jpeg png webp name".split()
)
CAPTION_FIELDS = ("captions", "caption", "texts", "text", "title", "comment")
_QUESTION_FIELDS, _LABEL_FIELDS = ("qa", "questions"), ("label", "class", "category")
_OTHER_FIELDS = ("key", "question", "answer", "answers", "regions", "dialogues", "extra")
_KNOWN_FIELDS = frozenset((*IMAGE_FIELDS, *CAPTION_FIELDS, *_QUESTION_FIELDS, *_LABEL_FIELDS, *_OTHER_FIELDS))
# Fields whose cell in a text table may hold JSON.
_JSON_CELLS = frozenset((*CAPTION_FIELDS, *_QUESTION_FIELDS, "answers", "regions", "dialogues", "extra")) - {
    "caption",
    "text",
    "title",
    "comment",
}


def first_field(fields: JsonMapping, names: Iterable[str]) -> str | None:
    """The field, as it is spelled in `fields`, that matches the first of `names` with a value other than None."""
    present = {field.lower(): field for field, value in fields.items() if value is not None}
    return next((present[name] for name in names if name in present), None)


def key_hash(key: str) -> int:
    """Hash of a key from which the hash of a numbered key follows.

    key_hash("a#2") == hash((key_hash("a"), "2")), so that `Dataset` can tell whether "a#2" is taken by hashes alone.
    """
    first, *numbers = key.split("#")
    return reduce(lambda before, number: hash((before, number)), numbers, hash(first))


def sample_from_fields(key: str, image: bytes | Path, fields: JsonMapping) -> Sample:
    """A sample from its fields, without those of the image and the key, which are arguments."""
    rest = own_fields(fields)

    def pop(names: tuple[str, ...], default: object = None) -> object:
        field = first_field(rest, names)
        return default if field is None else rest.pop(field)

    titles = _pop_file_title(rest)
    captions = _parse_texts(pop(CAPTION_FIELDS, ()), "caption")
    questions = _parse_questions(pop(_QUESTION_FIELDS, ()))
    question = pop(("question",))
    if question is not None:
        answers = pop(("answers", "answer"))
        questions += _parse_questions([{"question": question, "answers": answers}])
    regions = tuple(region_from_fields(region) for region in _parse_objects(pop(("regions",), ()), "regions"))
    for region in regions:
        check_corners(region.box, "a region's box")
    dialogues = tuple(map(dialogue_from_fields, _parse_objects(pop(("dialogues",), ()), "dialogues")))
    label = pop(_LABEL_FIELDS)
    if label is not None and not isinstance(label, str | int):
        raise ValueError("its label is neither a string nor an integer")
    if rest.get("key") == key:
        del rest["key"]
    extra = pop(("extra",), {})
    if isinstance(extra, str) and extra.startswith("{"):  # where a column must have one type, it is a text
        with suppress(ValueError):
            extra = json_object(extra.encode("utf-8", "surrogatepass"), "extra")
    rest.update(extra if isinstance(extra, Mapping) else {"extra": extra})
    label = None if label in (None, "") else check_text(str(label), "label")
    return Sample(key, image, captions, questions, regions, label, rest | titles, dialogues)


def _pop_file_title(fields: JsonDict) -> JsonDict:
    """Removes and returns a `title` that is the name of an image file, and makes a `description` the caption instead.

    Google Takeout writes {"title": "IMG_3397.JPG", "description": "Sunset at the lake"}.
    """
    title = first_field(fields, ("title",))
    text = None if title is None else fields[title]
    if title is None or not (isinstance(text, str) and is_image_name(text.strip())):
        return {}
    del fields[title]
    description = first_field(fields, ("description",))
    if description is not None and first_field(fields, CAPTION_FIELDS) is None:
        text_below = fields[description]
        if isinstance(text_below, str) and text_below.strip():
            fields["caption"] = fields.pop(description).strip()
    return {title: text}


def fields_from_sample(sample: Sample) -> JsonDict:
    """The inverse of `sample_from_fields`; empty fields are omitted."""
    fields: JsonDict = {}
    if sample.captions:
        fields["captions"] = list(sample.captions)
    if sample.questions:
        fields["qa"] = [_fields_from_question(question) for question in sample.questions]
    if sample.regions:
        fields["regions"] = [fields_from_region(region) for region in sample.regions]
    if sample.label is not None:
        fields["label"] = sample.label
    if sample.dialogues:
        fields["dialogues"] = [fields_from_dialogue(dialogue) for dialogue in sample.dialogues]
    # What would be read as something else goes below "extra".
    nested = {
        name: value for name, value in sample.extra.items() if name.lower() in _KNOWN_FIELDS or value is None
    }
    fields |= {name: value for name, value in sample.extra.items() if name not in nested}
    return fields | ({"extra": nested} if nested else {})


def region_from_fields(fields: JsonMapping) -> Region:
    """A region from its `label` and `box` and, optionally, `polygons`, `score` and `mask`."""
    box = finite_numbers(fields.get("box"), "a region's box")
    if len(box) != 4:
        raise ValueError(f"a region's box has {len(box)} numbers, not four")
    polygons = fields.get("polygons") or ()
    if not isinstance(polygons, list | tuple):
        raise ValueError("a region's polygons are not a list")
    outlines = tuple(finite_numbers(polygon, "a region's polygon") for polygon in polygons)
    score, mask = fields.get("score"), fields.get("mask")
    if mask is not None and not isinstance(mask, Mapping):
        raise ValueError("a region's mask is not COCO's run-length encoding")
    return Region(
        check_text(fields.get("label"), "region's label"),
        (box[0], box[1], box[2], box[3]),
        outlines,
        None if score is None else finite_numbers([score], "a region's score")[0],
        None if mask is None else decode_rle(mask),
    )


def fields_from_region(region: Region) -> JsonDict:
    """The inverse of `region_from_fields`; empty fields are omitted."""
    fields: JsonDict = {"label": region.label, "box": list(region.box)}
    fields |= {"polygons": [list(p) for p in region.polygons]} if region.polygons else {}
    fields |= {"score": region.score} if region.score is not None else {}
    return fields if region.mask is None else fields | {"mask": encode_rle(region.mask)}


def dialogue_from_fields(fields: JsonMapping) -> Dialogue:
    """A dialogue from its `rounds` and, optionally, its `caption`."""
    rounds = _parse_objects(fields.get("rounds"), "dialogue's rounds")
    caption = fields.get("caption")
    read: list[Round] = []
    for number, item in enumerate(rounds, 1):
        try:
            read.append(_round_from_fields(item))
        except ValueError as error:
            raise ValueError(f"round {number} of a dialogue: {error}") from None
    return Dialogue(tuple(read), "" if caption is None else check_text(caption, "dialogue's caption"))


def _round_from_fields(fields: JsonMapping) -> Round:
    answer, truth = fields.get("answer"), fields.get("truth")
    candidates, relevance = fields.get("candidates"), fields.get("relevance")
    attributes = fields.get("attributes") or {}
    if not isinstance(attributes, Mapping):
        raise ValueError("its attributes are not an object")
    if not isinstance(candidates, list | tuple | None):
        raise ValueError("its candidates are not a list")
    if truth is not None and (isinstance(truth, bool) or not isinstance(truth, int)):
        raise ValueError(f"its truth is no index of a candidate: {truth!r}")
    return checked_round(
        Round(
            check_text(fields.get("question"), "question"),
            None if answer is None else check_text(answer, "answer"),
            tuple(check_text(text, "candidate") for text in candidates or ()),
            truth,
            () if relevance is None else finite_numbers(relevance, "its relevance"),
            {name: finite_numbers(values, f"its attribute {name}") for name, values in attributes.items()},
        )
    )


def checked_round(one: Round) -> Round:
    """The round, if its truth is one of its candidates and the rest fits them. Raises ValueError."""
    count = len(one.candidates)
    if one.truth is not None and not 0 <= one.truth < count:
        raise ValueError(f"its true answer is number {one.truth} (from 0) of {count} candidates")
    if one.relevance and len(one.relevance) != count:
        raise ValueError(f"it has relevance for {len(one.relevance)} of {count} candidates")
    if one.relevance and min(one.relevance) < 0:
        raise ValueError(f"a relevance is negative: {min(one.relevance):g}")
    for name, values in one.attributes.items():
        if len(values) != count:
            raise ValueError(f"it has the attribute {name} of {len(values)} of {count} candidates")
        if not {*values} <= {0, 1}:
            raise ValueError(f"its attribute {name} is neither 0 nor 1 of every candidate")
    return one


def fields_from_dialogue(dialogue: Dialogue) -> JsonDict:
    """The inverse of `dialogue_from_fields`; empty fields are omitted."""
    rounds: list[JsonDict] = []
    for one in dialogue.rounds:
        fields: JsonDict = {"question": one.question}
        fields |= {} if one.answer is None else {"answer": one.answer}
        fields |= {"candidates": list(one.candidates)} if one.candidates else {}
        fields |= {} if one.truth is None else {"truth": one.truth}
        fields |= {"relevance": list(one.relevance)} if one.relevance else {}
        if one.attributes:
            fields["attributes"] = {name: list(values) for name, values in one.attributes.items()}
        rounds.append(fields)
    return ({"caption": dialogue.caption} if dialogue.caption else {}) | {"rounds": rounds}


def merge_samples(first: Sample, second: Sample) -> Sample:
    """One sample from two rows about one image; answers to equal questions are pooled."""
    questions = {question.question: question for question in second.questions}
    pooled = [
        replace(question, answers=question.answers + same.answers)
        if (same := questions.pop(question.question, None))
        else question
        for question in first.questions
    ]
    return replace(
        first,
        captions=first.captions + second.captions,
        questions=(*pooled, *questions.values()),
        regions=first.regions + second.regions,
        label=first.label if first.label is not None else second.label,
        extra={**second.extra, **first.extra},
        dialogues=first.dialogues + second.dialogues,
    )


def fields_from_cells(row: Mapping[str, str]) -> JsonDict:
    """Fields of a row of text cells: empty cells are dropped, JSON lists and objects are parsed."""
    fields: JsonDict = {name: cell for name, cell in row.items() if cell}
    for name, cell in fields.items():
        if name.lower() in _JSON_CELLS and cell[0] in "[{":
            with suppress(ValueError, RecursionError):  # a text that begins with a bracket
                fields[name] = parse_strict(cell)
    return fields


def split_captions(data: bytes, name: str) -> tuple[str, ...]:
    """Captions of a UTF-8 text file, one a line, stripped; blank lines are skipped."""
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise ValueError(f"{name} is not UTF-8: convert it first") from None
    return tuple(stripped for line in re.split(r"[\r\n]", text) if (stripped := line.strip()))


def join_captions(captions: tuple[str, ...]) -> bytes | None:
    """The inverse of `split_captions`; None where a caption cannot be a line (empty, with a line break or blanks)."""
    data = "".join(f"{caption}\n" for caption in captions).encode()
    return data if split_captions(data, "") == captions else None


def json_object(data: bytes, name: str) -> JsonDict:
    """Parses a JSON object. name: of the file, for messages."""
    try:
        value = parse_strict(data)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{name} cannot be read as JSON: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{name} is not a JSON object")
    return value


def json_text(value: object) -> str:
    """JSON on one line, also for `str.splitlines`, and valid UTF-8: lone surrogates and line separators are escaped.

    Numbers that are not finite become null.
    """
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False)
    except ValueError:  # JSON has no NaN and no infinity; Python reads and writes both
        value = _without_nan(value)
        text = json.dumps(value, ensure_ascii=False)
    is_safe = text.isascii() or not re.search("[\x85\u2028\u2029\ud800-\udfff]", text)
    return text if is_safe else json.dumps(value)


def _without_nan(value: object) -> object:
    if isinstance(value, Mapping):
        return {name: _without_nan(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def portable_name(name: str) -> str:
    """A file name as valid Unicode: bytes that are not UTF-8 become `\\xNN`, other surrogates `\\uNNNN`."""
    return valid_key(name).encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def valid_key(key: str) -> str:
    """A key that can be a file name: surrogates that stand for no byte of a file name become `\\uNNNN`."""
    if key.isascii():
        return key
    return re.sub("[\ud800-\udc7f\udd00-\udfff]", lambda match: f"\\u{ord(match[0]):04x}", key)


def _parse_texts(value: object, what: str) -> tuple[str, ...]:
    return tuple(check_text(text, what) for text in (value if isinstance(value, list | tuple) else (value,)))


def _parse_objects(value: object, what: str) -> list[JsonMapping]:
    if not isinstance(value, list | tuple) or not all(isinstance(item, Mapping) for item in value):
        raise ValueError(f"its {what} are not a list of objects")
    return list(value)


def _parse_questions(value: object) -> tuple[Question, ...]:
    """Questions of a list of objects. Answers: one or a list, each a string, a number or VQA's {"answer": ...}."""
    questions: list[Question] = []
    for item in _parse_objects(value, "questions"):
        answers = item.get("answers")
        answers = item.get("answer") if answers is None else answers
        answers = answers if isinstance(answers, list | tuple) else (answers,)
        answers = [answer.get("answer") if isinstance(answer, Mapping) else answer for answer in answers]
        if not answers or None in answers:
            raise ValueError(f"a question has no answer: {item.get('question')!r}")
        texts = tuple(check_text(str(a) if isinstance(a, int | float) else a, "answer") for a in answers)
        questions.append(Question(check_text(item.get("question"), "question"), texts))
    return tuple(questions)


def _fields_from_question(question: Question) -> JsonDict:
    if len(question.answers) == 1:
        return {"question": question.question, "answer": question.answers[0]}
    return {"question": question.question, "answers": list(question.answers)}
