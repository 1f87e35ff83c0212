"""`Dataset` of samples over folders, tables, COCO JSON, WebDataset shards and Parquet; opened by `open_dataset`."""

from __future__ import annotations

import glob
import hashlib
import os
import re
import stat
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from html import escape
from itertools import chain
from os import PathLike
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from sightloop.data.copies.learned_images import digest_of_image
from sightloop.data.datasets.annotated_folder import AnnotatedFolderSource, find_annotated_folders, find_split
from sightloop.data.datasets.annotation_files import (
    AnnotationFilesSource,
    annotation_files,
    is_annotation_file,
)
from sightloop.data.datasets.coco import CocoSource
from sightloop.data.datasets.folder import FolderSource
from sightloop.data.datasets.tables import TableSource
from sightloop.data.datasets.visdial import VisDialKind, open_visdial, visdial_kind
from sightloop.data.datasets.webdataset import ShardSource, StreamSource
from sightloop.data.datasets.yolo import YoloSource
from sightloop.data.datasets.yolo_yaml import open_yolo_file
from sightloop.data.images.decode import read_file
from sightloop.errors import ImageError, UsageError
from sightloop.types import Sample

_TABLES = (".csv", ".tsv", ".jsonl", ".ndjson", ".parquet")
_MAX_PATHS = 100_000  # of a brace range, or of all sources together
_KINDS = (
    "a folder, .csv, .tsv, .jsonl, .json, .xml (Pascal VOC), .parquet, .yaml (YOLO), .tar, .tar.gz, or - for a tar on "
    "standard input"
)


class SampleSource(Protocol):
    """Records of one file or folder, numbered from 0. Data that cannot be read is a record whose `sample` raises.

    Attributes:
        name: name of the file or folder.
        notes: what the source holds that a `Sample` cannot, for people.
    """

    name: str
    notes: tuple[str, ...]

    def __len__(self) -> int: ...

    def key_hashes(self) -> Iterable[int]:
        """`schema.key_hash` of every key."""
        ...

    def key(self, index: int) -> str: ...

    def sample(self, index: int, key: str) -> Sample:
        """The record under its key. Raises ValueError with a reason, or OSError."""
        ...

    def digest(self) -> str:
        """Hex digest of the content: texts and names; images count by name and size."""
        ...


