"""Evaluation: numbers against direct computation, resumed predictions, incompatible files, reports."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import sightloop
from sightloop.data.datasets.schema import fields_from_region
from sightloop.data.datasets.synthetic import synthetic_world, write_synthetic_world
from sightloop.errors import UnsupportedError, UsageError
from sightloop.evaluation import retrieval
from sightloop.evaluation.matching import draw_mismatches
from sightloop.evaluation.predictions import packed, read_predictions
from sightloop.evaluation.results import MetricTable
from sightloop.evaluation.templates import TEMPLATES
from sightloop.inference.fingerprint import fingerprint
from sightloop.inference.rerank import ImageCache
from sightloop.metrics.captions import caption_scores
from sightloop.metrics.detection import detection_scores
from sightloop.metrics.retrieval import retrieval_scores
from sightloop.metrics.vqa import exact_match
from sightloop.types import Done, Failed, Region, Sample, Skipped
from tests.tiny_checkpoints.clip_and_blip import write_blip, write_clip

COUNT = 20
SHORT = {"max_new_tokens": 6}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints, and scenes with two captions each (one of them equal for all), in a shard."""
    folder = tmp_path_factory.mktemp("evaluate")
    for head in ("caption", "answer", "match"):
        write_blip(folder / head, head=head)
    write_clip(folder / "clip")
    write_synthetic_world(
        folder / "world.tar", [replace(s, captions=(*s.captions, "a scene")) for s in scenes()]
    )
    for sample in scenes():
        file = folder / "classes" / sample.captions[0].split()[0] / f"{sample.key}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        assert isinstance(sample.image, bytes)
        file.write_bytes(sample.image)
    return folder


def scenes(seed: int = 1) -> list[Sample]:
    return [synthetic_world("train", COUNT, seed)[i] for i in range(COUNT)]


def run(place: Path, task: Any, model: str, out: Path | None = None, **options: Any) -> sightloop.Evaluation:
    return sightloop.evaluate(
        task, data_of(place, task), model=place / model, out=out, isolate=False, device="cpu", **options
    )


def data_of(place: Path, task: str) -> Path:
    return place / ("classes" if task in ("classify", "features") else "world.tar")


def loaded(place: Path, task: str = "captions") -> list[Sample]:
    return list(sightloop.open_dataset(data_of(place, task)))


def test_caption_metrics_equal_direct_computation(place: Path, tmp_path: Path) -> None:
    result = run(place, "captions", "caption", tmp_path, clip=str(place / "clip"), decoding=SHORT)
    numbers = dict(result)
    records = read_predictions(tmp_path / "predictions.jsonl")[1]
    samples = loaded(place)
    written = [records[sample.key]["caption"] for sample in samples]
    model = sightloop.load(place / "caption", device="cpu")
    assert written == model.caption([sample.image for sample in samples], **SHORT)
    expected = caption_scores(written, [list(sample.captions) for sample in samples])
    assert all(numbers[name] == pytest.approx(value, abs=1e-12) for name, value in expected.items())
    clip = sightloop.load(place / "clip", device="cpu")
    images = clip.embed_images([sample.image for sample in samples])
    own = clip.embed_texts([f"A photo depicts {text}" for text in written])
    cosine = (images * own).sum(1).clip(0)
    near = [
        max(0.0, *(clip.embed_texts([f"A photo depicts {t}" for t in sample.captions]) @ mine))
        for sample, mine in zip(samples, own, strict=True)
    ]
    assert numbers["CLIPScore"] == pytest.approx(2.5 * cosine.mean(), abs=1e-5)
    both = 2 * 2.5 * cosine * near / np.maximum(2.5 * cosine + near, 1e-12)
    assert numbers["RefCLIPScore"] == pytest.approx(both.mean(), abs=1e-5)
    assert {"METEOR", "SPICE"} == set(result.runs[0].scored.not_computed)


