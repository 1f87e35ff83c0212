"""Folder of explanations: for each text a PNG, its heat map over the image, and a JSON with layer, head and mass."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from sightloop.annotation.drawing import draw_heat_map
from sightloop.data.atomic import atomic_path, write_json
from sightloop.data.images.decode import decode
from sightloop.errors import UsageError
from sightloop.types import Floats32, ImageSource, Region


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


def check_folder(option: str, folder: Path) -> None:
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
