"""Image sets: what a server shows that is no plain folder, namely the images of an index, or those of a dataset.

Only the images of the set can be read, wherever their files are. The captions of a dataset are shown until an edit
writes a caption file beside the image; images inside archives (.tar, .parquet) have no place for one and stay as they
are. An index may hold both: files, and images of archives, which are read from there.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from sightloop.data.datasets.dataset import Dataset, open_dataset
from sightloop.data.datasets.schema import portable_name
from sightloop.data.image_names import is_image_name, is_video_name
from sightloop.errors import ImageError, UsageError
from sightloop.search.opening import is_index
from sightloop.search.sources import read_entry
from sightloop.types import JsonDict

_ARCHIVES = (".tar", ".parquet")


@dataclass(eq=False)
class ImageSet:
    """Images that were named one by one.

    Args:
        source: the index or dataset.
        folder: resolved; paths are relative to it, with `/`.
        home: folder of the review; edits are noted there.
        files: file of each image, resolved, by its path; images of archives have none.
        records: number of each image in `dataset`, by its path; empty for an index.
        archived: archive and key of the images of an index that are inside archives, by their path.
        dataset: where captions come from, and the images of archives; None for an index.
        obstacle: why captions cannot be edited, or "".
        left_out: images that are not shown.
    """

    source: Path
    folder: Path
    home: Path
    files: dict[str, Path] = field(default_factory=dict[str, Path])
    records: dict[str, int] = field(default_factory=dict[str, int])
    archived: dict[str, tuple[str, str]] = field(default_factory=dict[str, tuple[str, str]])
    dataset: Dataset | None = None
    obstacle: str = ""
    left_out: int = 0
    _captions: dict[str, str] = field(default_factory=dict[str, str])
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def in_archives(self) -> Collection[str]:
        """Paths of the images that are inside archives, where no caption can be written beside them."""
        return self.archived if self.files or self.archived else self.records

    @property
    def has_captions(self) -> bool:
        """Whether captions come from the set until they are edited."""
        return self.dataset is not None or bool(self._captions)

    def modified(self, path: str) -> int:
        """When the archive that holds an image was changed, in nanoseconds since 1970; 0 for a dataset's."""
        root, _ = self.archived.get(path, ("", ""))
        return os.stat(root).st_mtime_ns if root else 0

    def read(self, path: str, read_file: Callable[[str], bytes]) -> bytes:
        """The encoded image at a path.

        Args:
            path: of an image of the set.
            read_file: reads a file within the limits.

        Raises:
            KeyError: the set has no such image.
            OSError: its file is gone, or is a link to elsewhere.
            ImageError: it cannot be read.
        """
        if path in self.in_archives:
            image = (
                read_entry(*self.archived[path])
                if self.dataset is None
                else self.dataset[self.records[path]].image
            )
            if not isinstance(image, bytes):
                raise KeyError(path)
            return image
        return read_file(str(self.file(path)))

    def file(self, path: str) -> Path:
        """The file of an image or video that is in none of the archives.

        Raises:
            KeyError: the set has no such file.
            OSError: it is gone, or is a link to elsewhere.
        """
        file = self.files[path]
        if os.path.realpath(file, strict=True) != str(file):
            raise OSError("a link to elsewhere")
        return file

    def given(self, path: str) -> str | None:
        """The dataset's captions of an image, one a line; None if it has none, or cannot be read."""
        with self._lock:
            if path not in self._captions:
                if self.dataset is None or path not in self.records:
                    return None
                try:
                    captions = self.dataset[self.records[path]].captions
                except (ImageError, OSError):
                    captions = ()
                self._captions[path] = _lines(captions)
            return self._captions[path] or None

    def add_archived(self, path: str, archive: str, key: str, captions: Iterable[str]) -> None:
        """Takes in an image of an index that is inside an archive, with the captions that it has there."""
        self.archived[path] = (archive, key)
        if text := _lines(captions):
            self._captions[path] = text


def _lines(captions: Iterable[str]) -> str:
    return "\n".join(" ".join(caption.split()) for caption in captions)