@pytest.mark.parametrize("k", [1, 4, 3 * COUNT])
def test_retrieval_equals_similarity_and_rank(place: Path, k: int) -> None:
    found = run(place, "retrieval", "match", rerank=[k])
    samples = loaded(place)
    model = sightloop.load(place / "match", device="cpu")
    texts = [text for sample in samples for text in sample.captions]
    distinct = sorted(set(texts))  # "a scene" is everybody's, and counts once for each
    owner = np.repeat(np.arange(COUNT), 2)
    column = [distinct.index(text) for text in texts]
    pictures = [sample.image for sample in samples]
    similarity = model.similarity(pictures, distinct)[:, column]
    judged = model.rank(pictures, distinct, k=len(distinct))[:, column]
    near = np.argsort(-similarity, axis=1, kind="stable")[:, :k]
    close = np.argsort(-similarity.T, axis=1, kind="stable")[:, :k]
    expected = retrieval_scores(similarity, owner)
    anew = retrieval_scores(
        similarity,
        owner,
        reranked_texts=(near, np.take_along_axis(judged, near, 1)),
        reranked_images=(close, np.take_along_axis(judged.T, close, 1)),
    )
    expected |= {f"{name}, k={k}": value for name, value in anew.items()}
    assert dict(found) == pytest.approx(expected, abs=1e-12)
    lines = repr(found).splitlines()
    assert [line.split("  ")[0] for line in lines] == ["metric", *dict(found)]
    units = {number.name: (number.samples, number.unit) for number in found.runs[0].numbers}
    assert units["text-to-image recall@1"] == (2 * COUNT, "texts")
    assert units["image-to-text recall@1"] == (COUNT, "images")


