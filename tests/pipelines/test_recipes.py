"""Every recipe that ships runs, starts at the value of chance, and moves what it says it trains."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file

import sightread
from sightread.data.world import world, write_world
from sightread.errors import UsageError
from sightread.pipelines.recipes import RECIPES
from sightread.pipelines.run_events import Ended, Stepped
from sightread.pipelines.train import train

SMALL = (
    "data.batch=8",
    "data.augment.randaugment=null",
    "data.max_tokens=20",
    "model.words=600",
    "steps=3",
    "teacher.queue=0",
    "schedule.warmup_steps=0",
)
START_FROM_NOTHING = {
    "blip_pretrain": "world",
    "clip_pretrain": "world-clip",
    "siglip_pretrain": "world-sigmoid",
    "masked_pretrain": "world",
    "world": "world",
}


@pytest.fixture(scope="module")
def shard(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("world") / "train.tar"
    write_world(path, world("train", 24, seed=0))
    return path


@pytest.fixture(scope="module")
def started(shard: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A small model with all heads, for the recipes that fine-tune."""
    out = tmp_path_factory.mktemp("start") / "run"
    run("world", shard, out, "model.size=world")
    return str(out / "model")


def run(name: str, data: Path, out: Path, *settings: str) -> list[Any]:
    return list(train(name, str(data), out, settings=[*SMALL, *settings], device="cpu"))


@pytest.mark.parametrize("name", START_FROM_NOTHING)
def test_from_nothing(name: str, shard: Path, tmp_path: Path) -> None:
    events = run(name, shard, tmp_path / "run", f"model.size={START_FROM_NOTHING[name]}")
    first = next(event for event in events if isinstance(event, Stepped))
    assert set(first.chances) == {term for term, weight in RECIPES[name].terms.items() if weight}
    for term in set(first.chances) - {"siglip", "mim"}:  # a bias of -10, and pixels that are no noise
        assert first.values[term] == pytest.approx(first.chances[term], rel=0.2)
    assert isinstance(events[-1], Ended)
    sightread.load(tmp_path / "run" / "model")


@pytest.mark.parametrize("name", sorted(set(RECIPES) - set(START_FROM_NOTHING)))
def test_from_a_model(name: str, started: str, shard: Path, tmp_path: Path) -> None:
    if RECIPES[name].model.size:
        pytest.skip("starts from random weights at full size")
    data = shard
    if name == "classify":
        data = tmp_path / "classes"
        for index in range(8):
            place = data / ("light" if index % 2 else "dark")
            place.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.full((64, 64, 3), 200 * (index % 2) + index, np.uint8)).save(
                place / f"{index}.png"
            )
    events = run(name, data, tmp_path / "run", f"model.start={started}")
    assert [event.step for event in events if isinstance(event, Stepped)] == [1, 2, 3]
    before, after = (
        load_file(Path(folder) / "model.safetensors") for folder in (started, tmp_path / "run" / "model")
    )
    moved = {key for key in before if not before[key].equal(after[key])}
    assert bool(moved) == (name != "classify")  # the linear probe leaves the network alone


def test_another_picture_size(started: str, shard: Path, tmp_path: Path) -> None:
    """Positions are stretched: a fine-tuning at more pixels than the pre-training."""
    run("captioner", shard, tmp_path / "run", f"model.start={started}", "model.image_size=96")
    model = sightread.load(tmp_path / "run" / "model")
    assert model.image_spec.resize == (96, 96)
    assert len(model.caption(np.zeros((50, 70, 3), np.uint8))) == 1
    with pytest.raises(UsageError, match="multiple"):
        run("captioner", shard, tmp_path / "other", f"model.start={started}", "model.image_size=100")


def test_a_vision_tower_from_another_checkpoint(started: str, shard: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    run("world", shard, out, "model.size=world", f"model.vision={started}", 'model.frozen=["vision"]')
    ours, theirs = (
        load_file(out / "model" / "model.safetensors"),
        load_file(Path(started) / "model.safetensors"),
    )
    assert all(ours[key].equal(theirs[key]) for key in ours if key.startswith("vision."))


def test_lora_is_merged_into_the_result(started: str, shard: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    run("captioner", shard, out, f"model.start={started}", 'model.lora=["decoder.text.blocks.*"]', "optimiser.lr=0.01")
    before, after = (load_file(Path(folder) / "model.safetensors") for folder in (started, out / "model"))
    assert set(before) == set(after)
    moved = {key for key in before if not before[key].equal(after[key])}
    assert moved
    assert all(key.startswith(("decoder.", "encoder.")) for key in moved)  # encoder: modules that both share
    assert "caption" in sightread.load(out / "model").capabilities
