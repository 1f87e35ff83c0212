"""Ranking as the evaluation measures it: winners equal a search by hand, fitted weights are where the gradient ends."""

from __future__ import annotations

import math
from dataclasses import asdict

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sightloop.evaluation.ranked_answers import (
    CountText,
    Measure,
    RankedQuestion,
    TextCounts,
    fit_weights,
    ranked_question,
    ranking_metrics,
)
from sightloop.evaluation.results import ratio_of_means
from sightloop.ranking.options import SIGNALS, RankWeights
from sightloop.types import JsonDict

OF_DIALOGUES = ("match", "sensible", "specific", "grounded")
TEXTS = ["red", "blue", "two", "a cat"]


def question(number: int, draws: list[int], signals: list[tuple[float, float]], answer: str) -> JsonDict:
    """A line of the predictions: draws names the text of each sample."""
    candidates = [
        {
            "text": text,
            "draws": [i for i, drawn in enumerate(draws) if drawn == t],
            "signals": {"log_prob": signals[t][0], "itm": signals[t][1], "votes": 0.0},
            "dropped": "",
        }
        for t, text in enumerate(TEXTS)
        if t in draws
    ]
    return {"key": f"q{number}", "image": f"image{number // 2}", "record": candidates, "answer": answer}


def exact(answer: str) -> CountText:
    return lambda text: TextCounts((float(text == answer),), float(text == answer))


def ranked(made: JsonDict, greedy: str = "") -> RankedQuestion:
    return ranked_question(made["key"], made["image"], made["record"], greedy, exact(made["answer"]))


EXACT = Measure("exact match", "equal", "questions")
SIGNAL_PAIRS = st.lists(
    st.tuples(st.floats(-5, 0), st.floats(-8, 8)), min_size=len(TEXTS), max_size=len(TEXTS)
)
QUESTIONS = st.lists(
    st.tuples(st.lists(st.integers(0, 3), min_size=16, max_size=16), SIGNAL_PAIRS, st.sampled_from(TEXTS)),
    min_size=1,
    max_size=12,
)


@settings(max_examples=40)
@given(QUESTIONS, st.integers(0, 1))
def test_winners_are_those_of_a_search_by_hand(
    drawn: list[tuple[list[int], list[tuple[float, float]], str]], greedy: int
) -> None:
    made = [question(i, *each) for i, each in enumerate(drawn)]
    tables, _ = ranking_metrics([ranked(m, m["answer"] if greedy else "") for m in made], 16, [EXACT])
    by_name = {table.name: table.rows for table in tables}
    for n in (4, 16):
        for s, signal in enumerate(("log_prob", "itm")):
            expected: list[float] = []
            for draws, signals, answer in drawn:
                best = max(draws[:n], key=lambda t: (signals[t][s], -draws[:n].index(t)))
                expected.append(float(TEXTS[best] == answer))
            assert by_name[f"exact match[{n} samples by {signal}]"].tolist() == expected
        # Default weights: likelihood and ITM alike.
        best_of = [
            max(draws[:n], key=lambda t: (sum(signals[t]), -draws[:n].index(t)))
            for draws, signals, _ in drawn
        ]
        expected = [float(TEXTS[t] == answer) for t, (_, _, answer) in zip(best_of, drawn, strict=True)]
        assert by_name[f"exact match[{n} samples by default weights]"].tolist() == expected
        counts = [max(draws[:n].count(t) for t in range(4)) for draws, _, _ in drawn]
        for (draws, _, answer), right, most in zip(
            drawn, by_name[f"exact match[{n} samples by votes]"], counts, strict=True
        ):
            assert right <= float(draws[:n].count(TEXTS.index(answer)) == most)
    first = [float(TEXTS[draws[0]] == answer) for draws, _, answer in drawn]
    assert by_name["exact match[1 sample]"].tolist() == first
    assert by_name["exact match[greedy search]"].tolist() == [greedy] * len(drawn)
    gain = by_name["exact match: gain over greedy search[16 samples by itm]"]
    assert gain.tolist() == (by_name["exact match[16 samples by itm]"] - greedy).tolist()


