"""Caption scores: equal to slow references written here, and to the official COCO code where it is installed."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import sightloop
from sightloop import UsageError
from sightloop.metrics import captions as module
from sightloop.metrics.captions import bleu, caption_scores, caption_statistics, score_captions

sentence = st.lists(st.sampled_from("a b c d a dog runs".split()), max_size=9).map(" ".join)
samples = st.lists(st.tuples(sentence, st.lists(sentence, min_size=1, max_size=4)), min_size=1, max_size=6)


def grams(text: str, n: int) -> Counter[tuple[str, ...]]:
    words = text.split()
    return Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1))


def slow_bleu(pairs: list[tuple[str, list[str]]]) -> list[float]:
    matched, guessed, length, reference = [0] * 4, [0] * 4, 0, 0
    for text, references in pairs:
        size = len(text.split())
        length += size
        reference += min((abs(len(r.split()) - size), len(r.split())) for r in references)[1]
        for n in range(1, 5):
            most: Counter[tuple[str, ...]] = Counter()
            for other in references:
                most |= grams(other, n)
            matched[n - 1] += (grams(text, n) & most).total()
            guessed[n - 1] += max(0, size - n + 1)
    scores: list[float] = []
    product = 1.0
    for n in range(4):
        product *= (matched[n] + 1e-15) / (guessed[n] + 1e-9)
        ratio = (length + 1e-15) / (reference + 1e-9)
        scores.append(product ** (1 / (n + 1)) * (math.exp(1 - 1 / ratio) if ratio < 1 else 1))
    return scores


def slow_common(one: list[str], other: list[str]) -> int:
    row = [0] * (len(other) + 1)
    for a in one:
        above = row[:]
        for j, b in enumerate(other):
            row[j + 1] = above[j] + 1 if a == b else max(above[j + 1], row[j])
    return row[-1]


def slow_rouge(text: str, references: list[str]) -> float:
    ours = text.split(" ")
    common = [(slow_common(ours, r.split(" ")), len(r.split(" "))) for r in references]
    precision, recall = max(c / len(ours) for c, _ in common), max(c / size for c, size in common)
    return (1 + 1.44) * precision * recall / (recall + 1.44 * precision) if precision else 0.0


def slow_cider(pairs: list[tuple[str, list[str]]]) -> list[float]:
    frequency: Counter[tuple[str, ...]] = Counter()
    for _, references in pairs:
        frequency.update({g for r in references for n in range(1, 5) for g in grams(r, n)})

    def vector(text: str, n: int) -> dict[tuple[str, ...], float]:
        return {
            g: count * (math.log(len(pairs)) - math.log(max(1, frequency[g])))
            for g, count in grams(text, n).items()
        }

    scores: list[float] = []
    for text, references in pairs:
        total = 0.0
        for other in references:
            far = max(0, len(text.split()) - 1) - max(0, len(other.split()) - 1)
            for n in range(1, 5):
                ours, theirs = vector(text, n), vector(other, n)
                dot = sum(min(v, theirs.get(g, 0.0)) * theirs.get(g, 0.0) for g, v in ours.items())
                norm = math.hypot(*ours.values()) * math.hypot(*theirs.values())
                total += (dot / norm if norm else 0.0) * math.exp(-(far**2) / 72)
        scores.append(10 * total / 4 / len(references))
    return scores


def split(pairs: list[tuple[str, list[str]]]) -> tuple[list[str], list[list[str]]]:
    return [text for text, _ in pairs], [references for _, references in pairs]


@given(samples)
def test_every_score_is_that_of_the_slow_references(pairs: list[tuple[str, list[str]]]) -> None:
    scored = score_captions(*split(pairs), tokenizer="whitespace")
    corpus, each = scored.corpus, scored.per_sample
    np.testing.assert_allclose([corpus[f"BLEU-{n}"] for n in range(1, 5)], slow_bleu(pairs), rtol=1e-9)
    for index, pair in enumerate(pairs):
        ours = [each[f"BLEU-{n}"][index] for n in range(1, 5)]
        np.testing.assert_allclose(ours, slow_bleu([pair]), rtol=1e-9)
    np.testing.assert_allclose(each["ROUGE-L"], [slow_rouge(*pair) for pair in pairs], rtol=1e-12)
    np.testing.assert_allclose(each["CIDEr"], slow_cider(pairs), rtol=1e-9, atol=1e-12)
    assert corpus["CIDEr"] == pytest.approx(np.mean(each["CIDEr"]), abs=1e-12)
    assert list(corpus) == ["BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4", "ROUGE-L", "CIDEr", "CIDEr-D"]
    assert corpus["CIDEr"] == corpus["CIDEr-D"]


def random_pairs(count: int, seed: int, words: int = 60) -> list[tuple[str, list[str]]]:
    random = np.random.default_rng(seed)

    def text() -> str:
        return " ".join(f"w{int(w)}" for w in random.zipf(1.5, random.integers(1, 16)) % words)

    return [(text(), [text() for _ in range(random.integers(1, 6))]) for _ in range(count)]


@pytest.mark.parametrize("seed", range(3))
def test_equal_to_the_official_code(seed: int) -> None:
    pytest.importorskip("pycocoevalcap", reason="the official COCO evaluation code is not installed")
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge

    pairs = [*random_pairs(200, seed), ("", ["a b"]), ("a", [""]), ("a\u00a0b c", ["a\u00a0b c", "a b"])]
    texts, references = split(pairs)
    gold = dict(enumerate(references))
    written = {index: [text] for index, text in enumerate(texts)}
    scored = score_captions(texts, references, tokenizer="whitespace")
    official: dict[str, tuple[Any, Any]] = {
        "ROUGE-L": Rouge().compute_score(gold, written),
        "CIDEr": Cider().compute_score(gold, written),
    }
    corpus, each = Bleu(4).compute_score(gold, written, verbose=0)
    official |= {f"BLEU-{n + 1}": (corpus[n], each[n]) for n in range(4)}
    for name, (score, scores) in official.items():
        assert scored.corpus[name] == pytest.approx(score, abs=1e-9), name
        np.testing.assert_allclose(scored.per_sample[name], scores, rtol=1e-9, atol=1e-9)


def test_the_size_of_the_blocks_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    texts, references = split(random_pairs(60, 5))
    whole = score_captions(texts, references)
    monkeypatch.setattr(module, "_CHUNK", 50)
    parts = score_captions(texts, references)
    assert whole.corpus == pytest.approx(parts.corpus, abs=1e-12)
    np.testing.assert_array_equal(whole.bleu_counts, parts.bleu_counts)


def test_corpus_bleu_is_made_of_its_counts() -> None:
    scored = score_captions(*split(random_pairs(30, 1)))
    np.testing.assert_allclose(
        bleu(scored.bleu_counts.sum(0)), [scored.corpus[f"BLEU-{n}"] for n in range(1, 5)]
    )
    np.testing.assert_allclose(bleu(scored.bleu_counts)[:, 3], scored.per_sample["BLEU-4"])


def test_a_perfect_caption_and_a_wrong_one() -> None:
    references = {"x": ["A dog runs on grass."], "y": ["Two men cook."], "z": ["a red car"]}
    good = caption_scores({"z": "A red car!", "x": "a dog runs on grass", "y": "two men cook"}, references)
    assert good["BLEU-2"] == pytest.approx(1)
    assert good["ROUGE-L"] == pytest.approx(1)
    bad = caption_scores({"x": "", "y": "x x x", "z": "blue"}, references)
    assert max(bad.values()) < 1e-6


def test_one_sample_has_no_cider() -> None:
    assert caption_scores(["a dog"], [["a dog"]])["CIDEr"] == 0


def test_keys_give_the_order() -> None:
    scored = score_captions({2: "a", 1: "b c"}, {1: ["b c"], 2: ["x"]})
    np.testing.assert_allclose(scored.per_sample["ROUGE-L"], [0, 1])


@pytest.mark.parametrize(
    ("predictions", "references", "says"),
    [
        ({"a": "x"}, {"b": ["x"]}, "one side only"),
        ({"a": "x"}, {"a": []}, "references of 'a'"),
        ({"a": "x"}, {"a": "x"}, "references of 'a'"),
        ({"a": ["x"]}, {"a": ["x"]}, "prediction 'a': list"),
        (["x"], [["x"], ["y"]], "1 predictions but 2"),
        (["x"], {"a": ["x"]}, "two mappings or two lists"),
        ("x", ["x"], "two mappings or two lists"),
        ([], [], "there is none"),
        ({}, {}, "there is none"),
    ],
)
def test_what_does_not_fit_is_said(predictions: Any, references: Any, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        caption_scores(predictions, references)


def test_an_unknown_tokenizer_is_said() -> None:
    with pytest.raises(UsageError, match="whitespace"):
        caption_scores(["x"], [["x"]], tokenizer="moses")  # type: ignore[arg-type]


def test_facts_of_captions() -> None:
    facts = caption_statistics(
        ["A dog runs.", "a dog runs", "go on and go on and go"], training=["A dog runs!"]
    )
    assert facts == {
        "length": pytest.approx(13 / 3),
        "vocabulary": 6,
        "repetition": pytest.approx(1 / 3),
        "distinct": pytest.approx(2 / 3),
        "unseen": pytest.approx(1 / 3),
    }
    assert "unseen" not in caption_statistics(["a"])
    with pytest.raises(UsageError):
        caption_statistics([])


def test_the_public_name() -> None:
    assert sightloop.metrics.caption_scores is caption_scores
