"""Regions as files that other programs read: COCO's json, JSON lines, YOLO's labels. Whole or not at all.

    coco     x.json     images, annotations ("bbox", "segmentation", "score") and categories, numbered from 1
    jsonl    x.jsonl    {"key", "image", "regions": [{"label", "box", "polygons", "score", "mask"}]} for each image
    yolo     a folder   labels/NAME.txt, a line for each region; classes.txt and data.yaml with the labels' names

`sightloop.open_dataset` reads the first two back as they were written. A mask is stored as COCO's run lengths.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Literal, TypeAlias

from sightloop.annotation.drawing import draw_regions
from sightloop.data.atomic import TEMP_PREFIX, atomic_path
from sightloop.data.datasets.schema import fields_from_region
from sightloop.data.datasets.writers import CocoWriter, ImageFolder, JsonLinesWriter
from sightloop.data.images.decode import decode, upright_size
from sightloop.errors import UsageError
from sightloop.types import JsonDict, Region, Sample

RegionFile: TypeAlias = Literal["coco", "jsonl", "yolo"]
RegionRow: TypeAlias = tuple[str, Sequence[Region]]


def write_regions(path: Path, kind: RegionFile, rows: Iterable[RegionRow], *, overwrite: bool = False) -> int:
    """Writes what was found in each image, (its path, its regions), and returns how many images that were.

    Paths in COCO's json and JSON lines start from the file's folder. YOLO's format has no scores and no masks; a
    image's lines are outlines where each of its regions has one, else boxes, and all numbers are shares of its sides.
    overwrite: replace a file that is there; a folder is never replaced.

    Raises `UsageError` where something is in the way, `ImageError` for an image whose size cannot be read, OSError
    where nothing can be written; then nothing has changed. So it is if `rows` raises.
    """
    taken = os.path.lexists(path)
    if taken and (kind == "yolo" or not overwrite or path.is_dir()):
        raise UsageError(f"{path} is there already: move it away, or name another place.")
    if not path.parent.is_dir():
        raise UsageError(f"{path}: the folder {path.parent} does not exist; make it first.")
    if kind == "yolo":
        return _write_yolo(path, rows)
    with atomic_path(path, exclusive=not overwrite) as temporary:
        pictures = ImageFolder(path.with_suffix(".pictures"), path.parent)
        writer = (CocoWriter if kind == "coco" else JsonLinesWriter)(temporary, pictures)
        count = 0
        try:
            for picture, regions in rows:
                sample = Sample(picture, Path(picture), regions=tuple(regions))
                writer.check(sample)
                writer.add(sample, None, "")
                count += 1
            writer.close()
        except BaseException:
            with suppress(OSError, ValueError):  # its parts go away with the temporary
                writer.close()
            raise
    return count


class Drawings:
    """Images with their regions painted on them, in a folder; made when the first one is added."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.count = 0
        self._names: set[str] = set()

    def add(self, picture: str, regions: Sequence[Region]) -> None:
        """The image of that path as a JPEG of its name, with a number where another has that name. Raises ImageError
        for what cannot be read, OSError where nothing can be written."""
        stem = name = Path(picture).stem
        number = 1
        while name.lower() in self._names:
            number += 1
            name = f"{stem}-{number}"
        self._names.add(name.lower())
        self.folder.mkdir(parents=True, exist_ok=True)
        painted = draw_regions(decode(picture).convert("RGB"), regions)
        with atomic_path(self.folder / f"{name}.jpg") as temporary:
            painted.save(temporary, format="JPEG", quality=92)
        self.count += 1


def region_fields(region: Region) -> JsonDict:
    """A region as JSON values."""
    return fields_from_region(region)


def _write_yolo(path: Path, rows: Iterable[RegionRow]) -> int:
    """Labels lie below `labels` as the images lie below the folder that they have in common."""
    names: dict[str, int] = {}
    texts: dict[str, str] = {}
    for picture, regions in rows:
        stem = os.path.splitext(os.path.abspath(picture))[0]
        if stem in texts:
            raise UsageError(f"{picture}: two images of this name would have one file of labels; rename one.")
        texts[stem] = _yolo_lines(regions, upright_size(picture), names)
    base = os.path.commonpath([os.path.dirname(stem) for stem in texts]) if texts else ""
    staging = path.parent / f"{TEMP_PREFIX}{secrets.token_hex(8)}"
    staging.mkdir()
    try:
        for stem, text in texts.items():
            file = staging / "labels" / (os.path.relpath(stem, base) + ".txt")
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text, "ascii")
        labels = "".join(f"{name}\n" for name in names)
        (staging / "classes.txt").write_text(labels, "utf-8", "backslashreplace")
        classes = "".join(f"  {number}: {json.dumps(name)}\n" for name, number in names.items())
        (staging / "data.yaml").write_text(f"path: .\ntrain: images\nval: images\nnames:\n{classes}", "ascii")
        os.rename(staging, path)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise
    return len(texts)


def _yolo_lines(regions: Sequence[Region], size: tuple[int, int], names: dict[str, int]) -> str:
    """The lines of one image of (height, width); new labels get the next number."""
    height, width = size
    outlined = all(region.polygons for region in regions)
    lines: list[str] = []
    for region in regions:
        label = " ".join(region.label.split())
        number = names.setdefault(label, len(names))
        if outlined:
            points = max(region.polygons, key=len)  # a line holds one outline
            shares = [v / (height if i % 2 else width) for i, v in enumerate(points)]
        else:
            left, top, right, bottom = (
                min(max(v, 0.0), (width, height)[i % 2]) for i, v in enumerate(region.box)
            )
            shares = [(left + right) / 2 / width, (top + bottom) / 2 / height]
            shares += [(right - left) / width, (bottom - top) / height]
        lines.append(" ".join([str(number), *(f"{min(max(share, 0.0), 1.0):.6f}" for share in shares)]))
    return "".join(f"{line}\n" for line in lines)
