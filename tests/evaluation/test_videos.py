"""Evaluation of videos by caption: the files of captions, and the scores of BLIP's and CLIP4Clip's protocols."""

from __future__ import annotations

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
from sightloop.errors import UsageError
from sightloop.evaluation.video_captions import open_video_captions
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
    dataset = open_video_captions(captions_file(place, kind), place / "clips")
    assert {sample.key: list(sample.captions) for sample in dataset} == CAPTIONS
    assert [Path(str(sample.image)).name for sample in dataset] == [f"{name}.avi" for name in CAPTIONS]


def test_what_is_no_file_of_captions(place: Path) -> None:
    path = place / "none.json"
    for content in ("{}", "[1]", '[{"video": "a"}]', "[]", "no"):
        path.write_text(content)
        with pytest.raises(UsageError, match=r"none\.json"):
            open_video_captions(path, place / "clips")
    with pytest.raises(UsageError, match="has none of the videos"):
        open_video_captions(captions_file(place, "a.csv"), place / "blip")


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


def test_clip_by_the_mean_of_its_frames(place: Path) -> None:
    from sightloop.evaluation.video_retrieval import encode_video, video_vector

    model = sightloop.load(place / "clip")
    sample = open_video_captions(captions_file(place, "a.csv"), place / "clips")[0]
    own = model.embed_images([pixels_of(0)[i] for i in (0, 5, 10, 15)])  # four seconds
    mean = (own / np.linalg.norm(own, axis=1, keepdims=True)).mean(axis=0)
    vector = video_vector(model, encode_video(model, sample.image))
    np.testing.assert_allclose(vector, mean / np.linalg.norm(mean), atol=1e-5)


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
