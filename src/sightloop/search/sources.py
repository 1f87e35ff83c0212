"""What is to be indexed: images of folders, files, globs and datasets, as entries with their texts."""

from __future__ import annotations

import glob
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

from sightloop.data.datasets.dataset import Dataset, expand_paths, open_dataset
from sightloop.data.datasets.schema import fields_from_region, json_text, portable_name, sample_from_fields
from sightloop.data.datasets.sidecar_files import fields_of_sidecars, sidecars_beside
from sightloop.data.image_names import is_image_name, is_video_name
from sightloop.data.images.decode import read_file
from sightloop.data.images.preprocess import encode_thumbnail
from sightloop.data.video.reader import read_frames
from sightloop.data.video.sampling import at_times
from sightloop.errors import ImageError, UnsupportedError, UsageError, os_error_reason, similar_path
from sightloop.types import Failed, JsonDict, JsonMapping, Pixels, Sample

_ARCHIVES = (".tar", ".parquet")


@dataclass(frozen=True, slots=True)
class Entry:
    """An image that is to be in the index.

    Args:
        root: absolute path of the folder or of the dataset.
        path: from the root; in a dataset of encoded images the sample's key.
        size: bytes of the file; None inside of an archive.
        mtime: of the file, or of the archive, in nanoseconds since 1970.
        fields: `captions`, `labels`, `regions` (JSON) and `extra` (JSON).
        data: reads the encoded bytes; raises ImageError.
    """

    root: str
    path: str
    size: int | None
    mtime: int
    fields: JsonDict = field(repr=False)
    data: Callable[[], bytes] = field(repr=False)

    @property
    def name(self) -> str:
        """Where it is: one name for each entry."""
        return os.path.join(self.root, self.path)

    @property
    def stamp(self) -> int:
        """Hash of the fields, signed 64 bits."""
        text = json.dumps(self.fields, sort_keys=True, default=str)
        return int.from_bytes(
            hashlib.sha256(text.encode("utf-8", "backslashreplace")).digest()[:8], signed=True
        )


def list_entries(sources: Iterable[str]) -> Iterator[Entry | Failed]:
    """Entries of all sources, each source in a stable order; `Failed` for what cannot be found or read.

    Args:
        sources: folders, image files, globs, and every source that `open_dataset` takes.
    """
    seen: set[str] = set()
    for source in sources:
        for entry in _list_source(source):
            if isinstance(entry, Entry):
                if entry.name in seen:
                    continue
                seen.add(entry.name)
            yield entry


def _list_source(source: str) -> Iterator[Entry | Failed]:
    if source == "-":
        yield Failed(
            source, "standard input cannot be indexed: its images could not be shown; save the shard first"
        )
        return
    if not os.path.lexists(source) and glob.has_magic(source) and "{" not in source:
        matches = sorted(glob.glob(source, recursive=True))
        if not matches:
            yield Failed(source, "the pattern matches nothing")
        for match in matches:
            if os.path.isdir(match) or is_image_name(match) or Path(match).suffix.lower() in _ARCHIVES:
                yield from _list_source(match)
        return
    if not os.path.exists(source) and "{" not in source:
        link = os.path.islink(source)
        yield Failed(
            source, "a link that leads nowhere" if link else f"no such file or folder{similar_path(source)}"
        )
        return
    root = os.path.abspath(source)
    try:
        if os.path.isdir(source):
            yield from _list_folder(root)
        elif is_video_name(source):
            return  # `list_videos` lists it
        elif is_image_name(source):
            yield _file_entry(os.path.dirname(root), os.path.basename(root), _fields_beside(root))
        elif len(shards := _shards_of(source)) > 1:  # each is a root, so that its images are found again
            for shard in shards:
                yield from _list_source(shard)
        else:
            yield from _list_dataset(open_dataset(source), root)
    except (ValueError, OSError) as error:  # UsageError is a ValueError
        reason = (
            os_error_reason(error) if isinstance(error, OSError) else str(error).removeprefix(f"{source}: ")
        )
        yield Failed(source, reason)


def _shards_of(source: str) -> list[str]:
    """The shards of a brace range; nothing where it is a file, or names others than shards."""
    if os.path.lexists(source):
        return []
    paths = expand_paths([source])
    return paths if all(Path(path).suffix.lower() in _ARCHIVES for path in paths) else []


def _list_folder(root: str) -> Iterator[Entry | Failed]:
    """A folder of images; one of shards as its shards, so that an image has one name however it is reached."""
    try:
        dataset = open_dataset(root)
    except UsageError:
        if next(video_files(root), None) is not None:
            return  # videos alone
        raise
    first = next(iter(dataset.stream(lambda key, reason: None)), None)
    if first is not None and isinstance(first.image, bytes):
        shards = sorted(
            path for ending in _ARCHIVES for path in glob.glob(os.path.join(glob.escape(root), f"*{ending}"))
        )
        for shard in shards:
            yield from _list_source(shard)
    else:
        yield from _list_dataset(dataset, root)


def _list_dataset(dataset: Dataset, root: str) -> Iterator[Entry | Failed]:
    mtime = os.stat(root).st_mtime_ns if os.path.exists(root) else 0
    folder = root if os.path.isdir(root) else os.path.dirname(root)
    if dataset.is_stream:
        failures: list[Failed] = []
        for sample in dataset.stream(lambda key, reason: failures.append(Failed(key, reason))):
            yield from failures
            failures.clear()
            yield _sample_entry(sample, root, folder, mtime)
        yield from failures
        return
    for index in range(len(dataset)):
        try:
            yield _sample_entry(dataset[index], root, folder, mtime)
        except ImageError as error:
            yield Failed(error.name, error.reason)


