"""nano's recipes: what ships is the network that was trained."""

from __future__ import annotations

import re
import runpy
from dataclasses import replace
from hashlib import blake2b
from pathlib import Path
from typing import Any

import pytest
import torch

import sightloop
from sightloop.data.datasets.synthetic import synthetic_world, write_synthetic_world
from sightloop.data.images.augment import Augment
from sightloop.errors import UsageError
from sightloop.models.blip import Blip
from sightloop.protocols import require
from sightloop.training.calibration import learned_digests
from sightloop.training.events import StepDone
from sightloop.training.features import cache_features
from sightloop.training.model_sizes import SIZES
from sightloop.training.trainer import train
from tests.rules import REPOSITORY


def test_the_packed_model_has_the_calibrated_threshold(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "train.tar"
    write_synthetic_world(data, synthetic_world("train", 60, seed=0))
    settings = ["data.batch=8", "model.vocab_size=300", "model.image_size=32", "steps=2", "precision=float32"]
    list(train("nano", str(data), tmp_path / "run", settings=settings, device="cpu"))
    main: Any = runpy.run_path(str(REPOSITORY / "recipes" / "nano" / "pack.py"))["main"]
    main(str(tmp_path / "run" / "model"), str(tmp_path / "nano"), str(data), str(data))
    assert {path.name for path in (tmp_path / "nano").iterdir()} == {
        "config.json",
        "learned.bin",
        "model.safetensors",
        "vocab.txt",
        "tokenizer_config.json",
    }
    assert len(learned_digests(str(tmp_path / "nano"))) == 60
    packed = sightloop.load(tmp_path / "nano", device="cpu")
    samples = list(sightloop.open_dataset(data))
    order = sorted(samples, key=lambda sample: blake2b(sample.key.encode(), digest_size=8).digest())
    true = [(sample.image, text) for sample in samples for text in sample.captions]
    false = [
        (other.image, text)
        for sample, other in zip(order, [*order[1:], *order[:1]], strict=True)
        for text in sample.captions
        if text not in other.captions
    ]
    kept, taken = (
        packed.match([image for image, _ in pairs], [text for _, text in pairs]) >= 0.5
        for pairs in (true, false)
    )
    # A network that has learned nothing gives nearly equal logits, which half precision moves past each other.
    assert kept.mean() == pytest.approx(1 - taken.mean(), abs=6 / len(true))
    shares = re.search(r"keeps ([\d.]+)% .* drops ([\d.]+)% ", capsys.readouterr().out)
    assert shares is not None
    assert [float(share) / 100 for share in shares.groups()] == pytest.approx(
        [kept.mean(), 1 - taken.mean()], abs=6 / len(true)
    )


def test_a_mean_of_two_runs(tmp_path: Path) -> None:
    data = tmp_path / "train.tar"
    write_synthetic_world(data, synthetic_world("train", 20, seed=0))
    settings = ["data.batch=4", "model.vocab_size=300", "model.image_size=32", "steps=1", "precision=float32"]
    for seed in "01":
        run = [*settings, f"seed={seed}"]
        list(train("nano", str(data), tmp_path / seed, settings=run, device="cpu"))
    names = [str(tmp_path / seed / "model") for seed in "01"]
    main: Any = runpy.run_path(str(REPOSITORY / "recipes" / "nano" / "average.py"))["main"]
    main(str(tmp_path / "mean"), [0.25, 0.75], names)
    first, second, mean = (sightloop.load(name, device="cpu").network for name in (*names, tmp_path / "mean"))
    ours, theirs, found = (net.vision.trunk.stem.weight for net in (first, second, mean))
    torch.testing.assert_close(found, 0.25 * ours + 0.75 * theirs)


def test_cached_features_train_as_images_do(tmp_path: Path) -> None:
    data = tmp_path / "train.tar"
    write_synthetic_world(data, synthetic_world("train", 12, seed=0))
    settings = ["data.batch=4", "model.vocab_size=300", "model.image_size=32", "steps=2", "precision=float32"]
    settings += ['model.frozen=["vision.trunk.*"]', "data.augment=null", "ema=0", "model.dropout=0"]
    plain = list(train("nano", str(data), tmp_path / "plain", settings=settings, device="cpu"))
    model = sightloop.load(tmp_path / "plain" / "model", device="cpu")
    trunk, spec = require(model.network, Blip).vision.trunk, model.image_spec
    samples, folder = sightloop.open_dataset(data), tmp_path / "features"
    for part in (samples.select(range(5)), samples):  # the second call goes on
        assert list(cache_features(trunk, spec, part, folder, views=1, options=Augment()))[-1] == len(part)
    settings.append(f'data.features=["{folder}"]')
    cached = list(train("nano", str(data), tmp_path / "cached", settings=settings, device="cpu"))
    ours, theirs = ([e.loss for e in events if isinstance(e, StepDone)] for events in (plain, cached))
    assert ours == pytest.approx(theirs, rel=2e-3)


def test_features_that_are_not_there_are_named(tmp_path: Path) -> None:
    data = tmp_path / "train.tar"
    write_synthetic_world(data, synthetic_world("train", 6, seed=0))
    settings = ["data.batch=4", "model.vocab_size=300", f'data.features=["{tmp_path / "none"}"]']
    with pytest.raises(UsageError, match="holds no features"):
        list(train("nano", str(data), tmp_path / "run", settings=settings, device="cpu"))


def test_chunks_are_refused_where_batch_norm_would_see_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    family, config = SIZES["world"]
    vision = replace(config.vision, stem_norm="batch")
    monkeypatch.setitem(SIZES, "world", (family, replace(config, vision=vision)))
    write_synthetic_world(tmp_path / "train.tar", synthetic_world("train", 8, seed=0))
    with pytest.raises(UsageError, match=r"data\.micro_batch: world has batch norm"):
        list(
            train(
                "world",
                str(tmp_path / "train.tar"),
                tmp_path / "out",
                settings=["data.micro_batch=2", "data.batch=4", "model.vocab_size=300", "steps=300"],
                device="cpu",
            )
        )
