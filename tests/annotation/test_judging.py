"""Judged captions: p-values that keep their promise, resumed tables, edited captions, models that judge themselves."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sightloop.annotation.caption_record import RECORD_NAME, caption_writer, record_caption
from sightloop.annotation.judging import (
    arrange_judgments,
    conformal_p,
    foreign_captions,
    judge_captions,
    list_captions,
    verdict,
)
from sightloop.annotation.result_table import ResultTable
from sightloop.annotation.runner import LoaderConfig
from sightloop.data.datasets.dataset import open_dataset
from sightloop.types import Done, Failed
from tests.apps.fake_model import FakeModel, make_image

SCORES = st.lists(st.floats(-5, 5), min_size=1, max_size=30)


@given(SCORES, SCORES)
def test_p_values_count_scores_that_reach_the_own(scores: list[float], null: list[float]) -> None:
    p = conformal_p(scores, null)
    for value, score in zip(p, scores, strict=True):
        assert value == (1 + sum(other >= score for other in null)) / (1 + len(null))


def test_a_promised_rate_of_false_fits_is_kept() -> None:
    """Of captions that are foreign themselves, a share of at most a has p <= a (exchangeable scores)."""
    random = np.random.default_rng(0)
    levels = np.array([0.05, 0.1, 0.5])
    counts = np.zeros(3)
    for _ in range(4000):
        scores = np.exp(random.normal(size=61)).round(1)  # with ties
        counts += conformal_p(scores[:1], scores[1:])[0] <= levels
    assert (counts / 4000 <= levels + 3 * np.sqrt(levels * (1 - levels) / 4000)).all()


def test_verdicts() -> None:
    assert [verdict(0.2, p, None) for p in (0.05, 0.06, 0.5)] == ["fits", "doubtful", "does not fit"]
    assert [verdict(s, p, 0.5) for s, p in ((0.5, 0.9), (0.4, 0.4), (0.4, 0.5), (0.4, None))] == [
        "fits", "doubtful", "does not fit", "does not fit",
    ]  # fmt: skip
    assert verdict(0.9, None, None) == ""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for i in range(24):
        make_image(tmp_path / "photos" / f"{i:02d}.png", (i, 0, 0))
        (tmp_path / "photos" / f"{i:02d}.txt").write_text(f"caption {i}\n")
    return tmp_path / "photos"


def judge(folder: Path, out: Path, model: FakeModel, stop: int | None = None) -> list:
    """One run of a model that scores a caption of its own image, by the number in it, at 0.9, and others lower."""
    dataset = open_dataset(folder)
    table = ResultTable(out, "skip", {}, ("name", "caption"))
    listed = list_captions(dataset, table)

    def score(images, texts):
        return [
            [0.9 if text.split()[-1] == str(int(Path(image.name).stem)) else 0.1 for text in own]
            for image, own in zip(images, texts, strict=True)
        ]

    events = []
    run = judge_captions(model, score, dataset, listed, table, LoaderConfig(2))
    for event in run:
        events.append(event)
        if stop is not None and len(events) == stop:
            run.close()
            break
    else:
        table.finish(lambda entries: arrange_judgments(entries, None))
    table.close()
    return events


def rows(path: Path) -> list[dict]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_the_worst_comes_first_and_a_run_resumes(folder: Path, tmp_path: Path) -> None:
    (folder / "07.txt").write_text("caption 8")
    (folder / "03.txt").unlink()
    (folder / "05.png").write_bytes(b"broken")
    model, out = FakeModel(), tmp_path / "scores.csv"
    judge(folder, out, model, stop=9)
    assert not out.exists()
    read = len(model.read_names)
    events = judge(folder, out, model)
    assert len(model.read_names) - read < 24 - 6
    assert sum(isinstance(event, Failed) for event in events) == 1
    table = rows(out)
    assert len(table) == 22
    assert Path(table[0]["name"]).name == "07.png"
    assert table[0]["verdict"] == "does not fit"
    assert all(row["verdict"] == "fits" for row in table[1:])
    assert [float(row["match"]) for row in table] == sorted(float(row["match"]) for row in table)


def test_an_edited_caption_is_judged_again(folder: Path, tmp_path: Path) -> None:
    model, out = FakeModel(), tmp_path / "scores.csv"
    judge(folder, out, model)
    before = rows(out)
    assert not any(isinstance(event, Done) for event in judge(folder, out, model))
    assert rows(out) == before
    (folder / "09.txt").write_text("caption 1")
    done = [event.name for event in judge(folder, out, model) if isinstance(event, Done)]
    assert [Path(name).name for name in done] == ["09.png"]
    after = rows(out)
    assert after[0]["caption"] == "caption 1"
    assert len(after) == 24


def test_too_few_images_have_no_p(tmp_path: Path) -> None:
    for i in range(5):
        make_image(tmp_path / "few" / f"{i}.png")
        (tmp_path / "few" / f"{i}.txt").write_text(f"caption {i}")
    judge(tmp_path / "few", tmp_path / "s.csv", FakeModel())
    assert {row["p"] for row in rows(tmp_path / "s.csv")} == {""}


def test_foreign_captions_are_of_other_images_and_depend_on_the_name_alone(folder: Path) -> None:
    (folder / "02.txt").write_text("Caption  3\n")
    dataset = open_dataset(folder)
    listed = list_captions(dataset, None)
    from sightloop.annotation.judging import captioned_image

    item = captioned_image(dataset, 3)
    drawn = foreign_captions(item, listed)
    assert drawn == foreign_captions(item, listed)
    assert len(drawn) == len(set(drawn)) >= 20
    assert not {text.casefold() for text in drawn} & {"caption 3", "caption  3"}


def test_the_record_says_who_wrote_a_caption_until_it_is_edited(tmp_path: Path) -> None:
    image = make_image(tmp_path / "a.png")
    record_caption(str(image), "two dogs", "nano@1")
    with (tmp_path / RECORD_NAME).open("ab") as file:
        file.write(b'{"torn\n[1]\n')
    record_caption(str(image), "a cat", "M@2")
    assert caption_writer(image, " two  dogs\n") == "nano@1"
    assert caption_writer(image, "a cat") == "M@2"
    assert caption_writer(image, "two dogs and a cat") == ""


def test_records_of_one_image_are_kept_apart(tmp_path: Path) -> None:
    image = make_image(tmp_path / "a.png")
    lines = [{"image": str(image), "caption": text, "writer": "M@1"} for text in ("one", "two")]
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    listed = list_captions(open_dataset([tmp_path / "x.jsonl"] * 2), None)
    assert listed.images == len(listed.todo) == 2
    assert len(listed.keys) == 1
    assert listed.writers == {"M@1": 4}
