"""Region files in the formats of other programs: COCO JSON, JSON lines and YOLO labels, written atomically.

    coco     x.json     images, annotations ("bbox", "segmentation", "score") and categories, numbered from 1
    jsonl    x.jsonl    {"key", "image", "regions": [{"label", "box", "polygons", "score", "mask"}]} for each image
    yolo     a folder   labels/NAME.txt with a line for each region; classes.txt and data.yaml with the labels' names

`sightloop.open_dataset` reads the first two back without loss. Masks are stored as COCO run lengths.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Literal, Protocol, TypeAlias

import numpy as np

from sightloop.annotation.drawing import draw_heat_map, draw_regions
from sightloop.data.atomic import TEMP_PREFIX, atomic_path, atomic_write, write_json
from sightloop.data.datasets.schema import json_text, region_from_fields
from sightloop.data.datasets.writers import CocoWriter, ImageFolder, JsonLinesWriter
from sightloop.data.images.decode import decode, upright_size
from sightloop.data.journal import Journal, JournalLine
from sightloop.errors import SightloopError, UsageError
from sightloop.types import Floats32, ImageSource, JsonDict, JsonMapping, Region, Sample, Size

RegionFile: TypeAlias = Literal["coco", "jsonl", "yolo"]
RegionRow: TypeAlias = tuple[str, Sequence[Region]]


def write_regions(path: Path, kind: RegionFile, rows: Iterable[RegionRow], *, overwrite: bool = False) -> int:
    """Writes the regions of many images to one file, or for YOLO to one folder.

    Image paths in COCO and JSON lines are relative to the file's folder. YOLO has no scores and no masks: an image's
    lines are outlines if each of its regions has one, else boxes, with coordinates as fractions of width and height.

    Args:
        path: The file or folder. If anything fails, also in `rows`, it is left as it was.
        kind: The format.
        rows: (path, regions) of each image.
        overwrite: Replace a file that exists; a folder is never replaced.

    Returns:
        Number of images.

    Raises:
        UsageError: `path` exists already, or its folder does not exist.
        ImageError: The size of an image cannot be read.
        OSError: Nothing can be written.
    """
    if os.path.lexists(path) and (kind == "yolo" or not overwrite or path.is_dir()):
        raise UsageError(f"{path} exists already: move it away, or name another path.")
    if not path.parent.is_dir():
        raise UsageError(f"{path}: the folder {path.parent} does not exist; make it first.")
    if kind == "yolo":
        return _write_yolo(path, rows)
    with atomic_path(path, exclusive=not overwrite) as temporary:
        images = ImageFolder(path.with_suffix(".images"), path.parent)
        writer = (CocoWriter if kind == "coco" else JsonLinesWriter)(temporary, images)
        count = 0
        try:
            for image, regions in rows:
                sample = Sample(image, Path(image), regions=tuple(regions))
                writer.check(sample)
                writer.add(sample, None, "")
                count += 1
            writer.close()
        except BaseException:
            with suppress(OSError, ValueError):  # the temporary file is removed anyway
                writer.close()
            raise
    return count


class Drawings:
    """Folder of images with their regions drawn on them; created with the first image."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.count = 0
        self._stems: set[str] = set()

    def add(self, image: str, regions: Sequence[Region]) -> None:
        """Writes a JPEG named after the image, numbered if another image has that name.

        Raises ImageError if the image cannot be read, OSError if the JPEG cannot be written.
        """
        base = stem = Path(image).stem
        number = 1
        while stem.lower() in self._stems:
            number += 1
            stem = f"{base}-{number}"
        self._stems.add(stem.lower())
        self.folder.mkdir(parents=True, exist_ok=True)
        drawing = draw_regions(decode(image).convert("RGB"), regions)
        with atomic_path(self.folder / f"{stem}.jpg") as temporary:
            drawing.save(temporary, format="JPEG", quality=92)
        self.count += 1


def _write_yolo(path: Path, rows: Iterable[RegionRow]) -> int:
    """Writes a YOLO dataset; the tree below `labels` is that of the images below their common folder."""
    class_ids: dict[str, int] = {}
    texts: dict[str, str] = {}  # image path without ending -> label lines
    for image, regions in rows:
        stem = os.path.splitext(os.path.abspath(image))[0]
        if stem in texts:
            raise UsageError(f"{image}: two images of this name would share one label file; rename one.")
        texts[stem] = _yolo_lines(regions, upright_size(image), class_ids)
    base = os.path.commonpath([os.path.dirname(stem) for stem in texts]) if texts else ""
    staging = path.parent / f"{TEMP_PREFIX}{secrets.token_hex(8)}"
    staging.mkdir()
    try:
        for stem, text in texts.items():
            file = staging / "labels" / (os.path.relpath(stem, base) + ".txt")
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text, "ascii")
        labels = "".join(f"{name}\n" for name in class_ids)
        (staging / "classes.txt").write_text(labels, "utf-8", "backslashreplace")
        classes = "".join(f"  {number}: {json.dumps(name)}\n" for name, number in class_ids.items())
        (staging / "data.yaml").write_text(f"train: images\nval: images\nnames:\n{classes}", "ascii")
        os.rename(staging, path)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise
    return len(texts)


