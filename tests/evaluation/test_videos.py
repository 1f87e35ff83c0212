"""Evaluation of videos by caption: the files of captions, and the scores of BLIP's and CLIP4Clip's protocols."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("av")

import sightloop
from sightloop.apps.cli import main
from sightloop.data.video.writing import write_video
from sightloop.errors import UsageError, install_command
from sightloop.evaluation.video_annotations import open_video_annotations
from sightloop.types import Encoded
from tests.tiny_checkpoints.clip_and_blip import write_blip, write_clip

FRAMES, RATE = 20, 5
CAPTIONS = {"video1": ["a red car"], "video2": ["a dog", "a wet dog"], "video3": ["two boats"]}


def pixels_of(number: int) -> list[np.ndarray[Any, np.dtype[np.uint8]]]:
    """Random blocks, other ones in each frame."""
    random = np.random.default_rng(number)
    blocks = random.integers(0, 256, (FRAMES, 6, 8, 3), np.uint8)
    return list(blocks.repeat(8, axis=1).repeat(8, axis=2))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("videos")
    (folder / "clips").mkdir()
    for number, name in enumerate(CAPTIONS):
        write_video(
            folder / "clips" / f"{name}.avi", pixels_of(number), rate=RATE, codec="ffv1", pixel_format="bgr0"
        )
    write_blip(folder / "blip", head="match")
    write_clip(folder / "clip")
    return folder


def captions_file(place: Path, kind: str) -> Path:
    pairs = [(name, text) for name, texts in CAPTIONS.items() for text in texts]
    contents = {
        "a.csv": "key,vid_key,video_id,sentence\n"
        + "".join(f"ret{i},msr{i},{name},{text}\n" for i, (name, text) in enumerate(pairs)),
        "b.json": json.dumps(
            {
                "videos": [{"video_id": name, "split": "test"} for name in CAPTIONS],
                "sentences": [{"video_id": name, "caption": text, "sen_id": 1} for name, text in pairs],
            }
        ),
        "c.json": json.dumps([{"video": f"{n}.mp4", "caption": texts} for n, texts in CAPTIONS.items()]),
        "d.txt": "".join(f"{name} {text}\n" for name, text in pairs),
        "e.jsonl": "".join(json.dumps({"clip_name": n, "caption": t}) + "\n" for n, t in pairs),
    }
    path = place / kind
    path.write_text(contents[kind])
    return path


@pytest.mark.parametrize("kind", ["a.csv", "b.json", "c.json", "d.txt", "e.jsonl"])
def test_files_of_captions(place: Path, kind: str) -> None:
    dataset = open_video_annotations(captions_file(place, kind), place / "clips")
    assert {sample.key: list(sample.captions) for sample in dataset} == CAPTIONS
    assert [Path(str(sample.image)).name for sample in dataset] == [f"{name}.avi" for name in CAPTIONS]


def test_what_is_no_file_of_captions(place: Path) -> None:
    path = place / "none.json"
    for content in ("{}", "[1]", '[{"video": "a"}]', "[]", "no"):
        path.write_text(content)
        with pytest.raises(UsageError, match=r"none\.json"):
            open_video_annotations(path, place / "clips")
    with pytest.raises(UsageError, match="has none of the videos"):
        open_video_annotations(captions_file(place, "a.csv"), place / "blip")


def test_blip_by_its_published_rules(place: Path, tmp_path: Path) -> None:
    model = sightloop.load(place / "blip")
    path = captions_file(place, "a.csv")
    kwargs: Any = {"model": model, "rerank": [128], "out": tmp_path / "report"}
    sightloop.evaluate("videos", [path, place / "clips"], **kwargs)
    from sightloop.evaluation.predictions import floats, read_predictions

    records = read_predictions(tmp_path / "report" / "predictions.jsonl")[1]
    texts = list(dict.fromkeys(text for own in CAPTIONS.values() for text in own))
    network: Any = model.network
    for number, name in enumerate(CAPTIONS):
        # np.arange(0, 20, 20 / 8, dtype=int), whose step NumPy rounds down
        chosen = [pixels_of(number)[i] for i in (0, 2, 4, 6, 8, 10, 12, 14)]
        with torch.inference_mode():
            tokens = model.encode([*model.read(chosen, isolate=False)]).tokens  # type: ignore[list-item]
            projected = network.image_projection(tokens[:, 0])
            mean = torch.nn.functional.normalize(projected.mean(dim=0), dim=-1)
            logits = model.match_scores(
                Encoded(tokens.reshape(1, -1, tokens.shape[-1])),
                model.tokenize(texts),
                [np.arange(len(texts))],
            )[0][:, 1]
        np.testing.assert_allclose(floats(records[name]["image"]), mean, atol=1e-5)
        np.testing.assert_allclose(floats(records[name]["logits"]), logits, atol=1e-5)


def test_clip_by_the_mean_of_its_frames(place: Path, tmp_path: Path) -> None:
    from sightloop.evaluation.predictions import floats, read_predictions

    model = sightloop.load(place / "clip")
    path = captions_file(place, "a.csv")
    sightloop.evaluate("videos", [path, place / "clips"], model=model, rerank=[], out=tmp_path / "report")
    records = read_predictions(tmp_path / "report" / "predictions.jsonl")[1]
    for number, name in enumerate(CAPTIONS):
        own = model.embed_images([pixels_of(number)[i] for i in (0, 5, 10, 15)])  # four seconds
        mean = (own / np.linalg.norm(own, axis=1, keepdims=True)).mean(axis=0)
        np.testing.assert_allclose(floats(records[name]["image"]), mean / np.linalg.norm(mean), atol=1e-5)


def test_the_command(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (place / "clips" / "broken.mp4").write_bytes(b"no video")
    path = place / "with-broken.txt"
    path.write_text(captions_file(place, "d.txt").read_text() + "broken a lamp\ngone a hat\n")
    words = [
        "evaluate",
        "videos",
        "-d",
        path,
        place / "clips",
        "-m",
        place / "clip",
        "--rerank",
        "0",
        "--json",
    ]
    assert main.main([*map(str, words)]) == 1
    out, err = capsys.readouterr()
    report = json.dumps(json.loads(out.splitlines()[0]))
    assert "recall@1" in report
    assert "broken" in err
    assert "there is no video gone in the folder" in err


QUESTIONS = [
    ("video1", "what is it?", "a car"),
    ("video2", "how many?", "2"),
    ("video1", "is it red?", "yes"),
]


def questions_file(folder: Path, kind: str) -> Path:
    rows = [{"video_id": name, "question": text, "answer": answer} for name, text, answer in QUESTIONS]
    numbered = [{**row, "video_id": int(row["video_id"][5:]), "id": i} for i, row in enumerate(rows)]
    contents = {
        "a.json": json.dumps(numbered),  # as published: MSRVTT-QA numbers its videos
        "b.jsonl": "".join(json.dumps({**row, "video_id": row["video_id"] + ".avi"}) + "\n" for row in rows),
        "c.csv": "video,question,answer\n" + "".join(f"{n},{q},{a}\n" for n, q, a in QUESTIONS),
        "d.json": json.dumps(
            {"questions": [{"video": n, "question": q, "answers": [a]} for n, q, a in QUESTIONS]}
        ),
    }
    path = folder / kind
    path.write_text(contents[kind])
    return path


@pytest.mark.parametrize("kind", ["a.json", "b.jsonl", "c.csv", "d.json"])
def test_files_of_questions(place: Path, tmp_path: Path, kind: str) -> None:
    path = questions_file(tmp_path, kind)
    dataset = open_video_annotations(path, place / "clips", questions=True)
    asked = [(s.key, q.question, *q.answers) for s in dataset for q in s.questions]
    assert sorted(asked) == sorted(QUESTIONS)
    assert [Path(str(sample.image)).stem for sample in dataset] == ["video1", "video2"]
    changed = tmp_path / f"changed-{kind}"
    changed.write_text(path.read_text().replace("how many?", "how much?"))
    other = open_video_annotations(changed, place / "clips", questions=True)
    assert dataset.fingerprint != other.fingerprint


def test_what_is_no_file_of_questions(place: Path, tmp_path: Path) -> None:
    path = tmp_path / "none.json"
    for content in (
        "{}",
        "[]",
        '[{"video": "video1", "question": "?"}]',
        '[{"video": "video1", "answer": "a"}]',
    ):
        path.write_text(content)
        with pytest.raises(UsageError, match=r"none\.json.*questions"):
            open_video_annotations(path, place / "clips", questions=True)


def test_answers_of_sixteen_frames_in_one_sequence(place: Path, tmp_path: Path) -> None:
    write_blip(tmp_path / "answers", head="answer")
    model = sightloop.load(tmp_path / "answers")
    network: Any = model.network
    expected: list[tuple[str, str]] = []
    for name, question, _ in QUESTIONS:
        # np.arange(0, 20, 20 / 16, dtype=int), whose step NumPy rounds down
        frames = pixels_of(list(CAPTIONS).index(name))[:16]
        with torch.inference_mode():
            pixels: list[Any] = [*model.read(frames, isolate=False)]
            tokens = torch.cat([model.encode([one]).tokens for one in pixels], dim=1)
            asked = model.tokenize([question])
            states = network.encode_text(Encoded(tokens), *asked.rows(np.array([0])))
            options = model.options({}, {"num_beams": 1})
            expected.append((name, model.generator.continue_texts(states, None, [0], options)[0][0].text))
    path = tmp_path / "true.json"
    answers = [answer for _, answer in expected]
    rows = [
        {"video": name, "question": question, "answer": f"The {answer.upper()}." if i else "none of it"}
        for i, ((name, question, _), answer) in enumerate(zip(QUESTIONS, answers, strict=True))
    ]
    path.write_text(json.dumps(rows))
    result = sightloop.evaluate("videoqa", [path, place / "clips"], model=model, out=tmp_path / "report")
    from sightloop.evaluation.predictions import read_predictions

    records = read_predictions(tmp_path / "report" / "predictions.jsonl")[1]
    assert records["video1"]["answers"] == [answers[0], answers[2]]
    assert records["video2"]["answers"] == [answers[1]]
    exact = next(number for number in result.runs[0].numbers if number.name == "exact match")
    assert exact.value == pytest.approx(2 / 3)
    assert exact.low is not None
    assert "16 frames" in exact.protocol


def test_questions_of_a_video_that_cannot_be_read(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "clips"
    folder.mkdir()
    (folder / "video2.mp4").write_bytes(b"no video")
    (folder / "video1.avi").symlink_to(place / "clips" / "video1.avi")
    write_blip(tmp_path / "answers", head="answer")
    path = questions_file(tmp_path, "a.json")
    words = ["evaluate", "videoqa", "-d", path, folder, "-m", tmp_path / "answers", "--json"]
    assert main.main([*map(str, words)]) == 1
    out, err = capsys.readouterr()
    assert "video2" in err
    numbers = {row["name"]: row for row in map(json.loads, out.splitlines())}
    assert numbers["exact match"]["samples"] == 2


@pytest.mark.parametrize("task", ["videos", "videoqa"])
def test_without_pyav_no_model_is_loaded(
    task: str, place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    table = place / "questions.json"
    table.write_text(
        json.dumps([{"video_id": "video1", "question": "what is it?", "answer": "car", "caption": "a car"}])
    )
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "av" else find(name, *rest)
    )
    monkeypatch.setattr("sightloop.inference.load.load", lambda *_, **__: pytest.fail("a model is loaded"))
    arguments = ["evaluate", task, "-m", str(place / "blip"), "-d", str(table), str(place / "clips")]
    assert main.main(arguments) == 2
    assert f"PyAV: {install_command('video')}" in capsys.readouterr().err
