"""Captions of videos, or questions about them: a table (CSV, JSON, text) and a folder of videos, as a dataset.

    MSRVTT_JSFUSION_test.csv   key, vid_key, video_id, sentence: a caption a video (MSRVTT's 1k-A)
    MSRVTT's .json             {"videos": [{"video_id", ...}], "sentences": [{"video_id", "caption", ...}]}
    a list in .json, .jsonl    objects with one of the names below
    MSVD's .txt                a line each: the name, a space, the caption
    MSRVTT-QA, MSVD-QA         a list of {"video_id", "question", "answer"}; `video_id` may be a number

The name of a video is in `video_id`, `video`, `clip_name`, `file` or `image`, with or without its extension; its
caption, or a list of them, in `sentence`, `caption`, `captions` or `text`; the answer of a question, or a list, in
`answer` or `answers`. The number 7 is video 7, video7 or vid7 of the folder, the names of MSRVTT and MSVD.
"""

from __future__ import annotations

import csv
import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Final

from sightloop.data.datasets.dataset import Dataset
from sightloop.data.datasets.schema import key_hash, valid_key
from sightloop.data.image_names import VIDEO_EXTENSIONS, is_video_name
from sightloop.errors import UsageError
from sightloop.types import JsonMapping, Question, Sample

_NAMES: Final = ("video_id", "video", "clip_name", "file", "image")
_CAPTIONS: Final = ("sentence", "caption", "captions", "text")
_ANSWERS: Final = ("answer", "answers")
_NUMBER_PREFIXES: Final = ("", "video", "vid")


class VideoAnnotations:
    """Source of videos with their captions or questions, in the order of the table.

    Args:
        path: of the table.
        folder: of the videos.
        questions: whether it has questions, not captions.

    Raises:
        UsageError: the table cannot be read, or names no video.
    """

    notes: tuple[str, ...] = ()

    def __init__(self, path: Path, folder: Path, *, questions: bool = False) -> None:
        self.name = path.name
        what = "questions about videos" if questions else "captions of videos"
        captions: dict[str, list[str]] = {}
        asked: dict[str, list[Question]] = {}
        self._files = _files_of(folder)
        try:
            for row in _rows(path):
                key = self._key_of(_name_of(row))
                if questions:
                    asked.setdefault(key, []).append(_question_of(row))
                else:
                    captions.setdefault(key, []).extend(_texts_of(row, _CAPTIONS))
        except (OSError, ValueError, csv.Error, RecursionError) as error:
            raise UsageError(f"{path} cannot be read as {what}: {error}") from error
        self._keys, self._captions, self._asked = [*captions, *asked], captions, asked
        if not self._keys:
            raise UsageError(f"{path}: there are no {what} in it")
        if not any(key in self._files for key in self._keys):
            raise UsageError(f"{folder}: has none of the videos of {path.name}, such as {self._keys[0]}.mp4")

    def _key_of(self, name: str) -> str:
        """The name of a video without its extension; a number, as the folder has it."""
        key = os.path.splitext(name)[0] if is_video_name(name) else name
        names = [prefix + key for prefix in _NUMBER_PREFIXES] if key.isdecimal() else []
        return valid_key(next((name for name in names if name in self._files), key))

    def __len__(self) -> int:
        return len(self._keys)

    def key_hashes(self) -> Iterable[int]:
        """`schema.key_hash` of every key."""
        return map(key_hash, self._keys)

    def key(self, index: int) -> str:
        """The name of a video, without its extension."""
        return self._keys[index]

    def sample(self, index: int, key: str) -> Sample:
        """A video with its annotations. Raises ValueError if the folder does not have it."""
        name = self._keys[index]
        if name not in self._files:
            raise ValueError(f"there is no video {name} in the folder")
        captions, questions = self._captions.get(name, ()), self._asked.get(name, ())
        return Sample(key, self._files[name], captions=tuple(captions), questions=tuple(questions))

    def digest(self) -> str:
        """Hex digest of the names, annotations, and sizes of the videos."""
        digest = hashlib.sha256()
        for name in self._keys:
            size = self._files[name].stat().st_size if name in self._files else -1
            texts = self._captions.get(name) or [
                [question.question, *question.answers] for question in self._asked[name]
            ]
            digest.update(json.dumps([name, texts, size]).encode())
        return digest.hexdigest()


def open_video_annotations(
    path: str | os.PathLike[str], folder: str | os.PathLike[str] | None = None, *, questions: bool = False
) -> Dataset:
    """A dataset of videos with captions, or with questions.

    Args:
        path: of the captions or questions.
        folder: of the videos; by default that of `path`.
        questions: whether `path` has questions.

    Raises:
        UsageError: the table cannot be read, or the folder has none of its videos.
    """
    place = Path(path)
    where = place.parent if folder is None else Path(folder)
    return Dataset([VideoAnnotations(place, where, questions=questions)])


def _files_of(folder: Path) -> dict[str, Path]:
    """The videos of a folder and its subfolders, by name without extension."""
    files: dict[str, Path] = {}
    for path in sorted(folder.rglob("*")):
        if path.suffix.lower() in VIDEO_EXTENSIONS and path.is_file():
            files.setdefault(path.stem, path)
            files.setdefault(os.path.splitext(path.relative_to(folder).as_posix())[0], path)
    return files


def _rows(path: Path) -> Iterator[JsonMapping]:
    suffix = path.suffix.lower()
    if suffix in (".csv", ".tsv"):
        with path.open(encoding="utf-8-sig", newline="") as file:
            yield from csv.DictReader(file, delimiter="\t" if suffix == ".tsv" else ",")
        return
    text = path.read_text("utf-8-sig")
    if suffix == ".txt":
        for line in text.splitlines():
            name, _, caption = line.strip().partition(" ")
            if caption and not name.startswith("#"):
                yield {"video": name, "caption": caption.strip()}
        return
    lines = [line for line in text.splitlines() if line.strip()]
    values = [json.loads(line) for line in lines] if suffix == ".jsonl" else json.loads(text)
    if isinstance(values, dict):
        values = next(
            (values[key] for key in ("sentences", "annotations", "questions") if key in values), None
        )
    if not isinstance(values, list):
        raise ValueError("it is no list, and has none under `sentences`, `annotations` or `questions`")
    for value in values:
        if not isinstance(value, dict):
            raise ValueError("a record is no object")
        yield value


def _name_of(row: JsonMapping) -> str:
    name = next((row[name] for name in _NAMES if row.get(name) not in (None, "")), None)
    if isinstance(name, bool) or not isinstance(name, str | int):
        raise ValueError(f"a record has no {' or '.join(_NAMES)}")
    return str(name)


def _texts_of(row: JsonMapping, names: Sequence[str]) -> list[str]:
    """The texts under the first of the names that a record has: one, or a list of them."""
    value = next((row[name] for name in names if row.get(name) not in (None, "", [])), None)
    if value is None:
        raise ValueError(f"a record has no {' or '.join(names)}")
    return [" ".join(str(text).split()) for text in (value if isinstance(value, list) else [value])]


def _question_of(row: JsonMapping) -> Question:
    return Question(_texts_of(row, ("question",))[0], tuple(_texts_of(row, _ANSWERS)))
