"""Visual Dialog JSON, v0.9 and v1.0 (Das et al. 2017, https://visualdialog.org/data): ten rounds about a COCO image.

    {"split": "val", "version": "1.0", "data": {
      "questions": ["is it sunny", ...], "answers": ["yes", ...],
      "dialogs": [{"image_id": 185565, "caption": "a dog on a beach", "dialog": [
        {"question": 0, "answer": 0, "answer_options": [7, 0, ...], "gt_index": 1}, ...]}]}}

Questions, answers and options are indices into the two lists. The last round of a test set has no answer. The dense
annotations are a list [{"image_id": 185565, "round_id": 4, "gt_relevance": [0.0, 1.0, ...]}], with rounds counted from
1; those of the training set say "relevance".
"""

from __future__ import annotations

import hashlib
import os
import re
from array import array
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeAlias, TypeGuard

from sightloop.data.datasets import schema
from sightloop.data.datasets.coco_file import CocoId, is_id
from sightloop.data.json_members import parse_strict
from sightloop.errors import UsageError
from sightloop.types import Dialogue, JsonDict, Round, Sample

VisDialKind: TypeAlias = Literal["dialogues", "relevance"]

_HEAD_BYTES = 65536  # by which a file is recognized; its first dense annotation has 100 numbers
_SCALAR = rb'\s*"[^"\\]*"\s*:\s*(?:"[^"\\]*"|[-+.\w]+)\s*,'
_IS_DIALOGUES = re.compile(rb'\s*\{(?:%s)*\s*"data"\s*:\s*\{' % _SCALAR)
_IS_RELEVANCE = re.compile(
    rb'\s*\[\s*\{(?=[^{}]*"round_id")(?=[^{}]*"(?:gt_)?relevance")(?=[^{}]*"image_id")'
)
_FOLDERS = ("train2014", "val2014", "VisualDialog_val2018", "VisualDialog_test2018", "train2017", "val2017")
_NAMES = (
    "COCO_val2014_{:012d}.jpg",
    "COCO_train2014_{:012d}.jpg",
    "VisualDialog_val2018_{:012d}.jpg",
    "VisualDialog_test2018_{:012d}.jpg",
    "{:012d}.jpg",
    "{}.jpg",
)
_RELEVANCE_NAMES = ("gt_relevance", "relevance")


class _Dense(NamedTuple):
    """Relevance of the candidates of one round, which is counted from 1."""

    round_id: int
    relevance: object


