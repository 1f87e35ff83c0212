"""Tables of sample and rank in the tasks dialogue, pope and chair: winners by hand, and runs of small models."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

import sightloop
from sightloop.data.datasets.synthetic import synthetic_world, write_synthetic_world
from sightloop.data.datasets.synthetic_dialogue import exchange_of, label_answer
from sightloop.errors import UsageError
from sightloop.evaluation.pope import draw_objects
from sightloop.evaluation.predictions import read_predictions
from sightloop.evaluation.task import object_labels
from sightloop.inference.model import Model
from sightloop.metrics import chair_scores, pope_scores
from sightloop.types import Dialogue, JsonDict, Round, Sample
from tests.tiny_checkpoints.dialogue import dialogue_model

OBJECTS = ["circle", "square", "triangle", "star", "cross"]
BY = "4 samples by itm"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("world") / "world.tar"
    write_synthetic_world(path, synthetic_world("unseen", 8, seed=3, dialogues=True))
    return path


def drawn(texts: Sequence[str], best: int) -> list[JsonDict]:
    """Candidates of four samples: likelihood prefers the first text, ITM the one of index `best`."""
    return [
        {
            "text": text,
            "draws": [i for i in range(4) if i % len(texts) == t],
            "signals": {"log_prob": -1.0 - t, "itm": float(t == best), "votes": math.log(0.25)},
            "dropped": "",
        }
        for t, text in enumerate(texts)
    ]


def scored(task: Any, world: Path, file: Path, lines: Sequence[Mapping[str, Any]], **options: Any) -> Any:
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return sightloop.evaluate(task, world, predictions=file, rank_samples=4, **options)


def test_pope_of_winners(world: Path, tmp_path: Path) -> None:
    samples = list(sightloop.open_dataset(world))
    objects = draw_objects(samples, 0)
    lines: list[JsonDict] = []
    kept: list[str] = []
    greedy: list[str] = []
    truths: list[bool] = []
    for sample in samples:
        asked = objects[sample.key].asked
        says = ["yes" if name in object_labels(sample) else "no" for name in asked]
        wrong = ["no" if text == "yes" else "yes" for text in says]
        # The third question of each image is ranked wrongly.
        ranked = [drawn([w, s], int(i != 2)) for i, (w, s) in enumerate(zip(wrong, says, strict=True))]
        lines.append({"key": sample.key, "answers": ["yes"] * len(asked), "ranked": ranked})
        hardest = (*objects[sample.key].present, *objects[sample.key].absent["adversarial"])
        kept += [wrong[2] if asked.index(name) == 2 else says[asked.index(name)] for name in hardest]
        greedy += ["yes"] * len(hardest)
        truths += [name in object_labels(sample) for name in hardest]
    numbers = dict(scored("pope", world, tmp_path / "p.jsonl", lines))
    best, first = pope_scores(kept, truths), pope_scores(greedy, truths)
    for name in ("accuracy", "F1"):
        where = f"{name} (adversarial)"
        assert numbers[f"{where}[{BY}]"] == pytest.approx(best[name])
        assert numbers[where] == numbers[f"{where}[greedy search]"] == pytest.approx(first[name])
        gain = numbers[f"{where}: gain over greedy search[{BY}]"]
        assert gain == pytest.approx(best[name] - first[name], abs=1e-12)
    with pytest.raises(UsageError, match="goes without score_by"):
        scored("pope", world, tmp_path / "p.jsonl", lines, score_by="itm")


def test_chair_of_winners(world: Path, tmp_path: Path) -> None:
    samples = list(sightloop.open_dataset(world))
    texts = [f"a {name} and a {other}" for name, other in pairwise(OBJECTS)]
    texts = (texts * len(samples))[: len(samples)]
    lines = [
        {"key": sample.key, "caption": "a star", "ranked": drawn(["a cross", text], 1)}
        for sample, text in zip(samples, texts, strict=True)
    ]
    numbers = dict(scored("chair", world, tmp_path / "p.jsonl", lines, objects=OBJECTS))
    labels, people = [object_labels(one) for one in samples], [one.captions for one in samples]
    names = sightloop.metrics.ObjectNames(OBJECTS)
    kept = chair_scores(texts, labels, people, names)
    greedy = chair_scores(["a star"] * len(samples), labels, people, names)
    for name in ("CHAIRs", "CHAIRi"):
        assert numbers[name] == numbers[f"{name}[greedy search]"] == pytest.approx(greedy[name])
        assert numbers[f"{name}[{BY}]"] == pytest.approx(kept[name])
        fewer = numbers[f"{name}: gain over greedy search[{BY}]"]
        assert fewer == pytest.approx(greedy[name] - kept[name], abs=1e-12)
    assert numbers[f"objects named[{BY}]"] == 2


def test_answers_in_other_words_are_grounded(world: Path, tmp_path: Path) -> None:
    """Of the synthetic world: no wording of a true answer is wrong, and only the person's own is an exact match."""
    samples = list(sightloop.open_dataset(world))
    lines: list[JsonDict] = []
    same: list[bool] = []
    for sample in samples:
        (dialogue,) = sample.dialogues
        exchanges = [exchange_of(one) for one in dialogue.rounds]
        values = [one.value for one in exchanges if one is not None]
        assert len(values) == len(dialogue.rounds)
        scores = [[0.0] * len(one.candidates) for one in dialogue.rounds]
        ranked = [drawn(["maybe", value], 1) for value in values]
        lines.append({"key": sample.key, "scores": scores, "answers": ["maybe"] * 5, "ranked": ranked})
        same += [value == one.answer for value, one in zip(values, dialogue.rounds, strict=True)]
    numbers = dict(scored("dialogue", world, tmp_path / "p.jsonl", lines))
    assert numbers[f"grounded[{BY}]"] == numbers[f"grounded: gain over greedy search[{BY}]"] == 1
    assert numbers["grounded[greedy search]"] == numbers["grounded[4 samples by log_prob]"] == 0
    assert numbers[f"exact match[{BY}]"] == pytest.approx(sum(same) / len(same))