class Dataset:
    """Samples by index, or in order. Opening one reads names and offsets, never an image.

    A dataset can be pickled and used by several threads.

    Attributes:
        notes: what the sources hold that a `Sample` cannot, for people.
    """

    def __init__(
        self, sources: Sequence[SampleSource | StreamSource], indices: NDArray[np.int64] | None = None
    ) -> None:
        """Use `open_dataset`.

        Args:
            sources: one after the other; a `StreamSource` must be alone.
            indices: records of a selection `[N]`; None for all.
        """
        self._streams = [source for source in sources if isinstance(source, StreamSource)]
        self._sources = [source for source in sources if not isinstance(source, StreamSource)]
        if self._streams and len(sources) > 1:
            raise UsageError("A stream or a .tar.gz must be opened alone.")
        # Index after the last record of each source.
        self._ends: list[int] = np.cumsum([len(source) for source in self._sources]).tolist()
        self._indices = indices
        self._key_numbers = self._number_repeated_keys() if indices is None else {}
        self.notes = tuple(note for source in sources for note in source.notes)

    def __len__(self) -> int:
        """Number of records, broken ones included. Raises TypeError for a stream."""
        if self._streams:  # TypeError: list() and the like take it for an unknown length
            raise TypeError("a stream has no length and no index; convert it to shards or a folder first")
        if self._indices is not None:
            return len(self._indices)
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, index: int) -> Sample:
        """Raises `ImageError`, named by the key, for a broken record; IndexError out of range."""
        source, within, key = self._find(index)
        try:
            return source.sample(within, key)
        except (ValueError, OSError, RecursionError) as error:
            cause = error.strerror if isinstance(error, OSError) else None
            raise ImageError(key, cause or str(error)) from error

    def __iter__(self) -> Iterator[Sample]:
        return self.stream()

    def __repr__(self) -> str:
        count = "a stream of samples" if self._streams else f"{len(self):,} samples"
        return f"<Dataset: {count} of {self._source_names()}>"

    def _repr_html_(self) -> str:
        """One table for notebooks: samples, sources, and what the first sample has."""
        count, first = "a stream", ""
        if not self._streams:
            count = f"{len(self):,}"
            try:
                sample = self[0] if len(self) else None
            except ImageError as error:
                sample, first = None, f"{error}"
            if sample is not None:
                first = "; ".join(
                    [sample.key, *sample.captions[:1], *([sample.label] if sample.label else [])]
                )
        cells = {
            "samples": count,
            "source": self._source_names(),
            "first": first,
            "left out": "; ".join(self.notes),
        }
        head = "".join(f"<th>{name}</th>" for name, text in cells.items() if text)
        body = "".join(f"<td>{escape(text)}</td>" for text in cells.values() if text)
        return f"<table><tr>{head}</tr><tr>{body}</tr></table>"

    def _source_names(self) -> str:
        names = ["a stream"] * len(self._streams) + [source.name for source in self._sources]
        return ", ".join(names[:3]) + (f" and {len(names) - 3:,} more" if len(names) > 3 else "")

    @property
    def is_stream(self) -> bool:
        """Whether samples can only be read once and in order: no length, no index, no fingerprint."""
        return bool(self._streams)

    @property
    def source_lengths(self) -> list[int]:
        """Number of records of each source (a shard, a table), in order; a selection counts as one source."""
        return [len(self)] if self._indices is not None else [len(source) for source in self._sources]

    def key(self, index: int) -> str:
        """The key of a sample, unique in this dataset; the sample is not read."""
        return self._find(index)[2]

    def source_name(self, index: int) -> str:
        """Name of the source (a shard, a table) that holds a sample."""
        return self._find(index)[0].name

    def stream(self, on_skip: Callable[[str, str], None] | None = None) -> Iterator[Sample]:
        """All samples in order.

        Args:
            on_skip: called with the key and the reason for each broken record, which is skipped. Without it a broken
                record raises `ImageError`.
        """
        for sample in self._streams[0].samples() if self._streams else self._in_order():
            if not isinstance(sample, ImageError):
                yield sample
            elif on_skip is None:
                raise sample
            else:
                on_skip(sample.name, sample.reason)

    def select(self, indices: Iterable[int] | NDArray[np.integer]) -> Dataset:
        """The dataset of the records `indices` `[N]`, in this order. Raises IndexError out of range."""
        if isinstance(indices, str):
            raise UsageError(f"indices={indices!r}: must be whole numbers, such as [0, 2]")
        chosen = np.fromiter(indices, np.int64)
        if chosen.size and not (chosen.min() >= 0 and chosen.max() < len(self)):
            raise IndexError(f"indices must be from 0 to {len(self) - 1}")
        selection = Dataset(self._sources, chosen if self._indices is None else self._indices[chosen])
        selection._key_numbers = self._key_numbers
        return selection

    def image_digests(self) -> Iterator[bytes]:
        """Short digests of the encoded images (`data.copies.learned_images`), in order; b"" for unreadable ones."""
        for index in range(len(self)):
            try:
                image = self[index].image
                yield digest_of_image(image if isinstance(image, bytes) else read_file(os.fspath(image)))
            except ImageError:
                yield b""

    @property
    def fingerprint(self) -> str:
        """32 hex digits of the content, independent of its location: names, texts, and sizes of images."""
        return self.fingerprints()[0]

    def fingerprints(self) -> tuple[str, list[tuple[str, str]]]:
        """The fingerprint, and for each source (a shard, a table) its name and 16 hex digits of its content's hash."""
        if self._streams:
            raise UsageError("A stream has no fingerprint; convert it to shards or a folder first.")
        digests = [source.digest() for source in self._sources]
        combined = hashlib.sha256("".join(digests).encode())
        combined.update(b"" if self._indices is None else self._indices.tobytes())
        names = (source.name for source in self._sources)
        return combined.hexdigest()[:32], [(n, d[:16]) for n, d in zip(names, digests, strict=True)]

    def _in_order(self) -> Iterator[Sample | ImageError]:
        for index in range(len(self)):
            try:
                yield self[index]
            except ImageError as error:
                yield error

    def _find(self, index: int) -> tuple[SampleSource, int, str]:
        """The source of a record, its index in the source, and its key."""
        index += len(self) if index < 0 else 0
        if not 0 <= index < len(self):
            raise IndexError(f"no sample {index}: the dataset has {len(self)}")
        if self._indices is not None:
            index = int(self._indices[index])
        number = bisect_right(self._ends, index)
        within = index - (self._ends[number - 1] if number else 0)
        source = self._sources[number]
        count = self._key_numbers.get(index)
        return source, within, source.key(within) + (f"#{count}" if count else "")

    def _number_repeated_keys(self) -> dict[int, int]:
        """Numbers for records whose key an earlier record has, as in shards that each count from 0.

        The number is the occurrence of the key, or the next one whose numbered key no record has:

            keys  "0"  "1"  "0"  "0"  "0#3"   ->   numbers {2: 2, 3: 4}   ->   "0"  "1"  "0#2"  "0#4"  "0#3"
        """
        hashes = np.fromiter(
            chain.from_iterable(source.key_hashes() for source in self._sources), np.int64
        )  # [N]
        keys, first, group = np.unique(hashes, return_index=True, return_inverse=True)
        last_number: dict[int, int] = {}  # by group of equal keys
        numbers: dict[int, int] = {}  # by record
        for index in np.flatnonzero(first[group] != np.arange(len(hashes))).tolist():
            key, number = int(keys[group[index]]), last_number.get(group[index], 1) + 1
            # See `schema.key_hash`: the hash of "key#number". `keys` is sorted.
            while (numbered := hash((key, str(number)))) in keys[keys.searchsorted(numbered) :][:1]:
                number += 1
            last_number[group[index]] = numbers[index] = number
        return numbers


