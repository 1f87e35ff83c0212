"""YOLO data sets that are named by their .yaml file: `path`, `train`, `val`, `test` and `names`.

Paths are found as Ultralytics finds them (https://docs.ultralytics.com/datasets/detect/): splits are relative to
`path`, and `path` to the folder of the file, or else to the current folder. A split is a folder of images, a .txt file
with a path per line, or a list of both.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from sightloop.data.datasets.sidecar_files import read_plain_file
from sightloop.data.datasets.yolo import YoloSource
from sightloop.data.datasets.yolo_names import read_splits
from sightloop.errors import UsageError


def open_yolo_file(file: Path, images: Path | None = None) -> list[YoloSource]:
    """The sources that a .yaml file names, each once. The first one has notes on how its paths are taken.

    Args:
        file: the .yaml file.
        images: folder that the paths are relative to; by default that of `path`.

    Raises:
        UsageError: the file cannot be read, has no class names, or names no folder that exists.
    """
    root, splits = read_splits(file)
    if not splits and (file.parent / "labels").is_dir():  # a file of class names
        splits = {"train": [str(file.parent.absolute())]}
    if not splits:
        raise UsageError(f"{file}: it has no train, val or test; write there the folders of the images.")
    bases = [images] if images else list(_bases(file, root))
    sources: dict[Path, YoloSource] = {}
    missing: list[str] = []
    for split, names in splits.items():
        for name in names:
            path = _find(name, bases)
            if path is None:
                missing.append(f"{split}: {name}")
            elif path not in sources:
                sources[path] = _open_list(path, file) if path.is_file() else _open_folder(path, file)
    if not sources:
        raise UsageError(
            f"{file}: {', '.join(missing[:3])} not found in {bases[0]}; write the folder in which they are under "
            "`path:`, or name it with --images."
        )
    notes = [f"{file.name}: {', '.join(missing)} not found, and left out"] if missing else []
    if len(sources) > 1:
        notes.append(
            f"{file.name}: {', '.join(splits)} are all read; name a folder of images and labels for one"
        )
    first, *others = sources.values()
    first.notes = (*notes, *first.notes)
    return [first, *others]


def _bases(file: Path, root: str) -> Iterator[Path]:
    """Folders that the paths of a file may be relative to, the one that counts first."""
    if root:
        candidates = (file.parent / root, Path(root), file.parent.parent / root)
        yield from (path for path in dict.fromkeys(candidates) if path.is_dir())
    yield file.parent


def _find(name: str, bases: Iterable[Path]) -> Path | None:
    # Roboflow writes ../train/images for the folder train/images beside the file.
    spellings = [name, name[3:]] if name.startswith("../") else [name]
    paths = (base / spelling for base in bases for spelling in spellings)
    existing = next((path for path in paths if path.exists()), None)
    return None if existing is None else Path(os.path.normpath(existing))


def _open_folder(folder: Path, file: Path) -> YoloSource:
    images = folder / "images" if (folder / "images").is_dir() else folder
    return YoloSource(images, _labels_folder(images), file)


def _open_list(path: Path, file: Path) -> YoloSource:
    """The images that a .txt file lists; a path that begins with ./ is relative to the folder of the .txt file."""
    try:
        lines = read_plain_file(str(path)).decode("utf-8-sig").splitlines()
    except UnicodeDecodeError:
        raise UsageError(f"{path}: its text is not UTF-8; save it as UTF-8.") from None
    except ValueError as error:
        raise UsageError(f"{path}: {error}.") from None
    names = [line.strip() for line in lines if line.strip()]
    files = [os.path.normpath(name if os.path.isfile(name) else path.parent / name) for name in names]
    folders = {os.path.dirname(os.path.abspath(name)) for name in files}
    if not folders:
        raise UsageError(f"{path}: it lists no images; write a path per line.")
    root = os.path.commonpath(folders)
    listed = {os.path.relpath(os.path.abspath(name), root).replace(os.sep, "/") for name in files}
    source = YoloSource(Path(root), _labels_folder(Path(root)), file, listed)
    absent = sum(not os.path.isfile(name) for name in files)
    if absent:
        source.notes = (
            *source.notes,
            f"{path.name}: {absent:,} of {len(files):,} images are not found, and left out",
        )
    return source


def _labels_folder(images: Path) -> Path:
    """The folder of the labels: the last folder `images` of the path is `labels`; without one it is the same folder."""
    parts = list(images.parts)
    for number in reversed(range(len(parts))):
        if parts[number] == "images":
            return Path(*parts[:number], "labels", *parts[number + 1 :])
    return images
