"""COCO's json: captions and instances, and VQA's questions and annotations; all files about the same images merge.

Lin et al., "Microsoft COCO" (2014), https://cocodataset.org/#format-data; Antol et al., "VQA" (2015). Crowd regions
stand in `extra["crowd"]` as COCO has them; keypoints are left out, and said so.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from sightloop.data.datasets import schema
from sightloop.data.datasets.rle import decode_rle
from sightloop.errors import UsageError
from sightloop.types import JsonDict, Question, Region, Sample

_Object = JsonDict


class CocoSource:
    """A source: one sample an image, in the order of the files. `extra["image_id"]` is COCO's number."""

    def __init__(self, paths: Sequence[Path], pictures: Path | None = None) -> None:
        """Holds the annotations in memory. Raises `UsageError` where a file is not such json, or no folder has the
        images: `images`, or one beside the files or beside their folder ("train2017" for x_train2017.json)."""
        self.name = paths[0].name
        self._images: dict[int, _Object] = {}
        self._about: defaultdict[int, list[_Object]] = defaultdict(list)
        self._digest = ""
        self._names: dict[Any, str] = {}  # of categories
        counts = Counter[str]()
        questions: dict[Any, _Object] = {}
        seen: set[Any] = set()  # keypoint files repeat the regions of the instances
        for path in paths:
            value = self._load(path)
            subtype = value.get("data_subtype", "")
            for question in value.get("questions", ()):
                number = question["image_id"]
                self._images.setdefault(
                    number, {"id": number, "file_name": f"COCO_{subtype}_{number:012d}.jpg"}
                )
                questions[question["question_id"]] = dict(question)
            for note in value.get("annotations", ()):
                if "question_id" in note:
                    questions.setdefault(note["question_id"], {}).update(note)
                elif "caption" in note:
                    self._about[note["image_id"]].append(note)
                elif "bbox" in note and note.get("id", id(note)) not in seen:
                    seen.add(note.get("id", id(note)))
                    self._about[note["image_id"]].append(note)
                counts["keypoints are left out"] += "keypoints" in note
        for question in questions.values():
            if "question" in question and _answers(question):
                self._about[question["image_id"]].append(question)
            else:
                counts["questions without answers are left out"] += 1
        lost = sum(len(notes) for number, notes in self._about.items() if number not in self._images)
        counts["annotations are about images that are not listed"] = lost
        self.notes = tuple(f"{count:,} {what}" for what, count in counts.items() if count)
        self._numbers = list(self._images)
        self._folder = self._find_pictures(paths, pictures)

    def __len__(self) -> int:
        return len(self._numbers)

    def hashes(self) -> Iterator[int]:
        """key_hash() of every key."""
        return (schema.key_hash(self.key(index)) for index in range(len(self)))

    def key(self, index: int) -> str:
        """The key of a record."""
        image = self._images[self._numbers[index]]
        return str(image.get("key") or os.path.splitext(image["file_name"])[0])

    def sample(self, index: int, key: str) -> Sample:
        """The record under its key. Raises ValueError or OSError where it is broken."""
        number = self._numbers[index]
        left_out = ("id", "key", "file_name", "width", "height")
        fields = {k: v for k, v in self._images[number].items() if k not in left_out}
        path = self._folder / self._images[number]["file_name"]
        if not path.is_file():
            raise ValueError(f"there is no file {path}")
        captions: list[str] = []
        questions: list[Question] = []
        regions: list[Region] = []
        crowd: list[_Object] = []
        try:
            for note in self._about[number]:
                if "caption" in note:
                    captions.append(note["caption"])
                elif "question" in note:
                    questions.append(Question(note["question"], _answers(note)))
                elif note.get("iscrowd"):
                    region = {"bbox": note["bbox"], "segmentation": note.get("segmentation")}
                    crowd.append({"label": self._names[note["category_id"]]} | region)
                else:
                    regions.append(self._region(note))
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"an annotation lacks {error}, or has it in an unknown form") from error
        fields |= {"captions": captions} if captions else {}
        read = schema.sample_from_fields(key, path, fields)
        extra = {**read.extra, "image_id": number} | ({"crowd": crowd} if crowd else {})
        asked = (*read.questions, *questions)
        return Sample(key, path, read.captions, asked, (*read.regions, *regions), read.label, extra)

    def digest(self) -> str:
        """Of the json files; the images count by name."""
        return self._digest

    def _load(self, path: Path) -> _Object:
        try:
            data = path.read_bytes()
            value = json.loads(data)
            for image in value.get("images", ()):
                known = self._images.setdefault(image["id"], dict(image))
                if known["file_name"] != image["file_name"]:
                    raise UsageError(f"{path} and the files before it are not about the same images.")
                known.update(image)
            self._names |= {category["id"]: category["name"] for category in value.get("categories", ())}
            for note in value.get("annotations", ()):
                note["image_id"]
        except (OSError, KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
            if isinstance(error, UsageError):
                raise
            raise UsageError(f"{path} cannot be read as COCO's json: {error!r}") from error
        self._digest = hashlib.sha256(self._digest.encode() + data).hexdigest()
        return value

    def _region(self, note: _Object) -> Region:
        left, top, width, height = (float(x) for x in note["bbox"])
        outline = note.get("segmentation") or ()
        polygons = (
            tuple(tuple(float(x) for x in part) for part in outline) if isinstance(outline, list) else ()
        )
        box = (left, top, left + width, top + height)
        score = None if note.get("score") is None else float(note["score"])
        mask = decode_rle(outline) if isinstance(outline, dict) else None
        return Region(self._names[note["category_id"]], box, polygons, score, mask)

    def _find_pictures(self, paths: Sequence[Path], pictures: Path | None) -> Path:
        names = [self._images[number]["file_name"] for number in self._numbers[:100]]
        folders = [pictures] if pictures else list(dict.fromkeys(_candidates(paths)))
        for folder in folders:
            if not names or any((folder / name).is_file() for name in names):
                return folder
        looked = ", ".join(map(str, folders[:3])) + (", ..." if len(folders) > 3 else "")
        raise UsageError(
            f"{paths[0]}: no folder with its images ({names[0]}, ...); looked in {looked}. Name it (--images)."
        )


def _candidates(paths: Iterable[Path]) -> Iterable[Path]:
    for path in paths:
        part = path.stem.rpartition("_")[2]
        for base in (path.parent, path.parent.parent):
            for below in ("", part, "images", f"images/{part}"):
                yield base / below


def _answers(note: _Object) -> tuple[str, ...]:
    answers = note.get("answers") or [note.get("multiple_choice_answer")]
    found = (answer.get("answer") if isinstance(answer, dict) else answer for answer in answers)
    return tuple(answer for answer in found if isinstance(answer, str))
