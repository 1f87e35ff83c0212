"""nano's recipes: what ships is the network that was trained."""

from __future__ import annotations

import re
import runpy
from hashlib import blake2b
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import sightloop
from sightloop.data.datasets.synthetic import synthetic_world, write_synthetic_world
from sightloop.data.images.preprocess import normalize, preprocess
from sightloop.errors import UsageError
from sightloop.models.blip import Blip
from sightloop.nn.init import initialize
from sightloop.training.calibration import learned_digests
from sightloop.training.model_sizes import SIZES
from sightloop.training.trainer import train
from sightloop.types import ImageSpec
from tests.rules import REPOSITORY


def test_fixed_norms_compute_what_batch_norms_did() -> None:
    fixed: Any = runpy.run_path(str(REPOSITORY / "recipes" / "nano" / "pack.py"))["fixed"]
    config: Any = SIZES["blip-nano"][1]
    network = Blip(config)
    initialize(network, 0)
    pixels = torch.randn(4, 3, config.vision.image_size, config.vision.image_size)
    with torch.no_grad():
        for _ in range(3):
            network.train().encode_image(
                pixels + 1
            )  # statistics far from the mean 0, deviation 1 of the start
        wanted = network.eval().encode_image(pixels).tokens
        shipped = fixed(network)
        found = shipped.encode_image(pixels).tokens
    assert not any(isinstance(part, nn.BatchNorm2d) for part in shipped.modules())
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


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
    assert kept.mean() == pytest.approx(1 - taken.mean(), abs=2 / len(true))
    shares = re.search(r"keeps ([\d.]+)% .* drops ([\d.]+)% ", capsys.readouterr().out)
    assert shares is not None
    assert [float(share) / 100 for share in shares.groups()] == pytest.approx(
        [kept.mean(), 1 - taken.mean()], abs=2 / len(true)
    )


def test_a_mean_has_statistics_of_its_own(tmp_path: Path) -> None:
    data = tmp_path / "train.tar"
    write_synthetic_world(data, synthetic_world("train", 100, seed=0))
    settings = ["data.batch=4", "model.vocab_size=300", "model.image_size=32", "steps=1", "precision=float32"]
    for seed in "01":
        run = [*settings, f"seed={seed}"]
        list(train("nano", str(data), tmp_path / seed, settings=run, device="cpu"))
    names = [str(tmp_path / seed / "model") for seed in "01"]
    main: Any = runpy.run_path(str(REPOSITORY / "recipes" / "nano" / "average.py"))["main"]
    main(str(tmp_path / "mean"), [0.25, 0.75], names, str(data))
    first, second, mean = (sightloop.load(name, device="cpu").network for name in (*names, tmp_path / "mean"))
    ours, theirs, found = (net.vision.embed.proj.weight for net in (first, second, mean))
    torch.testing.assert_close(found, 0.25 * ours + 0.75 * theirs)
    norm = mean.vision.embed.stem[1].norm1
    seen: list[Any] = []

    def look(_: Any, inputs: Any) -> None:
        seen.append(inputs[0])

    norm.register_forward_pre_hook(look)
    mean.encode_image(normalised(data, sightloop.load(names[0], device="cpu").image_spec))
    torch.testing.assert_close(norm.running_mean, seen[0].mean((0, 2, 3)), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(norm.running_var, seen[0].var((0, 2, 3)), rtol=1e-3, atol=1e-4)


def normalised(data: Path, spec: ImageSpec) -> torch.Tensor:
    return normalize([preprocess(sample.image, spec) for sample in sightloop.open_dataset(data)], spec)


def test_chunks_are_refused_where_batch_norm_would_see_them(tmp_path: Path) -> None:
    write_synthetic_world(tmp_path / "train.tar", synthetic_world("train", 8, seed=0))
    with pytest.raises(UsageError, match=r"data\.micro_batch: blip-nano has batch norm"):
        list(
            train(
                "nano",
                str(tmp_path / "train.tar"),
                tmp_path / "out",
                settings=["data.micro_batch=2", "data.batch=4", "model.vocab_size=300"],
                device="cpu",
            )
        )