def open_dataset(
    source: str | Path | Sequence[str | Path],
    *,
    images: str | Path | None = None,
    classes: bool | None = None,
) -> Dataset:
    """Opens one source of samples, or several one after the other.

    Args:
        source: paths, globs and brace ranges (`{000..005}`, `{a,b}`) of

            * a folder: of images with sidecars (.txt, .json) or with a subfolder per class (see `FolderSource`), with
              YOLO's `labels`, with Pascal VOC's `Annotations`, or of .tar or .parquet files;
            * .csv, .tsv, .jsonl, .parquet, or .json with a list of objects (columns: see `schema`);
            * the .yaml file of a YOLO data set: all images of its `train`, `val` and `test`;
            * .json in COCO's format; several files about the same images merge;
            * .json of LabelMe and .xml of Pascal VOC, a file per image; a list of VOC's `ImageSets`;
            * .json of Visual Dialog (v0.9, v1.0), also together with its dense annotations;
            * .tar shards as WebDataset and img2dataset write them;
            * .tar.gz, a named pipe, or "-" for a tar on standard input: read once, in order.
        images: folder that image paths in a table or in COCO JSON start from, or YOLO's or Visual Dialog's images; by
            default found from the location of the file.
        classes: whether subfolders are classes; None to decide (see `FolderSource`).

    Raises:
        UsageError: a source does not exist, is of unknown kind, cannot be read, or is empty.
    """
    if not isinstance(source, Iterable | PathLike):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise UsageError(f"source={source!r}: give a path, or a list of paths.")
    names = [source] if isinstance(source, str | PathLike) else list(source)
    image_folder = None if images is None else Path(images)
    sources: list[SampleSource | StreamSource] = []
    coco: list[Path] = []
    annotated: list[Path] = []
    visdial: dict[VisDialKind, list[Path]] = {"dialogues": [], "relevance": []}
    for name in expand_paths(names):
        if name == "-":
            sources.append(StreamSource(None))
        elif is_annotation_file(name):
            annotated.append(Path(name))
        elif Path(name).suffix.lower() == ".json" and (kind := visdial_kind(Path(name))):
            visdial[kind].append(Path(name))
        elif Path(name).suffix.lower() == ".json" and _is_json_object(Path(name)):
            coco.append(Path(name))
        else:
            sources += _open_path(Path(name), image_folder, classes)
    if coco:
        sources.append(CocoSource(coco, image_folder))
    if annotated:
        sources.append(AnnotationFilesSource(annotated, image_folder))
    sources += open_visdial(visdial["dialogues"], visdial["relevance"], image_folder)
    dataset = Dataset(sources)
    if not isinstance(sources[0], StreamSource) and not len(dataset):
        notes = "".join(f" {note}." for note in dataset.notes)
        raise UsageError(f"{' '.join(map(str, names))}: there are no images in it.{notes}")
    return dataset


