"""Sample and rank: every signal equals the verb that it comes from, and rules hold for any candidates."""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sightloop.errors import UsageError
from sightloop.inference.load import load
from sightloop.inference.model import Model
from sightloop.inference.sample_rank import rank_texts, repeated_words
from sightloop.inference.text_generation import WrittenText
from sightloop.ranking.options import ABSTENTION, RankedText, Ranking, RankWeights
from sightloop.ranking.policy import Policy, read_policy
from tests.checkpoints.test_against_reference import pictures
from tests.tiny_checkpoints.clip_and_blip import write_blip, write_clip

WEIGHTS = RankWeights(log_prob=1.0, itm=0.5, itc=2.0, votes=0.25)


@pytest.fixture(scope="module")
def nano() -> Model:
    return load("nano", device="cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("checkpoints")
    write_clip(path / "clip")
    write_blip(path / "caption", head="caption")
    write_blip(path / "match", head="match")
    return path


def ranked(texts: list[str]) -> list[RankedText]:
    assert all(isinstance(text, RankedText) for text in texts)
    return [text for text in texts if isinstance(text, RankedText)]


def test_signals_are_those_of_the_verbs(nano: Model) -> None:
    images = pictures(2)
    captions = ranked(nano.caption(images, samples=6, weights=WEIGHTS, details=True))
    for image, best in zip(images, captions, strict=True):
        assert sum(one.count for one in best.candidates) == 6
        kept = [one for one in best.candidates if not one.dropped]
        probabilities = nano.match(image, [one.statement for one in kept])
        cosines = nano.similarity(image, [one.statement for one in kept])[0]
        for one, probability, cosine in zip(kept, probabilities, cosines, strict=True):
            assert 1 / (1 + math.exp(-one.signals["itm"])) == pytest.approx(float(probability), abs=1e-4)
            assert one.signals["itc"] == pytest.approx(float(cosine), abs=1e-4)
            assert one.score == pytest.approx(WEIGHTS.score(one.signals))
        assert [one.score for one in kept] == sorted((one.score for one in kept), reverse=True)
        assert str(best) == kept[0].text


def test_candidates_are_those_that_sampling_draws(nano: Model) -> None:
    image = pictures(1)[0]
    drawn = nano.caption(image, top_k=40, temperature=1.0, num_return=8)
    best = ranked(nano.caption(image, samples=8, details=True))[0]
    assert {one.text for one in best.candidates} <= set(drawn)
    assert sum(one.count for one in best.candidates) == len(drawn)


@pytest.mark.parametrize("batch_size", [1, 4])
def test_batches_change_nothing(nano: Model, batch_size: int) -> None:
    images, question = pictures(3), "what is on the table?"
    nano.batch_size = batch_size
    together = ranked(nano.answer(images, question, samples=5, details=True))
    for image, best in zip(images, together, strict=True):
        alone = ranked(nano.answer(image, question, samples=5, details=True))[0]
        assert str(alone) == str(best)
        assert [one.text for one in alone.candidates] == [one.text for one in best.candidates]
        assert best.candidates[0].statement.endswith("on the table")


def test_another_model_judges(nano: Model, folder: Path) -> None:
    images, writer = pictures(2), nano
    judge = load(folder / "match", device="cpu")
    loaded = ranked(writer.caption(images, samples=4, judge=judge, details=True))
    named = ranked(writer.caption(images, samples=4, judge=folder / "match", details=True))
    for image, best, other in zip(images, loaded, named, strict=True):
        kept = [one for one in best.candidates if not one.dropped]
        for one, probability in zip(kept, judge.match(image, [one.text for one in kept]), strict=True):
            assert 1 / (1 + math.exp(-one.signals["itm"])) == pytest.approx(float(probability), abs=1e-4)
        assert best.as_json() == other.as_json()
    clip = ranked(writer.caption(images, samples=4, judge=folder / "clip", details=True))
    assert all(
        "itc" in one.signals and "itm" not in one.signals for one in clip[0].candidates if not one.dropped
    )
    captioner = load(folder / "caption", device="cpu")
    with pytest.raises(UsageError, match="compares no text with an image"):
        writer.caption(images, samples=4, judge=captioner)
    alone = ranked(captioner.caption(images, samples=4, details=True))
    assert set(alone[0].candidates[0].signals) == {"log_prob", "votes"}


def test_wrong_options_are_refused(nano: Model, tmp_path: Path) -> None:
    image = pictures(1)[0]
    for options, words in (
        ({"judge": nano}, "goes with samples"),
        ({"samples": 0}, "must be 1 to 256"),
        ({"samples": 2.5}, "whole number"),
        ({"samples": 4, "num_beams": 3}, "goes without samples"),
        ({"samples": 4, "abstain": 0.5}, "fitted weights"),
        ({"samples": 4, "abstain": 2.0, "weights": RankWeights(bias=0.0)}, "between 0 and 1"),
        ({"samples": 4, "weights": {"itm": math.nan}}, "must be finite"),
        ({"samples": 4, "weights": {"itn": 1.0}}, "itn"),
        ({"samples": 4, "weights": tmp_path / "none.json"}, "no file of weights"),
        ({"samples": 4, "policy": tmp_path / "none.toml"}, "no policy"),
        ({"samples": 4, "judge": 3}, "give a loaded model"),
    ):
        with pytest.raises(UsageError, match=words):
            nano.caption(image, **options)
    with pytest.raises(UsageError, match="leave candidates out"):
        nano.answer(image, "what?", candidates=["a", "b"], samples=4)


def test_plain_strings_without_details(nano: Model) -> None:
    captions = nano.caption(pictures(1), samples=3)
    assert [type(text) for text in captions] == [str]


WORDS = st.lists(st.sampled_from(["a", "cat", "dog", "and", "runs", "red"]), max_size=12)
DRAWN = st.lists(st.tuples(WORDS.map(" ".join), st.floats(-9, 0)), min_size=1, max_size=10)


@given(DRAWN, st.sampled_from([None, -1.0, 3.0]), st.sets(st.sampled_from(["cat", "dog runs"])))
def test_candidates_of_any_texts(
    drawn: list[tuple[str, float]], bias: float | None, forbidden: set[str]
) -> None:
    written = [[WrittenText(text, value) for text, value in drawn]]
    weights = RankWeights(1.0, 0.0, 0.0, 0.5, bias)
    ranking = Ranking(
        samples=len(drawn),
        weights=weights,
        policy=Policy(tuple(sorted(forbidden))),
        abstain=None if bias is None else 0.3,
    )
    earlier = [drawn[0][0]]
    best = rank_texts(ranking, None, None, written, [[text for text, _ in drawn]], earlier)[0]
    counts = Counter(text for text, _ in drawn)
    assert {one.text: one.count for one in best.candidates} == dict(counts)
    kept = [one for one in best.candidates if not one.dropped]
    assert list(best.candidates[: len(kept)]) == kept
    for one in best.candidates:
        reasons = (not one.text, one.text == drawn[0][0], repeated_words(one.text), _has(one.text, forbidden))
        assert bool(one.dropped) == any(reasons)
        assert one.signals["log_prob"] == max(value for text, value in drawn if text == one.text)
    if not kept:
        assert str(best) == ABSTENTION
        assert best.abstained
        return
    scores = [
        one.signals["log_prob"] + 0.5 * math.log(one.count / len(drawn)) + (bias or 0.0) for one in kept
    ]
    assert scores == sorted(scores, reverse=True)
    if bias is None:
        assert best.probability is None
        assert str(best) == kept[0].text
    else:
        assert best.probability == pytest.approx(1 / (1 + math.exp(-scores[0])))
        assert best.abstained == (best.probability < 0.3)
    json.dumps(best.as_json(), allow_nan=False)


def _has(text: str, phrases: set[str]) -> bool:
    return any(f" {phrase} " in f" {text} " for phrase in phrases)


@given(WORDS)
def test_loops_are_words_that_follow_on_themselves(words: list[str]) -> None:
    loops = any(
        all(words[i + k] == words[i + size + k] for k in range(size * (times - 1)))
        for size, times in ((1, 3), *((n, 2) for n in range(2, 9)))
        for i in range(len(words) - size * times + 1)
    )
    assert bool(repeated_words(" ".join(words))) == loops


def test_weights_of_a_file(tmp_path: Path) -> None:
    path = tmp_path / "weights.json"
    path.write_text(json.dumps({"log_prob": 0.5, "itm": 2, "bias": -1.5}))
    others = {"match": 0.0, "sensible": 0.0, "specific": 0.0, "grounded": 0.0}
    assert RankWeights.read(path) == RankWeights(0.5, 2.0, 0.0, 0.0, -1.5, **others)
    for text in ("[1]", "{", '{"itm": "2"}', '{"itm": null}', '{"itm": true}'):
        path.write_text(text)
        with pytest.raises(UsageError):
            RankWeights.read(path)


def test_a_policy_is_read_and_says_what_is_wrong(tmp_path: Path) -> None:
    path = tmp_path / "policy.toml"
    path.write_text('words = ["knife"]\n')
    policy = read_policy(path)
    assert policy.refuse_text("A Knife on a table") != ""
    assert policy.refuse_text("knives") == ""
    for text, words in (
        ("words = 3", "words must be a list"),
        ('words = [""]', "words must be a list"),
        ("word = []", "word is not known"),
        ("[concepts.a]", "concepts is not known"),
        ("words = [", "no policy"),
    ):
        path.write_text(text)
        with pytest.raises(UsageError, match=words):
            read_policy(path)
