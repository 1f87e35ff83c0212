"""The training loop: bit-equal after a kill, the same for any number of processes; wrong settings are refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import sightloop
from sightloop.data.datasets.convert import convert
from sightloop.data.datasets.synthetic import synthetic_world, write_synthetic_world
from sightloop.errors import UsageError
from sightloop.training.config import EvaluationSettings, apply_settings, from_json, to_json
from sightloop.training.events import Evaluated, RunEnded, SampleSkipped, StepDone
from sightloop.training.model_sizes import SIZES
from sightloop.training.recipes import RECIPES, find_recipe
from sightloop.training.trainer import train
from sightloop.training.validation import validate
from tests.forked import Ranks
from tests.training.run_ranks import record_samples, train_until_killed

# All of BLIP's pre-training, small: teacher, a queue that wraps around, augmentation, hard negatives, answers.
SMALL = (
    "data.batch=12",
    "data.augment.randaugment=[2, 5]",
    "teacher.queue=40",
    "teacher.momentum=0.9",
    "steps=16",
    "save_every=7",
    "schedule.warmup_steps=5",
)


@pytest.fixture(scope="module")
def shard(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("world") / "train.tar"
    write_synthetic_world(path, synthetic_world("train", 60, seed=0))
    return path


def run(shard: Path, out: Path, *settings: str, **options: Any) -> list[Any]:
    return list(train("world", str(shard), out, settings=[*SMALL, *settings], device="cpu", **options))


def weights(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "model" / "model.safetensors")


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return set(a) == set(b) and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture(scope="module")
def whole(shard: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Any]]:
    out = tmp_path_factory.mktemp("whole") / "run"
    return out, run(shard, out)


def test_a_killed_run_resumes_bit_equal(whole: tuple[Path, list[Any]], shard: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    # Sums are the same bits for one number of threads.
    arguments = (str(shard), str(out), SMALL, 10)  # three steps behind the checkpoint of step 7
    Ranks(train_until_killed, arguments, tmp_path / "log", 1, torch.get_num_threads()).die()
    assert not (out / "model").exists()
    events = run(shard, out)
    steps = [event.step for event in events if isinstance(event, StepDone)]
    assert steps == list(range(8, 17))
    assert equal(weights(out), weights(whole[0]))
    uninterrupted = load_file(whole[0] / "checkpoints" / "step-000016" / "state.safetensors")
    assert equal(load_file(out / "checkpoints" / "step-000016" / "state.safetensors"), uninterrupted)
    assert any(name.startswith("teacher.") for name in uninterrupted)
    assert any(name.startswith("queue.") for name in uninterrupted)

    def losses(folder: Path) -> list[float]:
        lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
        return [line["loss"] for line in lines if line["kind"] == "step"]

    assert losses(out) == losses(whole[0])


def test_running_statistics_are_resumed_too(
    shard: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stem with batch norm has means and variances, which are buffers."""
    family, config = SIZES["world"]
    vision = replace(config.vision, stem_norm="batch")
    monkeypatch.setitem(SIZES, "world", (family, replace(config, vision=vision)))
    small = (
        "ema=0.9",
        "model.vocab_size=300",
        "data.batch=6",
        "data.cache=0",
        "steps=4",
        "save_every=2",
    )

    def learn(out: Path, last: int) -> None:
        for event in train("world", str(shard), out, settings=list(small), device="cpu"):
            if isinstance(event, StepDone) and event.step == last:
                return

    learn(tmp_path / "whole", 9)
    learn(tmp_path / "parts", 3)
    assert not (tmp_path / "parts" / "model").exists()
    learn(tmp_path / "parts", 9)
    once, twice = weights(tmp_path / "whole"), weights(tmp_path / "parts")
    assert any("running_mean" in name for name in once)
    assert equal(once, twice)