def open_image_set(source: Path) -> ImageSet | None:
    """The set that an index or a dataset is; None for a folder of images.

    Args:
        source: what the server is to show.

    Raises:
        UsageError: it is neither, or has no images.
    """
    if is_index(source):
        return _index_set(source)
    if source.is_dir():
        holds = [path for path in source.iterdir() if path.suffix.lower() in _ARCHIVES]
        if not holds or any(is_image_name(path.name) or path.is_dir() for path in source.iterdir()):
            return None
    return _dataset_set(source)


def _index_set(source: Path) -> ImageSet:
    from sightloop.search.index import open_index

    table = open_index(source).to_arrow(["root", "path", "captions"])
    kinds = {root: _kind_of(root or "") for root in table["root"].unique().to_pylist()}
    real: dict[str, JsonDict | None] = {}  # by name, the row of an image inside an archive, None for a file
    places: set[str] = set()
    for row in table.to_pylist():
        root, name = row["root"] or "", row["path"] or ""
        path = os.path.realpath(os.path.join(root, name))
        is_listed = is_image_name(name) or is_video_name(name)
        if is_listed and (kinds[row["root"]] == "folder" or root == name):
            real.setdefault(path, None)
            places.add(os.path.dirname(path))
        elif name and root != name and kinds[row["root"]] == "file":
            real.setdefault(path, row)
            places.add(os.path.dirname(os.path.realpath(root)))
    if not real:
        raise UsageError(f"{source}: none of its {len(table):,} images is on this machine.")
    folder = Path(os.path.commonpath(places))
    own_roots = {os.path.realpath(root) for root, kind in kinds.items() if kind == "folder"}
    home = Path(own_roots.pop()) if len(own_roots) == 1 else Path(os.path.realpath(source)).parent
    folder = home if folder.is_relative_to(home) else folder
    names = {
        (row["root"], row["path"]) for row in table.select(["root", "path"]).to_pylist()
    }  # scenes share one
    images = ImageSet(source, folder, home, left_out=len(names) - len(real))
    for path, row in real.items():
        relative = os.path.relpath(path, folder).replace(os.sep, "/")
        if row is None:
            images.files[relative] = Path(path)
        else:
            images.add_archived(relative, row["root"], row["path"], row["captions"] or ())
    if not images.files:
        images.obstacle = _obstacle(next(iter(images.archived.values()))[0])
    return images


def _kind_of(root: str) -> Literal["folder", "file", ""]:
    return "folder" if os.path.isdir(root) else "file" if os.path.isfile(root) else ""


def _obstacle(archive: str) -> str:
    name = Path(archive).name
    return f"the images are inside an archive: sightloop convert {name} photos makes a folder of them"


def _dataset_set(source: Path) -> ImageSet:
    dataset = open_dataset(source)
    if dataset.is_stream:
        raise UsageError(f"{source}: is read once and in order; convert it to a folder or to .tar first.")
    home = Path(os.path.realpath(source if source.is_dir() else source.parent))
    if source.suffix.lower() in _ARCHIVES or source.is_dir():
        return _archive_set(source, home, dataset)
    real: dict[str, int] = {}
    for number in range(len(dataset)):
        try:
            image = dataset[number].image
        except (ImageError, OSError):
            continue
        if isinstance(image, bytes):
            return _archive_set(source, home, dataset)
        if is_image_name(image.name) and image.is_file():
            real.setdefault(os.path.realpath(image), number)
    if not real:
        raise UsageError(f"{source}: none of its {len(dataset):,} images is a file that this machine has.")
    folder = Path(os.path.commonpath([os.path.dirname(path) for path in real]))
    places = {os.path.relpath(path, folder).replace(os.sep, "/"): path for path in real}
    records = {name: real[path] for name, path in places.items()}
    files = {name: Path(path) for name, path in places.items()}
    return ImageSet(source, folder, home, files, records, dataset=dataset, left_out=len(dataset) - len(files))


def _archive_set(source: Path, home: Path, dataset: Dataset) -> ImageSet:
    records = {
        f"{Path(dataset.source_name(number)).name}/{portable_name(dataset.key(number))}": number
        for number in range(len(dataset))
    }
    return ImageSet(source, home, home, {}, records, dataset=dataset, obstacle=_obstacle(source.name))
