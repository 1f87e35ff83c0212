"""POPE and CHAIR as tasks: drawn objects against their definitions, numbers against direct computation, reports."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import sightloop
from sightloop.errors import UnsupportedError, UsageError
from sightloop.evaluation.pope import draw_objects
from sightloop.evaluation.predictions import read_predictions
from sightloop.evaluation.task import object_labels
from sightloop.metrics import chair_scores, pope_question, pope_scores, roc_auc
from sightloop.metrics.matching import matching_curves
from sightloop.types import Region, Sample
from tests.tiny_checkpoints.clip_and_blip import write_blip

NAMES = ["dog", "cat", "apple", "dining table", "car", "person", "bus", "orange"]
SHORT = {"max_new_tokens": 6, "num_beams": 1}


def boxes(*labels: str) -> tuple[Region, ...]:
    return tuple(Region(label, (0, 0, 5, 5)) for label in labels)


@st.composite
def sets(draw: st.DrawFn) -> list[Sample]:
    labels = st.lists(st.sampled_from(NAMES), max_size=6)
    return [Sample(f"{i}", b"", regions=boxes(*draw(labels))) for i in range(draw(st.integers(1, 8)))]


@settings(max_examples=200, deadline=None)
@given(sets(), st.integers(0, 3))
def test_drawn_objects(samples: list[Sample], seed: int) -> None:
    own = {sample.key: {region.label for region in sample.regions} for sample in samples}
    every = sorted(set().union(*own.values()))
    expected = {key for key, labels in own.items() if labels and len(labels) < len(every)}
    if not expected:
        with pytest.raises(UsageError, match="needs images with labeled boxes"):
            draw_objects(samples, seed)
        return
    drawn = draw_objects(samples, seed)
    assert set(drawn) == expected
    assert draw_objects(samples, seed) == drawn
    images = {name: sum(name in labels for labels in own.values()) for name in every}
    both = Counter((a, b) for labels in own.values() for a in labels for b in labels if a != b)
    for key, objects in drawn.items():
        others = [name for name in every if name not in own[key]]
        assert len(objects.present) == len(set(objects.present)) == min(3, len(own[key]), len(others))
        assert set(objects.present) <= own[key]
        for names in objects.absent.values():
            assert len(names) == len(set(names)) == len(objects.present)
            assert set(names) <= set(others)
        popular = sorted(others, key=lambda name: (-images[name], name))
        assert list(objects.absent["popular"]) == popular[: len(objects.present)]
        taken: list[str] = []
        for name, absent in zip(objects.present, objects.absent["adversarial"], strict=True):
            left = [other for other in others if other not in taken]
            most = max(both[name, other] for other in left)
            # The first by name of those most often seen with it; any one if none ever was.
            assert absent == min(o for o in left if both[name, o] == most) if most else absent in left
            taken.append(absent)
        assert set(objects.asked) == {*objects.present}.union(*objects.absent.values())
        assert len(objects.asked) == len(set(objects.asked))


def test_another_seed_draws_others() -> None:
    samples = [Sample(str(i), b"", regions=boxes(*NAMES[i % 4 : i % 4 + 4])) for i in range(20)]
    assert draw_objects(samples, 0) != draw_objects(samples, 1)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints, and ten images with boxes, crowd regions and captions as COCO JSON."""
    folder = tmp_path_factory.mktemp("hallucination")
    for head in ("caption", "answer", "match"):
        write_blip(folder / head, head=head)
    images, annotations = [], []
    for number in range(10):
        Image.new("RGB", (40, 30), (25 * number, 90, 255 - 25 * number)).save(folder / f"{number}.png")
        images.append({"id": number, "file_name": f"{number}.png"})
        labels = [number % 8, (number + 1) % 8, (number * 3) % 8]
        for position, label in enumerate(labels):
            box = {"image_id": number, "category_id": label, "bbox": [position, 1, 9, 9]}
            annotations.append(box | {"iscrowd": int(position == 2 and number % 2)})
        annotations.append({"image_id": number, "caption": f"a photo of a {NAMES[(number + 2) % 8]}"})
    categories = [{"id": number, "name": name} for number, name in enumerate(NAMES)]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (folder / "coco.json").write_text(json.dumps(content))
    return folder