def _yolo_lines(regions: Sequence[Region], size: Size, class_ids: dict[str, int]) -> str:
    """Label lines of one image; labels without a class id get the next one.

    A line is `class x y width height` (center and size of the box) or `class x1 y1 x2 y2 ...` (outline), as
    fractions of the image's width and height. For a cat in the left half of an image: `0 0.25 0.5 0.5 1`.
    """
    height, width = size
    has_outlines = all(region.polygons for region in regions)
    lines: list[str] = []
    for region in regions:
        label = " ".join(region.label.split())
        class_id = class_ids.setdefault(label, len(class_ids))
        if has_outlines:
            points = max(region.polygons, key=len)  # the format has one outline a line: the most detailed
            fractions = [v / (height if i % 2 else width) for i, v in enumerate(points)]
        else:
            left, top, right, bottom = (
                min(max(v, 0.0), (width, height)[i % 2]) for i, v in enumerate(region.box)
            )
            fractions = [(left + right) / 2 / width, (top + bottom) / 2 / height]
            fractions += [(right - left) / width, (bottom - top) / height]
        numbers = (f"{min(max(fraction, 0.0), 1.0):.6f}" for fraction in fractions)
        lines.append(" ".join([str(class_id), *numbers]))
    return "".join(f"{line}\n" for line in lines)


class Explanation(Protocol):
    """Heat map, an array `[H, W]` of the image's size that sums to 1, with what it explains.

    Attributes:
        score: "match" (ITM) or "similarity" (cosine).
        layer: index of the attention layer.
        head: index of its head; None for the mean of all.
        grid: float32 `[h, w]`, evidence of each patch.

    Methods:
        mass: share of the map inside a box.
    """

    @property
    def score(self) -> str: ...
    @property
    def layer(self) -> int: ...
    @property
    def head(self) -> int | None: ...
    @property
    def grid(self) -> Floats32: ...
    def mass(self, box: Sequence[float]) -> float: ...
    def __array__(self) -> Floats32: ...


class ExplainingModel(Protocol):
    """Model whose scores can be explained."""

    def explain(self, image: ImageSource, text: str) -> Explanation:
        """What the score of a text looks at."""
        ...


def check_new_folder(option: str, folder: Path) -> None:
    """Raises `UsageError` unless a folder can be made there: nothing that exists is added to."""
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
        raise UsageError(f"{option} {folder}: exists already; name a new folder.")
    if not folder.parent.is_dir():
        raise UsageError(f"{option} {folder}: the folder {folder.parent} does not exist; make it first.")


class ExplanationFolder:
    """Folder of explanations; created with the first.

    Args:
        folder: The folder.
        model: Explains.

    Attributes:
        count: Maps written.
    """

    def __init__(self, folder: Path, model: ExplainingModel) -> None:
        self.folder, self.count = folder, 0
        self._model = model

    def add(
        self, name: str, image: Path | bytes, text: str, score: float, regions: Sequence[Region] = ()
    ) -> None:
        """Writes NUMBER-NAME.png and .json.

        Args:
            name: Of the image.
            image: Path or encoded bytes.
            text: What is explained.
            score: Of the text, for the JSON.
            regions: Annotated regions; the JSON has the share of the map in each.
        """
        heat = self._model.explain(image, text)
        self.folder.mkdir(exist_ok=True)
        stem = re.sub(r"[^\w.-]+", "_", Path(name).stem)[:80]
        base = self.folder / f"{self.count:04d}-{stem}"
        with atomic_path(base.with_name(base.name + ".png")) as temporary:
            draw_heat_map(decode(image), np.asarray(heat)).save(temporary, "PNG")
        record = {
            "name": name,
            "text": text,
            "score": heat.score,
            heat.score: score,
            "layer": heat.layer,
            "head": heat.head,
            "heads": "mean of all" if heat.head is None else "one",
            "grid": [[round(float(value), 8) for value in row] for row in heat.grid],
            "regions": [
                {"label": region.label, "box": list(region.box), "mass": round(heat.mass(region.box), 4)}
                for region in regions
            ],
        }
        write_json(record, base.with_name(base.name + ".json"))
        self.count += 1


