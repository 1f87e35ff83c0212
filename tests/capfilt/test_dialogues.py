"""Self-filtering of dialogues: scores are the judge's, and of each turn one answer is kept by the rule."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import sightloop
from sightloop.apps.cli import main
from sightloop.capfilt.bootstrap import bootstrap
from sightloop.data.datasets.synthetic import synthetic_world, write_synthetic_world
from sightloop.errors import UnsupportedError, UsageError
from sightloop.training.dialogue_rows import draw_rounds
from sightloop.types import Dialogue, Round
from tests.tiny_checkpoints.clip_and_blip import write_blip
from tests.tiny_checkpoints.dialogue import dialogue_model

QUICK: dict[str, Any] = {
    "task": "dialogue",
    "captions": 3,
    "max_tokens": 4,
    "block": 1,
    "group": 1,
    "threads": 1,
    "isolate": False,
}
NEEDED = ("safe", "sensible", "grounded")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, and two scenes with dialogues; of one round of the first it is not known what a person answered."""
    folder = tmp_path_factory.mktemp("talk")
    dialogue_model(folder / "made").save(folder / "model")
    write_blip(folder / "match", head="match")
    samples = list(synthetic_world("train", 2, seed=1, dialogues=True))
    (dialogue,) = samples[0].dialogues
    secret = Round(dialogue.rounds[1].question)
    rounds = (dialogue.rounds[0], secret, *dialogue.rounds[2:])
    samples[0] = replace(samples[0], dialogues=(Dialogue(rounds, dialogue.caption),))
    write_synthetic_world(folder / "talk.tar", samples)
    return folder


def run(place: Path, out: Path, **options: Any) -> Any:
    models = {"captioner": place / "model", "filter": place / "model"}
    return bootstrap(place / "talk.tar", out=out, **{**models, **QUICK, **options})


def evidence(out: Path) -> list[dict[str, Any]]:
    files = sorted((out / "evidence").iterdir())
    return [json.loads(line) for file in files for line in file.read_text().splitlines()]


def lowest(line: dict[str, Any]) -> float:
    return min(line["itm"], *(line["attributes"][name] for name in NEEDED))


@pytest.fixture(scope="module")
def filtered(place: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, float]:
    """A run at a half, filtered again where about half of the answers pass; that threshold."""
    out = tmp_path_factory.mktemp("filtered") / "out"
    run(place, out)
    scores = sorted(lowest(line) for line in evidence(out) if line["itm"] is not None)
    threshold = round((scores[len(scores) // 2 - 1] + scores[len(scores) // 2]) / 2, 5)
    run(place, out, threshold=threshold)
    return out, threshold


def test_scores_are_those_of_the_judge(place: Path, filtered: tuple[Path, float]) -> None:
    model = sightloop.load(place / "model", device="cpu")
    lines = evidence(filtered[0])
    for sample in sightloop.open_dataset(place / "talk.tar"):
        (dialogue,) = sample.dialogues
        mine = [line for line in lines if line["key"] == sample.key]
        for turn, one in enumerate(dialogue.rounds):
            own = [line for line in mine if line["turn"] == turn]
            assert [line["text"] for line in own if line["source"] == "web"] == (
                [one.answer] if one.answer else []
            )
            assert 1 <= sum(line["source"] == "synthetic" for line in own) <= 3
            assert {line["question"] for line in own} == {one.question}
            scored = [line for line in own if line["itm"] is not None]
            asked = Round(one.question, None, tuple(line["text"] for line in scored))
            talk = Dialogue((*dialogue.rounds[:turn], asked), dialogue.caption)
            scores = model.judge_answers(sample.image, talk)[-1]
            expected = 1 / (1 + np.exp(-scores.match.astype(float)))
            assert [line["itm"] for line in scored] == pytest.approx(expected.tolist(), abs=1e-4)
            for name, values in scores.attributes.items():
                assert [line["attributes"][name] for line in scored] == pytest.approx(
                    values.tolist(), abs=1e-4
                )


def test_of_each_turn_the_best_answer_that_passes_is_kept(place: Path, filtered: tuple[Path, float]) -> None:
    out, threshold = filtered
    before = {sample.key: sample for sample in sightloop.open_dataset(place / "talk.tar")}
    after = {sample.key: sample for sample in sightloop.open_dataset(out)}
    assert list(after) == list(before)
    lines, written = evidence(out), 0
    for key, sample in before.items():
        expected: list[tuple[str, str]] = []
        for turn, one in enumerate(sample.dialogues[0].rounds):
            own = [line for line in lines if (line["key"], line["turn"]) == (key, turn)]
            passing = [line for line in own if line["itm"] is not None and lowest(line) >= threshold]
            passing.sort(key=lambda line: (line["source"] != "web", -line["itm"]))
            assert [line["text"] for line in own if line["verdict"] == "kept"] == [
                line["text"] for line in passing[:1]
            ]
            written += bool(passing) and passing[0]["source"] == "synthetic"
            expected += [(one.question, line["text"]) for line in passing[:1]]
        rounds = [one for dialogue in after[key].dialogues for one in dialogue.rounds]
        assert [(one.question, one.answer) for one in rounds] == expected
        for one in rounds:
            assert one.truth is not None
            assert one.candidates[one.truth] == one.answer
            assert all(len(values) == len(one.candidates) for values in one.attributes.values())
        assert after[key].captions == sample.captions
        if any(len(one.candidates) > 1 for one in rounds):
            assert draw_rounds(np.random.default_rng(0), after[key], 2, 3, captioned=1.0, names=("safe",))
    assert written
    assert any(line["reason"] in ("unmatched", *(f"not {name}" for name in NEEDED)) for line in lines)


def test_filtering_again_is_as_filtering_at_once(
    place: Path, filtered: tuple[Path, float], tmp_path: Path
) -> None:
    out, threshold = filtered
    run(place, tmp_path / "out", threshold=threshold)
    for name in ("000000.tar", "000001.tar", "evidence/000000.jsonl", "evidence/000001.jsonl"):
        assert (tmp_path / "out" / name).read_bytes() == (out / name).read_bytes()


def test_what_does_not_fit_is_refused(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for option in ({"mode": "captioner-only"}, {"keep": "best"}, {"prompt": "a"}, {"num_beams": 2}):
        with pytest.raises(UsageError, match=f"{next(iter(option))}=.*goes without task='dialogue'"):
            run(place, tmp_path / "a", **option)
    with pytest.raises(UnsupportedError, match="judges no answers in a dialogue"):
        run(place, tmp_path / "b", filter=place / "match")
    with pytest.raises(UsageError, match="the captioner must be a model that"):
        run(place, tmp_path / "c", captioner="http://localhost:1/v1#m")
    assert (
        main.main(["bootstrap", str(place / "talk.tar"), "--task", "dialogue", "-o", str(tmp_path / "d")])
        == 2
    )
    assert "--filter: name a model that judges answers" in capsys.readouterr().err
