"""Evaluation on held-out images during training."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

import sightloop
from sightloop.data.datasets.dataset import open_dataset
from sightloop.data.datasets.synthetic import synthetic_world, write_synthetic_world
from sightloop.training.config import EvaluationSettings
from sightloop.training.validation import _answers, _retrieval, at_chance, validate, validation_score
from sightloop.types import Question, Sample
from tests.tiny_checkpoints.clip_and_blip import write_blip


@pytest.fixture(scope="module")
def shard(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("world") / "unseen.tar"
    write_synthetic_world(path, synthetic_world("unseen", 12, seed=0, different=True))
    return path


@pytest.mark.parametrize("head", ["caption", "match", "answer"])
def test_each_head_has_its_metrics(head: str, shard: Path, tmp_path: Path) -> None:
    write_blip(tmp_path / "model", head=head)
    model = sightloop.load(tmp_path / "model", device="cpu")
    values, texts, _ = validate(model, open_dataset(str(shard)), EvaluationSettings(samples=8, show=3))
    expected = {
        "caption": {"CIDEr", "BLEU-4", "exact match"},
        "match": {
            *(f"{way} recall@{k}" for way in ("image-to-text", "text-to-image") for k in (1, 10)),
            *("ITM accuracy (random)", "ITM accuracy (hard)"),
        },
        "answer": {"VQA exact match"},  # one answer per question
    }
    assert set(values) == expected[head]
    assert len(texts) == (3 if head == "caption" else 0)
    assert not model.network.training


def test_answers_are_compared_as_evaluate_compares_them() -> None:
    class Answerer:
        def answer(self, images: list[Any], questions: list[str]) -> list[str]:
            return ["yes"] * len(questions)

    def values(*answers: str) -> dict[str, float]:
        sample = Sample("a", b"", questions=(Question("red?", answers),))
        return _answers(Answerer(), [sample], [None])  # type: ignore[arg-type,list-item]

    assert values("Yes") == {"VQA exact match": 1}
    assert values("No") == {"VQA exact match": 0}
    assert values(*["Yes", "yes"] * 5) == {"VQA accuracy": 1}


def test_validation_restores_training_mode(shard: Path, tmp_path: Path) -> None:
    write_blip(tmp_path / "model", head="match")
    model = sightloop.load(tmp_path / "model", device="cpu")
    model.network.train()
    validate(model, open_dataset(str(shard)), EvaluationSettings(samples=4))
    assert model.network.training


def test_recall_against_counting(shard: Path, tmp_path: Path) -> None:
    write_blip(tmp_path / "model", head="match")
    model = sightloop.load(tmp_path / "model", device="cpu")
    samples = list(open_dataset(str(shard)))
    texts = [sample.captions[0] for sample in samples]
    similarity = torch.from_numpy(model.similarity([sample.image for sample in samples], texts))
    values, *_ = validate(model, open_dataset(str(shard)), EvaluationSettings(samples=12))
    place = similarity.argsort(1, descending=True)
    hits = [i in place[i, :1].tolist() for i in range(len(samples))]
    assert values["image-to-text recall@1"] == pytest.approx(sum(hits) / len(hits))


class _Constant:
    """Model whose similarities and match probabilities are all equal."""

    capabilities = frozenset({"match"})

    def similarity(self, images: Sequence[object], texts: Sequence[str]) -> NDArray[np.float32]:
        return np.full((len(images), len(texts)), 0.5, np.float32)

    def match(self, images: Sequence[object], texts: Sequence[str]) -> NDArray[np.float32]:
        return np.ones(len(texts), np.float32)


def test_ties_and_equal_texts_count_as_in_evaluate() -> None:
    samples = [Sample(str(i), b"", captions=(text,)) for i, text in enumerate("abcd")]
    values = _retrieval(cast(Any, _Constant()), samples, cast(Any, [None] * 4))
    assert values["image-to-text recall@1"] == values["text-to-image recall@1"] == pytest.approx(0.25)
    assert values["ITM accuracy (hard)"] == 0.5
    # Two images of one text: each finds its text with either copy, and no text is a false one of its own image.
    same = [Sample(str(i), b"", captions=(text,)) for i, text in enumerate("aab")]
    assert _retrieval(cast(Any, _Constant()), same, cast(Any, [None] * 3))[
        "image-to-text recall@1"
    ] == pytest.approx((2 / 3 + 2 / 3 + 1 / 3) / 3)


def test_metrics_at_chance_are_reported() -> None:
    both = {"itc", "itm"}
    assert "0.010" in at_chance({"text-to-image recall@1": 0.01, "ITM accuracy (random)": 0.9}, 100, both)
    assert "ITM accuracy (random)" in at_chance(
        {"text-to-image recall@1": 0.6, "ITM accuracy (random)": 0.52}, 100, both
    )
    assert at_chance({"text-to-image recall@1": 0.6, "ITM accuracy (random)": 0.9}, 100, both) == ""
    assert at_chance({"text-to-image recall@1": 0.01, "ITM accuracy (random)": 0.5}, 100, {"lm"}) == ""
    assert at_chance({"CIDEr": 0.0}, 100, both) == ""


def test_the_score_is_the_preferred_metric() -> None:
    assert validation_score({"CIDEr": 0.3, "VQA accuracy": 0.9}, {"lm", "vqa"}) == 0.3
    assert (
        validation_score({"CIDEr": 0.3, "text-to-image recall@1": 0.1}, {"itc", "itm"}) == 0.1
    )  # its captioner is not trained
    assert validation_score({"VQA accuracy": 0.9}, {"lm"}) == 0.9
    assert validation_score({}, {"lm"}) is None