class VisDialSource:
    """Source of the images of a VisDial file, one sample a dialogue. `extra["image_id"]` is COCO's id."""

    def __init__(self, path: Path, dense: Sequence[Path] = (), images: Path | None = None) -> None:
        """Reads the dialogues into memory; options are kept as packed integers.

        Args:
            path: of the dialogues.
            dense: files of dense annotations; entries about other images are ignored.
            images: folder of the images, or above it (`val2014`, `VisualDialog_val2018`, ...). By default they are
                searched beside the file and beside its folder.

        Raises:
            UsageError: a file has another form, or no folder has the images.
        """
        self.name = path.name
        self._path = path
        content, digest = _read(path, _pack_options)
        data = content.get("data") if isinstance(content, dict) else None
        if not isinstance(data, dict):
            raise UsageError(f'{path} cannot be read as VisDial JSON: it has no object "data"')
        self._dialogs, self._questions, self._answers = (
            _member(path, data, name) for name in ("dialogs", "questions", "answers")
        )
        self._dense: defaultdict[CocoId, list[_Dense]] = defaultdict(list)
        left_out = Counter[str]()
        for file in dense:
            entries, part = _read(file)
            digest += part
            self._add_dense(file, entries, left_out)
        self._digest = hashlib.sha256(digest.encode()).hexdigest()
        self._keys = [_key(path, number, dialog) for number, dialog in enumerate(self._dialogs)]
        self.notes = tuple(f"{count:,} {what}" for what, count in left_out.items())
        self._folders = list(dict.fromkeys(_image_folders(path, images)))
        self._last = (_NAMES[0], self._folders[0])  # the pattern and the folder of the last image
        self._check_images()

    def __len__(self) -> int:
        return len(self._dialogs)

    def key_hashes(self) -> Iterator[int]:
        """`schema.key_hash` of every key."""
        return map(schema.key_hash, self._keys)

    def key(self, index: int) -> str:
        """The key of a record: the image's id in twelve digits."""
        return self._keys[index]

    def sample(self, index: int, key: str) -> Sample:
        """The record under its key. Raises ValueError if it is broken."""
        dialog = self._dialogs[index]
        if not isinstance(dialog, dict):
            raise ValueError("its dialogue is not an object")
        image_id, caption, rounds = dialog.get("image_id"), dialog.get("caption", ""), dialog.get("dialog")
        if not is_id(image_id):
            raise ValueError(f"its image_id is no number or text: {image_id!r}")
        caption = schema.check_text(caption, "caption")
        if not isinstance(rounds, list) or not rounds:
            raise ValueError("its dialog is not a list of rounds")
        read: list[Round] = []
        for number, one in enumerate(rounds, 1):
            try:
                read.append(self._round(one))
            except ValueError as error:
                raise ValueError(f"round {number}: {error}") from None
        for dense in self._dense.get(image_id, ()):
            if not 1 <= dense.round_id <= len(read):
                raise ValueError(f"relevance is given for round {dense.round_id} of {len(read)}")
            values = schema.finite_numbers(dense.relevance, "its relevance")
            if (before := read[dense.round_id - 1].relevance) and before != values:
                raise ValueError(f"relevance is given twice for round {dense.round_id}")
            read[dense.round_id - 1] = schema.checked_round(
                replace(read[dense.round_id - 1], relevance=values)
            )
        path = self._find(image_id)
        if path is None:
            raise ValueError(f"there is no file {self._folders[0] / _file_name(_NAMES[0], image_id)}")
        dialogue = Dialogue(tuple(read), caption)
        captions = (caption,) if caption else ()
        return Sample(key, path, captions, extra={"image_id": image_id}, dialogues=(dialogue,))

    def digest(self) -> str:
        """SHA-256 of the JSON files; images count by name."""
        return self._digest

    def _add_dense(self, path: Path, entries: object, left_out: Counter[str]) -> None:
        if not isinstance(entries, list):
            raise UsageError(f"{path} cannot be read as VisDial's dense annotations: it is not a list")
        listed = {
            dialog.get("image_id") for dialog in self._dialogs if isinstance(dialog, dict) and _has_id(dialog)
        }
        for entry in entries:
            fields: JsonDict = entry if isinstance(entry, dict) else {}
            image_id, round_id = fields.get("image_id"), fields.get("round_id")
            relevance = next((fields[name] for name in _RELEVANCE_NAMES if name in fields), None)
            if not is_id(image_id) or not _is_index(round_id) or relevance is None:
                left_out[
                    f"entries of {path.name} lack an image_id, a round_id or a relevance and are left out"
                ] += 1
            elif image_id in listed:
                self._dense[image_id].append(_Dense(round_id, relevance))

    def _round(self, fields: object) -> Round:
        if not isinstance(fields, dict):
            raise ValueError("it is not an object")
        answer, options, truth = fields.get("answer"), fields.get("answer_options"), fields.get("gt_index")
        if options is not None and not isinstance(options, list | array):
            raise ValueError("its answer_options are not a list")
        if truth is not None and not _is_index(truth):
            raise ValueError(f"its gt_index is no whole number: {truth!r}")
        return schema.checked_round(
            Round(
                _text(self._questions, fields.get("question"), "question"),
                None if answer is None else _text(self._answers, answer, "answer"),
                tuple(_text(self._answers, option, "answer") for option in options or ()),
                truth,
            )
        )

    def _check_images(self) -> None:
        """Raises UsageError if none of the first 100 images is found."""
        ids = [d["image_id"] for d in self._dialogs[:100] if isinstance(d, dict) and _has_id(d)]
        if ids and not any(self._find(image_id) for image_id in ids):
            searched = ", ".join(map(str, self._folders[:3])) + (", ..." if len(self._folders) > 3 else "")
            raise UsageError(
                f"{self._path}: images ({_file_name(_NAMES[0], ids[0])}, "
                f"{_file_name(_NAMES[2], ids[0])}, ...) not found in {searched}. Put them there, or name their "
                "folder: --images of `sightloop convert`, `images` of open_dataset."
            )

    def _find(self, image_id: CocoId) -> Path | None:
        """The file of an image. The pattern and the folder of the last one are tried first."""
        tried = [self._last, *((name, folder) for folder in self._folders for name in _NAMES)]
        for name, folder in tried:
            path = folder / _file_name(name, image_id)
            if os.path.isfile(path):
                self._last = (name, folder)
                return path
        return None


