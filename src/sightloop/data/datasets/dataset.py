"""Sources of samples: folders, tables, COCO's json, WebDataset shards and Parquet, all as one `Dataset`."""

from __future__ import annotations

import glob
import hashlib
import os
import re
import stat
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from sightloop.data.datasets.coco import CocoSource
from sightloop.data.datasets.folder import FolderSource
from sightloop.data.datasets.tables import TableSource
from sightloop.data.datasets.webdataset import ShardSource, StreamSource
from sightloop.data.datasets.yolo import YoloSource
from sightloop.errors import ImageError, UsageError
from sightloop.types import Sample

_TABLES = (".csv", ".tsv", ".jsonl", ".ndjson", ".parquet")
_KINDS = "a folder, .csv, .tsv, .jsonl, .json, .parquet, .tar, .tar.gz, or - for a tar on standard input"


class SampleSource(Protocol):
    """What one file or folder offers. Records count from 0; a loss (a shard cut short, say) is one that raises.

    name: of the file or folder.
    """

    name: str
    notes: tuple[str, ...]

    def __len__(self) -> int: ...

    def hashes(self) -> Iterable[int]:
        """records.key_hash() of every key."""
        ...

    def key(self, index: int) -> str: ...

    def sample(self, index: int, key: str) -> Sample:
        """Raises ValueError with a reason, or OSError."""
        ...

    def digest(self) -> str: ...


class Dataset:
    """Samples by number, and in order. Opening one reads names and places, never an image; it can be pickled, and
    used by several threads.

    notes: what the source holds that a `Sample` cannot, in words.
    """

    def __init__(
        self, sources: Sequence[SampleSource | StreamSource], indices: NDArray[np.int64] | None = None
    ) -> None:
        """Use `open_dataset`."""
        self._pipes = [source for source in sources if isinstance(source, StreamSource)]
        self._sources = [source for source in sources if not isinstance(source, StreamSource)]
        if self._pipes and len(sources) > 1:
            raise UsageError("A stream, or a .tar.gz, can only be opened alone.")
        self._ends: list[int] = np.cumsum([len(source) for source in self._sources]).tolist()
        self._indices = indices
        self._second = self._repeated_keys() if indices is None else {}
        self.notes = tuple(note for source in sources for note in source.notes)

    def __len__(self) -> int:
        """How many records there are, broken ones too. Raises TypeError for a stream."""
        if self._pipes:  # TypeError: what list() and the like take for "not known"
            raise TypeError("a stream has no length and no numbers; convert it to shards or a folder first")
        if self._indices is not None:
            return len(self._indices)
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, index: int) -> Sample:
        """Raises `ImageError`, named by the key, for a broken record, and IndexError."""
        source, within, key = self._find(index)
        try:
            return source.sample(within, key)
        except (ValueError, OSError, RecursionError) as error:
            cause = error.strerror if isinstance(error, OSError) else None
            raise ImageError(key, cause or str(error)) from error

    def __iter__(self) -> Iterator[Sample]:
        return self.stream()

    @property
    def is_stream(self) -> bool:
        """Whether it can only be read in order, and once: no length, no numbers, no fingerprint."""
        return bool(self._pipes)

    @property
    def parts(self) -> list[int]:
        """How many records each source holds (a shard, a table), in order; a selection is one part."""
        return [len(self)] if self._indices is not None else [len(source) for source in self._sources]

    def key(self, index: int) -> str:
        """The key of a sample, unique in this dataset, without reading the sample."""
        return self._find(index)[2]

    def origin(self, index: int) -> str:
        """The name of the source, a shard's say, that holds a sample."""
        return self._find(index)[0].name

    def stream(self, on_skip: Callable[[str, str], None] | None = None) -> Iterator[Sample]:
        """All samples in order. A broken one is skipped, after `on_skip(key, reason)`; without that it raises."""
        for sample in self._pipes[0].samples() if self._pipes else self._in_order():
            if not isinstance(sample, ImageError):
                yield sample
            elif on_skip is None:
                raise sample
            else:
                on_skip(sample.name, sample.reason)

    def select(self, indices: Iterable[int] | NDArray[np.integer]) -> Dataset:
        """The dataset of these records in this order. Raises IndexError for one that is not there."""
        wanted = np.fromiter(indices, np.int64)
        if wanted.size and not (wanted.min() >= 0 and wanted.max() < len(self)):
            raise IndexError(f"indices must be from 0 to {len(self) - 1}")
        chosen = Dataset(self._sources, wanted if self._indices is None else self._indices[wanted])
        chosen._second = self._second
        return chosen

    @property
    def fingerprint(self) -> str:
        """32 hex digits for the content, wherever it lies: names, sizes and texts; images count by name and size."""
        return self.fingerprints()[0]

    def fingerprints(self) -> tuple[str, list[tuple[str, str]]]:
        """The fingerprint, and for each source, a shard say, its name and 16 hex digits of its own."""
        if self._pipes:
            raise UsageError("A stream has no fingerprint; convert it to shards or a folder first.")
        digests = [source.digest() for source in self._sources]
        whole = hashlib.sha256("".join(digests).encode())
        whole.update(b"" if self._indices is None else self._indices.tobytes())
        names = (source.name for source in self._sources)
        return whole.hexdigest()[:32], [(n, d[:16]) for n, d in zip(names, digests, strict=True)]

    def _in_order(self) -> Iterator[Sample | ImageError]:
        for index in range(len(self)):
            try:
                yield self[index]
            except ImageError as error:
                yield error

    def _find(self, index: int) -> tuple[SampleSource, int, str]:
        index += len(self) if index < 0 else 0
        if not 0 <= index < len(self):
            raise IndexError(f"no sample {index}: there are {len(self)}")
        if self._indices is not None:
            index = int(self._indices[index])
        number = bisect_right(self._ends, index)
        within = index - (self._ends[number - 1] if number else 0)
        source = self._sources[number]
        count = self._second.get(index)
        return source, within, source.key(within) + (f"#{count}" if count else "")

    def _repeated_keys(self) -> dict[int, int]:
        """Which records have the key of an earlier one, as in shards that count alike, and the number behind it: which
        time it is, but for numbers with which it would be a key that a record has."""
        hashes = np.fromiter(chain.from_iterable(source.hashes() for source in self._sources), np.int64)
        keys, first, group = np.unique(hashes, return_index=True, return_inverse=True)
        times: dict[int, int] = {}
        repeated: dict[int, int] = {}
        for index in np.flatnonzero(first[group] != np.arange(len(hashes))).tolist():
            key, number = int(keys[group[index]]), times.get(group[index], 1) + 1
            while (name := hash((key, str(number)))) in keys[keys.searchsorted(name) :][:1]:
                number += 1
            times[group[index]] = repeated[index] = number
        return repeated


