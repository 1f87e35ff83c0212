"""Wrong types in a checkpoint's small files are refused in one line, or make no difference; none gives a traceback."""

from __future__ import annotations

import json
import random
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import sightloop
from sightloop.checkpoints.config_types import check_config
from sightloop.checkpoints.hub import BUNDLED_FOLDER
from sightloop.checkpoints.registry import FAMILIES, config_from_dict
from sightloop.errors import CheckpointError, SightloopError
from sightloop.types import ImageSpec
from tests.tiny_checkpoints.clip_and_blip import write_blip, write_clip
from tests.tiny_checkpoints.florence import write_florence

WRONG: tuple[Any, ...] = (
    *(None, [], {}, "x", -1, 0, 1e308, True, [1], {"a": 1}, "9" * 400, [[]], ["a", None]),
)
WRITERS = {"clip": write_clip, "blip": write_blip, "florence": write_florence}
TRIES = 40


def places(data: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    if isinstance(data, dict):
        for key, value in data.items():
            yield (*path, key)
            if len(path) < 2 and key not in ("vocab", "merges", "added_tokens"):
                yield from places(value, (*path, key))


def _refusal(folder: Path, kind: str, image: Any) -> str:
    """Why a checkpoint is not loaded or used; "" if it works. Any other exception passes through."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            model = sightloop.load(folder, device="cpu")
            (model.embed_images if kind == "clip" else model.caption)(image)
        except SightloopError as error:
            return str(error)
    return ""


@pytest.mark.parametrize("kind", WRITERS)
def test_any_value_is_taken_or_refused_by_name(kind: str, tmp_path: Path) -> None:
    folder = tmp_path / kind
    WRITERS[kind](folder)
    image = np.zeros((8, 8, 3), np.uint8)
    draw = random.Random(kind)
    all_places = [
        (file, place)
        for file in sorted(folder.glob("*.json"))
        for place in places(json.loads(file.read_text("utf-8")))
    ]
    for file, place in draw.sample(all_places, TRIES):
        text = file.read_text("utf-8")
        data = inner = json.loads(text)
        for key in place[:-1]:
            inner = inner[key]
        inner[place[-1]] = value = draw.choice(WRONG)
        file.write_text(json.dumps(data), "utf-8")
        assert "\n" not in _refusal(folder, kind, image), (file.name, place, value)
        file.write_text(text, "utf-8")


def test_every_bundled_value_is_right_and_any_other_type_is_named() -> None:
    config = json.loads((BUNDLED_FOLDER / "config.json").read_text("utf-8"))
    family = FAMILIES[config["family"]]
    check_config(config_from_dict(family.config, config["config"], family.towers), "nano")
    vision = config["config"]["vision"]
    for name, value in (("mlp_dim", 0), ("heads", 0), ("eps", [1]), ("layers", True), ("activation", 3)):
        changed = config["config"] | {"vision": vision | {name: value}}
        with pytest.raises(CheckpointError, match=rf"nano: its config says vision\.{name}="):
            check_config(config_from_dict(family.config, changed, family.towers), "nano")


@pytest.mark.parametrize(
    "values", [{"shortest_edge": {}}, {"mean": (0.0, 0.0)}, {"std": ("a", 1.0, 1.0)}, {"interpolation": "x"}]
)
def test_preprocessing_is_checked_too(values: dict[str, Any]) -> None:
    with pytest.raises(CheckpointError, match=next(iter(values))):
        check_config(ImageSpec(**values), "m")
