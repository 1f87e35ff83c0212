"""Conversion of any source of samples to any format; one sample at a time is in memory.

    folder    DST/                     images; captions in .txt if they can be lines, the rest in .json
    yolo      DST/                     YOLO: images/, labels/, data.yaml; boxes or outlines
    imagefolder  DST/                  Hugging Face's ImageFolder: images, and all fields in metadata.jsonl
    tar       x.tar, x-{000..}.tar     WebDataset; the first caption in .txt, the rest in .json; reproducible bytes
    parquet   x.parquet                images as {"bytes", "path"}
    csv tsv   x.csv, x.tsv             a row per caption
    jsonl     x.jsonl                  an object per image
    coco      x.json                   captions, boxes and outlines as COCO has them; other fields in the image objects

Images are copied byte for byte. Tables and COCO JSON refer to image files where they are; images out of an archive are
written to the folder x.images.
"""

from __future__ import annotations

import glob
import json
import os
import re
import shutil
from collections import Counter
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias, get_args

from sightloop.data.atomic import check_regular, exchange_paths, try_lock
from sightloop.data.datasets import writers
from sightloop.data.datasets.dataset import Dataset, open_dataset
from sightloop.data.datasets.dedupe import LeftOut, without_copies
from sightloop.data.datasets.folder import MARKER_NAME
from sightloop.data.datasets.folder_writers import ImageFolderWriter, YoloWriter
from sightloop.data.images import headers
from sightloop.errors import ImageError, UsageError
from sightloop.types import Done, Failed, Limits, Sample

DatasetFormat: TypeAlias = Literal[
    "folder", "imagefolder", "yolo", "tar", "parquet", "csv", "tsv", "jsonl", "coco"
]
_FOLDER_FORMATS = ("folder", "imagefolder", "yolo")

_FORMATS: dict[str, DatasetFormat] = {
    ".tar": "tar",
    ".parquet": "parquet",
    ".csv": "csv",
    ".tsv": "tsv",
    ".jsonl": "jsonl",
    ".json": "coco",
}
_EXTENSIONS = {
    "JPEG": ".jpg",
    "PNG": ".png",
    "GIF": ".gif",
    "BMP": ".bmp",
    "TIFF": ".tif",
    "WEBP": ".webp",
    "AVIF": ".avif",
    "HEIF": ".heic",
}


@dataclass(frozen=True, slots=True)
class ConvertSummary:
    """Result of a conversion.

    Attributes:
        target: path that was written.
        kind: its format.
        samples: number of samples written.
        failed: number of samples that could not be read or written.
        notes: what the target cannot hold and what the source left out, for people.
    """

    target: str
    kind: DatasetFormat
    samples: int
    failed: int
    notes: tuple[str, ...]


def convert(
    source: str | Path | Sequence[str | Path] | Dataset,
    target: str | Path,
    *,
    to: DatasetFormat | None = None,
    shard_size: int = 10_000,
    images: str | Path | None = None,
    overwrite: bool = False,
    dedupe: bool = False,
    notify: Callable[[Done[None] | Failed], None] | None = None,
) -> ConvertSummary:
    """Writes all samples of a source to a target, completely or not at all.

    Args:
        source: a dataset, or a source as for `open_dataset`.
        target: file or folder; its name gives the format. `x-{000..}.tar` is a pattern of shards.
        to: format, if the name of the target does not give it. "tar" with a folder writes 00000.tar, 00001.tar, ...
        shard_size: samples per shard.
        images: folder of the images, as for `open_dataset`.
        overwrite: replace an existing target; a folder is replaced only if a conversion wrote it.
        dedupe: leave out identical images and copies, with their captions; of each group the largest image stays.
        notify: called for every sample, with `Failed` for one that is broken and left out.

    Raises:
        UsageError: the source cannot be opened, the target exists or is being written, or no sample can be read.
        OSError: the target cannot be written.
    """
    if shard_size < 1:
        raise UsageError(f"shard_size {shard_size}: must be at least 1.")
    dataset = source if isinstance(source, Dataset) else open_dataset(source, images=images)
    destination = _Destination(Path(target), to)
    destination.check(overwrite)
    dataset, left_out = without_copies(dataset) if dedupe else (dataset, ())
    counts = Counter[type]()

    def count(event: Done[None] | Failed) -> None:
        counts[type(event)] += 1
        if notify is not None:
            notify(event)

    with _staging_folder(destination) as staging:
        writer = _open_writer(destination, staging, shard_size)
        try:
            _write_samples(dataset, writer, count)
            if not counts[Done]:
                raise UsageError(f"{target} was not written: none of {counts[Failed]:,} samples can be read.")
            writer.close()
        except BaseException:
            with suppress(OSError, ValueError):  # the file is removed with the folder
                writer.close()
            raise
        destination.publish(staging, overwrite)
    kind = destination.kind
    dropped = (
        f"{number:,} {what}, which {kind} cannot hold" for what, number in writer.dropped.items() if number
    )
    return ConvertSummary(
        str(target), kind, counts[Done], counts[Failed], (*dataset.notes, *dropped, *_left_out(left_out))
    )


