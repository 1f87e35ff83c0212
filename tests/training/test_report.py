from __future__ import annotations

import io
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sightloop.errors import SightloopError
from sightloop.reports.plots import HEIGHT, WIDTH
from sightloop.training.events import (
    CheckpointSaved,
    Evaluated,
    RunEnded,
    RunEvent,
    RunStarted,
    SampleSkipped,
    StepDone,
    WarningRaised,
)
from sightloop.training.log import RunLog
from sightloop.training.report import sample_path, write_report, write_samples
from sightloop.types import Sample

EVIL = "<script>alert('\"x\"')</script>&"


class Page(HTMLParser):
    """Counts tags, gathers the text, and checks that all that is opened is closed."""

    VOID = frozenset({"meta", "img"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(self.words)


def story(steps: int, name: str = "blip_pretrain", **more: float) -> list[RunEvent]:
    events: list[RunEvent] = [RunStarted(name, steps, 32, 6000, 14_000_000, 13_000_000, 0)]
    for step in range(1, steps + 1):
        values = {"itc": 1 + 3.8 / step, "lm": 10.3 / step**0.5, "itm.accuracy": 1 - 0.3 / step, **more}
        chances = {"itc": math.log(128), "lm": math.log(30524)}
        events.append(StepDone(step, step / 187, 5 / step, values, chances, 1e-4, 0.5, 32))
        if step % max(1, steps // 10) == 0:
            texts = (("a/1.jpg", f"a dog at {step}"), ("b.jpg", "two men"))
            events += [
                Evaluated(step, {"CIDEr": step / steps}, texts),
                CheckpointSaved(step, Path("checkpoints/x")),
            ]
    return events


def report(folder: Path, events: list[RunEvent]) -> Page:
    with RunLog(folder) as log:
        for event in events:
            log.write(event)
    path = write_report(folder)
    assert path == folder / "report.html"
    return Page(path.read_text("utf-8"))


def test_what_a_report_shows(tmp_path: Path) -> None:
    (tmp_path / "recipe.json").write_text('{"recipe": {"name": "blip_pretrain", "seed": 7}}')
    rgb = np.random.default_rng(0).integers(0, 255, (300, 500, 3)).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(rgb).save(file, "PNG")
    write_samples(tmp_path, [Sample("a/1.jpg", file.getvalue()), Sample("broken", b"no")])
    with Image.open(sample_path(tmp_path, "a/1.jpg")) as image:
        assert image.size == (160, 96)
    assert not sample_path(tmp_path, "broken").exists()
    warning = WarningRaised(40, "itc", "itc has not left chance")
    page = report(
        tmp_path,
        [
            *story(100),
            warning,
            WarningRaised(60, "itc", "left", over=True),
            SampleSkipped("c.jpg", "damaged"),
            RunEnded(100, 60.0, Path("model")),
        ],
    )
    for words in ("finished after 100 steps", "14 M", "chance 4.852", "chance 10.33", "itc has not left chance",
                  "a dog at 100", "a dog at 10", "two men", "c.jpg: damaged", '"seed": 7', "No warnings."):  # fmt: skip
        assert (words in page.text) == (words != "No warnings."), words
    tags = [tag for tag, _ in page.tags]
    # loss, two terms, CIDEr, accuracy, learning rate, throughput
    assert tags.count("svg") == tags.count("polyline") == 7
    assert [a["src"] for tag, a in page.tags if tag == "img"][0].startswith("data:image/jpeg;base64,")  # type: ignore[union-attr] # noqa: RUF015
    assert tags.count("img") == 1
    assert [a["class"] for tag, a in page.tags if tag == "p" and a.get("class") in ("warning", "fine")] == [
        "warning",
        "fine",
    ]


def test_the_report_is_self_contained(tmp_path: Path) -> None:
    page = report(tmp_path, story(10))
    assert not {tag for tag, _ in page.tags} & {"link", "iframe", "object", "base"}
    for tag, attributes in page.tags:
        assert tag == "img" or not {"src", "href", "onclick", "onload"} & attributes.keys()
    assert "http" not in (tmp_path / "report.html").read_text()


def test_every_text_is_escaped(tmp_path: Path) -> None:
    (tmp_path / "recipe.json").write_text(EVIL)
    events = [
        *story(3, name=EVIL, **{EVIL: 1.0}),
        Evaluated(3, {EVIL: 0.5}, ((EVIL, EVIL),)),
        WarningRaised(3, EVIL, EVIL),
        SampleSkipped(EVIL, EVIL),
    ]
    page = report(tmp_path, events)
    assert "script" not in {tag for tag, _ in page.tags}
    assert page.text.count(EVIL) >= 8


@pytest.mark.parametrize("steps", [1, 2, 5000])
def test_curves_of_any_length(tmp_path: Path, steps: int) -> None:
    page = report(tmp_path, story(steps))
    assert f"step {steps:,} of {steps:,}" in page.text
    for tag, attributes in page.tags:
        if tag == "polyline":
            points = [tuple(map(float, pair.split(","))) for pair in (attributes["points"] or "").split()]
            assert 1 <= len(points) <= 242
            assert all(0 <= x <= WIDTH and 0 <= y <= HEIGHT for x, y in points)
    assert (tmp_path / "report.html").stat().st_size < 400_000


def test_odd_numbers(tmp_path: Path) -> None:
    events = story(5, constant=3.0, zero=0.0, huge=1e30, tiny=-1e-12)
    lost = StepDone(6, 0.1, math.nan, {"itc": math.inf, "only": math.nan}, {"itc": 4.8}, 0.0, 0.0, 32)
    page = report(tmp_path, [*events, lost])
    assert "nan" in page.text
    assert not any("nan" in (a.get("points") or "") for _, a in page.tags)


def test_a_report_of_a_new_run(tmp_path: Path) -> None:
    assert "no checkpoint yet" in report(tmp_path / "a", [RunStarted("r", 10, 8, 9, 1, 1, 0)]).text
    assert "not finished" in report(tmp_path / "b", []).text
    with pytest.raises(SightloopError, match="no such file"):
        write_report(tmp_path)


def test_the_metric_of_the_recipe_comes_first(tmp_path: Path) -> None:
    values = {
        "image-to-text recall@1": 0.25,
        "text-to-image recall@1": 0.26,
        "CIDEr": 1.25,
        "VQA accuracy": 0.5,
    }

    def tiles(folder: Path, term: str) -> list[tuple[str, str]]:
        step = StepDone(1, 0.1, 2.0, {term: 2.0}, {term: 3.0}, 1e-4, 0.5, 32)
        started = RunStarted("r", 10, 8, 9, 7_960_000, 12_000, 0)
        report(folder, [started, step, Evaluated(1, values)])
        page = (folder / "report.html").read_text()
        return re.findall(r"<b>([^<]*)</b><span>([^<]*)</span>", page)

    assert tiles(tmp_path / "a", "lm")[0] == ("1.25", "CIDEr")
    assert tiles(tmp_path / "b", "itc")[0] == ("0.26", "text-to-image recall@1")
    assert tiles(tmp_path / "c", "vqa")[0] == ("0.5", "VQA accuracy")
    assert ("12 k", "trained parameters") in tiles(tmp_path / "d", "lm")