def test_rounds_of_this_world_are_known() -> None:
    """The label of every candidate follows from the true answer alone; a round with another answer is not known."""
    for sample in synthetic_world("train", 12, seed=5, dialogues=True):
        for one in sample.dialogues[0].rounds:
            exchange = exchange_of(one)
            assert exchange is not None
            labels = [label_answer(exchange, text).grounded for text in one.candidates]
            assert [float(label) for label in labels] == list(one.attributes["grounded"])
    assert exchange_of(Round("what color?", "red", ("red", "blue", "a dog"), 0)) is None
    assert exchange_of(Round("what color?", "red")) is None


def test_grounded_by_the_labels_of_candidates(tmp_path: Path) -> None:
    """Elsewhere the candidate that says the same has the label; without labels only the exact match is measured."""
    labels = {"grounded": (1, 0, 1)}
    rounds = (
        Round("what is it?", "a dog", ("a dog", "cat", "Dog."), 0, attributes=labels),
        Round("any cat?", "no"),
    )
    samples = [
        Sample("a", b"", dialogues=(Dialogue(rounds),)),
        Sample("b", b"", dialogues=(Dialogue(rounds),)),
    ]
    lines = [
        {
            "key": sample.key,
            "scores": [[3.0, 2.0, 1.0], []],
            "answers": ["cat", "No!"],
            "ranked": [drawn(["bird", "dog"], 1), drawn(["yes", "no"], 1)],
        }
        for sample in samples
    ]
    numbers = dict(scored("dialogue", sightloop_dataset(samples, tmp_path), tmp_path / "p.jsonl", lines))
    assert numbers["grounded[greedy search]"] == 0
    assert numbers[f"grounded[{BY}]"] == 1
    assert numbers["exact match[greedy search]"] == 0.5
    assert numbers[f"exact match[{BY}]"] == 1  # articles do not count in VQA's form


def sightloop_dataset(samples: Sequence[Sample], folder: Path) -> Path:
    """A shard of samples without an image of their own."""
    (scene,) = synthetic_world("train", 1, seed=0)
    write_synthetic_world(folder / "own.tar", [replace(one, image=scene.image) for one in samples])
    return folder / "own.tar"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return dialogue_model(tmp_path_factory.mktemp("dialogue"))


@pytest.mark.parametrize("task", ["dialogue", "pope", "chair", "vqa"])
def test_small_models_draw_beside_greedy_search(model: Model, world: Path, tmp_path: Path, task: Any) -> None:
    options: JsonDict = {"samples": 2, "isolate": False, "decoding": {"max_new_tokens": 4, "num_beams": 1}}
    if task == "chair":
        options["objects"] = OBJECTS
    result = sightloop.evaluate(task, world, model=model, out=tmp_path, rank_samples=3, **options)
    numbers = dict(result)
    records = read_predictions(tmp_path / "predictions.jsonl")[1]
    measures = {"dialogue": "grounded", "pope": "F1 (adversarial)", "chair": "CHAIRs", "vqa": "exact match"}
    measure = measures[task]
    own = {"log_prob", "votes"} | (
        {"itm"} if task == "chair" else {"match", "sensible", "specific", "grounded"}
    )
    for signal in own:
        assert f"{measure}[3 samples by {signal}]" in numbers
    assert f"{measure}: gain over greedy search[3 samples by default weights]" in numbers
    samples = {one.key: one for one in sightloop.open_dataset(world) if one.key in records}
    assert len(samples) == 2
    for key, record in records.items():
        asked = record["ranked"] if task != "chair" else [record["ranked"]]
        assert all(sum(len(one["draws"]) for one in own) == 3 for own in asked)
        if task == "dialogue":
            (dialogue,) = samples[key].dialogues
            talk = [sightloop.Message("system", dialogue.caption)]
            for i, one in enumerate(dialogue.rounds):
                images = (samples[key].image,) if i == 0 else ()
                talk.append(sightloop.Message("user", one.question, images))
                assert record["answers"][i] == model.chat(talk, max_new_tokens=4)
                talk.append(sightloop.Message("assistant", one.answer or ""))
    again = sightloop.evaluate(task, world, predictions=tmp_path / "predictions.jsonl")
    assert list(again) == list(result)