def _left_out(samples: Sequence[LeftOut]) -> list[str]:
    """What was left out, as a note."""
    if not samples:
        return []
    same = sum(sample.is_same for sample in samples)
    first = samples[0]
    return [
        f"{len(samples):,} images were left out, {same:,} with the same bytes as another and {len(samples) - same:,} "
        f"copies, such as {first.key} for {first.kept}"
    ]


def _write_samples(
    dataset: Dataset, writer: writers.DatasetWriter, count: Callable[[Done[None] | Failed], None]
) -> None:
    for sample in dataset.stream(lambda key, reason: count(Failed(key, reason))):
        try:
            data, extension = encoded_image(sample, read_all=writer.embeds_images)
            writer.check(sample)
        except ImageError as error:
            count(Failed(error.name, error.reason))
            continue
        writer.add(sample, data, extension)
        count(Done(sample.key, None))


def encoded_image(sample: Sample, *, read_all: bool) -> tuple[bytes | None, str]:
    """The encoded image of a sample, and the file extension of its format (".jpg").

    Args:
        sample: with an image in memory or in a file.
        read_all: read the whole file. Otherwise only its header is read, and the bytes of an image that is a file are
            None.

    Raises:
        ImageError: the file is missing, too large or of unknown format.
    """
    if isinstance(sample.image, bytes):
        data = sample.image
    else:
        try:
            with sample.image.open("rb") as file:
                data = file.read(Limits().max_file_bytes + 1 if read_all else 4096)
        except OSError as error:
            raise ImageError(sample.key, (error.strerror or str(error)).lower()) from error
    if len(data) > Limits().max_file_bytes:
        raise ImageError(sample.key, "its image is too large")
    if not data:
        raise ImageError(sample.key, "its image is an empty file")
    extension = _EXTENSIONS.get(headers.image_format(data))
    if extension is None:
        raise ImageError(sample.key, headers.unknown_format_reason(data))
    return data if read_all or isinstance(sample.image, bytes) else None, extension


class _Destination:
    """Target of a conversion: its format, its file names, and how it is replaced.

    Everything is written to a staging folder beside the target first, and moved when it is complete.
    """

    def __init__(self, target: Path, to: DatasetFormat | None) -> None:
        # x-{000..}.tar: three digits
        self.target, self._shard_pattern = target, re.search(r"\{(0+)\.\.\d*\}", target.name)
        extension = target.suffix.lower()
        is_folder = target.is_dir() or not extension
        kind = to or ("folder" if is_folder else _FORMATS.get(extension))
        if kind is None:
            raise UsageError(
                f"{target}: unknown format; name it, one of {', '.join(get_args(DatasetFormat))}."
            )
        if is_folder and kind not in (*_FOLDER_FORMATS, "tar"):
            raise UsageError(f"{target}: {kind} is a file, not a folder; name a file.")
        self.kind: DatasetFormat = kind
        self.is_folder = kind in _FOLDER_FORMATS or is_folder
        self.images = target.with_suffix(".images")

    def shard(self, number: int) -> str:
        """File name of a shard: number 5 of x-{000..}.tar is x-005.tar."""
        if self._shard_pattern is None:
            return f"{number:05}.tar" if self.is_folder else self.target.name
        low, high = self._shard_pattern.span()
        return f"{self.target.name[:low]}{number:0{len(self._shard_pattern[1])}}{self.target.name[high:]}"

    @property
    def has_one_shard(self) -> bool:
        """Whether all samples go to one shard."""
        return self._shard_pattern is None and not self.is_folder

    def check(self, overwrite: bool) -> None:
        """Raises `UsageError` if something exists that must not be replaced."""
        if self.is_folder:
            folders = [self.target]
        else:
            folders = [self.images] if self.kind in writers.LINKED_IMAGE_FORMATS else []
        for folder in folders:
            if not os.path.lexists(folder) or (folder.is_dir() and not os.listdir(folder)):
                continue
            if not (folder / MARKER_NAME).is_file():
                raise UsageError(f"{folder} exists, and no conversion wrote it: name another target.")
            if not overwrite:
                raise UsageError(f"{folder} exists: name another target, or replace it (--overwrite).")
        existing = self._existing_files()
        if existing and not overwrite:
            raise UsageError(f"{existing[0]} exists: name another target, or replace it (--overwrite).")
        if any(path.is_dir() for path in existing):
            raise UsageError(f"{existing[0]} is a folder.")
        for path in existing:
            check_regular(path)

    def publish(self, staging: Path, overwrite: bool) -> None:
        """Moves the staged files to the target: images before the table that refers to them."""
        self.check(overwrite)
        for folder, _, names in os.walk(staging):
            for name in names:
                with open(os.path.join(folder, name), "r+b") as file:
                    os.fsync(file.fileno())
        if self.is_folder:
            _replace_folder(staging, self.target)
            return
        old = set(self._existing_files())
        staged = sorted(staging.iterdir(), key=lambda path: not path.is_dir())
        for path in staged:  # x.captions.json
            final = self.target.parent / path.name
            if not path.is_dir() and final not in old and os.path.lexists(final) and not overwrite:
                raise UsageError(f"{final} exists: name another target, or replace it (--overwrite).")
        for path in staged:
            final = self.target.parent / path.name
            old.discard(final)
            if path.is_dir():
                _replace_folder(path, final)
            else:
                os.replace(path, final)
        for path in old:  # shards with higher numbers
            path.unlink()

    def _existing_files(self) -> list[Path]:
        if self.is_folder:
            return []
        if self._shard_pattern is None:
            return [self.target] if os.path.lexists(self.target) else []
        low, high = self._shard_pattern.span()
        name = f"{glob.escape(self.target.name[:low])}[0-9]*{glob.escape(self.target.name[high:])}"
        return sorted(self.target.parent.glob(name))


