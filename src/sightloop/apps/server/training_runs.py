"""Trainings of a folder: what each was made from, where its model is, and how it compared with the model before it.

FOLDER/.sightloop/runs/NAME/run.json          what was trained on what
                           /train.jsonl       the images that it learned from, with their captions
                           /held-out.jsonl    those that it is compared on
                           /run/model         the result
                           /comparison.json   the last comparison
"""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass
from pathlib import Path

from sightloop.apps.server.caption_review import REVIEW_FOLDER
from sightloop.apps.server.errors import ApiError
from sightloop.data.atomic import write_json
from sightloop.types import JsonDict

_NAME = re.compile(r"run-[0-9]{8}-[0-9]{6}")


@dataclass(frozen=True, slots=True)
class TrainingRun:
    """One training.

    Attributes:
        name: of its folder.
        model: checkpoint that it began with.
        steps: of the optimizer.
        images: that it learned from.
        held_out: images that it is compared on.
    """

    name: str
    model: str
    steps: int
    images: int
    held_out: int


def run_folder(folder: Path, name: str) -> Path:
    """Where a training of a folder of images is."""
    return folder / REVIEW_FOLDER / "runs" / name


def save_run(folder: Path, run: TrainingRun) -> None:
    """Writes what a training is made from."""
    write_json(asdict(run), run_folder(folder, run.name) / "run.json")


def save_comparison(folder: Path, name: str, metrics: list[JsonDict]) -> None:
    """Keeps the last comparison of a training with the model before it."""
    write_json(metrics, run_folder(folder, name) / "comparison.json")


def find_run(folder: Path, name: str) -> TrainingRun:
    """A training that has ended well. Raises ApiError (400) if there is none of that name."""
    run = _read(run_folder(folder, name) / "run.json") if _NAME.fullmatch(name) else None
    if run is None or not model_of(folder, name).is_dir():
        raise ApiError(400, "run: not a training that has ended well", param="run")
    return _run(run)


def model_of(folder: Path, name: str) -> Path:
    """The model that a training made."""
    return run_folder(folder, name) / "run" / "model"


def list_runs(folder: Path) -> list[JsonDict]:
    """The trainings that ended well, the latest first, each with its last comparison."""
    rows: list[JsonDict] = []
    for path in sorted(run_folder(folder, "").glob("run-*/run.json"), reverse=True):
        try:
            run = find_run(folder, path.parent.name)
        except ApiError:
            continue
        rows.append(asdict(run) | {"metrics": _read(path.with_name("comparison.json"))})
    return rows


def _run(values: object) -> TrainingRun:
    try:
        return TrainingRun(**values) if isinstance(values, dict) else TrainingRun("", "", 0, 0, 0)
    except TypeError:
        raise ApiError(400, "run: its run.json is damaged", param="run") from None


def _read(path: Path) -> object:
    """The content of a JSON file; None if there is none or it is damaged."""
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None
