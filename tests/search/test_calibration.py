"""Calibration of no-match: conformal validity on exchangeable scores, the normalized cosine, the choice of texts."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sightloop.errors import UsageError
from sightloop.search.calibration import (
    Background,
    NullScores,
    best_mean,
    check_cut,
    choose_background,
    log_odds,
    verdict,
)
from sightloop.search.score_weights import NOTHING, ScoreWeights, area, learn_scores
from sightloop.types import Floats, Floats32, JsonDict


def null_of(absent: Floats, present: Floats | None = None) -> NullScores:
    return NullScores(
        "itc", np.sort(absent), np.sort(absent[:0] if present is None else present), 100, "texts"
    )


@settings(max_examples=25, deadline=None)
@given(
    st.integers(0, 10**6),
    st.sampled_from(["normal", "heavy", "tied"]),
    st.integers(30, 400),
    st.sampled_from([0.05, 0.1, 0.2]),
)
def test_the_promise_holds_for_exchangeable_scores(seed: int, shape: str, m: int, cut: float) -> None:
    """P(p <= cut) <= cut whatever the distribution, ties included (Vovk et al. 2005, proposition 2.4)."""
    rng = np.random.default_rng(seed)
    draws = {
        "normal": rng.normal(size=(2000, m + 1)),
        "heavy": rng.standard_cauchy((2000, m + 1)),
        "tied": rng.integers(0, 5, (2000, m + 1)).astype(float),
    }[shape]
    false = np.mean([null_of(row[:-1]).p_value(row[-1]) <= cut for row in draws])
    assert false <= cut + 4 * np.sqrt(cut * (1 - cut) / 2000)  # four standard errors
    if shape != "tied":  # and it is no smaller than it need be
        assert false >= np.floor(cut * (m + 1)) / (m + 1) - 4 * np.sqrt(cut * (1 - cut) / 2000)


@given(st.lists(st.floats(-5, 5), min_size=1, max_size=50), st.floats(-6, 6))
def test_the_p_value_counts(scores: list[float], score: float) -> None:
    expected = (1 + sum(other >= score for other in scores)) / (len(scores) + 1)
    assert null_of(np.array(scores)).p_value(score) == pytest.approx(expected)


def test_what_is_missed_is_the_share_of_refused_texts_with_an_image() -> None:
    null = null_of(np.arange(99.0), np.array([50.0, 91.0, 95.0, 200.0]))
    assert [null.p_value(score) for score in (50.0, 91.0, 200.0)] == [0.5, 0.09, 0.01]
    assert null.missed(0.1) == 0.25
    assert null_of(np.arange(99.0)).missed(0.1) is None
    found, words = verdict(null, 95.0, 0.1)
    assert found
    assert "at most 10 % false finds" in words
    assert "refuses 25 %" in words
    found, words = verdict(null, 3.0, 0.1)
    assert not found
    assert words.startswith("nothing here shows that")


def test_the_normalized_cosine_is_qb_norm_without_own_images() -> None:
    rng = np.random.default_rng(0)

    def unit(count: int) -> Floats32:
        vectors = rng.normal(size=(count, 8)).astype(np.float32)
        return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)

    texts, images, query = unit(6), unit(3), unit(1)[0]
    owners = ["i0", "i0", "i1", "", "x", "x"]
    bank = Background(texts, owners, images)
    for own in ("", "x"):
        cosines = images @ query
        values = bank.normalized(cosines, images, ["i0", "i1", "i2"], own)
        for j, name in enumerate(("i0", "i1", "i2")):
            terms = [
                np.exp(20 * float(texts[b] @ images[j]))
                for b in range(6)
                if owners[b] != name and not (own and owners[b] == own)
            ]
            assert np.exp(values[j]) == pytest.approx(np.exp(20 * cosines[j]) / np.mean(terms), rel=1e-4)
    several = np.stack([images, -images], axis=1)  # [k, q, d]: the nearest counts
    nearest = bank.normalized(images @ query, several, ["a", "b", "c"])
    powers = np.exp(20 * np.abs(texts @ images.T))
    assert np.exp(nearest) == pytest.approx(np.exp(20 * (images @ query)) / powers.mean(axis=0), rel=1e-4)


def test_the_signals_of_a_query() -> None:
    rng = np.random.default_rng(0)
    texts, images, query = (0.3 * rng.normal(size=shape).astype(np.float32) for shape in ((9, 8), (7, 8), 8))
    bank = Background(texts, [""] * 9, images)
    cosines, ids = images @ query, list("abcdefg")
    values = np.sort(bank.normalized(cosines, images, ids))
    expected = [values[-1], values[-5:].mean(), cosines.mean(), cosines.std()]
    assert bank.signals(query, cosines, images, ids) == pytest.approx(expected, rel=1e-5)
    nothing = bank.signals(query, cosines[:0], images[:0], [])
    assert nothing[:2].tolist() == [-np.inf, -np.inf]
    assert ScoreWeights.plain("itc").scores(nothing[None])[0] == NOTHING


def test_learned_weights_find_the_signal_that_tells_and_the_promise_holds() -> None:
    rng = np.random.default_rng(0)
    false: list[float] = []
    for _ in range(40):
        # The plain score says little, the fourth signal all but hides behind the third, which all texts have.
        absent, present, queries = (rng.normal(size=(count, 4)) for count in (600, 600, 600))
        for signals, shift in ((absent, 0), (present, 1), (queries, 0)):
            signals[:, 1] += 0.1 * shift
            signals[:, 3] = 5 * signals[:, 2] + signals[:, 3] + shift
        weights, null, found = learn_scores("itc", absent, present)
        assert area(found, null) > 0.7 > 0.6 > area(present[:, 1], absent[:, 1])
        p = null_of(null).p_values(weights.scores(queries))
        false.append(float((p <= 0.1).mean()))
    assert np.mean(false) == pytest.approx(0.1, abs=0.01)


@pytest.mark.parametrize("shape", ["noise", "few", "without images", "constant"])
def test_nothing_is_learned_where_nothing_tells(shape: str) -> None:
    rng = np.random.default_rng(1)
    absent, present = rng.normal(size=(2, 40 if shape == "few" else 300, 4))
    present[:, 1] += 2 if shape == "few" else 0
    if shape == "without images":
        present = present[:0]
    if shape == "constant":
        absent[:], present[:] = 1, 1
    weights, null, found = learn_scores("itc", absent, present)
    if area(found, null) <= 0.5 if len(found) else True:
        assert weights.values.tolist() == [0, 1, 0, 0]
        assert null.tolist() == absent[:, 1].tolist()
    assert np.isfinite(null).all()


def test_the_best_five_are_averaged() -> None:
    scores = np.array([[1, 9, 2, 8, 3, 7, 4.0], [-np.inf, 2, -np.inf, 4, -np.inf, -np.inf, -np.inf]])
    assert best_mean(scores).tolist() == [(9 + 8 + 7 + 4 + 3) / 5, 3]
    assert best_mean(np.zeros((2, 0))).tolist() == [-np.inf, -np.inf]


def test_log_odds_are_finite_but_for_images_that_are_gone() -> None:
    odds = log_odds(np.array([0.5, 1.0, 0.0, 0.9, np.nan], np.float32))
    assert odds[:4] == pytest.approx([0, 16.1, -16.1, np.log(9)], abs=0.1)
    assert odds[4] == -np.inf


def test_background_texts_are_of_as_many_images_as_there_are() -> None:
    captions = [["a", "b"], [], ["c", "a"], ["d", " "], ["e", "f"]]
    chosen = choose_background(captions, 4)
    assert sorted(owner for owner, _ in chosen) == [0, 2, 3, 4]
    everything = choose_background(captions, 100)
    assert sorted(text for _, text in everything) == ["a", "b", "c", "d", "e", "f"]
    assert all(text in captions[owner] for owner, text in everything)
    assert choose_background(captions, 4) == chosen
    assert choose_background([], 9) == []


def test_a_null_is_read_as_it_was_written() -> None:
    null = null_of(np.array([0.25, 0.5]), np.array([0.75]))
    again = NullScores.from_json(null.as_json())
    assert again.as_json() == null.as_json()
    for broken in (JsonDict(), {**null.as_json(), "format": 0}, {**null.as_json(), "absent": "x"}):
        with pytest.raises(ValueError, match=r"format|calibration|string"):
            NullScores.from_json(broken)


def test_a_null_is_stale_when_the_index_has_grown_by_a_tenth() -> None:
    null = null_of(np.zeros(3))  # of 100 images
    assert [null.is_stale(count) for count in (80, 91, 110, 111)] == [True, False, False, True]


@pytest.mark.parametrize("cut", [0, 1, -0.1, 10, float("nan")])
def test_a_cut_is_a_share(cut: float) -> None:
    with pytest.raises(UsageError, match="between 0 and 1"):
        check_cut(cut)