def _sample_entry(sample: Sample, root: str, folder: str, mtime: int) -> Entry | Failed:
    fields = _fields_of(sample)
    image = sample.image
    if isinstance(image, bytes):
        return Entry(root, portable_name(sample.key), None, mtime, fields, lambda: image)
    path = os.path.abspath(image)
    if path.startswith(os.path.join(folder, "")):
        return _file_entry(folder, path[len(os.path.join(folder, "")) :], fields)
    return _file_entry(os.path.dirname(path), os.path.basename(path), fields)


def _file_entry(root: str, path: str, fields: JsonDict) -> Entry | Failed:
    name = os.path.join(root, path)
    try:
        status = os.stat(name)
    except OSError as error:
        return Failed(name, os_error_reason(error))
    return Entry(
        portable_name(root),
        portable_name(path),
        status.st_size,
        status.st_mtime_ns,
        fields,
        lambda: read_file(name),
    )


def _fields_beside(path: str) -> JsonDict:
    """Fields of an image file from the sidecars beside it. Raises ValueError for one that cannot be read."""
    return _fields_of(sample_from_fields(path, Path(path), fields_of_sidecars(*sidecars_beside(path))))


def _fields_of(sample: Sample) -> JsonDict:
    labels = [sample.label] if sample.label else []
    labels += [region.label for region in sample.regions]
    return {
        "captions": list(sample.captions),
        "labels": list(dict.fromkeys(labels)),
        "regions": json_text([fields_from_region(region) for region in sample.regions])
        if sample.regions
        else None,
        "extra": json_text(dict(sample.extra)) if sample.extra else None,
    }


def video_files(root: str) -> Iterator[str]:
    """Paths of the videos in a folder and its subfolders, from it, in order."""
    for folder, folders, names in os.walk(root):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            if is_video_name(name) and not name.startswith("."):
                yield os.path.relpath(os.path.join(folder, name), root)


def list_videos(sources: Iterable[str]) -> Iterator[Entry | Failed]:
    """Entries of the videos among sources: files, globs and folders; `list_entries` leaves them out.

    Their captions, of sidecars, are those of every scene.
    """
    seen: set[str] = set()
    for source in sources:
        matched = sorted(glob.glob(source, recursive=True)) if not os.path.lexists(source) else [source]
        for match in matched:
            root = os.path.abspath(match)
            if os.path.isdir(match):
                places = [(root, path) for path in video_files(root)]
            else:
                places = [os.path.split(root)] if is_video_name(match) else []
            for folder, path in places:
                if (name := os.path.join(folder, path)) not in seen:
                    seen.add(name)
                    yield _video_entry(folder, path)


def _video_entry(folder: str, path: str) -> Entry | Failed:
    try:
        return _file_entry(folder, path, _fields_beside(os.path.join(folder, path)))
    except (ValueError, OSError) as error:
        reason = os_error_reason(error) if isinstance(error, OSError) else str(error)
        return Failed(os.path.join(folder, path), reason)


def read_row(row: JsonMapping) -> bytes | str:
    """The image of a row again, as `read_entry`; of a scene of a video, the frame in its middle.

    Args:
        row: `root`, `path`, and of a scene `start` and `end`.

    Raises:
        ImageError: it is gone.
    """
    root, path = row["root"] or "", row["path"] or ""
    if row.get("start") is None:
        return read_entry(root, path)
    return video_frame(os.path.join(root, path), (row["start"] + row["end"]) / 2)


def video_frame(name: str, time: float) -> bytes:
    """The frame of a video at a time, as a JPEG. Raises ImageError where there is none."""
    try:
        frame = next(read_frames(name, at_times([time]), warn=lambda _: None), None)
    except UnsupportedError as error:
        raise ImageError(name, str(error)) from error
    if frame is None:
        raise ImageError(name, f"there is no frame at {time:.2f} s")
    pixels = Pixels(name, frame.pixels.transpose(2, 0, 1), (frame.pixels.shape[0], frame.pixels.shape[1]))
    return encode_thumbnail(pixels, max(pixels.size))


def read_entry(root: str, path: str) -> bytes | str:
    """An image of the index again: the path of its file, or its bytes from the dataset that holds it.

    Raises:
        ImageError: it is gone.
    """
    name = os.path.join(root, path)
    if os.path.isfile(name):
        return name
    if not os.path.isfile(root):
        raise ImageError(name, "the file is gone; `sightloop index` with --prune removes its entry")
    try:
        dataset, numbers = _opened(root, os.stat(root).st_mtime_ns)
        if numbers is None:  # a stream: read up to the sample
            image = next((sample.image for sample in dataset if sample.key == path), None)
        else:
            image = dataset[numbers[path]].image if path in numbers else None
    except (UsageError, OSError) as error:
        raise ImageError(name, str(error)) from error
    if image is None:
        raise ImageError(name, "the dataset has no such sample any more")
    return image if isinstance(image, bytes) else str(image)


@lru_cache(maxsize=32)
def _opened(root: str, mtime: int) -> tuple[Dataset, dict[str, int] | None]:
    """A dataset and the numbers of its samples by key, kept while the file does not change."""
    dataset = open_dataset(root)
    if dataset.is_stream:
        return dataset, None
    return dataset, {portable_name(dataset.key(index)): index for index in range(len(dataset))}