def open_dataset(
    source: str | Path | Sequence[str | Path],
    *,
    images: str | Path | None = None,
    classes: bool | None = None,
) -> Dataset:
    """The samples of one source, or of several one after the other.

    source: a folder of images with .txt or .json beside them, or with a folder for each class, or of shards; .csv,
    .tsv, .jsonl, .parquet (`records` has the names of columns); .json, a list of records or COCO's, of which several
    about the same images merge; a folder with YOLO's `labels`; .tar shards as WebDataset and img2dataset write them,
    `{000..005}` and globs too;
    .tar.gz, a named pipe or "-" (standard input), which can only be read in order.
    images: the folder that a table's or COCO's paths start from. classes: whether folders are classes (see `Folder`).

    Raises `UsageError` where there is no such thing, or nothing in it.
    """
    given = [source] if isinstance(source, str | Path) else list(source)
    base = None if images is None else Path(images)
    sources: list[SampleSource | StreamSource] = []
    coco: list[Path] = []
    for name in (name for each in given for name in _expanded(os.fspath(each))):
        if name == "-":
            sources.append(StreamSource(None))
        elif Path(name).suffix.lower() == ".json" and _is_object(Path(name)):
            coco.append(Path(name))
        else:
            sources += _opened(Path(name), base, classes)
    if coco:
        sources.append(CocoSource(coco, base))
    dataset = Dataset(sources)
    if not isinstance(sources[0], StreamSource) and not len(dataset):
        raise UsageError(f"{' '.join(map(str, given))}: there are no images in it.")
    return dataset


def _opened(path: Path, base: Path | None, classes: bool | None) -> list[SampleSource | StreamSource]:
    try:
        mode = path.stat().st_mode
    except OSError as error:
        raise UsageError(f"{path}: {(error.strerror or str(error)).lower()}.") from error
    name = path.name.lower()
    if stat.S_ISDIR(mode):
        if YoloSource.is_there(path):
            return [YoloSource(path, base)]
        folder = FolderSource(path, classes)
        if len(folder):
            return [folder]
        for ending in (".tar", ".parquet"):
            if inside := sorted(path.glob(f"*{ending}")):
                return [each for file in inside for each in _opened(file, base, classes)]
        return [folder]
    if name.endswith((".tar.gz", ".tgz")) or stat.S_ISFIFO(mode):
        return [StreamSource(path)]
    if name.endswith(".tar"):
        return [ShardSource(path)]
    if path.suffix.lower() in (*_TABLES, ".json"):
        return [TableSource(path, base)]
    raise UsageError(f"{path}: not a kind of source that is known; it must be {_KINDS}.")


def _expanded(name: str) -> Iterator[str]:
    """Every path of a brace range or list, `{000..005}` or `{a,b}`, and of a glob."""
    if re.match(r"(pipe:|[a-z][a-z0-9+]+://)", name):
        raise UsageError(f"{name}: commands and addresses are not opened; fetch the files first.")
    braces = re.search(r"\{(?:(\d+)\.\.(\d+)|([^{}]*,[^{}]*))\}", name)
    if braces is not None and not os.path.lexists(name):
        low, high, listed = braces.groups()
        within = (
            listed.split(",") if listed else [str(i).zfill(len(low)) for i in range(int(low), int(high) + 1)]
        )
        for each in within:
            yield from _expanded(name[: braces.start()] + each + name[braces.end() :])
    elif glob.has_magic(name) and not os.path.lexists(name):
        found = sorted(glob.glob(name, recursive=True))
        if not found:
            raise UsageError(f"{name}: the pattern matches nothing.")
        yield from found
    else:
        yield name


def _is_object(path: Path) -> bool:
    """Whether a .json holds one object, as COCO's does, and not a list of records."""
    try:
        with path.open("rb") as file:
            return file.read(4096).lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"{")
    except OSError:
        return False  # said by who opens it
