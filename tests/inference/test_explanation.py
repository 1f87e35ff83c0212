"""Explanations: evidence equals that of plain weights, maps are distributions, and nothing is left behind."""

from __future__ import annotations

import io
import threading

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import sightloop
from sightloop.checkpoints.hub import BUNDLED_FOLDER
from sightloop.data.images.preprocess import input_box, preprocess
from sightloop.errors import UnsupportedError, UsageError
from sightloop.inference.explanation import HeatMap, enlarge
from sightloop.inference.model import Model
from sightloop.nn.attention import Attention
from sightloop.nn.prepack import pack, unpack
from sightloop.nn.quantize import can_multiply_int8
from sightloop.tasks.text_scores import grad_cam
from sightloop.types import Encoded, ImageSpec
from tests.tiny_checkpoints.clip_and_blip import write_clip

TEXTS = ["a dog on the grass", "two people"]


@pytest.fixture(scope="module")
def model() -> Model:
    if not BUNDLED_FOLDER.is_dir():
        pytest.skip("this source tree has no bundled model")
    return sightloop.load(device="cpu")


@pytest.fixture(scope="module")
def image() -> Image.Image:
    noise = np.random.default_rng(0).integers(0, 255, (12, 9, 3), np.uint8)
    return Image.fromarray(noise).resize((130, 90), Image.Resampling.BICUBIC)


def test_a_map_is_a_distribution_over_the_image(model: Model, image: Image.Image) -> None:
    one = model.explain(image, TEXTS[0])
    assert isinstance(one, HeatMap)
    assert (one.shape, one.dtype) == ((90, 130), np.float32)
    assert one.min() >= 0
    assert one.sum() == pytest.approx(1, abs=1e-4)
    assert (one.score, one.layer, one.head, one.grid.shape) == ("match", 1, None, (7, 7))
    assert one.value == pytest.approx(float(model.match(image, TEXTS[0])[0]), abs=1e-5)
    assert sum(share for _, share in one.views) == pytest.approx(1, abs=1e-5)
    assert one.mass((0, 0, 130, 90)) == pytest.approx(1, abs=1e-4)
    assert one.mass((0, 0, 65, 90)) + one.mass((65, 0, 130, 90)) == pytest.approx(1, abs=1e-4)


def test_a_model_in_int8_has_nearly_the_map_of_float32(model: Model, image: Image.Image) -> None:
    if not can_multiply_int8():
        pytest.skip("this torch multiplies no bytes")
    wanted = model.explain(image, TEXTS[0], crops=False).grid.ravel()
    got = sightloop.load(device="cpu", quantize="int8").explain(image, TEXTS[0], crops=False).grid.ravel()
    assert np.corrcoef(wanted, got)[0, 1] > 0.98


def test_several_texts_have_the_maps_that_each_has_alone(model: Model, image: Image.Image) -> None:
    for own, text in zip(model.explain(image, TEXTS), TEXTS, strict=True):
        np.testing.assert_allclose(own, model.explain(image, text), atol=1e-6)


def test_heads_average_to_the_whole(model: Model, image: Image.Image) -> None:
    whole = model.explain(image, TEXTS[0], crops=False)
    heads = [model.explain(image, TEXTS[0], crops=False, head=head).grid for head in range(4)]
    np.testing.assert_allclose(np.mean(heads, axis=0), whole.grid, rtol=1e-4, atol=1e-9)


def test_words_average_to_the_text(model: Model, image: Image.Image) -> None:
    words = ["red", "dogs"]
    whole = model.explain(image, "red dogs", crops=False).grid
    parts = [model.explain(image, "red dogs", word, crops=False).grid for word in words]
    np.testing.assert_allclose(np.mean(parts, axis=0), whole, rtol=1e-4, atol=1e-9)


def test_evidence_equals_that_of_plain_weights_by_finite_differences(
    model: Model, image: Image.Image
) -> None:
    """The gradient of one attention weight, against the change of the score when that weight is changed."""
    network, layer = model.network, model.network.patch_attention("match").layers[1]
    encoded = Encoded(model.encode(list(model.read([image], isolate=False))).tokens.clone())
    tokens = model.tokenize(TEXTS[:1])
    rows = tokens.rows(np.arange(1))

    def margin() -> torch.Tensor:
        logits = network.match_logits(encoded, *rows)
        return logits[:, 1] - logits[:, 0]

    (packed,) = grad_cam([layer], margin)
    unpack(model.module)
    try:
        (plain,) = grad_cam([layer], margin)
        assert layer.watcher is None
        where = tuple(int(i) for i in np.unravel_index(int(plain.argmax()), plain.shape))

        def shifted(amount: float) -> float:
            def watcher(weights: torch.Tensor) -> torch.Tensor:
                changed = weights.clone()
                changed[where] += amount
                return changed

            layer.watcher = watcher
            with torch.no_grad():
                value = float(margin())
            layer.watcher = None
            return value

        weight: list[torch.Tensor] = []
        layer.watcher = lambda weights: weight.append(weights) or weights
        with torch.no_grad():
            margin()
        layer.watcher = None
        slope = (shifted(1e-2) - shifted(-1e-2)) / 2e-2
        assert float(plain[where]) == pytest.approx(float(weight[0][where]) * slope, rel=2e-2)
    finally:
        pack(model.module)
    torch.testing.assert_close(packed, plain, rtol=1e-3, atol=1e-7)