class RegionTable:
    """Table of the regions of images, in a format of `region_files`.

    During the run, regions go to the journal `FILE.partial`; `finish` writes FILE and removes the journal. A JSON lines
    file that exists keeps its lines as they are, and new images are added behind them; other files are not replaced.

    Args:
        path: FILE; for YOLO a folder.
        kind: the format.
        settings: of the run; a journal of other settings is refused.
        drawings: also draws the regions of images that are skipped because an earlier run has found them.

    Raises:
        UsageError: FILE exists already or cannot be read, or a journal is of another run.
    """

    def __init__(
        self, path: Path, kind: RegionFile, settings: JsonMapping, drawings: Drawings | None = None
    ) -> None:
        if not path.parent.is_dir():
            raise UsageError(f"--out {path}: the folder {path.parent} does not exist; make it first.")
        if os.path.lexists(path) and kind != "jsonl":
            raise UsageError(f"--out {path}: exists already; give another name.")
        self._kind: RegionFile = kind
        self.path, self._drawings = path, drawings
        self._before = path.read_bytes() if path.exists() else b""
        self._written = {os.path.abspath(path.parent / name) for name in _images_of(path, self._before)}
        self._settings: JsonDict = json.loads(json.dumps(settings, default=str))
        self._offsets: dict[str, int] = {}  # path of an image -> start of its line in the journal
        self._order: dict[str, None] = {}  # of those among the inputs
        journal = path.with_name(path.name + ".partial")
        try:
            self._journal = Journal(journal, self._load_line, dumps=json_text)
        except OSError as error:
            raise UsageError(f"--out: {journal} cannot be written: {error.strerror}.") from error
        if journal.stat().st_size == 0:
            self._journal.add({"settings": self._settings})

    def __contains__(self, image: str) -> bool:
        """Whether FILE or the journal of an earlier run has the image."""
        return os.path.abspath(image) in self._written or image in self._offsets

    def entry(self, image: str) -> JsonDict:
        """The "rows" of an image: its regions as JSON, if an earlier, unfinished run has found them."""
        start = self._offsets.get(image)
        return {"rows": [] if start is None else self._journal.read(start)["regions"]}

    def add(self, image: str, rows: Iterable[JsonMapping]) -> None:
        """Adds the regions of an image, as JSON."""
        self._offsets[image] = self._journal.add({"name": image, "regions": list(rows)})
        self._order[image] = None

    def note_skipped(self, image: str) -> None:
        """Puts the regions of a skipped image at its position among the inputs, and draws them."""
        if image in self._offsets:
            self._order[image] = None
            if self._drawings is not None:
                self._drawings.add(image, self._row(image)[1])

    def commit(self) -> None:
        """Forces the journal onto the disk (fsync)."""
        self._journal.sync()

    def finish(self) -> None:
        """Writes FILE and removes the journal.

        Raises:
            SightloopError: another program changed FILE during the run; the journal is kept.
        """
        if self._offsets:
            rows = [name for name in self._offsets if name not in self._order] + list(self._order)
            if self._before:
                self._append(map(self._row, rows))
            else:
                write_regions(self.path, self._kind, map(self._row, rows))
        self._journal.remove()

    def close(self) -> None:
        """Closes the journal and deletes it if it has no regions; does nothing after `finish`."""
        if self._journal.closed:
            return
        if self._offsets:
            self.commit()
            self._journal.close()
        else:
            self._journal.remove()

    def _append(self, rows: Iterator[RegionRow]) -> None:
        temporary = self.path.with_name(f"{TEMP_PREFIX}{secrets.token_hex(8)}")
        try:
            write_regions(temporary, self._kind, rows)
            data = temporary.read_bytes()
        finally:
            temporary.unlink(missing_ok=True)
        if self.path.read_bytes() != self._before:
            raise SightloopError(
                f"{self.path} was changed during the run, so it was left as it is. The new regions are in "
                f"{self._journal.path.name}: run the same command again to add them."
            )
        end = b"" if self._before.endswith(b"\n") else b"\n"
        atomic_write(self.path, self._before + end + data)

    def _row(self, image: str) -> RegionRow:
        fields: list[JsonDict] = self._journal.read(self._offsets[image])["regions"]
        return image, [region_from_fields(region) for region in fields]

    def _load_line(self, line: JournalLine) -> None:
        """Records the offset of an image. The first line holds the settings of the run that began the journal."""
        name = self.path.with_name(self.path.name + ".partial")
        entry = line.entry
        if entry is None or (line.number == 1) != ("settings" in entry):
            raise UsageError(f"{name} is not the journal of a run: move it elsewhere.")
        if line.number > 1:
            self._offsets[entry["name"]] = line.start
        elif entry["settings"] != self._settings:
            raise UsageError(
                f"{name}: is of a run with another model or other options; repeat that one, or remove the file."
            )


def _images_of(path: Path, data: bytes) -> Iterator[str]:
    """The images of the lines of a JSON lines file. UsageError names a line that has none."""
    for number, line in enumerate(data.splitlines(), 1):
        if not line.strip():
            continue
        try:
            image = json.loads(line)["image"]
        except (ValueError, LookupError, TypeError):
            image = None
        if not isinstance(image, str):
            raise UsageError(
                f"--out {path}: line {number} is no object with an image; give another name, or mend the file."
            )
        yield image
