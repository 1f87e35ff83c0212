"""Dialogues: scores of candidates token by token, what the model reads, and the task from VisDial's file to report."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import sightloop
from sightloop.errors import UnsupportedError, UsageError
from sightloop.evaluation.answer_scores import score_dialogues, score_method
from sightloop.evaluation.predictions import read_predictions
from sightloop.inference.model import Model
from sightloop.metrics import dialogue_scores
from sightloop.ranking.dialogue_text import context_text, readings
from sightloop.types import Dialogue, Pixels, Round
from tests.tiny_checkpoints.blip2 import OPT, T5, opt_tokenizer, t5_tokenizer, write_processor, write_writer
from tests.tiny_checkpoints.clip_and_blip import write_blip, write_clip
from tests.tiny_checkpoints.dialogue import dialogue_model
from tests.tiny_checkpoints.llava import LLAVA_15, write_llava
from tests.tiny_checkpoints.paligemma import write_paligemma

LONG_OPT = {**OPT, "max_position_embeddings": 256}
ANSWERS = ["a dog", "cat", "the red ball", "yes", "a", "in the street", "two dogs", "no"]
DIALOGUE = Dialogue(
    (
        Round("what is it", "a dog", tuple(ANSWERS), 0),
        Round("any cat?", "no", (), None),
        Round("where", None, tuple(ANSWERS[1:6]), 4, (0.0, 0.5, 0.0, 0.0, 1.0)),
    ),
    "a photo of a dog",
)


def image(seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (40, 30, 3), dtype=np.uint8))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dialogue")
    write_blip(folder / "answer", head="answer")
    write_blip(folder / "match", head="match")
    write_clip(folder / "clip")
    write_llava(folder / "llava", tiled=False, template=LLAVA_15)
    write_paligemma(folder / "paligemma")
    for name, text, tokenizer in (("opt", LONG_OPT, opt_tokenizer()), ("t5", T5, t5_tokenizer())):
        model = write_writer(folder / name, text, words=len(tokenizer) + 1)
        write_processor(folder / name, model, tokenizer)
    return folder


def loaded(place: Path, name: str) -> Model:
    return sightloop.load(place / name, device="cpu")


def pixels(model: Model, *seeds: int) -> list[Pixels]:
    read = list(model.read([image(seed) for seed in seeds], isolate=False))
    return [one for one in read if isinstance(one, Pixels)]


def texts(index: int, history: int | None = None) -> list[str]:
    return [context_text(DIALOGUE, index, reading) for reading in readings(DIALOGUE, index, history)]


def test_what_is_read_with_a_question() -> None:
    assert texts(2) == [
        "a photo of a dog. what is it? a dog. any cat? no. where?",
        "a photo of a dog. any cat? no. where?",
        "a photo of a dog. where?",
        "where?",
    ]
    assert texts(2, 1) == texts(2)[1:]
    assert texts(2, 9) == texts(2)
    assert texts(2, 0) == ["where?"]
    assert texts(0) == ["a photo of a dog. what is it?", "what is it?"]
    assert [tuple(reading) for reading in readings(Dialogue(DIALOGUE.rounds), 1)] == [(0, False), (1, False)]


@torch.inference_mode()
def word_by_word(decoder: Any, memory: Any, start: list[int], words: list[int]) -> float:
    """Log-likelihood of words, each appended alone."""
    state = decoder.start(memory, len(start) + len(words))
    logits = decoder.next_logits(torch.tensor([start], dtype=torch.long).reshape(1, -1), state)
    total = 0.0
    for word in words:
        total += float(logits.float().log_softmax(-1)[0, word])
        logits = decoder.next_logits(torch.tensor([[word]]), state)
    return total


def test_blips_likelihoods_word_by_word(place: Path) -> None:
    model = loaded(place, "answer")
    network: Any = model.network
    given = pixels(model, 0, 1)
    scores = score_dialogues(model, given, [[DIALOGUE], [DIALOGUE, DIALOGUE]], "likelihood", 1)
    assert [len(own) for own in scores] == [3, 6]
    assert [len(row) for row in scores[0]] == [8, 0, 5]
    for i, one in enumerate(given):
        read = model.tokenize(["a photo of a dog. any cat? no. where?"])
        states = network.encode_text(model.encode([one]), read.ids, read.device_lengths)
        for answer, score in zip(DIALOGUE.rounds[2].candidates, scores[i][2], strict=True):
            tokens = model.tokenizer.encode([answer]).ids[0].tolist()
            expected = word_by_word(network.decoder, states, [network.config.start_id], tokens[1:])
            assert score == pytest.approx(expected, abs=1e-3)
    assert np.allclose(scores[1][0], scores[1][3])


@pytest.mark.parametrize("name", ["llava", "paligemma", "opt", "t5"])
def test_likelihoods_of_prompted_networks_word_by_word(place: Path, name: str) -> None:
    model = loaded(place, name)
    network: Any = model.network
    given = pixels(model, 3)
    (scores,) = score_dialogues(model, given, [[DIALOGUE]], "likelihood")
    if "chat" in model.capabilities:
        prompt = network.render_chat(
            [
                sightloop.Message("user", "a photo of a dog. what is it?", (given[0],)),
                sightloop.Message("assistant", "a dog"),
                sightloop.Message("user", "any cat?"),
                sightloop.Message("assistant", "no"),
                sightloop.Message("user", "where?"),
            ]
        )
    else:
        prompt = model.generator.format_prompt("answer", texts(2)[0])
    prefix, _ = model.generator.build_prefix([model.encoder.encode_each(given)], [prompt])
    start = list(network.config.start_ids)
    for answer, score in zip(DIALOGUE.rounds[2].candidates, scores[2], strict=True):
        ids = model.tokenizer.backend.encode(answer, add_special_tokens=False).ids
        expected = word_by_word(network.language, prefix, start, [*ids, network.config.end_id])
        assert score == pytest.approx(expected, abs=2e-3), answer


def test_itm_scores_are_those_of_match(place: Path) -> None:
    model = loaded(place, "match")
    given = pixels(model, 0, 1)
    scores = score_dialogues(model, given, [[DIALOGUE], [DIALOGUE]], "itm", 0)
    for one, own in zip(given, scores, strict=True):
        texts = [f"where? {answer}" for answer in DIALOGUE.rounds[2].candidates]
        odds = model.match(one, texts)
        assert np.allclose(1 / (1 + np.exp(-own[2])), odds, atol=1e-5)
        assert own[1].shape == (0,)


def test_old_rounds_make_room(place: Path) -> None:
    """The tiny encoder reads 64 tokens: the oldest rounds are left out, and nothing is cut with a warning."""
    rounds = (*(Round(f"a zebra {i}", "a zebra") for i in range(12)), DIALOGUE.rounds[0])
    long = Dialogue(rounds, "a photo")
    for name, method, longest in (("answer", "likelihood", ""), ("match", "itm", " in the street")):
        model = loaded(place, name)
        given = pixels(model, 0)
        read = [context_text(long, 12, reading) for reading in readings(long, 12)]
        room = [len(model.tokenizer.backend.encode(text + longest).ids) <= 64 for text in read]
        assert 3 < room.index(True) < 12
        fewer = Dialogue(rounds[room.index(True) :], "a photo")
        own, expected = (score_dialogues(model, given, [[d]], method)[0][-1] for d in (long, fewer))  # type: ignore[arg-type]
        assert np.allclose(own, expected, atol=1e-4)


def test_the_model_decides_how_it_scores(place: Path) -> None:
    assert score_method(loaded(place, "answer"), None) == "likelihood"
    assert score_method(loaded(place, "match"), None) == "itm"
    with pytest.raises(UnsupportedError, match="cannot answer or match"):
        score_method(loaded(place, "clip"), None)
    with pytest.raises(UnsupportedError, match=r"cannot match .*score_by"):
        score_method(loaded(place, "answer"), "itm")


@pytest.fixture(scope="module")
def visdial(place: Path) -> list[Path]:
    """Six dialogues of three rounds among 20 candidates, with relevance of four rounds."""
    draw = random.Random(1)
    answers = [f"{a} {b}" for a in ("a", "the", "two", "no") for b in ("dog", "cat", "man", "ball", "house")]
    dialogs, dense = [], []
    for number in range(6):
        image(number).save(place / f"COCO_val2014_{number:012d}.jpg")
        options = [draw.sample(range(20), 20) for _ in range(3)]
        dialog = [{"question": 0, "answer": o[7], "answer_options": o, "gt_index": 7} for o in options]
        dialogs.append({"image_id": number, "caption": "a photo", "dialog": dialog})
        if number < 4:
            dense.append(
                {
                    "image_id": number,
                    "round_id": number % 3 + 1,
                    "gt_relevance": draw.choices([0, 0, 0.5, 1], k=20),
                }
            )
    content = {
        "version": "0.9",
        "data": {"dialogs": dialogs, "questions": ["what is it"], "answers": answers},
    }
    files = place / "visdial_0.9_val.json", place / "visdial_0.9_val_dense.json"
    for file, value in zip(files, (content, dense), strict=True):
        file.write_text(json.dumps(value))
    return list(files)


@pytest.mark.parametrize("name", ["answer", "match"])
def test_the_task_from_file_to_report(place: Path, visdial: list[Path], tmp_path: Path, name: str) -> None:
    result = sightloop.evaluate(
        "dialogue", visdial, model=place / name, out=tmp_path, isolate=False, device="cpu"
    )
    records = read_predictions(tmp_path / "predictions.jsonl")[1]
    samples = list(sightloop.open_dataset(visdial))
    model = loaded(place, name)
    method: Any = "likelihood" if name == "answer" else "itm"
    scores, truths, relevance = [], [], []
    for sample in samples:
        given = [one for one in model.read([sample.image], isolate=False) if isinstance(one, Pixels)]
        (own,) = score_dialogues(model, given, [sample.dialogues], method)
        assert records[sample.key]["scored_by"] == method
        for mine, kept, one in zip(
            own, records[sample.key]["scores"], sample.dialogues[0].rounds, strict=True
        ):
            assert np.allclose(mine, kept, atol=1e-4)
            scores.append(kept)
            truths.append(one.truth)
            relevance.append(one.relevance or None)
    expected = dialogue_scores(scores, truths, relevance)
    assert dict(result) == pytest.approx(expected, abs=1e-12)
    assert set(dict(result)) == {"MRR", "R@1", "R@5", "R@10", "mean rank", "NDCG"}
    numbers = {number.name: number for number in result.runs[0].numbers}
    assert (numbers["MRR"].samples, numbers["NDCG"].samples) == (6, 4)
    assert "18 rounds" in numbers["MRR"].protocol
    assert ("log-likelihood" if name == "answer" else "ITM logit") in numbers["MRR"].protocol
    assert numbers["MRR"].low is not None
    assert numbers["MRR"].low < numbers["MRR"].value < (numbers["MRR"].high or math.inf)
    again = sightloop.evaluate("dialogue", visdial, predictions=tmp_path / "predictions.jsonl")
    assert list(again) == list(result)
    page = (tmp_path / "report.html").read_text()
    assert page.count("data:image/jpeg;base64,") > 3
    assert "of 20)" in page


def test_scores_of_other_rounds_are_refused(place: Path, visdial: list[Path], tmp_path: Path) -> None:
    file = tmp_path / "p.jsonl"
    for row in ([[1.0] * 20] * 2, [[1.0] * 19] * 3, [[1.0] * 20, [1.0], [2.0] * 20]):
        lines = [{"key": f"{number:012d}", "scores": row} for number in range(6)]
        file.write_text("".join(json.dumps(line) + "\n" for line in lines))
        with pytest.raises(UsageError, match="incomplete"):
            sightloop.evaluate("dialogue", visdial, predictions=file)
    lines = [{"key": f"{number:012d}", "scores": [[1.0] * 20] * 3} for number in range(6)]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    result = sightloop.evaluate("dialogue", visdial[:1], predictions=file)
    assert dict(result)["mean rank"] == 8  # all equal: the order of the candidates
    assert "dense annotations" in result.runs[0].scored.not_computed["NDCG"]
    with pytest.raises(UsageError, match="no sample has what dialogue needs"):
        sightloop.evaluate("dialogue", place, predictions=file)
    with pytest.raises(UsageError, match="score_by"):
        sightloop.evaluate("dialogue", visdial, predictions=file, score_by="guess")
    with pytest.raises(UsageError, match="history"):
        sightloop.evaluate("dialogue", visdial, predictions=file, history=-1)


def test_a_model_of_dialogues_scores_by_the_sum_of_both(tmp_path: Path) -> None:
    model = dialogue_model(tmp_path)
    assert score_method(model, None) == "both"
    sample = next(iter(sightloop.open_dataset(tmp_path / "world.tar")))
    images, dialogues = list(model.read([sample.image])), [sample.dialogues]
    both, itm, likelihood = (
        score_dialogues(model, images, dialogues, method)[0]  # pyright: ignore[reportArgumentType]
        for method in ("both", "itm", "likelihood")
    )
    assert len(both) == len(sample.dialogues[0].rounds)
    for one, a, b in zip(both, itm, likelihood, strict=True):
        np.testing.assert_allclose(one, a + b, rtol=1e-5)
    report = sightloop.evaluate("dialogue", tmp_path / "world.tar", model=model, samples=2)
    assert "the sum of its ITM logit and its log-likelihood" in str(report.runs[0])
