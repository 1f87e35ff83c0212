"""Every recipe that ships runs, starts at the value of chance, and moves what it says it trains."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file

import sightloop
from sightloop.apps.cli import main
from sightloop.data.datasets.synthetic import synthetic_world, write_synthetic_world
from sightloop.errors import UsageError
from sightloop.training.events import Evaluated, RunEnded, StepDone
from sightloop.training.recipes import RECIPES
from sightloop.training.trainer import train
from tests.tiny_checkpoints.clip_and_blip import write_clip

SMALL = (
    "data.batch=8",
    "data.augment.randaugment=null",
    "data.max_tokens=20",
    "model.vocab_size=600",
    "steps=3",
    "teacher.queue=0",
    "schedule.warmup_steps=0",
)
START_FROM_NOTHING = {
    "blip_pretrain": "world",
    "clip_pretrain": "world-clip",
    "siglip_pretrain": "world-siglip",
    "masked_pretrain": "world",
    "world": "world",
}


@pytest.fixture(scope="module")
def shard(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("world") / "train.tar"
    write_synthetic_world(path, synthetic_world("train", 24, seed=0, dialogues=True))
    return path


@pytest.fixture(scope="module")
def started(shard: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A small model with all heads, for the recipes that fine-tune."""
    out = tmp_path_factory.mktemp("start") / "run"
    run("world", shard, out, "model.size=world")
    return str(out / "model")


def light_and_dark(folder: Path, count: int) -> Path:
    """Two classes that are easy to tell apart, as folders."""
    for index in range(count):
        place = folder / ("light" if index % 2 else "dark")
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((64, 64, 3), 200 * (index % 2) + index, np.uint8)).save(
            place / f"{index}.png"
        )
    return folder


def run(name: str, data: Path, out: Path, *settings: str) -> list[Any]:
    return list(train(name, str(data), out, settings=[*SMALL, *settings], device="cpu"))


@pytest.mark.parametrize("name", START_FROM_NOTHING)
def test_from_nothing(name: str, shard: Path, tmp_path: Path) -> None:
    events = run(name, shard, tmp_path / "run", f"model.size={START_FROM_NOTHING[name]}")
    first = next(event for event in events if isinstance(event, StepDone))
    assert set(first.chances) == {term for term, weight in RECIPES[name].terms.items() if weight}
    for term in set(first.chances) - {"siglip", "mim"}:  # a bias of -10, and pixels that are no noise
        assert first.values[term] == pytest.approx(first.chances[term], rel=0.2)
    assert isinstance(events[-1], RunEnded)
    sightloop.load(tmp_path / "run" / "model")


# Those of other families: tests/models/test_blip2.py, tests/pipelines/test_{florence,paligemma,conversing}.py.
OTHERS = {"blip2_stage2", *(n for n in RECIPES if n.startswith(("florence", "paligemma", "llava")))}


@pytest.mark.parametrize("name", sorted(set(RECIPES) - {*START_FROM_NOTHING} - OTHERS))
def test_from_a_model(name: str, started: str, shard: Path, tmp_path: Path) -> None:
    if RECIPES[name].model.size:
        pytest.skip("starts from random weights at full size")
    data = shard
    if name == "classify":
        data = light_and_dark(tmp_path / "classes", 8)
    events = run(name, data, tmp_path / "run", f"model.init_from={started}")
    assert [event.step for event in events if isinstance(event, StepDone)] == [1, 2, 3]
    before, after = (
        load_file(Path(folder) / "model.safetensors") for folder in (started, tmp_path / "run" / "model")
    )
    moved = {key for key in before if not before[key].equal(after[key])}
    assert bool(moved) == (name != "classify")  # the linear probe leaves the network alone


def test_another_image_size(started: str, shard: Path, tmp_path: Path) -> None:
    """Positions are stretched: a fine-tuning at more pixels than the pre-training."""
    run("captioner", shard, tmp_path / "run", f"model.init_from={started}", "model.image_size=96")
    model = sightloop.load(tmp_path / "run" / "model")
    assert model.image_spec.resize == (96, 96)
    assert len(model.caption(np.zeros((50, 70, 3), np.uint8))) == 1
    with pytest.raises(UsageError, match="multiple"):
        run("captioner", shard, tmp_path / "other", f"model.init_from={started}", "model.image_size=100")


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
    run(
        "captioner",
        shard,
        out,
        f"model.init_from={started}",
        'model.lora=["decoder.text.blocks.*"]',
        "optimizer.lr=0.01",
    )
    before, after = (load_file(Path(folder) / "model.safetensors") for folder in (started, out / "model"))
    assert set(before) == set(after)
    moved = {key for key in before if not before[key].equal(after[key])}
    assert moved
    assert all(key.startswith(("decoder.", "encoder.")) for key in moved)  # encoder: modules that both share
    assert "caption" in sightloop.load(out / "model").capabilities