def test_nothing_is_left_behind_and_inference_mode_is_allowed(model: Model, image: Image.Image) -> None:
    before = model.match(image, TEXTS[0])
    with torch.inference_mode():
        one = model.explain(image, TEXTS[0])
    np.testing.assert_allclose(one, model.explain(image, TEXTS[0]), atol=1e-7)
    assert not any(layer.watcher for layer in model.module.modules() if isinstance(layer, Attention))
    assert (model.match(image, TEXTS[0]) == before).all()
    assert all(parameter.grad is None for parameter in model.module.parameters())


def test_other_threads_are_not_watched(model: Model, image: Image.Image) -> None:
    expected = model.explain(image, TEXTS[0])
    stop = threading.Event()

    def work() -> None:
        while not stop.is_set():
            model.match(image, TEXTS)

    thread = threading.Thread(target=work)
    thread.start()
    try:
        for _ in range(3):
            np.testing.assert_allclose(model.explain(image, TEXTS[0]), expected, atol=1e-7)
    finally:
        stop.set()
        thread.join()


@settings(max_examples=25, deadline=None)
@given(
    st.tuples(st.integers(5, 60), st.integers(5, 60)),
    st.sampled_from(
        [
            ImageSpec(resize=(8, 8), interpolation="nearest"),
            ImageSpec(shortest_edge=8, crop=(8, 8), interpolation="nearest"),
            ImageSpec(crop=(16, 16)),
            ImageSpec(resize=(8, 8), square=(0, 0, 0), interpolation="nearest"),
        ]
    ),
)
def test_the_input_box_is_where_the_input_comes_from(size: tuple[int, int], spec: ImageSpec) -> None:
    """An image whose red is x and green is y: the input's pixels name the place that they come from."""
    height, width = size
    y, x = np.mgrid[:height, :width]
    pixels = np.stack([x, y, np.full_like(x, 255)], -1).astype(np.uint8)
    values = preprocess(pixels, spec).values.astype(float)
    left, top, right, bottom = input_box(size, spec)
    rows, columns = values.shape[1:]
    seen = values[2] == 255  # not padding
    scale_x, scale_y = (right - left) / columns, (bottom - top) / rows
    for r in range(rows):
        for c in range(columns):
            if seen[r, c]:
                assert abs(left + (c + 0.5) * scale_x - (values[0, r, c] + 0.5)) <= 0.5 + scale_x / 2 + 1e-6
                assert abs(top + (r + 0.5) * scale_y - (values[1, r, c] + 0.5)) <= 0.5 + scale_y / 2 + 1e-6


def test_what_the_model_does_not_see_has_no_mass() -> None:
    wide = enlarge(np.ones((2, 2), np.float32), (8, 20), ImageSpec(shortest_edge=8, crop=(8, 8)))
    assert wide[:, :6].sum() == wide[:, 14:].sum() == 0
    assert wide.sum() == pytest.approx(1)


def test_two_towers_explain_the_cosine(tmp_path, image: Image.Image) -> None:
    write_clip(tmp_path / "clip")
    clip = sightloop.load(tmp_path / "clip", device="cpu")
    one, other = clip.explain(image, TEXTS)
    assert (one.score, one.shape) == ("similarity", (90, 130))
    assert one.value == pytest.approx(float(clip.similarity(image, TEXTS[0])[0, 0]), abs=1e-5)
    np.testing.assert_allclose(one, clip.explain(image, TEXTS[0]), atol=1e-5)
    assert other.sum() == pytest.approx(1, abs=1e-4)
    with pytest.raises(UnsupportedError, match="one by one"):
        clip.explain(image, TEXTS[0], "dog")


def test_wrong_arguments_are_named(model: Model, image: Image.Image) -> None:
    with pytest.raises(UsageError, match='word="cat": is not in the text'):
        model.explain(image, TEXTS[0], "cat")
    with pytest.raises(UsageError, match="layer=3: must be from 0 to 2"):
        model.explain(image, TEXTS[0], layer=3)
    with pytest.raises(UsageError, match="head=9"):
        model.explain(image, TEXTS[0], head=9)
    with pytest.raises(sightloop.ImageError):
        model.explain(io.BytesIO(b"no").getvalue(), TEXTS[0])