@contextmanager
def _staging_folder(destination: _Destination) -> Generator[Path]:
    """An empty folder beside the target, locked against other runs and removed at the end."""
    target = destination.target
    target.parent.mkdir(parents=True, exist_ok=True)
    name = re.sub(r"[{}]", "", target.name)
    folder = target.absolute().parent / f".sightloop-{name}.tmp"
    folder.mkdir(exist_ok=True)
    descriptor = os.open(folder, os.O_RDONLY) if hasattr(os, "O_DIRECTORY") else None  # not on Windows
    try:
        if descriptor is not None and not try_lock(descriptor):
            raise UsageError(f"{target}: another run is writing it now.")
        try:
            for final in (target, destination.images):
                _recover_folder(final)
            for path in folder.iterdir():  # left by a killed run; the folder itself is locked, so it stays
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)  # after an exchange it holds the old target
    finally:
        if descriptor is not None:
            os.close(descriptor)


def _replace_folder(new: Path, final: Path) -> None:
    """Gives `new` the name `final`, in one step where the system can; the old folder is removed afterwards."""
    (new / MARKER_NAME).write_text(json.dumps({"by": "sightloop convert"}) + "\n", "utf-8")
    if not os.path.lexists(final):
        os.rename(new, final)
    elif exchange_paths(new, final):
        shutil.rmtree(new)
    else:  # a run that is killed between the renames is repaired by the next one
        aside = _aside(final)
        os.rename(final, aside)
        os.rename(new, final)
        shutil.rmtree(aside)


def _aside(final: Path) -> Path:
    return final.absolute().with_name(f".sightloop-{final.name}.old")


def _recover_folder(final: Path) -> None:
    """Ends what a killed `_replace_folder` began: the old folder gets its name back, or is removed."""
    aside = _aside(final)
    if not aside.is_dir():
        return
    if os.path.lexists(final):
        shutil.rmtree(aside, ignore_errors=True)
    else:
        os.rename(aside, final)


def _open_writer(destination: _Destination, staging: Path, shard_size: int) -> writers.DatasetWriter:
    target = destination.target
    image_folder = writers.ImageFolder(staging / destination.images.name, target.absolute().parent)
    match destination.kind:
        case "folder":
            return writers.FolderWriter(staging)
        case "imagefolder":
            return ImageFolderWriter(staging)
        case "yolo":
            return YoloWriter(staging)
        case "tar":
            return writers.ShardWriter(
                staging, destination.shard, 0 if destination.has_one_shard else shard_size
            )
        case "parquet":
            return writers.ParquetWriter(staging / target.name)
        case "coco":
            return writers.CocoWriter(staging / target.name, image_folder)
        case "csv":
            return writers.CsvWriter(staging / target.name, image_folder, ",")
        case "tsv":
            return writers.CsvWriter(staging / target.name, image_folder, "\t")
        case "jsonl":
            return writers.JsonLinesWriter(staging / target.name, image_folder)