def run(place: Path, task: Any, model: str, out: Path, **options: Any) -> sightloop.Evaluation:
    data = place / "coco.json"
    return sightloop.evaluate(
        task, data, model=place / model, out=out, isolate=False, device="cpu", **options
    )


@pytest.mark.parametrize("score_by", [None, "likelihood", "itm"])
def test_pope_equals_direct_computation(place: Path, tmp_path: Path, score_by: Any) -> None:
    name = "match" if score_by == "itm" else "answer"
    result = run(place, "pope", name, tmp_path, score_by=score_by, decoding=SHORT)
    numbers = dict(result)
    samples = list(sightloop.open_dataset(place / "coco.json"))
    drawn = draw_objects(samples, 0)
    model = sightloop.load(place / name, device="cpu")
    for choice in ("random", "popular", "adversarial"):
        answers: list[str] = []
        truths: list[bool] = []
        scores: list[float] = []
        pairs: list[Any] = []
        for sample in samples:
            asked = [*drawn[sample.key].present, *drawn[sample.key].absent[choice]]  # type: ignore[index]
            truths += [label in object_labels(sample) for label in asked]
            if score_by == "itm":
                said = [pope_question(label).replace("Is there", "there is")[:-1] for label in asked]
                own = model.match(sample.image, said).tolist()
                scores += own
                answers += ["yes" if score >= 0.5 else "no" for score in own]
            else:
                pairs += [(sample.image, pope_question(label)) for label in asked]
        if pairs:
            candidates = None if score_by is None else ["yes", "no"]
            answers = model.answer([i for i, _ in pairs], [q for _, q in pairs], candidates, **SHORT)
        assert sum(truths) * 2 == len(truths)
        expected = {f"{key} ({choice})": value for key, value in pope_scores(answers, truths).items()}
        for key, value in expected.items():
            assert numbers.get(key, float("nan")) == pytest.approx(value, abs=1e-12, nan_ok=True), key
        if scores:
            curve = matching_curves(scores, list(map(int, truths)))
            assert numbers[f"ROC AUC ({choice})"] == pytest.approx(roc_auc(curve), abs=1e-6)
    assert ("neither" in numbers) == (score_by is None)
    first = result.runs[0].numbers[0]
    assert (first.name, first.samples, first.unit) == ("accuracy (random)", 10, "images")
    assert f"{len(truths)} questions" in first.protocol
    again = sightloop.evaluate("pope", place / "coco.json", predictions=tmp_path / "predictions.jsonl")
    assert again.runs[0].numbers == result.runs[0].numbers
    page = (tmp_path / "report.html").read_text()
    assert page.count("data:image/jpeg;base64,") > 3
    assert "right about" in page or "says yes to" in page


def test_pope_says_what_it_needs(place: Path, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match=r"cannot answer .*score_by=.itm"):
        run(place, "pope", "match", tmp_path / "a")
    with pytest.raises(UnsupportedError, match="cannot match"):
        run(place, "pope", "answer", tmp_path / "b", score_by="itm")
    (tmp_path / "c.json").write_text(
        json.dumps({"images": [{"id": 0, "file_name": str(place / "0.png")}], "annotations": []})
    )
    with pytest.raises(UsageError, match="needs images with labeled boxes"):
        sightloop.evaluate("pope", tmp_path / "c.json", model=place / "answer")


