"""Image sets: what a server shows that is no plain folder, namely the images of an index, or those of a dataset.

Only the images of the set can be read, wherever their files are. The captions of a dataset are shown until an edit
writes a caption file beside the image; images inside archives (.tar, .parquet) have no place for one and stay as they
are.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

from sightloop.data.datasets.dataset import Dataset, open_dataset
from sightloop.data.datasets.schema import portable_name
from sightloop.data.image_names import is_image_name
from sightloop.errors import ImageError, UsageError
from sightloop.search.opening import is_index

_ARCHIVES = (".tar", ".parquet")


@dataclass(eq=False)
class ImageSet:
    """Images that were named one by one.

    Args:
        source: the index or dataset.
        folder: resolved; paths are relative to it, with `/`.
        home: folder of the review; edits are noted there.
        files: file of each image, resolved, by its path; empty for archives.
        records: number of each image in `dataset`, by its path; empty for an index.
        dataset: where captions come from, and the images of archives.
        obstacle: why captions cannot be edited, or "".
        left_out: images that are not shown.
    """

    source: Path
    folder: Path
    home: Path
    files: dict[str, Path] = field(default_factory=dict[str, Path])
    records: dict[str, int] = field(default_factory=dict[str, int])
    dataset: Dataset | None = None
    obstacle: str = ""
    left_out: int = 0
    _captions: dict[str, str] = field(default_factory=dict[str, str])
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def paths(self) -> Iterable[str]:
        """Paths of all images."""
        return self.files or self.records

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
        if not self.files:
            assert self.dataset is not None
            image = self.dataset[self.records[path]].image
            if not isinstance(image, bytes):
                raise KeyError(path)
            return image
        file = self.files[path]
        if os.path.realpath(file, strict=True) != str(file):
            raise OSError("a link to elsewhere")
        return read_file(str(file))

    def given(self, path: str) -> str | None:
        """The dataset's captions of an image, one a line; None if it has none, or cannot be read."""
        if self.dataset is None or path not in self.records:
            return None
        with self._lock:
            if path not in self._captions:
                try:
                    captions = self.dataset[self.records[path]].captions
                except (ImageError, OSError):
                    captions = ()
                self._captions[path] = "\n".join(" ".join(caption.split()) for caption in captions)
            return self._captions[path] or None


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

    table = open_index(source).to_arrow(["root", "path"])
    roots, names = table["root"].to_pylist(), table["path"].to_pylist()
    pairs = [(root or "", name or "") for root, name in zip(roots, names, strict=True)]
    real: dict[str, Path] = {}
    for root, name in pairs:
        if is_image_name(name) and (os.path.isdir(root) or root == name):
            real.setdefault(os.path.realpath(os.path.join(root, name)), Path())
    if not real:
        raise UsageError(f"{source}: none of its {len(pairs):,} images is a file that this machine has.")
    folder = Path(os.path.commonpath([os.path.dirname(path) for path in real]))
    own_roots = {os.path.realpath(root) for root, _ in pairs if os.path.isdir(root)}
    home = Path(own_roots.pop()) if len(own_roots) == 1 else Path(os.path.realpath(source)).parent
    folder = home if folder.is_relative_to(home) else folder
    files = {os.path.relpath(path, folder).replace(os.sep, "/"): Path(path) for path in real}
    return ImageSet(source, folder, home, files, left_out=len(pairs) - len(files))


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
    return ImageSet(source, folder, home, files, records, dataset, left_out=len(dataset) - len(files))


def _archive_set(source: Path, home: Path, dataset: Dataset) -> ImageSet:
    records = {
        f"{Path(dataset.source_name(number)).name}/{portable_name(dataset.key(number))}": number
        for number in range(len(dataset))
    }
    obstacle = (
        f"the images are inside an archive: sightloop convert {source.name} photos makes a folder of them"
    )
    return ImageSet(source, home, home, {}, records, dataset, obstacle)
