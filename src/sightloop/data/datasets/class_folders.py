"""Class labels from the folders of images: cat/1.jpg, train/cat/1.jpg."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence

from sightloop.data.datasets.schema import json_object, portable_name
from sightloop.data.datasets.sidecar_files import read_plain_file

CLASS_NAMES_FILE = "classes.json"  # {"red_panda": "red panda"}: folder -> label
_SPLITS = frozenset("train training val valid validation dev test testing".split())
_MAX_STRAYS = 0.05  # share of images that are outside of class folders or have sidecars, and stop no others


class ClassFolders:
    """Label of an image by its folder, where folders are classes.

    Attributes:
        notes: what was decided, for people.
    """

    def __init__(
        self,
        root: str,
        names: Sequence[str],
        classes: bool | None,
        has_sidecar: Callable[[str], bool],
        is_written: bool,
    ) -> None:
        """Decides whether folders are classes.

        Args:
            root: the folder.
            names: paths of the images, from the root.
            classes: whether folders are classes. None: if there are two of them or more besides `train`, `test` and the
                like, and nearly every image is directly in one and has no sidecar.
            has_sidecar: whether an image has a sidecar.
            is_written: whether `convert` wrote the folder, whose labels are in sidecars.
        """
        tops = {name.partition("/")[0] for name in names if "/" in name}
        self._has_splits = bool(tops) and all(top.lower() in _SPLITS for top in tops)
        folders = sorted({label for name in names if (label := self._folder(name))})
        notes: list[str] = []
        if self._has_splits and classes is not False:
            notes.append(f"{', '.join(sorted(tops))} are taken as splits, not as classes; all are read")
        strays = 0
        self._is_classes = bool(classes)
        if classes is None and len(folders) > 1 and not is_written:
            # A folder of captions holds many sidecars: count no further than needed.
            is_plain = [self._depth(name) == 1 for name in names]
            strays = is_plain.count(False)
            limit = max(len(names) * _MAX_STRAYS, 1 if len(names) >= 10 else 0)
            for name, plain in zip(names, is_plain, strict=True):
                strays += plain and has_sidecar(name)
                if strays > limit:
                    break
            self._is_classes = strays <= limit
            if not self._is_classes and is_plain.count(True) * 2 > len(names):
                notes.append(
                    f"{_listed(folders)} are not taken as classes: images have sidecars or are outside of them"
                )
        self._labels = _read_class_names(root, notes) if self._is_classes and folders else {}
        if self._is_classes:
            notes.insert(0, f"{len(folders):,} folders are taken as classes: {_listed(folders)}")
            outside = sum(not self._folder(name) for name in names)
            if outside:
                notes.append(f"{outside:,} images outside of the class folders have no class")
        self.notes = tuple(notes)

    def label(self, name: str) -> str | None:
        """The label of an image, by its path from the root."""
        folder = self._folder(name) if self._is_classes else ""
        return self._labels.get(folder, portable_name(folder)) if folder else None

    def _folder(self, name: str) -> str:
        """The class folder of a path, "" without one: cat/1.jpg and train/cat/1.jpg -> "cat"."""
        parts = name.split("/")[self._has_splits :]
        return parts[0] if len(parts) > 1 else ""

    def _depth(self, name: str) -> int:
        return name.count("/") - self._has_splits


def _listed(folders: Sequence[str]) -> str:
    return ", ".join(folders[:5]) + (", ..." if len(folders) > 5 else "")


def _read_class_names(root: str, notes: list[str]) -> dict[str, str]:
    path = os.path.join(root, CLASS_NAMES_FILE)
    if not os.path.lexists(path):
        return {}
    try:
        names = json_object(read_plain_file(path), CLASS_NAMES_FILE)
    except ValueError as error:
        notes.append(f"{error}; the names of the folders are the classes")
        return {}
    labels = {folder: name for folder, name in names.items() if isinstance(name, str) and name}
    notes.append(f"{len(labels):,} class names are from {CLASS_NAMES_FILE}")
    if odd := [json.dumps(folder) for folder in names if folder not in labels]:
        notes.append(f"{CLASS_NAMES_FILE}: {len(odd):,} entries are no text and are left out: {_listed(odd)}")
    return labels