@settings(max_examples=40)
@given(QUESTIONS, st.booleans())
def test_counts_of_one_image_are_added_up(
    drawn: list[tuple[list[int], list[tuple[float, float]], str]], less: bool
) -> None:
    """A ratio over images: letters "a" among all letters, against sums by hand; the gain is paired by image."""

    def count(text: str) -> TextCounts:
        return TextCounts((9.0, text.count("a"), len(text)), 0.0)

    made = [question(i, *each) for i, each in enumerate(drawn)]
    rows = [ranked_question(m["image"], m["image"], m["record"], "a cat", count) for m in made]
    measure = Measure("a", "share", "images", (1, 2), ratio_of_means, less_is_better=less)
    tables, weights = ranking_metrics(rows, 4, [measure])
    assert weights == {}  # nothing is right
    table = {one.name: one for one in tables}
    label = "4 samples by itm"
    kept = [
        TEXTS[max(draws[:4], key=lambda t: (signals[t][1], -draws[:4].index(t)))]
        for draws, signals, _ in drawn
    ]
    share = sum(text.count("a") for text in kept) / sum(map(len, kept))
    assert table[f"a[{label}]"].evaluate(0).value == pytest.approx(share)
    assert len(table[f"a[{label}]"].rows) == len({m["image"] for m in made})
    gain = table[f"a: gain over greedy search[{label}]"].evaluate(0)
    assert gain.value == pytest.approx((0.4 - share) if less else (share - 0.4), abs=1e-12)
    same = [m["record"] for m in made if {one["text"] for one in m["record"]} == {"a cat"}]
    if len(same) == len(made) > 2:
        assert gain.low == gain.high == 0  # paired: no image differs


def test_fitted_weights_are_where_the_gradient_ends() -> None:
    rng = np.random.default_rng(0)
    rows = []
    for number in range(200):
        signals = [
            (float(a), float(b)) for a, b in zip(-5 * rng.random(4), 6 * rng.normal(size=4), strict=True)
        ]
        odds = [0.5 * a + 0.4 * b for a, b in signals]
        best = int(np.argmax(np.array(odds) + rng.gumbel(size=4)))
        draws = rng.permutation(np.repeat(np.arange(4), 4)).tolist()
        made = question(number, draws, signals, TEXTS[best])
        rows.append(ranked(made))
    weights = fit_weights(rows, 16)
    assert weights is not None
    assert weights.bias is not None
    assert weights.itc == 0.0
    assert 0.2 < weights.itm < 0.8
    # The derivative of the likelihood by each weight, written out.
    gradient = dict.fromkeys((*SIGNALS, "bias"), 0.0)
    for row in rows:
        for one in row.drawn:
            signals = {**one.signals, "votes": math.log(len(one.draws) / 16)}
            score = weights.bias + sum(getattr(weights, name) * value for name, value in signals.items())
            error = one.right - 1 / (1 + math.exp(-score))
            gradient["bias"] += error
            for name, value in signals.items():
                gradient[name] += error * value
    assert all(abs(value) < 0.5 for value in gradient.values()), gradient


def test_nothing_to_tell_apart_gives_no_weights() -> None:
    made = question(0, [0] * 16, [(-1.0, 1.0)] * 4, "red")
    row = ranked(made)
    assert fit_weights([row], 16) is None
    tables, weights = ranking_metrics([row], 16, [EXACT])
    assert weights == {}
    assert not any("fitted" in table.name for table in tables)


def test_written_weights_are_read_again() -> None:
    weights = RankWeights(0.5, 1.0, 0.0, 2.0, -1.0)
    file = {"log_prob": 0.5, "itm": 1, "votes": 2.0, "bias": -1.0, "itc": 0}
    assert RankWeights.read({**dict.fromkeys(SIGNALS, 0.0), **file}) == RankWeights.read(file)
    assert asdict(RankWeights.read(file)) == {**asdict(weights), **dict.fromkeys(OF_DIALOGUES, 0.0)}
    assert pytest.approx(weights.bias) == -1.0
