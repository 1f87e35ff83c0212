"""Training of the painter: exact resume, scores of its drawings, and their grid in the report."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image
from safetensors.torch import load_file

from sightloop.data.datasets.synthetic import synthetic_world, write_synthetic_world
from sightloop.training.config import EvaluationSettings
from sightloop.training.report import sample_path
from sightloop.training.trainer import train
from sightloop.training.validation import at_chance, validate
from sightloop.types import Sample

SETTINGS = ("data.batch=4", "steps=4", "save_every=1", "schedule.warmup_steps=0")


@pytest.fixture(scope="module")
def shard(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("plain") / "scenes.tar"
    write_synthetic_world(path, synthetic_world("train", 12, scenes="plain"))
    return path


@pytest.fixture(scope="module")
def run(shard: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with two evaluations, of its training data."""
    out = tmp_path_factory.mktemp("painter") / "run"
    evaluation = (f"evaluation.data={shard}", "evaluation.samples=3", "evaluation.show=2")
    for _ in train("painter_world", str(shard), out, settings=[*SETTINGS, *evaluation], device="cpu"):
        pass
    return out


def test_an_interrupted_run_ends_as_an_unbroken_one(shard: Path, run: Path, tmp_path: Path) -> None:
    for stop_after in (3, None):
        settings = [*SETTINGS, f"evaluation.data={shard}", "evaluation.samples=3", "evaluation.show=2"]
        for _ in train(
            "painter_world", str(shard), tmp_path, settings=settings, device="cpu", stop_after=stop_after
        ):
            pass
    one, other = (load_file(folder / "model" / "model.safetensors") for folder in (run, tmp_path))
    assert one.keys() == other.keys()
    assert all(one[name].equal(other[name]) for name in one)


def test_the_report_shows_drawings_over_time(shard: Path, run: Path) -> None:
    page = (run / "report.html").read_text("utf-8")
    assert "Drawings of captions" in page
    assert "step 0" in page
    assert "step 4" in page
    for sample in synthetic_world("train", 2, scenes="plain"):
        assert sample.key in page
        real = sample_path(run, sample.key)
        for step in (0, 4):
            with Image.open(real.with_name(f"{real.stem}-step-{step:06d}.jpg")) as drawn:
                assert drawn.size == (64, 64)


class _Printer:
    """A "painter" that draws the scenes which it was given with their captions, or those of others."""

    capabilities = frozenset({"draw"})
    labels: tuple[str, ...] = ()
    network: object = None

    class module:
        training = False

        @classmethod
        def eval(cls) -> None: ...
        @classmethod
        def train(cls, _: bool) -> None: ...

    def __init__(self, scenes: dict[str, Image.Image]) -> None:
        self.scenes = scenes

    def draw(self, texts: list[str]) -> list[Image.Image]:
        return [self.scenes[text] for text in texts]


@pytest.mark.parametrize("own", [True, False])
def test_drawings_are_scored_by_the_parser(own: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    world = synthetic_world("train", 24, seed=3, scenes="plain", different=True)
    images = [Image.fromarray(world._render(i).pixels) for i in range(24)]
    texts = [sample.captions[0] for sample in world]
    if not own:
        images = [*images[1:], images[0]]

    def samples(*_: object) -> tuple[list[Sample], list[object]]:
        return list(world), [None] * 24

    monkeypatch.setattr("sightloop.training.validation.load_samples", samples)
    printer = _Printer(dict(zip(texts, images, strict=True)))
    found = validate(printer, [], EvaluationSettings(show=5))  # type: ignore[arg-type]
    assert [key for key, _ in found.drawings] == [sample.key for sample in world[:5]]
    right, other = found.values["drawings right"], found.values["drawings right (other texts)"]
    assert (right, other) == ((1, 0) if own else (0, pytest.approx(23 / 24, abs=1 / 24)))
    message = at_chance(found.values, 24, {"flow"})
    assert (message == "") == own
    assert own or "by the texts of other images" in message


def test_other_captions_are_drawn_but_not_scored(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "sightloop.training.validation.load_samples",
        lambda *_: ([Sample("a", b"", captions=("a dog on a beach",))], [None]),
    )
    picture = Image.new("RGB", (64, 64))
    found = validate(_Printer({"a dog on a beach": picture}), [], EvaluationSettings())  # type: ignore[arg-type]
    assert (found.values, found.drawings) == ({}, (("a", picture),))