def test_the_result_is_the_network_of_the_last_step(whole: tuple[Path, list[Any]]) -> None:
    out, events = whole
    assert sightloop.load(out / "model").capabilities >= {"caption", "answer", "match", "embed"}
    stored = load_file(out / "checkpoints" / "step-000016" / "state.safetensors")
    result = weights(out)
    assert len(result) > 50
    for name, tensor in result.items():
        assert torch.equal(tensor, stored[f"network.{name}"])
    assert isinstance(events[-1], RunEnded)
    assert (events[-1].step, events[-1].folder) == (16, out / "model")


def test_a_finished_run_takes_no_step(whole: tuple[Path, list[Any]], shard: Path) -> None:
    before = weights(whole[0])
    assert not [event for event in run(shard, whole[0]) if isinstance(event, StepDone)]
    assert equal(before, weights(whole[0]))


def test_two_runs_in_one_folder_are_refused(
    whole: tuple[Path, list[Any]], shard: Path, tmp_path: Path
) -> None:
    first = train("world", str(shard), tmp_path / "run", settings=SMALL, device="cpu")
    while not isinstance(next(first), StepDone):
        pass
    with pytest.raises(UsageError, match=r"run: another process is working on it now"):
        run(shard, tmp_path / "run")
    list(first)
    run(shard, tmp_path / "run")
    assert equal(weights(whole[0]), weights(tmp_path / "run"))


def test_another_recipe_or_other_data_is_refused(
    whole: tuple[Path, list[Any]], shard: Path, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=r"optimizer\.lr: 0\.001, now 0\.5"):
        run(shard, whole[0], "optimizer.lr=0.5")
    other = tmp_path / "other.tar"
    write_synthetic_world(other, synthetic_world("train", 30, seed=5))
    with pytest.raises(UsageError, match="other data"):
        run(other, whole[0])


def ranks(
    world_size: int, shard: Path, out: Path, *settings: str
) -> list[tuple[list[int], dict[str, float]]]:
    """Each step's sample ids in global order, and the values that the first process reports."""
    arguments = (str(shard), str(out), [*SMALL, "steps=6", *settings])
    Ranks(record_samples, arguments, out, world_size).finish()
    parts = [json.loads((out / f"rank-{rank}.json").read_text()) for rank in range(world_size)]
    return [
        ([i for part in parts for i in part[step][0]], parts[0][step][1]) for step in range(len(parts[0]))
    ]


UNEVEN = (
    "data.batch=10",
    "hard_negatives=0.5",
    "data.caption_dropout=0.2",
)  # 10 rows: uneven parts for 3 and 4
PLAIN = ("teacher.momentum=0", "teacher.queue=0", "data.texts=2")  # no momentum teacher, all captions read


@pytest.fixture(scope="module")
def alone(shard: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, ...], Any]:
    """By settings, the run of one process."""
    out = tmp_path_factory.mktemp("alone")
    return {how: ranks(1, shard, out / str(len(how)), *UNEVEN, *how) for how in ((), PLAIN)}


@pytest.mark.parametrize(("count", "how"), [(2, ()), (3, ()), (4, ()), (3, PLAIN)])
def test_any_number_of_processes_means_the_same(
    count: int, how: tuple[str, ...], alone: dict[tuple[str, ...], Any], shard: Path, tmp_path: Path
) -> None:
    many = ranks(count, shard, tmp_path / "many", *UNEVEN, *how)
    for (ids, values), (their_ids, theirs) in zip(alone[how], many, strict=True):
        assert ids == their_ids
        for name in ("itc", "itm", "lm", "vqa"):
            assert theirs[name] == pytest.approx(values[name], abs=1e-5)


@pytest.mark.parametrize("how", [(), PLAIN])
def test_micro_batches_of_images_some_without_captions(
    how: tuple[str, ...], shard: Path, tmp_path: Path
) -> None:
    convert(shard, tmp_path / "all.jsonl")
    rows = [json.loads(line) for line in (tmp_path / "all.jsonl").read_text().splitlines()]
    for row in rows[::3]:
        del row["captions"]
    (tmp_path / "some.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    losses = [
        [
            event.loss
            for event in run(
                tmp_path / "some.jsonl", tmp_path / str(chunk), f"data.micro_batch={chunk}", "steps=2", *how
            )
            if isinstance(event, StepDone)
        ]
        for chunk in (0, 5)
    ]
    assert np.allclose(losses[0], losses[1], rtol=1e-4)