def test_lora_on_all_layers(started: str, shard: Path, tmp_path: Path) -> None:
    """Tied words are left out; what is saved has no trace of adapters."""
    out = tmp_path / "run"
    run("captioner", shard, out, f"model.init_from={started}", "model.lora=*", "optimizer.lr=0.01")
    before, after = (load_file(Path(folder) / "model.safetensors") for folder in (started, out / "model"))
    assert set(before) == set(after)
    moved = {key for key in before if not before[key].equal(after[key])}
    assert any(key.startswith("vision.") for key in moved)
    assert not any(key.endswith(("bias", "word.weight")) for key in moved)
    assert sightloop.load(out / "model").caption(np.zeros((64, 64, 3), np.uint8))
    # The adapter alone, merged into the model that the run started from, is that model too.
    sightloop.load(started, lora=out / "adapter").save(tmp_path / "merged")
    assert all(load_file(tmp_path / "merged" / "model.safetensors")[key].equal(after[key]) for key in after)
    with pytest.raises(UsageError, match="quantize"):
        sightloop.load(started, lora=out / "adapter", quantize="int8")


def test_a_folder_of_images_with_txt_files(started: str, shard: Path, tmp_path: Path, capsys) -> None:
    """Fine-tuning with one command."""
    photos = tmp_path / "photos"
    assert main.main(["convert", str(shard), str(photos)]) == 0
    assert len(list(photos.glob("*.txt"))) == 24
    command = ["train", "captioner", "--data", str(photos), "--out", str(tmp_path / "run"), "--device", "cpu"]
    settings = [f"model.init_from={started}", "data.batch=8", "epochs=1"]
    assert main.main([*command, "--set", *settings]) == 2  # three steps within a warm-up of ten
    assert "schedule.warmup_steps=10: the run has 3 steps" in capsys.readouterr().err
    assert main.main([*command, "--set", *settings, "schedule.warmup_steps=1"]) == 0
    assert "Finished 3 steps" in "".join(capsys.readouterr())
    assert sightloop.load(tmp_path / "run" / "model").caption(photos / "train-0-000000.png")


@pytest.fixture(scope="module")
def classifier(started: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, list[Any]]:
    """Images by class, a run that learned the classes, and what it said."""
    place = tmp_path_factory.mktemp("classes")
    data = light_and_dark(place / "data", 16)
    settings = [f"model.init_from={started}", "data.batch=8", "epochs=10", f"evaluation.data={data}"]
    return (
        data,
        place / "run",
        list(train("classify", str(data), place / "run", settings=settings, device="cpu")),
    )


def test_classes_that_were_learned(classifier: tuple[Path, Path, list[Any]], tmp_path: Path) -> None:
    data, out, events = classifier
    assert next(e for e in reversed(events) if isinstance(e, Evaluated)).values["top-1 accuracy"] == 1.0
    model = sightloop.load(out / "model", device="cpu")
    assert model.labels == ("dark", "light")
    images = [data / "dark" / "0.png", data / "light" / "1.png"]
    found = model.classify(images)
    assert found.argmax(1).tolist() == [0, 1]
    assert found.sum(1) == pytest.approx([1, 1], abs=1e-5)
    assert model.classify(images, ["a circle", "a star", "a ring"]).shape == (2, 3)  # zero-shot, as before

    model.save(tmp_path / "copy")
    assert np.array_equal(sightloop.load(tmp_path / "copy", device="cpu").classify(images), found)
    result = sightloop.evaluate("classify", data, model=out / "model", device="cpu", workers=1)
    assert dict(result)["top-1"] == 1.0
    assert "fine-tuned for these 2 classes" in result.runs[0].numbers[0].protocol


def test_classes_of_a_clip(classifier: tuple[Path, Path, list[Any]], tmp_path: Path) -> None:
    write_clip(tmp_path / "clip")
    run("classify", classifier[0], tmp_path / "run", f"model.init_from={tmp_path / 'clip'}")
    model = sightloop.load(tmp_path / "run" / "model", device="cpu")
    assert model.labels == ("dark", "light")
    assert model.classify(np.zeros((9, 9, 3), np.uint8)).shape == (1, 2)
    model.save(tmp_path / "theirs", layout="transformers")  # which has no place for the classes
    assert sightloop.load(tmp_path / "theirs", device="cpu").labels == ()


def test_classes_on_the_command_line(
    classifier: tuple[Path, Path, list[Any]], started: str, tmp_path: Path, capsys
) -> None:
    data, out, _ = classifier
    options = ["--device", "cpu", "--workers", "1"]
    assert main.main(["classify", str(data / "dark"), "-m", str(out / "model"), "--top", "1", *options]) == 0
    rows = capsys.readouterr().out.splitlines()
    assert len(rows) == 8
    assert all(row.split("\t")[1] == "dark" for row in rows)
    assert main.main(["classify", str(data), "-m", started, *options]) == 2
    assert "was not fine-tuned on classes" in capsys.readouterr().err
    with pytest.raises(UsageError, match="was not fine-tuned on classes"):
        sightloop.load(started, device="cpu").classify(data / "dark" / "0.png")


def test_classes_are_learned_on(
    classifier: tuple[Path, Path, list[Any]], shard: Path, tmp_path: Path
) -> None:
    """The same classes start from what was learned; another objective leaves them as they are."""
    data, out, _ = classifier
    again = run("classify", data, tmp_path / "again", f"model.init_from={out / 'model'}")
    assert (
        next(e for e in again if isinstance(e, StepDone)).loss < 0.5
    )  # ln 2 = 0.69 at the start of a new layer
    run("captioner", shard, tmp_path / "captioner", f"model.init_from={out / 'model'}")
    before, after = (load_file(f / "model" / "model.safetensors") for f in (out, tmp_path / "captioner"))
    assert before["classes.weight"].equal(after["classes.weight"])
