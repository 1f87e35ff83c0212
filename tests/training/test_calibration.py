"""Calibration of the ITM threshold on held-out pairs."""

from __future__ import annotations

from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import sightloop
from sightloop.data.copies.learned_images import DIGESTS_FILE
from sightloop.data.datasets.dataset import open_dataset
from sightloop.data.datasets.synthetic import synthetic_world, write_synthetic_world
from sightloop.errors import UnsupportedError, UsageError
from sightloop.metrics.matching import matching_scores
from sightloop.nn.prepack import unpack
from sightloop.training.calibration import (
    calibrate,
    learned_digests,
    split_held_out,
)
from sightloop.training.events import Calibrated, RunEnded, RunStarted, StepDone, WarningRaised
from sightloop.training.trainer import train
from tests.tiny_checkpoints.clip_and_blip import write_blip


@pytest.fixture(scope="module")
def shard(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("world") / "train.tar"
    write_synthetic_world(path, synthetic_world("train", 100, seed=0, different=True))
    return path


@pytest.fixture(scope="module")
def unseen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("world") / "unseen.tar"
    write_synthetic_world(path, synthetic_world("unseen", 24, seed=1, different=True))
    return path


def run(shard: Path, out: Path, *settings: str, **options: Any) -> list[Any]:
    given = ["data.batch=8", "teacher.momentum=0", "terms.lm=0", "terms.vqa=0", "steps=4", "save_every=2"]
    return list(train("world", str(shard), out, settings=[*given, "calibrate=true", *settings], **options))


def one(events: list[Any], kind: type) -> Any:
    (found,) = [event for event in events if isinstance(event, kind)]
    return found


def test_the_held_out_images_depend_on_their_keys_alone(shard: Path) -> None:
    whole = open_dataset(shard)
    rest, held = split_held_out(whole)
    assert (len(rest), len(held)) == (75, 25)
    mine = {held.key(i) for i in range(25)}
    assert {rest.key(i) for i in range(75)} | mine == {whole.key(i) for i in range(100)}
    assert [rest.key(i) for i in range(75)] == [key for key in map(whole.key, range(100)) if key not in mine]
    turned = split_held_out(whole.select(range(99, -1, -1)))[1]
    assert {turned.key(i) for i in range(25)} == mine
    assert len(split_held_out(whole.select(range(79)))[1]) == 0


def test_images_learned_before_are_left_out(shard: Path, tmp_path: Path) -> None:
    _, held = split_held_out(open_dataset(shard))
    known = list(held.image_digests())
    assert one(run(shard, tmp_path / "one"), Calibrated).images == 25
    start = tmp_path / "one" / "model"
    (start / DIGESTS_FILE).write_bytes(b"".join(known[:4]))
    assert learned_digests(str(start)) == frozenset(known[:4])
    calibrated = one(run(shard, tmp_path / "two", f"model.init_from={start}"), Calibrated)
    assert (calibrated.images, calibrated.start) == (21, "")

    (start / DIGESTS_FILE).write_bytes(b"".join(known))
    out = tmp_path / "three"
    calibrated = one(run(shard, out, f"model.init_from={start}"), Calibrated)
    assert (calibrated.images, calibrated.start) == (25, str(start))
    assert "has learned from the 25 images" in calibrated.summary()
    samples = [held[i] for i in range(25)]
    order = sorted(samples, key=lambda sample: blake2b(sample.key.encode(), digest_size=8).digest())
    wrong = [
        (other.image, text)
        for sample, other in zip(order, [*order[1:], *order[:1]], strict=True)
        for text in sample.captions
        if text not in other.captions
    ]
    dropped = [
        float((sightloop.load(model, device="cpu").match(*zip(*wrong, strict=True)) < 0.5).mean())
        for model in (start, out / "model")
    ]
    assert dropped[0] == pytest.approx(dropped[1], abs=1.5 / len(wrong))
    assert dropped[1] == pytest.approx(calibrated.after["dropped"], abs=1.5 / len(wrong))


def test_the_threshold_balances_true_and_false_pairs(shard: Path, tmp_path: Path) -> None:
    write_blip(tmp_path / "match", head="match")
    model = sightloop.load(tmp_path / "match", device="cpu")
    unpack(model.network)
    before = model.network.match_head.bias.tolist()
    calibrated = calibrate(model, open_dataset(shard), 40, (7, "there"))
    assert calibrated is not None
    assert (calibrated.step, calibrated.data, calibrated.images) == (7, "there", 40)
    assert abs(calibrated.after["kept"] - calibrated.after["dropped"]) <= 2 / 40
    now = model.network.match_head.bias.tolist()
    assert now[0] == before[0]
    assert now[1] != before[1]
    samples = list(open_dataset(shard))[:40]
    pairs = [(s.image, text) for s in samples for text in s.captions]
    kept = model.match([image for image, _ in pairs], [text for _, text in pairs]) >= 0.5
    assert kept.mean() == pytest.approx(calibrated.after["kept"], abs=1 / len(pairs))
    again = calibrate(model, open_dataset(shard), 40, (7, "there"))
    assert again is not None
    assert again.before == pytest.approx(calibrated.after, abs=1 / len(pairs))
    assert again.area == pytest.approx(calibrated.area)
    assert model.network.match_head.bias.tolist() == pytest.approx(now, abs=1e-5)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_weight_of_the_cosine_has_the_largest_roc_area(shard: Path, tmp_path: Path, seed: int) -> None:
    write_blip(tmp_path / "match", head="match", seed=seed)
    model = sightloop.load(tmp_path / "match", device="cpu")
    unpack(model.network)
    samples = list(open_dataset(shard))[:40]
    order = sorted(range(40), key=lambda i: blake2b(samples[i].key.encode(), digest_size=8).digest())
    other = {i: order[(place + 1) % 40] for place, i in enumerate(order)}
    pairs = [(i, text, True) for i, sample in enumerate(samples) for text in sample.captions]
    pairs += [(other[i], text, False) for i, text, _ in pairs if text not in samples[other[i]].captions]
    images, texts, match = (
        [samples[i].image for i, _, _ in pairs],
        [t for _, t, _ in pairs],
        [m for *_, m in pairs],
    )
    probability = model.match(images, texts).astype(float)
    odds = np.log(probability) - np.log1p(-probability)
    cosines = np.diagonal(model.similarity(images, texts)).astype(float)
    areas = {
        w: matching_scores(odds + w * cosines, match, logits=True)["roc_auc"] for w in (0, 5, 10, 20, 40)
    }
    calibrated = calibrate(model, open_dataset(shard), 40, (1, ""))
    assert calibrated is not None
    assert calibrated.area == pytest.approx(max(areas.values()), abs=2e-4)
    assert areas[int(calibrated.cosine)] == pytest.approx(max(areas.values()), abs=2e-4)
    now = model.match(images, texts).astype(float)
    both = odds + calibrated.cosine * cosines
    threshold = both[now >= 0.5].min()
    assert (both[now < 0.5] < threshold + 1e-3).all()
    near = np.argmin(np.abs(now - 0.5))  # where the threshold is calibrated most exactly
    expected = 1 / (1 + np.exp(both[near] - both - np.log(now[near] / (1 - now[near]))))
    assert now == pytest.approx(expected, abs=1e-3)
    # However the texts are grouped, and after a way to the disk.
    model.save(tmp_path / "own")
    again = sightloop.load(tmp_path / "own", device="cpu")
    assert again.network.config.match_cosine == calibrated.cosine
    mine = [i for i, (image, _, _) in enumerate(pairs) if image == 0]
    assert len(mine) > 1
    one = again.match(samples[0].image, [texts[i] for i in mine])
    assert one == pytest.approx(now[mine], abs=1e-4)
    if calibrated.cosine:
        with pytest.raises(UnsupportedError, match="ITC's cosine"):
            model.save(tmp_path / "theirs", layout="transformers")


def test_a_run_holds_images_out_and_sets_the_threshold(shard: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    events = run(shard, out)
    calibrated = one(events, Calibrated)
    assert one(events, RunStarted).samples == 75
    assert (calibrated.images, calibrated.data, calibrated.step) == (25, "", 4)
    assert abs(calibrated.after["kept"] - calibrated.after["dropped"]) <= 2 / 25
    learned = load_file(out / "checkpoints" / "step-000004" / "state.safetensors")
    result = load_file(out / "model" / "model.safetensors")
    moved = learned["network.match_head.bias"] - result["match_head.bias"]
    assert moved[0] == 0
    assert moved[1] != 0
    assert torch.equal(learned["network.match_head.weight"], result["match_head.weight"])
    assert "kept out of the training" in calibrated.summary()
    assert f"0.5 keeps {calibrated.after['kept']:.1%}" in (out / "report.html").read_text()

    cut = tmp_path / "cut"
    run(shard, cut, stop_after=2)
    assert [event.step for event in run(shard, cut) if isinstance(event, StepDone)] == [3, 4]
    again = load_file(cut / "model" / "model.safetensors")
    assert all(torch.equal(again[name], result[name]) for name in result)
    log = (out / "metrics.jsonl").read_text().splitlines()
    assert one(run(shard, out), Calibrated) == calibrated
    assert len((out / "metrics.jsonl").read_text().splitlines()) == len(log)


def test_evaluation_data_is_used_for_calibration(shard: Path, unseen: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    events = run(shard, out, f"evaluation.data={unseen}")
    calibrated = one(events, Calibrated)
    assert one(events, RunStarted).samples == 100
    assert (calibrated.images, calibrated.data) == (24, str(unseen))
    with pytest.raises(UsageError, match=r"evaluation\.data"):
        run(shard, out)  # it would learn from fewer images


def test_too_few_images_are_a_warning(unseen: Path, tmp_path: Path) -> None:
    events = run(unseen, tmp_path / "run")
    assert one(events, RunStarted).samples == 24
    assert [event.about for event in events if isinstance(event, WarningRaised)][-1:] == ["calibration"]
    assert isinstance(events[-1], RunEnded)


def test_without_itm_there_is_no_calibration(shard: Path, tmp_path: Path) -> None:
    events = run(shard, tmp_path / "run", "terms.itm=0", "terms.itc=0", "terms.lm=1")
    assert one(events, RunStarted).samples == 100
    assert not [event for event in events if isinstance(event, Calibrated)]
    assert not [e for e in events if isinstance(e, WarningRaised) and e.about == "calibration"]