def _open_path(
    path: Path, image_folder: Path | None, classes: bool | None
) -> list[SampleSource | StreamSource]:
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError) as error:  # ValueError: a name with a zero byte
        cause = error.strerror if isinstance(error, OSError) else None
        raise UsageError(f"{path}: {(cause or str(error)).lower()}.") from error
    name = path.name.lower()
    if stat.S_ISDIR(mode):
        if files := _coco_files(path):
            return [CocoSource([file], image_folder) for file in files]
        if files := _createml_files(path):
            return [TableSource(file, image_folder) for file in files]
        if folders := YoloSource.find(path):
            return [YoloSource.open_folder(folder, image_folder) for folder in folders]
        if folders := find_annotated_folders(path):
            return [AnnotatedFolderSource(folder, image_folder) for folder in folders]
        folder = FolderSource(path, classes)
        if len(folder):
            return [folder]
        if files := annotation_files(path):
            return [AnnotationFilesSource(files, image_folder)]
        for ending in (".tar", ".parquet"):
            if files := sorted(path.glob(f"*{ending}")):
                return [source for file in files for source in _open_path(file, image_folder, classes)]
        return [folder]
    is_table = path.suffix.lower() in (*_TABLES, ".json", ".yaml", ".yml")
    if name.endswith((".tar.gz", ".tgz")) or (stat.S_ISFIFO(mode) and not is_table):
        return [StreamSource(path)]
    if stat.S_ISFIFO(mode):
        raise UsageError(f"{path}: a named pipe is read as a tar archive only; write it to a file first.")
    if not stat.S_ISREG(mode):
        raise UsageError(f"{path}: neither a file, a folder nor a pipe.")
    if name.endswith(".tar"):
        return [ShardSource(path)]
    if path.suffix.lower() in (*_TABLES, ".json"):
        return [TableSource(path, image_folder)]
    if path.suffix.lower() in (".yaml", ".yml"):
        return [*open_yolo_file(path, image_folder)]
    if (folder := find_split(path)) is not None:
        return [AnnotatedFolderSource(folder, image_folder, split=path)]
    raise UsageError(f"{path}: unknown kind of source; it must be {_KINDS}.")


def _coco_files(folder: Path) -> list[Path]:
    """COCO files of a folder as FiftyOne (data/, labels.json) and Roboflow (train/_annotations.coco.json) write it."""
    files = [folder / "labels.json"] if (folder / "data").is_dir() else []
    files += [folder / split / "_annotations.coco.json" for split in ("", "train", "valid", "test")]
    return [file for file in files if _is_json_object(file) and b'"images"' in file.read_bytes()]


def _createml_files(folder: Path) -> list[Path]:
    """CreateML files of a folder as Roboflow writes it: train/_annotations.createml.json."""
    files = (folder / split / "_annotations.createml.json" for split in ("", "train", "valid", "test"))
    return [file for file in files if file.is_file()]


def expand_paths(patterns: Iterable[str | Path]) -> list[str]:
    """Paths of all patterns: globs and brace ranges. Raises `UsageError` for more than `_MAX_PATHS`, or none."""
    paths: list[str] = []
    for pattern in patterns:
        for path in _expand(os.fspath(pattern)):
            paths.append(path)
            if len(paths) > _MAX_PATHS:
                raise UsageError(f"{pattern}: names more than {_MAX_PATHS:,} files.")
    if not paths:
        raise UsageError("no source is named.")
    return paths


def _expand(name: str) -> Iterator[str]:
    """Paths of a pattern: "{000..002}" -> 000, 001, 002; "{a,b}" -> a, b; globs. An existing file is not a pattern."""
    if re.match(r"(pipe:|[a-z][a-z0-9+]+://)", name):
        raise UsageError(f"{name}: commands and URLs are not supported; fetch the files first.")
    braces = re.search(r"\{(?:(\d{1,18})\.\.(\d{1,18})|([^{}]*,[^{}]*))\}", name)
    if braces is not None and not os.path.lexists(name):
        low, high, listed = braces.groups()
        if not listed and int(low) > int(high):
            raise UsageError(f"{name}: the range {low}..{high} is empty; write the smaller number first.")
        if not listed and int(high) - int(low) >= _MAX_PATHS:
            raise UsageError(f"{name}: the range {low}..{high} names more than {_MAX_PATHS:,} files.")
        numbers = range(int(low), int(high) + 1) if not listed else ()
        for value in listed.split(",") if listed else (str(number).zfill(len(low)) for number in numbers):
            yield from _expand(name[: braces.start()] + value + name[braces.end() :])
    elif glob.has_magic(name) and not os.path.lexists(name):
        paths = sorted(glob.glob(name, recursive=True))
        if not paths:
            raise UsageError(f"{name}: the pattern matches no files.")
        yield from paths
    else:
        yield name


def _is_json_object(path: Path) -> bool:
    """Whether a .json file holds an object (COCO) and not a list of rows."""
    try:
        if not path.is_file():  # opening a named pipe would wait for its writer
            return False
        with path.open("rb") as file:
            return file.read(4096).lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"{")
    except (OSError, ValueError):
        return False  # opening it raises the error
