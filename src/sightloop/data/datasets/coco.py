"""COCO JSON: captions and instances, and the questions and annotations of VQA. Files about the same images merge.

Lin et al., "Microsoft COCO" (2014), https://cocodataset.org/#format-data; Antol et al., "VQA" (2015). Crowd regions are
kept as COCO has them in `extra["crowd"]`. What is left out (keypoints, panoptic segments) is counted in a note.
"""

from __future__ import annotations

import hashlib
import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from sightloop.data.datasets import coco_file, schema
from sightloop.data.datasets.coco_file import CocoId, is_id
from sightloop.data.datasets.image_paths import find_image
from sightloop.data.datasets.values import check_text
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
                below `images` and `data`, under the last part of their names (`train2017` for x_train2017.json).

        Raises:
            UsageError: a file is not COCO JSON, the files disagree, or no folder has the images.
        """
        self.name = paths[0].name
        self._images: dict[CocoId, JsonDict] = {}
        self._broken: list[tuple[str, str]] = []  # images that cannot be used: key, reason
        self._repeated: set[CocoId] = set()  # ids of several images
        self._annotations: defaultdict[CocoId, list[JsonDict]] = defaultdict(list)  # by image id
        self._category_names: dict[CocoId, str] = {}
        self._digest = ""
        self._counts = Counter[str]()
        self._questions: dict[tuple[CocoId, CocoId | None], JsonDict] = {}
        self._region_files: dict[str, Path] | None = {} if len(paths) > 1 else None
        for path in paths:
            self._load(path)
        for question in self._questions.values():
            self._add_question(question)
        self._counts["annotations are about images that are not listed"] += sum(
            len(annotations)
            for number, annotations in self._annotations.items()
            if number not in self._images
        )
        self.notes = tuple(f"{count:,} {what}" for what, count in self._counts.items() if count)
        del self._questions, self._region_files
        self._ids = list(self._images)
        self._folders = self._find_folders(paths, images)

    def __len__(self) -> int:
        return len(self._ids) + len(self._broken)

    def key_hashes(self) -> Iterator[int]:
        """`schema.key_hash` of every key."""
        return (schema.key_hash(self.key(index)) for index in range(len(self)))

    def key(self, index: int) -> str:
        """The key of a record."""
        if index >= len(self._ids):
            return self._broken[index - len(self._ids)][0]
        return _image_key(self._images[self._ids[index]])

    def sample(self, index: int, key: str) -> Sample:
        """The record under its key. Raises ValueError if it is broken."""
        if index >= len(self._ids):
            raise ValueError(self._broken[index - len(self._ids)][1])
        number = self._ids[index]
        image = self._images[number]
        if number in self._repeated:
            raise ValueError(f"several images have the id {number!r}, so its annotations are not known")
        fields = {name: value for name, value in image.items() if name not in _IMAGE_MEMBERS}
        path = find_image(image["file_name"], self._folders)
        if path is None:
            raise ValueError(f"there is no file {self._folders[0] / image['file_name']}")
        captions: list[str] = []
        questions: list[Question] = []
        regions: list[Region] = []
        crowd: list[JsonDict] = []
        labels: list[str] = []
        for annotation in self._annotations[number]:
            try:
                kind = coco_file.annotation_kind(annotation)
                if kind == "caption":
                    captions.append(check_text(annotation["caption"], "caption"))
                elif kind == "question":
                    text = check_text(annotation["question"], "question")
                    questions.append(Question(text, coco_file.answers(annotation)))
                elif kind == "label":
                    labels.append(self._label(annotation))
                elif annotation.get("iscrowd"):
                    crowd.append({"label": self._label(annotation)} | _crowd_members(annotation))
                else:
                    regions.append(coco_file.region_from_annotation(annotation, self._label(annotation)))
            except ValueError as error:
                raise ValueError(f"annotation {annotation.get('id', 'without an id')}: {error}") from None
        # What `CocoWriter` put into the object of the image: questions, a label, captions, other fields.
        base = schema.sample_from_fields(key, path, fields)
        captions += [caption for caption in base.captions if caption not in captions]
        if labels and base.label is None and len(set(labels)) == 1:
            base = schema.merge_samples(base, Sample(key, path, label=labels[0]))
        elif labels:
            crowd_and_labels: JsonDict = {"labels": list(dict.fromkeys(labels))}
            base = schema.merge_samples(base, Sample(key, path, extra=crowd_and_labels))
        return Sample(
            key,
            path,
            tuple(captions),
            (*base.questions, *questions),
            (*base.regions, *regions),
            base.label,
            {"image_id": number, **base.extra} | ({"crowd": crowd} if crowd else {}),
            base.dialogues,
        )

    def digest(self) -> str:
        """SHA-256 of the JSON files; images count by name."""
        return self._digest

    def _load(self, path: Path) -> None:
        """Takes over the images, categories, questions and annotations of a file."""
        try:
            data = path.read_bytes()
        except OSError as error:
            raise UsageError(f"{path}: {(error.strerror or str(error)).lower()}.") from error
        content = coco_file.read_coco_file(path, data)
        self._digest = hashlib.sha256(self._digest.encode() + data).hexdigest()
        before = frozenset(self._images)
        for position, image in enumerate(coco_file.objects(content, "images", self._counts)):
            self._add_image(path, position, image, before)
        for category in coco_file.objects(content, "categories", self._counts):
            self._add_category(path, category)
        subtype = content.get("data_subtype", "")
        for question in coco_file.objects(content, "questions", self._counts):
            self._add_question_text(question, subtype)
        for annotation in coco_file.objects(content, "annotations", self._counts):
            self._add_annotation(path, annotation)

    def _add_image(self, path: Path, position: int, image: JsonDict, before: frozenset[CocoId]) -> None:
        """before: ids of the images of the files before this one."""
        number, name = image.get("id"), coco_file.file_name(image)
        if name is None or not is_id(number):
            key = _image_key(image) if name is not None else f"{path.name} image {position + 1}"
            self._broken.append(
                (key, "its file_name is no text" if name is None else "its id is no number or text")
            )
            return
        image["file_name"] = name
        merged = self._images.setdefault(number, dict(image))
        if merged["file_name"] == name:
            merged.update(image)
        elif number in before:
            raise UsageError(f"{path} is not about the same images as the files before it.")
        else:
            self._repeated.add(number)
            self._broken.append((_image_key(image), f"another image has its id {number!r} too"))

    def _add_category(self, path: Path, category: JsonDict) -> None:
        number, name = category.get("id"), category.get("name")
        if not is_id(number) or not is_id(name):
            self._counts["categories without an id or a name are left out"] += 1
            return
        if self._category_names.setdefault(number, str(name)) != str(name):
            raise UsageError(
                f"{path}: category {number!r} is {name!r} here and {self._category_names[number]!r} before; "
                "give every category a unique id."
            )

    def _add_question_text(self, question: JsonDict, subtype: object) -> None:
        number, image_id = question.get("question_id"), question.get("image_id")
        if not is_id(number) or not is_id(image_id):
            self._counts["questions without a question_id or an image_id are left out"] += 1
            return
        if image_id not in self._images and isinstance(image_id, int):  # VQA names no files
            name = f"COCO_{subtype}_{image_id:012d}.jpg"
            self._images[image_id] = {"id": image_id, "file_name": name}
        merged = self._questions.setdefault((number, image_id), dict(question))
        if merged.get("question", question.get("question")) != question.get("question"):
            self._counts["questions have the id of another one and are left out"] += 1
        else:
            merged.update(question)

    def _add_annotation(self, path: Path, annotation: JsonDict) -> None:
        image_id, kind = annotation.get("image_id"), coco_file.annotation_kind(annotation)
        if kind == "question":
            number = annotation["question_id"]
            if not is_id(number) or not (image_id is None or is_id(image_id)):
                self._counts["answers without a question_id are left out"] += 1
                return
            key = (number, image_id)
            if image_id is None:  # of the only question with this id
                key = next((key for key in self._questions if key[0] == number), key)
            self._questions.setdefault(key, {}).update(annotation)
            return
        if not is_id(image_id):
            kind = "annotations without an image_id are left out"
        if kind not in ("caption", "region", "label"):
            self._counts[kind] += 1
            return
        self._counts["keypoints are left out"] += "keypoints" in annotation
        if kind == "region" and self._is_repeated_region(path, annotation):
            return
        self._counts["crowd regions (iscrowd 1) are kept aside: they are neither learned nor searched"] += (
            kind == "region" and bool(annotation.get("iscrowd"))
        )
        assert is_id(image_id)
        self._annotations[image_id].append(annotation)

    def _is_repeated_region(self, path: Path, annotation: JsonDict) -> bool:
        """Whether another file has the same region, as keypoint files repeat those of the instances."""
        if self._region_files is None or "id" not in annotation:
            return False
        identity = repr([annotation.get(name) for name in ("id", "image_id", "category_id", "bbox")])
        return self._region_files.setdefault(identity, path) != path

    def _add_question(self, question: JsonDict) -> None:
        image_id = question.get("image_id")
        value = question.get("answers") or question.get("multiple_choice_answer")
        if "question" not in question or not value:
            self._counts["questions without answers are left out"] += 1
        elif not is_id(image_id):
            self._counts["questions without an image_id are left out"] += 1
        else:
            self._annotations[image_id].append(question)

    def _label(self, annotation: JsonDict) -> str:
        number = annotation.get("category_id")
        if not is_id(number) or number not in self._category_names:
            raise ValueError(f"its category {number!r} is not listed in categories")
        return check_text(self._category_names[number], "category")

    def _find_folders(self, paths: Sequence[Path], images: Path | None) -> list[Path]:
        """Folders of the images; the first one has one of the first 100."""
        names = [self._images[number]["file_name"] for number in self._ids[:100]]
        folders = [images] if images else list(dict.fromkeys(_image_folders(paths)))
        for folder in folders:
            if not names or any(find_image(name, [folder]) for name in names):
                return [folder, *(other for other in folders if other != folder)]
        searched = ", ".join(map(str, folders[:3])) + (", ..." if len(folders) > 3 else "")
        raise UsageError(
            f"{paths[0]}: images ({names[0]}, ...) not found in {searched}. Put them there, or name their folder: "
            "--images of `sightloop convert`, `images` of open_dataset."
        )


def _image_key(image: JsonDict) -> str:
    key = image.get("key")
    if is_id(key) and key != "":
        return schema.valid_key(str(key))
    return schema.valid_key(os.path.splitext(image["file_name"])[0].replace("\\", "/"))


def _crowd_members(annotation: JsonDict) -> JsonDict:
    return {"bbox": annotation.get("bbox"), "segmentation": annotation.get("segmentation")}


def _image_folders(paths: Iterable[Path]) -> Iterable[Path]:
    """For a/annotations/x_val2017.json: `.`, `val2017`, `images`, `images/val2017`, `data` there, then in a."""
    for path in paths:
        part = path.stem.rpartition("_")[2]
        for base in (path.parent, path.parent.parent):
            for subfolder in ("", part, "images", f"images/{part}", "data"):
                yield base / subfolder