def test_micro_batches_change_rounding_only(
    whole: tuple[Path, list[Any]], shard: Path, tmp_path: Path
) -> None:
    steps = [
        event
        for event in run(shard, tmp_path / "run", "data.micro_batch=5", "steps=6")
        if isinstance(event, StepDone)
    ]
    for ours, theirs in zip(steps, (e for e in whole[1] if isinstance(e, StepDone)), strict=False):
        assert ours.loss == pytest.approx(theirs.loss, abs=2e-4)


def test_a_broken_image_is_named_once(tmp_path: Path) -> None:
    from PIL import Image

    for index in range(8):
        Image.fromarray(np.full((64, 64, 3), index * 20, np.uint8)).save(tmp_path / f"{index}.png")
        (tmp_path / f"{index}.txt").write_text(f"shade number {index}")
    (tmp_path / "3.png").write_bytes(b"no image")
    out = tmp_path.with_name("run")
    events = list(
        train("world", str(tmp_path), out, settings=[*SMALL, "steps=4", "data.batch=8"], device="cpu")
    )
    skipped = [event for event in events if isinstance(event, SampleSkipped)]
    assert [Path(event.key).stem for event in skipped] == ["3"]


def test_the_evaluation_of_the_last_step_is_that_of_the_result(shard: Path, tmp_path: Path) -> None:
    unseen = tmp_path / "unseen.tar"
    write_synthetic_world(unseen, synthetic_world("unseen", 10, seed=1))
    settings = (f"evaluation.data={unseen}", "evaluation.every=2", "steps=4", "ema=0.9")
    events = run(shard, tmp_path / "run", *settings)
    evaluated = [event for event in events if isinstance(event, Evaluated)]
    assert [event.step for event in evaluated] == [0, 2, 4]
    best = max(evaluated[1:], key=lambda event: event.values["CIDEr"]).step
    assert (tmp_path / "run" / "checkpoints" / f"step-{best:06d}").is_dir()
    # The averaged weights are evaluated, and they are the result.
    model = sightloop.load(tmp_path / "run" / "model", device="cpu")
    values, texts, _ = validate(model, sightloop.open_dataset(unseen), EvaluationSettings())
    assert {
        "CIDEr",
        "text-to-image recall@1",
        "image-to-text recall@10",
        "ITM accuracy (hard)",
        "VQA exact match",
    } <= set(values)
    assert evaluated[-1].values == pytest.approx(values)
    assert evaluated[-1].texts == texts


@pytest.mark.parametrize(
    ("setting", "word"),
    [
        ("optimizer.lrr=1", "lr"),
        ("optimizer.lr=fast", "number"),
        ("data.batch=1.5", "whole"),
        ("nothing.at=1", "no such"),
        ("terms.itx=1", "itc"),
        ("terms.clip=1", "lacks"),
        ("precision=half", "float32"),
        ("data.batch", "name=value"),
        ("model.size=huge", "world"),
        ("ema=2", "ema"),
        ("hard_negatives=1.5", "from 0 to 1"),
        ("data.caption_dropout=1", "caption_dropout"),
    ],
)
def test_wrong_settings_are_refused_before_training(
    setting: str, word: str, shard: Path, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=word):
        run(shard, tmp_path / "run", setting)
    assert not (tmp_path / "run" / "checkpoints").exists()


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_survive_json(name: str) -> None:
    recipe = find_recipe(name)
    assert from_json(json.loads(json.dumps(to_json(recipe)))) == recipe
    assert apply_settings(recipe, ["seed=7"]).seed == 7


def test_two_runs_of_a_recipe_are_bit_equal(shard: Path, tmp_path: Path) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    run(shard, one, "steps=5")
    run(shard, other, "steps=5")
    assert equal(weights(one), weights(other))