def test_pope_of_written_answers(place: Path, tmp_path: Path) -> None:
    """A perfect file, one that always says yes, and one that says neither yes nor no."""
    samples = list(sightloop.open_dataset(place / "coco.json"))
    drawn = draw_objects(samples, 0)

    def score(say: Any) -> dict[str, float]:
        file = tmp_path / "p.jsonl"
        lines = [
            {"key": s.key, "answers": [say(name in object_labels(s)) for name in drawn[s.key].asked]}
            for s in samples
        ]
        file.write_text("".join(json.dumps(line) + "\n" for line in lines))
        return dict(sightloop.evaluate("pope", place / "coco.json", predictions=file))

    perfect = score(lambda here: "Yes, it is." if here else "No, there is not.")
    assert {value for name, value in perfect.items() if name.startswith(("acc", "prec", "rec", "F1"))} == {1}
    assert perfect["neither"] == 0
    always = score(lambda here: "yes")
    assert always["yes ratio (random)"] == always["recall (popular)"] == 1
    assert always["accuracy (adversarial)"] == always["precision (random)"] == 0.5
    assert score(lambda here: "lamp")["neither"] == 1
    never = score(lambda here: "no")
    assert never["recall (random)"] == never["F1 (random)"] == 0
    assert "precision (random)" not in never


def test_chair_equals_direct_computation(place: Path, tmp_path: Path) -> None:
    result = run(place, "chair", "caption", tmp_path, decoding=SHORT)
    samples = list(sightloop.open_dataset(place / "coco.json"))
    records = read_predictions(tmp_path / "predictions.jsonl")[1]
    model = sightloop.load(place / "caption", device="cpu")
    captions = model.caption([sample.image for sample in samples], **SHORT)
    assert [records[sample.key]["caption"] for sample in samples] == captions
    expected = chair_scores(
        captions, [object_labels(sample) for sample in samples], [sample.captions for sample in samples]
    )
    numbers = dict(result)
    assert numbers["CHAIRs"] == expected["CHAIRs"]
    assert numbers["object recall"] == pytest.approx(expected["object recall"], abs=1e-12)
    assert numbers.get("CHAIRi", -1) == pytest.approx(expected["CHAIRi"] if "CHAIRi" in numbers else -1)


def test_chair_scores_the_captions_of_captions(place: Path, tmp_path: Path) -> None:
    run(place, "captions", "caption", tmp_path / "captions", decoding=SHORT)
    run(place, "chair", "caption", tmp_path / "chair", decoding=SHORT)
    results = [
        sightloop.evaluate("chair", place / "coco.json", predictions=tmp_path / name / "predictions.jsonl")
        for name in ("captions", "chair")
    ]
    assert results[0].runs[0].numbers == results[1].runs[0].numbers
    with pytest.raises(UsageError, match="another task"):
        sightloop.evaluate(
            "pope", place / "coco.json", predictions=tmp_path / "captions" / "predictions.jsonl"
        )


def test_chair_of_written_captions(place: Path, tmp_path: Path) -> None:
    """What crowd regions and people's captions name is there; a list of one's own changes what is looked for."""
    samples = list(sightloop.open_dataset(place / "coco.json"))

    def score(captions: list[str], **options: Any) -> sightloop.Evaluation:
        file = tmp_path / "p.jsonl"
        lines = [{"key": s.key, "caption": text} for s, text in zip(samples, captions, strict=True)]
        file.write_text("".join(json.dumps(line) + "\n" for line in lines))
        return sightloop.evaluate("chair", place / "coco.json", predictions=file, **options)

    right = [f"a {' and a '.join(object_labels(s))}, {s.captions[0]}" for s in samples]
    assert any(s.extra.get("crowd") for s in samples)
    assert dict(score(right))["CHAIRi"] == 0
    assert dict(score(right))["object recall"] == 1
    wrong = dict(score([text + " with a zebra and two zebras" for text in right]))
    assert wrong["CHAIRs"] == wrong["CHAIRi[zebra]"] == 1
    mentions = wrong["objects named"] * 10
    assert wrong["CHAIRi"] == pytest.approx(20 / mentions)
    silent = score(["a nice view"] * 10)
    assert dict(silent)["CHAIRs"] == 0
    assert "no caption names" in silent.runs[0].scored.not_computed["CHAIRi"]
    own = dict(score(["a pup"] * 10, objects=["dog: pup", "apple"]))
    assert own["CHAIRs"] == sum("dog" not in {*object_labels(s), s.captions[0][13:]} for s in samples) / 10
    with pytest.raises(UsageError, match=r"names one of 1 objects \(unicorn"):
        score(right, objects=["unicorn"])
    with pytest.raises(UsageError, match="list of"):
        score(right, objects="dog")