def test_images_beyond_the_cache_are_encoded_again(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = list(run(place, "retrieval", "match", rerank=[5]))
    monkeypatch.setattr(retrieval, "ImageCache", lambda: ImageCache(3 * 17 * 32 * 4))
    assert list(run(place, "retrieval", "match", rerank=[5])) == expected


@pytest.mark.parametrize("task", ["captions", "retrieval", "classify", "vqa", "matching", "features"])
def test_scoring_the_predictions_again_gives_the_same_numbers(place: Path, tmp_path: Path, task: str) -> None:
    models = {"captions": "caption", "vqa": "answer", "classify": "clip", "features": "clip"}
    options = {"samples": 16, "seed": 3} | ({"decoding": SHORT} if task in ("captions", "vqa") else {})
    first = run(place, task, models.get(task, "match"), tmp_path, **options)
    again = sightloop.evaluate(task, data_of(place, task), predictions=tmp_path / "predictions.jsonl")
    assert list(again) == list(first)
    assert len(list(first)) > 1
    assert again.runs[0].numbers == first.runs[0].numbers
    for number in first.runs[0].numbers:
        assert number.protocol
        assert number.samples
        if number.low is not None:
            assert number.low <= number.high
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["about"]["samples"] == 16
    assert report["about"]["version"] == sightloop.__version__
    assert report["runs"][0]["about"]["weights"] == fingerprint(place / models.get(task, "match"))
    page = (tmp_path / "report.html").read_text()
    assert "http" not in page.replace("http-equiv", "")
    assert page.count("data:image/jpeg;base64,") > 3


def test_reports_name_what_the_data_leaves_out(tmp_path: Path) -> None:
    for name in "abc":
        Image.new("RGB", (8, 8)).save(tmp_path / f"{name}.png")
    for name in "ab":
        (tmp_path / f"{name}.txt").write_text("a cat\n")
    (tmp_path / "labels.xml").write_text("")
    predictions = tmp_path / "out" / "p.jsonl"
    predictions.parent.mkdir()
    predictions.write_text('{"key": "a", "caption": "a cat"}\n{"key": "b", "caption": "a dog"}\n')
    result = sightloop.evaluate("captions", tmp_path, predictions=predictions, out=tmp_path / "out")
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    page = (tmp_path / "out" / "report.html").read_text()
    assert len(result.notes) == 2
    assert report["notes"] == list(result.notes)
    assert all(note in page for note in result.notes)
    assert any("1 .xml" in note for note in result.notes)
    assert any("1 of 3 samples" in note for note in result.notes)


@pytest.mark.parametrize("task", ["captions", "retrieval"])
def test_interrupted_run_resumes(place: Path, tmp_path: Path, task: str) -> None:
    model, options = ("caption", {"decoding": SHORT}) if task == "captions" else ("match", {"rerank": [3]})
    whole = run(place, task, model, tmp_path / "whole", **options)
    seen: list[str] = []
    last = "captioning" if task == "captions" else "matching"

    def stop(what: str, total: int, event: Any) -> None:
        seen.append(event.name)
        if what.startswith(last) and seen.count(event.name) and len([1 for n in seen if n]) % COUNT == 7:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(place, task, model, tmp_path / "cut", on_sample=stop, **options)
    file = tmp_path / "cut" / "predictions.jsonl"
    with file.open("ab") as opened:
        opened.write(b'{"key": "train-1-0000')
    events: list[Any] = []
    again = run(place, task, model, tmp_path / "cut", on_sample=lambda *args: events.append(args), **options)
    mine = [event for what, _, event in events if what.startswith(last)]
    assert Counter(type(event) for event in mine) == {Skipped: 7, Done: COUNT - 7}
    for (name, value), (other, expected) in zip(again, whole, strict=True):
        assert name == other
        assert value == pytest.approx(expected, abs=1e-9)
    lines = [json.loads(line) for line in file.read_bytes().splitlines()]
    assert max(Counter((line.get("key"), *sorted(line)) for line in lines).values()) == 1


def test_killed_run_resumes(place: Path, tmp_path: Path) -> None:
    program = """
import sys, sightloop
def watch(what, total, event):
    print(event.name, flush=True)
    sys.stdin.readline()
sightloop.evaluate("captions", sys.argv[1], model=sys.argv[2], out=sys.argv[3], device="cpu", isolate=False,
    decoding={"max_new_tokens": 6}, on_sample=watch)
"""
    arguments = [str(place / "world.tar"), str(place / "caption"), str(tmp_path / "killed")]
    process = subprocess.Popen(
        [sys.executable, "-c", program, *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdin
    assert process.stdout
    for _ in range(9):
        assert process.stdout.readline()
        process.stdin.write("\n")
        process.stdin.flush()
    assert process.stdout.readline()
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    process.stdin.close()
    process.stdout.close()
    file = tmp_path / "killed" / "predictions.jsonl"
    assert len(read_predictions(file)[1]) == 10
    file.write_bytes(file.read_bytes()[:-9])  # as a power cut may leave it
    events: list[Any] = []
    again = run(
        place,
        "captions",
        "caption",
        tmp_path / "killed",
        decoding=SHORT,
        on_sample=lambda *a: events.append(a[2]),
    )
    assert Counter(type(event) for event in events) == {Skipped: 9, Done: COUNT - 9}
    assert list(again) == list(run(place, "captions", "caption", decoding=SHORT))


def test_incompatible_predictions_are_refused(place: Path, tmp_path: Path) -> None:
    run(place, "captions", "caption", tmp_path, decoding=SHORT)
    file = tmp_path / "predictions.jsonl"
    with pytest.raises(UsageError, match=r"other settings .*max_new_tokens.*--out"):
        run(place, "captions", "caption", tmp_path, decoding={"max_new_tokens": 7})
    with pytest.raises(UsageError, match="other data"):
        run(place, "captions", "caption", tmp_path, decoding=SHORT, samples=5)
    with pytest.raises(UsageError, match="another precision"):
        run(place, "captions", "caption", tmp_path, decoding=SHORT, dtype="bfloat16")
    write_blip(place / "other", seed=1)
    with pytest.raises(UsageError, match=r"another model \(.*caption.*now .*other"):
        run(place, "captions", "other", tmp_path, decoding=SHORT)
    write_synthetic_world(tmp_path / "other.tar", scenes(2))
    with pytest.raises(UsageError, match="other data"):
        sightloop.evaluate("captions", tmp_path / "other.tar", predictions=file)
    with pytest.raises(UsageError, match="another task"):
        sightloop.evaluate("retrieval", place / "world.tar", predictions=file)
    settings = place / "caption" / "preprocessor_config.json"
    whole = settings.read_text()
    settings.write_text(whole + " ")
    with pytest.raises(UsageError, match="preprocessing"):
        run(place, "captions", "caption", tmp_path, decoding=SHORT)
    settings.write_text(whole)
    lines = file.read_bytes().splitlines(keepends=True)
    file.write_bytes(b"".join(lines[:-2]))
    with pytest.raises(UsageError, match="lack 2 of 20 samples"):
        sightloop.evaluate("captions", place / "world.tar", predictions=file)
    file.write_bytes(b"".join([*lines[:3], b"oh\n", *lines[3:]]))
    with pytest.raises(UsageError, match="line 4"):
        sightloop.evaluate("captions", place / "world.tar", predictions=file)


def test_predictions_of_other_programs_are_scored(place: Path, tmp_path: Path) -> None:
    file = tmp_path / "theirs.jsonl"
    samples = loaded(place)
    file.write_text("".join(json.dumps({"key": s.key, "caption": s.captions[0]}) + "\n" for s in samples))
    numbers = dict(sightloop.evaluate("captions", place / "world.tar", predictions=file))
    assert numbers["BLEU-4"] == pytest.approx(1, abs=1e-6)
    assert numbers["ROUGE-L"] == 1
    with pytest.raises(UsageError, match="not of this task"):
        sightloop.evaluate("retrieval", place / "world.tar", predictions=file)
    file.write_text(file.read_text() + '{"key": "nobody", "caption": ""}\n')
    with pytest.raises(UsageError, match="nobody"):
        sightloop.evaluate("captions", place / "world.tar", predictions=file)


def write_predicted_regions(
    file: Path, samples: list[Sample], move: float, *, score: float | None = 0.9
) -> None:
    """Writes the regions of every other sample, moved `move` pixels to the right, as predictions."""
    with file.open("w") as out:
        for place, sample in enumerate(samples):
            regions = [
                replace(
                    region,
                    box=tuple(np.add(region.box, [move, 0, move, 0])),
                    polygons=tuple(tuple(np.add(p, [move, 0] * (len(p) // 2))) for p in region.polygons),
                    score=score,
                )
                for region in sample.regions
            ]
            fields = [fields_from_region(region) for region in regions if place % 2 == 0]
            out.write(json.dumps({"key": sample.key, "regions": fields}) + "\n")


def test_detections_of_other_programs_are_scored(place: Path, tmp_path: Path) -> None:
    pytest.importorskip("faster_coco_eval")
    files = [tmp_path / "boxes.jsonl", tmp_path / "moved.jsonl"]
    samples = loaded(place)
    write_predicted_regions(files[0], samples, 0)
    write_predicted_regions(files[1], samples, 12)
    known = [s.regions for s in samples]
    found = [s.regions if i % 2 == 0 else () for i, s in enumerate(samples)]
    result = sightloop.evaluate("detect", place / "world.tar", predictions=files, out=tmp_path)
    assert {n.name: n.value for n in result.runs[0].numbers} == detection_scores(found, known)
    assert result.differences["mAP"].value > 0
    assert all(
        n.low <= n.value <= n.high for n in result.runs[0].numbers if n.low is not None and n.high is not None
    )
    page = (tmp_path / "report.html").read_text()
    assert "A red and B blue" in page
    with pytest.raises(UnsupportedError, match="--predictions"):
        run(place, "detect", "clip")
    files[0].write_text(files[0].read_text().replace('"score"', '"sure"', 1))
    with pytest.raises(UsageError, match="some have none"):
        sightloop.evaluate("detect", place / "world.tar", predictions=files[0])
    write_predicted_regions(files[0], samples, 0, score=None)
    again = sightloop.evaluate("detect", place / "world.tar", predictions=files[0])
    assert "no scores" in again.runs[0].numbers[0].protocol
    files[0].write_text(files[0].read_text().replace('"box": [', '"box": ["x", ', 1))
    with pytest.raises(UsageError, match="box holds something else than finite numbers"):
        sightloop.evaluate("detect", place / "world.tar", predictions=files[0])


@pytest.mark.parametrize("task", ["locate", "segment"])
def test_phrases_are_scored_by_iou(place: Path, tmp_path: Path, task: Any) -> None:
    """Images without predictions count 0; a label of several regions is one phrase."""
    pytest.importorskip("faster_coco_eval")
    file = tmp_path / "found.jsonl"
    samples = loaded(place)
    write_predicted_regions(file, samples, 0)
    result = sightloop.evaluate(task, place / "world.tar", predictions=file)

    def phrases(sample: Sample) -> int:
        return len({r.label for r in sample.regions if task == "locate" or r.polygons})

    right = sum(phrases(sample) for sample in samples[::2])
    count = sum(map(phrases, samples))
    numbers = dict(result)
    first = "accuracy@0.5" if task == "locate" else "precision@0.5"
    assert numbers[first] == pytest.approx(right / count)
    assert numbers["mean IoU" if task == "locate" else "mIoU"] == pytest.approx(right / count)
    assert (result.runs[0].numbers[0].samples, result.runs[0].numbers[0].unit) == (count, "phrases")


def test_region_models_get_the_labels_of_the_data(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = sightloop.load(place / "clip", device="cpu")
    regions = {s.key: s.regions for s in loaded(place)}
    asked: list[tuple[int, Any]] = []

    def locate(pictures: list[Any], phrases: list[str]) -> list[list[Region]]:
        asked.append((len(pictures), phrases))
        return [[Region("it", (0, 0, 9, 9), score=0.5)] for _ in phrases]

    def detect(pictures: list[Any], phrases: Any) -> list[list[Region]]:
        asked.append((len(pictures), phrases))
        return [[Region("word cat", (0, 0, 9, 9))] for _ in pictures]

    monkeypatch.setattr(type(model), "capabilities", frozenset({"detect", "locate"}))
    monkeypatch.setattr(type(model), "locate", staticmethod(locate), raising=False)
    monkeypatch.setattr(type(model), "detect", staticmethod(detect), raising=False)
    given = {"model": model, "isolate": False}
    sightloop.evaluate("locate", place / "world.tar", out=tmp_path, **given)
    texts = [text for _, phrases in asked for text in phrases]
    assert all(count == len(phrases) for count, phrases in asked)
    assert texts == [label for mine in regions.values() for label in dict.fromkeys(r.label for r in mine)]
    records = read_predictions(tmp_path / "predictions.jsonl")[1]
    assert [r["label"] for record in records.values() for r in record["regions"]] == texts
    asked.clear()
    pytest.importorskip("faster_coco_eval")
    sightloop.evaluate("detect", place / "world.tar", labels=["word cat"], **given)
    assert {tuple(phrases) for _, phrases in asked} == {("word cat",)}


def test_unreadable_images_are_named_and_left_out(place: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    for i, sample in enumerate(scenes()[:6]):
        assert isinstance(sample.image, bytes)
        (data / f"{i}.png").write_bytes(sample.image if i != 2 else sample.image[:60])
        (data / f"{i}.txt").write_text(f"{sample.captions[0]} <b>&")
    events: list[Any] = []
    result = sightloop.evaluate(
        "retrieval",
        data,
        model=place / "match",
        out=tmp_path / "out",
        isolate=False,
        device="cpu",
        on_sample=lambda *args: events.append(args[2]),
    )
    assert list(result.runs[0].failed) == ["2"]
    assert [event.name for event in events if isinstance(event, Failed)] == ["2"]
    assert next(n for n in result.runs[0].numbers).samples == 5
    again = sightloop.evaluate("retrieval", data, predictions=tmp_path / "out" / "predictions.jsonl")
    assert again.runs[0].failed == result.runs[0].failed
    assert list(again) == list(result)
    page = (tmp_path / "out" / "report.html").read_text()
    assert "<b>&" not in page
    assert "&lt;b&gt;&amp;" in page
    assert "1 left out" in page


def test_classification_equals_classify(place: Path) -> None:
    result = run(place, "classify", "clip", templates="clip-7")
    samples = loaded(place, "classify")
    labels = sorted({sample.label or "" for sample in samples})
    model = sightloop.load(place / "clip", device="cpu")
    templates = result.runs[0].about["settings"]["templates"]
    found = model.classify([sample.image for sample in samples], labels, templates)
    hits = [labels[row.argmax()] == sample.label for row, sample in zip(found, samples, strict=True)]
    numbers = dict(result)
    assert len(templates) == 7
    assert "7 template(s) averaged" in result.runs[0].numbers[0].protocol
    assert "clip-7" in result.runs[0].numbers[0].protocol
    assert len(set(TEMPLATES["clip-80"])) == 80
    assert set(TEMPLATES["clip-7"]) < set(TEMPLATES["clip-80"])
    assert all(text.count("{}") == 1 for text in TEMPLATES["clip-80"])
    assert numbers["top-1"] == np.mean(hits)
    by_class = [
        np.mean([h for h, s in zip(hits, samples, strict=True) if s.label == label]) for label in labels
    ]
    assert numbers["mean per class"] == pytest.approx(np.mean(by_class))
    confusion = result.runs[0].scored.confusion
    assert confusion is not None
    assert confusion[1].sum() == COUNT
    assert confusion[1].trace() == sum(hits)
    with pytest.raises(UsageError, match="not among those given"):
        run(place, "classify", "clip", labels=["x", "y"])


@pytest.mark.parametrize("answer_by", ["generate", "rank"])
def test_vqa_equals_answer(place: Path, tmp_path: Path, answer_by: Any) -> None:
    numbers = dict(run(place, "vqa", "answer", tmp_path, answer_by=answer_by, decoding=SHORT, samples=6))
    records = read_predictions(tmp_path / "predictions.jsonl")[1]
    samples = [sample for sample in loaded(place) if sample.key in records]
    own = sorted(
        {answer for s in loaded(place) if s.key in records for q in s.questions for answer in q.answers}
    )
    model = sightloop.load(place / "answer", device="cpu")
    written, given = [], []
    for sample in samples:
        asked = [q.question for q in sample.questions]
        candidates = own if answer_by == "rank" else None
        answers = model.answer(sample.image, asked, candidates=candidates, **SHORT)
        assert records[sample.key]["answers"] == answers
        written += answers
        given += [list(q.answers) for q in sample.questions]
    assert numbers["exact match"] == pytest.approx(exact_match(written, given))
    assert "exact match[yes/no]" in numbers or "exact match[number]" in numbers


def test_mismatches_are_wrong_captions_drawn_by_the_seed() -> None:
    samples = [replace(s, captions=(*s.captions, s.captions[0].upper())) for s in scenes()]
    found = draw_mismatches(samples, 0)
    assert found == draw_mismatches(samples[::1], 0) != draw_mismatches(samples, 1)
    captions = {s.key: {text.lower() for text in s.captions} for s in samples}
    for key, pairs in found.items():
        assert len(pairs) == 2
        assert not any(text.lower() in captions[key] for pair in pairs for text in pair)

    def shared(key: str, text: str) -> int:
        return len(set(next(iter(captions[key])).split()) & set(text.lower().split()))

    hard = sum(shared(key, pair[1]) for key, pairs in found.items() for pair in pairs)
    assert hard > sum(shared(key, pair[0]) for key, pairs in found.items() for pair in pairs)
    with pytest.raises(UsageError, match="differ"):
        draw_mismatches([replace(s, captions=("a cat",)) for s in samples], 0)


def test_matching_scores_of_perfect_and_random_scores(place: Path, tmp_path: Path) -> None:
    file = tmp_path / "scores.jsonl"

    def score(make: Any) -> dict[str, float]:
        random = np.random.default_rng(0)
        lines = [{"key": s.key, "scores": [make(random) for _ in s.captions]} for s in loaded(place)]
        file.write_text("".join(json.dumps(line) + "\n" for line in lines))
        return dict(sightloop.evaluate("matching", place / "world.tar", predictions=file))

    sure = score(lambda random: [0.9, 0.2, 0.6])
    assert sure["roc_auc (hard)"] == sure["roc_auc (random)"] == 1
    assert 0.6 < sure["recommended_threshold (hard)"] < 0.9
    assert sure["missed_match_rate (hard)"] == 0
    coin = score(lambda random: random.random(3).tolist())
    assert 0.3 < coin["roc_auc (random)"] < 0.7


def test_separable_features_are_classified(place: Path, tmp_path: Path) -> None:
    file = tmp_path / "vectors.jsonl"
    samples = loaded(place, "features")
    labels = sorted({s.label or "" for s in samples})
    random = np.random.default_rng(0)
    with file.open("w") as out:
        for sample in samples:
            vector = np.eye(8)[labels.index(sample.label or "")] + random.normal(0, 0.01, 8)
            out.write(json.dumps({"key": sample.key, "image": packed(vector.astype(np.float32))}) + "\n")
    numbers = dict(sightloop.evaluate("features", place / "classes", predictions=file))
    lone = sum(count == 1 for count in Counter(s.label for s in samples).values())
    assert numbers["20-NN"] >= 1 - lone / COUNT
    assert numbers["linear probe"] >= 1 - lone / COUNT


def test_two_models_are_compared(place: Path, tmp_path: Path) -> None:
    write_blip(place / "second", seed=5)
    result = sightloop.evaluate(
        "captions",
        place / "world.tar",
        model=[place / "caption", place / "second"],
        train_data=place / "world.tar",
        out=tmp_path,
        isolate=False,
        device="cpu",
        decoding=SHORT,
    )
    assert (tmp_path / "predictions-2.jsonl").exists()
    first, second = ({n.name: n.value for n in run.numbers} for run in result.runs)
    for name, gap in result.differences.items():
        assert gap.value == pytest.approx(first[name] - second[name], abs=1e-12)
        assert gap.low <= gap.value <= gap.high
        assert 0 < gap.p <= 1
    assert {"BLEU-4", "CIDEr", "unseen"} <= result.differences.keys()
    assert result.leaks is not None
    assert len(result.leaks.images) == COUNT
    page = (tmp_path / "report.html").read_text()
    assert "A against B" in page
    assert "Copies in the training data" in page


def test_differences_of_rows_are_paired() -> None:
    random = np.random.default_rng(0)
    values = random.random(40)
    rows = [str(i) for i in range(40)]

    def measure(table: np.ndarray, names: list[str]) -> MetricTable:
        median = lambda drawn: float(np.median(drawn))  # noqa: E731
        return MetricTable("m", "p", "u", names, table, of_rows=median)

    same = measure(values, rows).difference(measure(values[::-1].copy(), rows[::-1]), 0)
    assert (same.value, same.low, same.high, same.p) == (0, 0, 0, 1)
    apart = measure(values + 1, rows).difference(measure(values[:30], rows[:30]), 0)
    assert apart.low == pytest.approx(1)
    assert apart.p < 0.01


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"model": ()}, "give one or two"),
        ({"model": "x", "predictions": "y"}, "not both"),
        ({"model": "x", "colour": 1}, "no such option"),
        ({"model": "x", "answer_by": "guess"}, "answer_by"),
        ({"model": "x", "rerank": [0]}, "rerank"),
        ({"model": "x", "samples": 0}, "samples"),
    ],
)
def test_wrong_arguments_raise(place: Path, options: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        sightloop.evaluate("vqa", place / "world.tar", **options)
    with pytest.raises(UsageError, match="task"):
        sightloop.evaluate("taste", place / "world.tar", model="x")  # type: ignore[arg-type]


def test_missing_capabilities_raise_before_predicting(place: Path, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match=r"cannot rank .*rerank=\[\]"):
        run(place, "retrieval", "clip", tmp_path)
    assert read_predictions(tmp_path / "predictions.jsonl")[1] == {}
    assert len(list(run(place, "retrieval", "clip", rerank=[]))) == 8
    with pytest.raises(UnsupportedError, match="match-by itc"):
        run(place, "matching", "clip")
    assert "ece (hard)" not in dict(run(place, "matching", "clip", match_by="itc"))


def test_fingerprint_of_a_loaded_model_is_that_of_its_weights(place: Path) -> None:
    weights = (place / "match" / "model.safetensors").read_bytes()
    assert fingerprint(place / "match") == hashlib.sha256(weights).hexdigest()[:32]
    model = sightloop.load(place / "match", device="cpu")
    assert fingerprint(model) == fingerprint(sightloop.load(place / "match", device="cpu"))
    assert fingerprint(model) != fingerprint(sightloop.load(place / "caption", device="cpu"))
    by_object = sightloop.evaluate("retrieval", place / "world.tar", model=model, isolate=False)
    assert list(by_object) == list(run(place, "retrieval", "match"))
