"""Captions of videos: a table of names and sentences (CSV, JSON, text) and a folder of videos, as a dataset.

    MSRVTT_JSFUSION_test.csv   key, vid_key, video_id, sentence: a caption a video (MSRVTT's 1k-A)
    MSRVTT's .json             {"videos": [{"video_id", ...}], "sentences": [{"video_id", "caption", ...}]}
    a list in .json, .jsonl    objects with one of the names below
    MSVD's .txt                a line each: the name, a space, the caption

The name of a video is in `video_id`, `video`, `clip_name`, `file` or `image`, with or without its extension; its
caption, or a list of them, in `sentence`, `caption`, `captions` or `text`.
"""

from __future__ import annotations

import csv
import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Final

from sightloop.data.datasets.dataset import Dataset
from sightloop.data.datasets.schema import key_hash, valid_key
from sightloop.data.image_names import VIDEO_EXTENSIONS, is_video_name
from sightloop.errors import UsageError
from sightloop.types import JsonMapping, Sample

_NAMES: Final = ("video_id", "video", "clip_name", "file", "image")
_CAPTIONS: Final = ("sentence", "caption", "captions", "text")


class VideoCaptions:
    """Source of videos with their captions, in the order of their first captions.

    Args:
        path: of the captions.
        folder: of the videos.

    Raises:
        UsageError: the captions cannot be read, or name no video.
    """

    notes: tuple[str, ...] = ()

    def __init__(self, path: Path, folder: Path) -> None:
        self.name = path.name
        captions: dict[str, list[str]] = {}
        try:
            for name, texts in _records(path):
                key = valid_key(os.path.splitext(name)[0] if is_video_name(name) else name)
                captions.setdefault(key, []).extend(texts)
        except (OSError, ValueError, csv.Error, RecursionError) as error:
            raise UsageError(f"{path} cannot be read as captions of videos: {error}") from error
        if not captions:
            raise UsageError(f"{path}: there is no caption of a video in it")
        self._keys, self._captions = list(captions), captions
        self._files = _files_of(folder)
        if not any(key in self._files for key in self._keys):
            raise UsageError(f"{folder}: has none of the videos of {path.name}, such as {self._keys[0]}.mp4")

    def __len__(self) -> int:
        return len(self._keys)

    def key_hashes(self) -> Iterable[int]:
        """`schema.key_hash` of every key."""
        return map(key_hash, self._keys)

    def key(self, index: int) -> str:
        """The name of a video, without its extension."""
        return self._keys[index]

    def sample(self, index: int, key: str) -> Sample:
        """A video with its captions. Raises ValueError if the folder does not have it."""
        name = self._keys[index]
        if name not in self._files:
            raise ValueError(f"there is no video {name} in the folder")
        return Sample(key, self._files[name], captions=tuple(self._captions[name]))

    def digest(self) -> str:
        """Hex digest of the names, captions, and sizes of the videos."""
        digest = hashlib.sha256()
        for name in self._keys:
            size = self._files[name].stat().st_size if name in self._files else -1
            digest.update(json.dumps([name, self._captions[name], size]).encode())
        return digest.hexdigest()


def open_video_captions(
    path: str | os.PathLike[str], folder: str | os.PathLike[str] | None = None
) -> Dataset:
    """A dataset of videos with captions.

    Args:
        path: of the captions.
        folder: of the videos; by default that of the captions.

    Raises:
        UsageError: the captions cannot be read, or the folder has none of the videos.
    """
    place = Path(path)
    return Dataset([VideoCaptions(place, place.parent if folder is None else Path(folder))])


def _files_of(folder: Path) -> dict[str, Path]:
    """The videos of a folder and its subfolders, by name without extension."""
    files: dict[str, Path] = {}
    for path in sorted(folder.rglob("*")):
        if path.suffix.lower() in VIDEO_EXTENSIONS and path.is_file():
            files.setdefault(path.stem, path)
            files.setdefault(os.path.splitext(path.relative_to(folder).as_posix())[0], path)
    return files


def _records(path: Path) -> Iterator[tuple[str, list[str]]]:
    """Name and captions of each record."""
    suffix = path.suffix.lower()
    if suffix in (".csv", ".tsv"):
        with path.open(encoding="utf-8-sig", newline="") as file:
            for row in csv.DictReader(file, delimiter="\t" if suffix == ".tsv" else ","):
                yield _record(row)
        return
    text = path.read_text("utf-8-sig")
    if suffix == ".txt":
        for line in text.splitlines():
            name, _, caption = line.strip().partition(" ")
            if caption and not name.startswith("#"):
                yield name, [caption.strip()]
        return
    lines = [line for line in text.splitlines() if line.strip()]
    values = [json.loads(line) for line in lines] if suffix == ".jsonl" else json.loads(text)
    if isinstance(values, dict):  # MSRVTT
        values = values.get("sentences", values.get("annotations"))
    if not isinstance(values, list):
        raise ValueError("neither a list of captions nor MSRVTT's `sentences`")
    for value in values:
        yield _record(value)


def _record(row: JsonMapping) -> tuple[str, list[str]]:
    if not isinstance(row, dict):
        raise ValueError("a record is no object")
    name = next((row[name] for name in _NAMES if row.get(name)), None)
    captions = next((row[name] for name in _CAPTIONS if row.get(name)), None)
    if not isinstance(name, str) or captions is None:
        raise ValueError(f"a record has no {' or '.join(_NAMES)}, or no {' or '.join(_CAPTIONS)}")
    texts = captions if isinstance(captions, list) else [captions]
    return name, [" ".join(str(text).split()) for text in texts]
