"""From any source of samples to any other: `sightloop convert SRC DST`. One sample at a time is held in memory.

    folder    DST/                     images; captions in .txt where lines can hold them, the rest in .json
    tar       x.tar, x-{000..}.tar     WebDataset; a lone caption in .txt, the rest in .json; the same bytes every time
    parquet   x.parquet                images inside, as {"bytes", "path"}
    csv tsv   x.csv, x.tsv             a row for each caption
    jsonl     x.jsonl                  an object for each image
    coco      x.json                   captions, boxes and outlines as COCO has them, questions and labels beside them

Images are copied byte for byte. Tables and COCO's json refer to image files where they are; images from an
archive go to the folder x.images.
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

from sightloop.data.atomic import try_lock
from sightloop.data.datasets import writers
from sightloop.data.datasets.dataset import Dataset, open_dataset
from sightloop.data.datasets.folder import MARKER
from sightloop.data.images import headers
from sightloop.errors import ImageError, UsageError
from sightloop.types import Done, Failed, Limits, Sample

DatasetFormat: TypeAlias = Literal["folder", "tar", "parquet", "csv", "tsv", "jsonl", "coco"]

_BY_ENDING: dict[str, DatasetFormat] = {
    ".tar": "tar",
    ".parquet": "parquet",
    ".csv": "csv",
    ".tsv": "tsv",
    ".jsonl": "jsonl",
    ".json": "coco",
}
_ENDINGS = {"JPEG": ".jpg", "PNG": ".png", "GIF": ".gif", "BMP": ".bmp", "TIFF": ".tif", "WEBP": ".webp"} | {
    "AVIF": ".avif",
    "HEIF": ".heic",
}


@dataclass(frozen=True, slots=True)
class ConvertSummary:
    """What a conversion wrote. notes: what the target could not hold, and what the source left out, in words."""

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
    notify: Callable[[Done[None] | Failed], None] | None = None,
) -> ConvertSummary:
    """Writes every sample of `source` to `target`, whole or not at all.

    source, images: as for `open_dataset`. to: the kind, where the target's form does not say it; "tar" with a folder
    writes 00000.tar and so on in it. shard_size: samples in a shard. overwrite: replace what is there; a folder only if
    a conversion wrote it. notify: is told of every sample; a broken one is `Failed` and left out.

    Raises `UsageError` for what cannot be opened or may not be replaced, or if no sample is left; OSError where the
    disk is full.
    """
    if shard_size < 1:
        raise UsageError(f"shard_size {shard_size}: must be at least 1.")
    dataset = source if isinstance(source, Dataset) else open_dataset(source, images=images)
    place = _Destination(Path(target), to)
    place.check(overwrite)
    counts = Counter[type]()

    def count(event: Done[None] | Failed) -> None:
        counts[type(event)] += 1
        if notify is not None:
            notify(event)

    with _staged(place) as staging:
        writer = _writer(place, staging, shard_size)
        try:
            _write(dataset, writer, count)
            if not counts[Done]:
                raise UsageError(f"{target} was not written: of {counts[Failed]:,} samples none can be read.")
            writer.close()
        except BaseException:
            with suppress(OSError, ValueError):  # the file goes away with the folder
                writer.close()
            raise
        place.publish(staging, overwrite)
    lost = (f"{many:,} {what}, which {place.kind} cannot hold" for what, many in writer.lost.items())
    return ConvertSummary(str(target), place.kind, counts[Done], counts[Failed], (*dataset.notes, *lost))


def _write(
    dataset: Dataset, writer: writers.DatasetWriter, count: Callable[[Done[None] | Failed], None]
) -> None:
    for sample in dataset.stream(lambda key, reason: count(Failed(key, reason))):
        try:
            data, ending = encoded_image(sample, whole=writer.copies)
            writer.check(sample)
        except ImageError as error:
            count(Failed(error.name, error.reason))
            continue
        writer.add(sample, data, ending)
        count(Done(sample.key, None))


def encoded_image(sample: Sample, *, whole: bool) -> tuple[bytes | None, str]:
    """The bytes, where they are wanted (whole) or nowhere else, and the ending for what they start like.

    Raises `ImageError` for an image that is gone, too large or of no known kind.
    """
    if isinstance(sample.image, bytes):
        data = sample.image
    else:
        try:
            with sample.image.open("rb") as file:
                data = file.read(Limits().max_file_bytes + 1 if whole else 4096)
        except OSError as error:
            raise ImageError(sample.key, (error.strerror or str(error)).lower()) from error
    if len(data) > Limits().max_file_bytes:
        raise ImageError(sample.key, "its image is too large")
    ending = _ENDINGS.get(headers.image_format(data))
    if ending is None:
        raise ImageError(sample.key, headers.unknown_format_reason(data))
    return data if whole or isinstance(sample.image, bytes) else None, ending


class _Destination:
    """Where the result goes. Everything is written to a folder beside it first, and moved when it is complete."""

    def __init__(self, target: Path, to: DatasetFormat | None) -> None:
        self.target, self._shards = target, re.search(r"\{(0+)\.\.\d*\}", target.name)
        ending = target.suffix.lower()
        is_folder = target.is_dir() or not ending
        kind = to or ("folder" if is_folder else _BY_ENDING.get(ending))
        if kind is None:
            raise UsageError(f"{target}: name its kind, one of {', '.join(get_args(DatasetFormat))}.")
        if is_folder and kind not in ("folder", "tar"):
            raise UsageError(f"{target}: {kind} is one file; name one.")
        self.kind: DatasetFormat = kind
        self.is_folder = kind == "folder" or is_folder
        self.pictures = target.with_suffix(".pictures")

    def shard(self, number: int) -> str:
        """The name of a shard."""
        if self._shards is None:
            return f"{number:05}.tar" if self.is_folder else self.target.name
        low, high = self._shards.span()
        return f"{self.target.name[:low]}{number:0{len(self._shards[1])}}{self.target.name[high:]}"

    @property
    def has_one_shard(self) -> bool:
        """Whether all samples go to one file."""
        return self._shards is None and not self.is_folder

    def check(self, overwrite: bool) -> None:
        """Raises `UsageError` where something stands in the way that may not be replaced."""
        folders = [self.target] if self.is_folder else [self.pictures] if self.kind in writers.TABLES else []
        for folder in folders:
            if not os.path.lexists(folder) or (folder.is_dir() and not os.listdir(folder)):
                continue
            if not (folder / MARKER).is_file():
                raise UsageError(f"{folder} is there, and no conversion wrote it: name another target.")
            if not overwrite:
                raise UsageError(f"{folder} is there: name another target, or replace it (--overwrite).")
        present = self._present()
        if present and not overwrite:
            raise UsageError(f"{present[0]} is there: name another target, or replace it (--overwrite).")
        if any(path.is_dir() for path in present):
            raise UsageError(f"{present[0]} is a folder.")

    def publish(self, staging: Path, overwrite: bool) -> None:
        """Moves what was staged to its place: images before the table that names them."""
        self.check(overwrite)
        for folder, _, names in os.walk(staging):
            for name in names:
                with open(os.path.join(folder, name), "r+b") as file:
                    os.fsync(file.fileno())
        if self.is_folder:
            _replace_folder(staging, self.target)
            return
        old = set(self._present())
        for path in sorted(staging.iterdir(), key=lambda path: not path.is_dir()):
            final = self.target.parent / path.name
            old.discard(final)
            if path.is_dir():
                _replace_folder(path, final)
            else:
                os.replace(path, final)
        for path in old:  # shards of a longer row
            path.unlink()

    def _present(self) -> list[Path]:
        if self.is_folder:
            return []
        if self._shards is None:
            return [self.target] if os.path.lexists(self.target) else []
        low, high = self._shards.span()
        name = f"{glob.escape(self.target.name[:low])}[0-9]*{glob.escape(self.target.name[high:])}"
        return sorted(self.target.parent.glob(name))


@contextmanager
def _staged(place: _Destination) -> Generator[Path]:
    """A folder beside the target, which only this run writes to; what a killed run left in it goes first."""
    place.target.parent.mkdir(parents=True, exist_ok=True)
    name = re.sub(r"[{}]", "", place.target.name)
    folder = place.target.absolute().parent / f".sightloop-{name}.tmp"
    folder.mkdir(exist_ok=True)
    held = os.open(folder, os.O_RDONLY) if hasattr(os, "O_DIRECTORY") else None  # Windows opens none
    try:
        if held is not None and not try_lock(held):
            raise UsageError(f"{place.target}: another run is writing it now.")
        try:
            for left in folder.iterdir():  # the folder itself is locked, and stays
                shutil.rmtree(left) if left.is_dir() and not left.is_symlink() else left.unlink()
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    finally:
        if held is not None:
            os.close(held)


def _replace_folder(new: Path, final: Path) -> None:
    (new / MARKER).write_text(json.dumps({"by": "sightloop convert"}) + "\n", "utf-8")
    if not os.path.lexists(final):
        os.rename(new, final)
        return
    aside = final.absolute().with_name(f".sightloop-{final.name}.old")
    shutil.rmtree(aside, ignore_errors=True)
    os.rename(final, aside)
    os.rename(new, final)
    shutil.rmtree(aside)


def _writer(place: _Destination, staging: Path, shard_size: int) -> writers.DatasetWriter:
    target = place.target
    pictures = writers.ImageFolder(staging / place.pictures.name, target.absolute().parent)
    match place.kind:
        case "folder":
            return writers.FolderWriter(staging)
        case "tar":
            return writers.ShardWriter(staging, place.shard, 0 if place.has_one_shard else shard_size)
        case "parquet":
            return writers.ParquetWriter(staging / target.name)
        case "coco":
            return writers.CocoWriter(staging / target.name, pictures)
        case "csv" | "tsv":
            return writers.CsvWriter(staging / target.name, pictures, "," if place.kind == "csv" else "\t")
        case "jsonl":
            return writers.JsonLinesWriter(staging / target.name, pictures)
