"""COCO JSON: captions and instances, and the questions and annotations of VQA. Files about the same images merge.

Lin et al., "Microsoft COCO" (2014), https://cocodataset.org/#format-data; Antol et al., "VQA" (2015). Crowd regions are
kept as COCO has them in `extra["crowd"]`. Keypoints are dropped, with a note.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from sightloop.data.datasets import schema
from sightloop.data.datasets.rle import decode_rle
from sightloop.errors import UsageError
from sightloop.types import JsonDict, Question, Region, Sample

# Members of an image object that do not go to `Sample.extra`.
_IMAGE_MEMBERS = ("id", "key", "file_name", "width", "height")


class CocoSource:
    """Source of the images of COCO files, in the order of the files. `extra["image_id"]` is COCO's id."""

    def __init__(self, paths: Sequence[Path], images: Path | None = None) -> None:
        """Reads the annotations into memory.

        Args:
            paths: JSON files about the same images.
            images: folder of the images. By default it is searched beside the files and beside their folder, also
                below `images`, under the last part of their names (`train2017` for x_train2017.json) or none.

        Raises:
            UsageError: a file is not COCO JSON, the files disagree, or no folder has the images.
        """
        self.name = paths[0].name
        self._images: dict[int, JsonDict] = {}  # by image id
        self._annotations: defaultdict[int, list[JsonDict]] = defaultdict(list)  # by image id
        self._category_names: dict[int | str, str] = {}
        self._digest = ""
        counts = Counter[str]()
        questions: dict[int | str, JsonDict] = {}
        region_ids: set[int | str] = set()  # keypoint files repeat the regions of the instances
        for path in paths:
            content = self._load(path)
            subtype = content.get("data_subtype", "")
            for question in content.get("questions", ()):  # VQA names no files
                number = question["image_id"]
                self._images.setdefault(
                    number, {"id": number, "file_name": f"COCO_{subtype}_{number:012d}.jpg"}
                )
                questions[question["question_id"]] = dict(question)
            for annotation in content.get("annotations", ()):
                if "question_id" in annotation:
                    questions.setdefault(annotation["question_id"], {}).update(annotation)
                elif "caption" in annotation:
                    self._annotations[annotation["image_id"]].append(annotation)
                elif "bbox" in annotation and annotation.get("id", id(annotation)) not in region_ids:
                    region_ids.add(annotation.get("id", id(annotation)))
                    self._annotations[annotation["image_id"]].append(annotation)
                counts["keypoints are left out"] += "keypoints" in annotation
        for question in questions.values():
            if "question" in question and _answers(question):
                self._annotations[question["image_id"]].append(question)
            else:
                counts["questions without answers are left out"] += 1
        counts["annotations are about images that are not listed"] = sum(
            len(annotations)
            for number, annotations in self._annotations.items()
            if number not in self._images
        )
        self.notes = tuple(f"{count:,} {what}" for what, count in counts.items() if count)
        self._ids = list(self._images)
        self._folder = self._find_images(paths, images)

    def __len__(self) -> int:
        return len(self._ids)

    def key_hashes(self) -> Iterator[int]:
        """`schema.key_hash` of every key."""
        return (schema.key_hash(self.key(index)) for index in range(len(self)))

    def key(self, index: int) -> str:
        """The key of a record."""
        image = self._images[self._ids[index]]
        return str(image.get("key") or os.path.splitext(image["file_name"])[0])

    def sample(self, index: int, key: str) -> Sample:
        """The record under its key. Raises ValueError if it is broken."""
        number = self._ids[index]
        image = self._images[number]
        fields = {name: value for name, value in image.items() if name not in _IMAGE_MEMBERS}
        path = self._folder / image["file_name"]
        if not path.is_file():
            raise ValueError(f"there is no file {path}")
        captions: list[str] = []
        questions: list[Question] = []
        regions: list[Region] = []
        crowd: list[JsonDict] = []
        try:
            for annotation in self._annotations[number]:
                if "caption" in annotation:
                    captions.append(annotation["caption"])
                elif "question" in annotation:
                    questions.append(Question(annotation["question"], _answers(annotation)))
                elif annotation.get("iscrowd"):
                    label = self._category_names[annotation["category_id"]]
                    segmentation = annotation.get("segmentation")
                    crowd.append({"label": label, "bbox": annotation["bbox"], "segmentation": segmentation})
                else:
                    regions.append(self._region(annotation))
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"an annotation lacks {error}, or has it in an unknown form") from error
        fields |= {"captions": captions} if captions else {}
        # What `CocoWriter` put into the object of the image: questions, a label, other fields.
        base = schema.sample_from_fields(key, path, fields)
        return Sample(
            key,
            path,
            base.captions,
            (*base.questions, *questions),
            (*base.regions, *regions),
            base.label,
            {**base.extra, "image_id": number} | ({"crowd": crowd} if crowd else {}),
        )

    def digest(self) -> str:
        """SHA-256 of the JSON files; images count by name."""
        return self._digest

    def _load(self, path: Path) -> JsonDict:
        """Reads a file, and takes over its images and categories."""
        try:
            data = path.read_bytes()
            content = json.loads(data)
            for image in content.get("images", ()):
                merged = self._images.setdefault(image["id"], dict(image))
                if merged["file_name"] != image["file_name"]:
                    raise UsageError(f"{path} is not about the same images as the files before it.")
                merged.update(image)
            self._category_names |= {
                category["id"]: category["name"] for category in content.get("categories", ())
            }
            for annotation in content.get("annotations", ()):
                annotation["image_id"]  # KeyError if it is missing
        except (OSError, KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
            if isinstance(error, UsageError):
                raise
            raise UsageError(f"{path} cannot be read as COCO JSON: {error!r}") from error
        self._digest = hashlib.sha256(self._digest.encode() + data).hexdigest()
        return content

    def _region(self, annotation: JsonDict) -> Region:
        left, top, width, height = (float(x) for x in annotation["bbox"])
        segmentation = annotation.get("segmentation") or ()  # polygons, or RLE
        polygons = (
            tuple(tuple(float(x) for x in polygon) for polygon in segmentation)
            if isinstance(segmentation, list)
            else ()
        )
        box = (left, top, left + width, top + height)
        score = None if annotation.get("score") is None else float(annotation["score"])
        mask = decode_rle(segmentation) if isinstance(segmentation, dict) else None
        return Region(self._category_names[annotation["category_id"]], box, polygons, score, mask)

    def _find_images(self, paths: Sequence[Path], images: Path | None) -> Path:
        """The first folder that has one of the first 100 images."""
        names = [self._images[number]["file_name"] for number in self._ids[:100]]
        folders = [images] if images else list(dict.fromkeys(_image_folders(paths)))
        for folder in folders:
            if not names or any((folder / name).is_file() for name in names):
                return folder
        searched = ", ".join(map(str, folders[:3])) + (", ..." if len(folders) > 3 else "")
        raise UsageError(
            f"{paths[0]}: images ({names[0]}, ...) not found in {searched}. Name their folder (--images)."
        )


def _image_folders(paths: Iterable[Path]) -> Iterable[Path]:
    """For a/annotations/x_val2017.json: `.`, `val2017`, `images` and `images/val2017` in a/annotations, then in a."""
    for path in paths:
        part = path.stem.rpartition("_")[2]
        for base in (path.parent, path.parent.parent):
            for subfolder in ("", part, "images", f"images/{part}"):
                yield base / subfolder


def _answers(annotation: JsonDict) -> tuple[str, ...]:
    answers = annotation.get("answers") or [annotation.get("multiple_choice_answer")]
    texts = (answer.get("answer") if isinstance(answer, dict) else answer for answer in answers)
    return tuple(text for text in texts if isinstance(text, str))
