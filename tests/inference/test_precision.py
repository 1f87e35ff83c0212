"""`dtype="auto"`: which precision it stands for on which machine, and what int8 and bfloat16 change."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

import sightloop
from sightloop.errors import UsageError
from sightloop.inference import precision
from sightloop.nn.attention import Linear
from sightloop.nn.quantize import Int8Product, can_multiply_int8, is_quantized

CPU = torch.device("cpu")
TEXTS = ["a red square above a blue circle", "two dogs on a beach", "a man rides a horse"]


def machine(monkeypatch: pytest.MonkeyPatch, *, bfloat16: bool, vnni: bool, gain: float = 2.0) -> None:
    """A CPU with these instructions, on which bfloat16 takes 1/gain of the time."""

    def bfloat16_gain(_: Counter[tuple[int, int]]) -> float:
        return gain

    monkeypatch.setattr(precision, "has_native_bfloat16", lambda: bfloat16)
    monkeypatch.setattr(precision, "has_vnni", lambda: vnni)
    monkeypatch.setattr(precision, "bfloat16_gain", bfloat16_gain)


def is_int8(model: sightloop.Model) -> bool:
    return any(isinstance(m, Linear) and is_quantized(m) for m in model.module.modules())


def test_bfloat16_where_it_is_native_and_quicker(monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch, bfloat16=True, vnni=True)
    model = sightloop.load(device="cpu", dtype="auto")
    assert (model.dtype, is_int8(model)) == (torch.bfloat16, False)
    machine(monkeypatch, bfloat16=True, vnni=True, gain=1.1)
    model = sightloop.load(device="cpu", dtype="auto")
    assert (model.dtype, is_int8(model)) == (torch.float32, False)


def test_int8_where_bytes_are_native_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch, bfloat16=False, vnni=True)
    model = sightloop.load(device="cpu", dtype="auto")
    assert (model.dtype, is_int8(model)) == (torch.float32, can_multiply_int8())
    machine(monkeypatch, bfloat16=False, vnni=False)
    model = sightloop.load(device="cpu", dtype="auto")
    assert (model.dtype, is_int8(model)) == (torch.float32, False)


def test_what_auto_would_gain(monkeypatch: pytest.MonkeyPatch) -> None:
    network = sightloop.load(device="cpu").module
    for bfloat16, vnni, gain, words in (
        (True, True, 1.9, "bfloat16, whose products take 1/1.9 of the time on this processor"),
        (True, True, 1.1, ""),
        (False, False, 1.9, ""),
        (False, True, 1.9, "int8 weights and activations" if can_multiply_int8() else ""),
    ):
        machine(monkeypatch, bfloat16=bfloat16, vnni=vnni, gain=gain)
        assert precision.auto_gain(network, CPU) == words
    assert precision.auto_gain(network, torch.device("mps")) == ""


def test_other_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    def supported(including_emulation: bool = True) -> bool:
        return including_emulation

    assert precision.auto_dtype(torch.device("mps"), []) == torch.float32
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", supported)
    assert precision.auto_dtype(torch.device("cuda"), []) == torch.float32
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: True)  # pyright: ignore
    assert precision.auto_dtype(torch.device("cuda"), []) == torch.bfloat16


def test_the_gain_is_of_an_image_and_its_caption(monkeypatch: pytest.MonkeyPatch) -> None:
    """A token's products in caches gain nothing, an image's fivefold: 100 + 20 x 2 against 20 + 20 x 2."""

    def seconds(shape: precision.Shape, row_class: int) -> float:
        image = 100.0 if shape.dtype == torch.float32 else 20.0
        return {precision.ONE: 2.0, precision.MOST: image}[row_class]

    def nothing(_: object) -> None: ...

    monkeypatch.setattr(precision, "best_seconds", seconds)
    monkeypatch.setattr(precision, "time_shapes", nothing)
    assert precision.bfloat16_gain(Counter({(96, 64): 3, (64, 64): 1})) == pytest.approx(140 / 60)
    assert precision.bfloat16_gain(Counter()) == 0.0


def test_a_wrong_dtype_is_refused_before_a_file_is_looked_for() -> None:
    with pytest.raises(UsageError, match="auto, float32"):
        sightloop.load("no/such", dtype="int8")  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    ("options", "least"),
    # nano's 48 convolutions round their activations in bfloat16; photographs keep 0.997.
    [({"quantize": "int8"}, 0.99), ({"dtype": "bfloat16"}, 0.95)],
    ids=["int8", "bfloat16"],
)
def test_embeddings_of_nano_keep_their_direction(
    options: dict[str, str], least: float, gradient: Callable[[int], np.ndarray]
) -> None:
    images = [gradient(i) for i in range(4)]
    exact, model = sightloop.load(device="cpu"), sightloop.load(device="cpu", **options)  # pyright: ignore
    for a, b in (
        (exact.embed_texts(TEXTS), model.embed_texts(TEXTS)),
        (exact.embed_images(images), model.embed_images(images)),
    ):
        lengths = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
        assert ((a * b).sum(axis=1) / lengths).min() > least
    assert len(model.caption(images)) == 4


def test_a_quantized_model_is_batch_independent_and_is_not_saved(
    tmp_path: Path, gradient: Callable[[int], np.ndarray]
) -> None:
    model = sightloop.load(device="cpu", quantize="int8")
    images = [gradient(i) for i in range(3)]
    together = model.embed_images(images)
    alone = np.concatenate([model.embed_images(image) for image in images])
    assert abs(together - alone).max() < 2e-3
    if can_multiply_int8():
        assert any(
            isinstance(m, Linear) and isinstance(m.kernel, Int8Product) for m in model.module.modules()
        )
    with pytest.raises(UsageError, match="few bits"):
        model.save(tmp_path / "saved")


@pytest.fixture
def gradient() -> Callable[[int], np.ndarray]:
    """Image i: uint8 `[112, 112, 3]`, colors that run across it."""

    def image(i: int) -> np.ndarray:
        rows, columns = np.mgrid[0:112, 0:112]
        return np.stack([rows * 2, columns * 2, rows * 0 + 60 * i], axis=2).astype(np.uint8)

    return image
