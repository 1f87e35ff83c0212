"""Detection as a target: what is to be written is what the verbs read, boxes follow the image, the loss falls."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import sightloop
from sightloop.data.datasets.synthetic import synthetic_world, write_synthetic_world
from sightloop.data.images.augment import Augment, sample_view
from sightloop.errors import UsageError
from sightloop.inference.regions import regions_of
from sightloop.metrics.detection import detection_not_computed
from sightloop.tasks.generate import Generation
from sightloop.tasks.region_parser import FORMATTERS
from sightloop.training.build import build_model
from sightloop.training.config import DataSettings, apply_settings
from sightloop.training.dataloader import BatchLoader
from sightloop.training.events import Evaluated, StepDone
from sightloop.training.recipes import RECIPES
from sightloop.training.trainer import train
from sightloop.types import Region
from tests.tiny_checkpoints.florence import write_florence
from tests.tiny_checkpoints.paligemma import PATCH, SIDE, write_paligemma

pytestmark = pytest.mark.filterwarnings("ignore:__array__:DeprecationWarning")
KINDS = {"florence": "boxes", "paligemma": "located"}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    folder = tmp_path_factory.mktemp("boxes")
    write_florence(folder / "florence", seed=1, text={"max_position_embeddings": 300})
    _, processor = write_paligemma(folder / "paligemma")
    write_synthetic_world(folder / "world.tar", synthetic_world("train", 16, seed=0))
    return folder, processor


def targets(
    folder: Path, family: str, dataset: Any, **data: Any
) -> tuple[Any, list[tuple[int, str, list[int], list[int]]]]:
    """The model, and for each text the sample, the prompt, its ids and those of the answer."""
    settings = DataSettings(**{"batch": 8, "texts": 0, "questions": 0, "regions": 9, "augment": None, **data})
    recipe = replace(RECIPES[f"{family}_detect"], data=settings)
    recipe = apply_settings(recipe, [f"model.init_from={folder / family}"])
    trainee = build_model(recipe, dataset, folder)
    feed = BatchLoader(
        dataset, settings, trainee.tokenizer, trainee.image_spec, 0, {}, prompts=trainee.prompts
    )
    (batch,) = feed.batches(0, 1)
    rows = batch.prompted
    assert rows is not None
    out: list[tuple[int, str, list[int], list[int]]] = []
    for ids, length, prompt, owner in zip(
        rows.ids, rows.lengths, rows.prompt_lengths, rows.image_rows, strict=True
    ):
        asked, said = ids[:prompt].tolist(), ids[prompt:length].tolist()
        text = trainee.tokenizer.decode([asked])[0]
        out.append((int(batch.sample_indices[int(owner)]), text, asked, said))
    return trainee, out


def table(folder: Path, **fields: Any) -> Any:
    """A dataset of black images, each with its fields."""
    rows: list[dict[str, Any]] = []
    for key, more in fields.items():
        Image.new("RGB", (20, 20)).save(folder / f"{key}.png")
        rows.append({"image": f"{key}.png", "key": key, **more})
    (folder / "d.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return sightloop.open_dataset(folder / "d.jsonl")


def scored(ids: list[int]) -> Generation:
    return Generation(ids, [0.0] * len(ids))


def in_order(regions: Sequence[Region]) -> list[Region]:
    names = list(dict.fromkeys(region.label for region in regions))
    return sorted(regions, key=lambda region: names.index(region.label))


@pytest.mark.parametrize("family", KINDS)
def test_targets_are_parsed_back_to_the_regions(family: str, made: tuple[Path, Any]) -> None:
    folder, processor = made
    dataset = sightloop.open_dataset(folder / "world.tar")
    trainee, found = targets(folder, family, dataset, max_tokens=200)
    assert len(found) == 8
    for index, text, asked, said in found:
        sample, prompts = dataset[index], trainee.prompts
        things = [(region.label, region.box) for region in sample.regions]
        written = "".join(FORMATTERS[KINDS[family]](things, (64, 64)))
        assert said[-1] == prompts.end_id
        if family == "florence":
            assert text == "Locate the objects with category name in the image."
            assert said[0] == 0
        else:
            names = " ; ".join(dict.fromkeys(label for label, _ in things))
            assert text == f"detect {names}\n"
            image = Image.new("RGB", (9, 9))
            each, image_id = (SIDE // PATCH) ** 2, trainee.network.config.image_id
            ids = [i for one in [*asked, *said] for i in [one] * (each if one == image_id else 1)]
            theirs = processor(images=image, text=f"<image>detect {names}", suffix=written)
            assert ids == theirs["input_ids"][0]
        body = said[family == "florence" : -1]
        regions = regions_of(trainee.tokenizer, KINDS[family], scored(body), (64, 64), "")
        wanted = in_order(sample.regions) if family == "florence" else sample.regions
        assert [one.label for one in regions] == [one.label for one in wanted]
        for one, other in zip(regions, wanted, strict=True):
            assert np.allclose(one.box, other.box, atol=1.1 if family == "florence" else 0.07)


def test_boxes_follow_the_augmentation(made: tuple[Path, Any]) -> None:
    folder, _ = made
    dataset = sightloop.open_dataset(folder / "world.tar")
    options = Augment(scale=(0.3, 0.8), randaugment=None)
    for cache in (0, 32):  # kept at half its size
        trainee, found = targets(folder, "paligemma", dataset, max_tokens=200, augment=options, cache=cache)
        side, lost = 32 if cache else 64, 0
        for index, _, _, said in found:
            sample = dataset[index]
            texts = [*sample.captions, *(q.question for q in sample.questions)]
            texts += [region.label for region in sample.regions]
            view = sample_view((side, side), options, seed=0, epoch=0, key=sample.key, texts=texts)
            scaled = [[edge * side / 64 for edge in region.box] for region in sample.regions]
            boxes = [view.map_box((a, b, c, d)) for a, b, c, d in scaled]
            lost += boxes.count(None)
            shown = [box for box in boxes if box is not None]
            regions = regions_of(trainee.tokenizer, "located", scored(said[:-1]), view.size, "")
            assert len(regions) == len(shown)
            for one, box in zip(regions, shown, strict=True):
                assert np.allclose(one.box, box, atol=0.07)
        assert lost


def test_fixed_classes_and_truncation(made: tuple[Path, Any], tmp_path: Path) -> None:
    folder, _ = made
    regions = [{"label": f"dog {i}", "box": [i, i, i + 2, i + 2]} for i in range(8)]
    dataset = table(tmp_path, many={"regions": regions}, none={})
    trainee, found = targets(folder, "paligemma", dataset, batch=2, classes=("dog 3", "dog 5", "cat"))
    said = {dataset[i].key: (text, trainee.tokenizer.decode([ids])[0]) for i, text, _, ids in found}
    assert said["none"] == ("detect dog 3 ; dog 5 ; cat\n", "")
    assert said["many"][1].endswith("dog 5")
    assert len(found) == 2
    trainee, found = targets(folder, "florence", dataset, batch=2, regions=5, max_tokens=30)
    (one,) = found  # an image without things teaches nothing
    body = one[3][1:-1]
    kept = regions_of(trainee.tokenizer, "boxes", scored(body), (20, 20), "")
    assert 1 <= len(kept) < 5
    assert len(one[3]) <= 31
    assert all(region.box[2] > region.box[0] for region in kept)
    trainee, found = targets(folder, "florence", dataset, batch=2, regions=3, max_tokens=200)
    assert len(found[0][3]) > 2 + 3 * 4


def test_samples_that_cannot_be_learned_are_named(made: tuple[Path, Any], tmp_path: Path) -> None:
    folder, _ = made
    dataset = table(
        tmp_path,
        good={"regions": [{"label": "dog", "box": [1, 1, 9, 9]}]},
        nameless={"regions": [{"label": " <>", "box": [1, 1, 9, 9]}]},
        ends={"captions": ["a </s> b"]},
        shows={"qa": [{"question": "an <image>?", "answer": "yes"}]},
    )
    settings = DataSettings(batch=4, regions=9, augment=None)
    recipe = apply_settings(RECIPES["florence_detect"], [f"model.init_from={folder / 'florence'}"])
    trainee = build_model(recipe, dataset, folder)
    feed = BatchLoader(
        dataset, settings, trainee.tokenizer, trainee.image_spec, 0, {}, prompts=trainee.prompts
    )
    (batch,) = feed.batches(0, 1)
    assert batch.keys == ("good",)
    assert {key for key, _ in batch.skipped} == {"nameless", "ends", "shows"}


@pytest.mark.parametrize("family", KINDS)
def test_it_learns(family: str, made: tuple[Path, Any], tmp_path: Path) -> None:
    folder, _ = made
    settings = [
        f"model.init_from={folder / family}", "steps=10", "data.batch=6", "optimizer.lr=3e-3", "data.max_tokens=90",
        "schedule.warmup_steps=0", "data.augment.randaugment=null", f"evaluation.data={folder / 'world.tar'}",
        "evaluation.samples=2", "evaluation.leaks=false",
    ]  # fmt: skip
    out, data = tmp_path / "run", str(folder / "world.tar")
    events = list(train(f"{family}_detect", data, out, settings=settings, device="cpu"))
    losses = [event.loss for event in events if isinstance(event, StepDone)]
    (_, checked) = (event for event in events if isinstance(event, Evaluated))  # the first is of the start
    assert detection_not_computed() or 0 <= checked.values["mAP"] <= checked.values["mAP@0.5"] <= 1
    assert sum(losses[-3:]) < 0.9 * sum(losses[:3])
    model = sightloop.load(out / "model", device="cpu")
    names = None if family == "florence" else ["red circle"]
    assert len(model.detect([Image.new("RGB", (9, 9))] * 2, names, max_new_tokens=9)) == 2


@pytest.mark.parametrize(
    ("recipe", "settings", "reason"),
    [
        ("florence_detect", ["data.augment.randaugment=[1,5]"], "RandAugment"),
        ("captioner", ["data.regions=3"], "only the objective `prompted`"),
        ("florence_detect", ["data.regions=0"], "at least 1"),
        ("florence_detect", ["data.regions=-1"], "below 0"),
        ("florence_detect", ["data.classes=cat", "schedule.warmup_steps=0"], "data.classes"),
        ("llava", ["data.regions=2", "schedule.warmup_steps=0"], "data.regions: .*llava"),
    ],
)
def test_settings_that_do_not_fit_are_refused(
    recipe: str, settings: list[str], reason: str, made: tuple[Path, Any], tmp_path: Path
) -> None:
    folder, _ = made
    start = folder / "florence"
    if recipe == "llava":
        from tests.tiny_checkpoints.llava import LLAVA_15, write_llava

        start = tmp_path / "llava"
        write_llava(start, tiled=False, template=LLAVA_15)
    with pytest.raises(UsageError, match=reason):
        list(
            train(
                recipe,
                str(folder / "world.tar"),
                tmp_path / "run",
                settings=[f"model.init_from={start}", *settings],
            )
        )
