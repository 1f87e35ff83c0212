"""The verb draw: keys of the noise, batches, judges, and what else a drawing network is asked."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from sightloop.errors import UnsupportedError, UsageError
from sightloop.inference.drawing import draw_settings, image_seed
from sightloop.inference.load import load
from sightloop.inference.model import Model
from sightloop.types import DrawSettings
from tests.tiny_checkpoints.painter import TEXTS, painter_model


@pytest.fixture(scope="module")
def painter(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return painter_model(tmp_path_factory.mktemp("painter"))


def _far(first: Image.Image, second: Image.Image) -> int:
    """Greatest difference of two images."""
    return int(np.abs(np.asarray(first, np.int16) - np.asarray(second, np.int16)).max())


def test_images_differ_by_text_number_and_seed_and_by_nothing_else(painter: Model) -> None:
    images = painter.draw(TEXTS, n=2)
    assert [(image.info["prompt"], image.info["number"]) for image in images] == [
        (text, number) for text in TEXTS for number in (0, 1)
    ]
    assert all(image.size == (16, 16) for image in images)
    others = [*images, *painter.draw(TEXTS[0], seed=1)]
    for i, first in enumerate(others):
        assert all(_far(first, second) > 8 for second in others[:i])
    assert all(_far(*pair) == 0 for pair in zip(images, painter.draw(TEXTS, n=2), strict=True))


@pytest.mark.parametrize("batch_size", [1, 4, 32])
def test_an_image_does_not_depend_on_its_batch(painter: Model, batch_size: int) -> None:
    together = replace(painter, batch_size=batch_size).draw(TEXTS, n=3)
    for number, text in enumerate(TEXTS):
        alone = painter.draw([text], n=3)
        for first, second in zip(alone, together[3 * number :], strict=False):
            assert _far(first, second) <= 1  # rounding


@settings(max_examples=30)
@given(st.integers(), st.text(max_size=20), st.integers(0, 1 << 40))
def test_seeds_of_images_are_those_of_torch_and_differ(seed: int, prompt: str, number: int) -> None:
    own = image_seed(seed, prompt, number)
    assert 0 <= own < 1 << 63
    assert own == image_seed(seed, prompt, number)
    assert len({own, image_seed(seed + 1, prompt, number), image_seed(seed, prompt + "a", number)}) == 3
    assert own != image_seed(seed, prompt, number + 1)


def test_a_saved_painter_draws_the_same_bytes(painter: Model, tmp_path: Path) -> None:
    painter.save(tmp_path / "model")
    loaded = load(tmp_path / "model")
    assert loaded.capabilities == {"draw"}
    for first, second in zip(painter.draw(TEXTS), loaded.draw(TEXTS), strict=True):
        assert _far(first, second) <= 1
    with pytest.raises(UsageError, match="transformers"):
        loaded.save(tmp_path / "other", layout="transformers")


def test_the_best_by_the_judge_come_first(painter: Model) -> None:
    judge = load()  # nano: ITM and ITC
    everything = painter.draw(TEXTS[:2], n=3)
    ranked = painter.draw(TEXTS[:2], n=3, keep=2, judge=judge)
    for row, text in enumerate(TEXTS[:2]):
        own = ranked[2 * row : 2 * row + 2]
        assert [image.info["judge"] for image in own] == ["nano"] * 2
        logits = [image.info["scores"]["itm"] for image in own]
        probabilities = judge.match(list(everything[3 * row : 3 * row + 3]), text)
        best = np.argsort(-probabilities)[:2].tolist()
        assert [image.info["number"] for image in own] == best
        assert 1 / (1 + np.exp(-np.array(logits))) == pytest.approx(probabilities[best], abs=1e-4)
        assert _far(own[0], everything[3 * row + best[0]]) == 0
    assert len(painter.draw(TEXTS, n=2, judge=judge)) == len(TEXTS)  # one of each


def test_a_drawing_starts_from_an_image(painter: Model) -> None:
    start = painter.draw(TEXTS[0])[0]
    near, far = (painter.draw(TEXTS[1], init=start, strength=strength)[0] for strength in (0.05, 1.0))
    assert _far(near, start) < _far(far, start)
    assert _far(far, painter.draw(TEXTS[1])[0]) == 0  # all noise


def test_progress_counts_the_evaluations_of_all_batches(painter: Model) -> None:
    calls: list[tuple[int, int]] = []
    replace(painter, batch_size=2).draw(TEXTS, steps=2, on_step=lambda *call: calls.append(call))
    assert calls == [(1, 4), (2, 4), (3, 4), (4, 4)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n": 0}, "n=0"),
        ({"n": 2, "keep": 3}, "keep at most n"),
        ({"n": 2, "keep": 1}, "for a judge to say"),
        ({"steps": 0}, "steps=0: must be a whole number from 1"),
        ({"guidance": -1.0}, "guidance=-1.0"),
        ({"guidance": float("nan")}, "guidance=nan"),
        ({"interval": (0.5,)}, "two shares"),
        ({"strength": 0.0}, "strength=0.0"),
        ({"size": 18}, "size=18x18: both sides must be multiples of 4"),
        ({"size": "big"}, "size='big'"),
        ({"sampler": "magic"}, 'sampler="magic": must be one of euler, heun'),
        ({"step": 3}, "step: no option of drawing"),
        ({"judge": 3}, "judge=3"),
    ],
)
def test_wrong_options_are_named(painter: Model, options: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        painter.draw(TEXTS[0], **options)  # pyright: ignore


def test_settings_are_the_networks_own_where_a_caller_says_nothing() -> None:
    defaults = DrawSettings((64, 64), 20, 3.0)
    assert draw_settings(defaults, {"steps": None}) == defaults
    assert draw_settings(defaults, {"size": 32, "guidance": 1}) == DrawSettings((32, 32), 20, 1)


def test_other_verbs_say_what_a_painter_can(painter: Model) -> None:
    image = painter.draw(TEXTS[0])[0]
    for ask in (painter.caption, painter.embed_images, painter.detect, painter.read_text):
        with pytest.raises(UnsupportedError, match="it can: draw"):
            ask(image)
    with pytest.raises(UnsupportedError, match="cannot read images; it can: draw"):
        painter.encode([])
    with pytest.raises(UnsupportedError, match=r"nano cannot draw; it can: .*embed"):
        load().draw("a cat")
    assert "draw" in dir(painter)
    assert "caption" not in dir(painter)
    assert "draw" not in dir(load())