def visdial_kind(path: Path) -> VisDialKind | None:
    """What a .json file of Visual Dialog holds, by its beginning; None for other files."""
    try:
        if not path.is_file():  # opening a named pipe would wait for its writer
            return None
        with path.open("rb") as file:
            head = file.read(_HEAD_BYTES).removeprefix(b"\xef\xbb\xbf")
    except (OSError, ValueError):
        return None  # opening it raises the error
    if _IS_DIALOGUES.match(head):
        return "dialogues"
    return "relevance" if _IS_RELEVANCE.match(head) else None


def open_visdial(
    dialogues: Sequence[Path], dense: Sequence[Path], images: Path | None
) -> list[VisDialSource]:
    """A source for each file of dialogues, with the dense annotations of all files. Raises UsageError."""
    if dense and not dialogues:
        raise UsageError(
            f"{dense[0]} has the relevance of answers; name the file of the dialogues too, such as "
            "visdial_1.0_val.json."
        )
    return [VisDialSource(path, dense, images) for path in dialogues]


def _read(path: Path, finish: Callable[[JsonDict], JsonDict] | None = None) -> tuple[Any, str]:
    """The content of a JSON file, and its SHA-256."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UsageError(f"{path}: {(error.strerror or str(error)).lower()}.") from error
    try:
        content = parse_strict(data.removeprefix(b"\xef\xbb\xbf"), finish)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path} cannot be read as VisDial JSON: {error}") from error
    return content, hashlib.sha256(data).hexdigest()


def _pack_options(members: dict[str, object]) -> dict[str, object]:
    """An object with its `answer_options` as packed integers: 1.2 billion bytes less for VisDial's training set."""
    options = members.get("answer_options")
    if isinstance(options, list) and all(type(option) is int and 0 <= option < 1 << 31 for option in options):
        members["answer_options"] = array("i", options)
    return members


def _member(path: Path, data: JsonDict, name: str) -> list[object]:
    value = data.get(name)
    if not isinstance(value, list):
        raise UsageError(f"{path} cannot be read as VisDial JSON: its {name} are missing or not a list")
    return value


def _has_id(dialog: JsonDict) -> bool:
    return is_id(dialog.get("image_id"))


def _is_index(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)


def _text(texts: Sequence[object], index: object, what: str) -> str:
    """The text with a number. Raises ValueError."""
    if not isinstance(index, int) or isinstance(index, bool):
        raise ValueError(f"its {what} is no number of the list {what}s: {index!r}")
    if not 0 <= index < len(texts):
        raise ValueError(f"its {what} has the number {index}, and there are {len(texts):,}")
    return schema.check_text(texts[index], what)


def _key(path: Path, number: int, dialog: object) -> str:
    image_id = dialog.get("image_id") if isinstance(dialog, dict) else None
    if not is_id(image_id):
        return f"{path.name} dialogue {number + 1}"
    return schema.valid_key(f"{image_id:012d}" if isinstance(image_id, int) else image_id)


def _file_name(pattern: str, image_id: CocoId) -> str:
    if isinstance(image_id, str):
        pattern = pattern.replace(":012d", "")
    return pattern.format(image_id)


def _image_folders(path: Path, images: Path | None) -> Iterator[Path]:
    """`.`, `val2014`, ..., `images`, `images/val2014`, ... of the given folder, or of the file's and the one above."""
    for base in [images] if images else [path.parent, path.parent.parent]:
        yield base
        for folder in (base, base / "images"):
            for name in ("", *_FOLDERS):
                if (folder / name).is_dir():
                    yield folder / name
