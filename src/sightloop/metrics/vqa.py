"""Scores of answers: the official VQA accuracy, exact match, WUPS.

The normalisation is that of the VQA challenge's evaluation script (Antol et al. 2015), oddities included: with a comma
between digits ("1,000") all punctuation goes without leaving a space, and where all people gave the same answer nothing
is normalised at all.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable, Mapping, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sightloop.errors import UsageError
from sightloop.metrics.align import KeyedPredictions, KeyedReferences, align, kinds_of

_NUMBERS = {"none": "0"} | {
    word: str(number)
    for number, word in enumerate("zero one two three four five six seven eight nine ten".split())
}
_ARTICLES = {"a", "an", "the"}
# Words that lost one of their apostrophes get it back. The list is the challenge's: "lets" and "shes" are not in it.
_CONTRACTIONS = {
    word[:at] + word[at + 1 :]: word
    for word in """
        ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd
        he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am might've mightn't mightn't've must've mustn't
        needn't not've o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've
        somebody'll somebody's someone'd someone'd've someone'll someone's something'd something'd've something'll
        that's there'd there'd've there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've
        weren't what'll what're what's what've when's where'd where's where've who'd who'd've who'll who's who've
        why'll why're why's won't would've wouldn't wouldn't've y'all y'all'd've y'all'll you'd you'd've you'll you're
        you've
    """.split()
    for at, letter in enumerate(word)
    if letter == "'"
} | {"somebody'd": "somebodyd"}
_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_PERIOD = re.compile(r"\.(?!\d)")
_PERIODS = 32  # the most the official script removes from one answer
_COMMA = re.compile(r"\d,\d")


def vqa_accuracy(
    predictions: KeyedPredictions,
    answers: KeyedReferences,
    kinds: Mapping[Hashable, str] | Sequence[str] | None = None,
) -> dict[str, float]:
    """The official VQA accuracy, 0..1, as `accuracy`, and for every kind of question as `accuracy[kind]`.

    predictions: one answer a question. answers: those that people gave, 10 in VQA. A prediction's accuracy against some
    answers is min(1, matches / 3), and the question's the mean over all ways to leave one answer out (Antol et al.
    2015). `overall` is the same number as the official script prints it: percent, two decimals.

    Raises UsageError where keys differ or a question has no answer.
    """
    keys, written, given = align(predictions, answers)
    scores = _accuracies(written, given)
    result = {"accuracy": float(scores.mean()), "overall": round(100 * sum(scores.tolist()) / len(scores), 2)}
    if kinds is not None:
        groups = np.array(kinds_of(keys, kinds))
        result |= {
            f"accuracy[{kind}]": float(scores[groups == kind].mean()) for kind in sorted(set(groups.tolist()))
        }
    return result


def vqa_accuracies(predictions: KeyedPredictions, answers: KeyedReferences) -> NDArray[np.float64]:
    """`vqa_accuracy` of every question, float64 [N], in the predictions' order."""
    _, written, given = align(predictions, answers)
    return _accuracies(written, given)


def exact_match(predictions: KeyedPredictions, answers: KeyedReferences) -> float:
    """Share of predictions equal to one of their answers, both normalised as for VQA; for sets with one answer."""
    _, written, given = align(predictions, answers)
    hits = [
        normalize_answer(text) in map(normalize_answer, texts)
        for text, texts in zip(written, given, strict=True)
    ]
    return sum(hits) / len(hits)


def normalize_answer(answer: str) -> str:
    """An answer as the official script compares it: lower case, no articles, digits for words, no punctuation."""
    text = _stripped(answer)
    tight = _COMMA.search(text) is not None
    bare = text
    for mark in _PUNCTUATION:
        touches_space = f"{mark} " in text or f" {mark}" in text
        bare = bare.replace(mark, "" if tight or touches_space else " ")
    bare = _PERIOD.sub("", bare, count=_PERIODS)
    words = (_NUMBERS.get(word, word) for word in bare.lower().split())
    return " ".join(_CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)


def _stripped(answer: str) -> str:
    return answer.replace("\n", " ").replace("\t", " ").strip()


def _accuracies(written: list[str], given: list[list[str]]) -> NDArray[np.float64]:
    remembered = lru_cache(1 << 16)(normalize_answer)
    scores = np.zeros(len(written))
    for index, (text, texts) in enumerate(zip(written, given, strict=True)):
        answer, answers = _stripped(text), [_stripped(t) for t in texts]
        if len(set(answers)) > 1:
            answer, answers = remembered(text), [remembered(t) for t in texts]
        matches, total = answers.count(answer), len(answers)
        # Leaving out a match leaves one match less; leaving out another answer leaves all.
        left = matches * min(1, (matches - 1) / 3) + (total - matches) * min(1, matches / 3)
        scores[index] = left / total
    return scores


def wups(
    predictions: KeyedPredictions,
    answers: KeyedReferences,
    threshold: float = 0.9,
    similarity: Callable[[str, str], float] | None = None,
) -> float:
    """WUPS (Malinowski and Fritz 2014), 0..1: like accuracy, but words near in WordNet count as nearly right.

    An answer may be a set, "knife, fork". A similarity below the threshold counts a tenth; threshold 0 is WUPS@0.0.
    similarity: of two words, 0..1; default Wu-Palmer over the nouns of WordNet. Where a question has several answers,
    the best counts. Raises UsageError where WordNet is not there (see `wups_not_computed`).
    """
    if similarity is None:
        if reason := wups_not_computed():
            raise UsageError(f"WUPS: {reason}")
        similarity = lru_cache(1 << 16)(_wu_palmer)
    _, written, given = align(predictions, answers)

    def near(one: str, other: str) -> float:
        value = 1.0 if one == other else similarity(one, other)
        return value if value >= threshold else 0.1 * value

    def score(text: str, answer: str) -> float:
        ours, theirs = _members(text), _members(answer)
        forth = np.prod([max(near(a, t) for t in theirs) for a in ours])
        back = np.prod([max(near(a, t) for a in ours) for t in theirs])
        return float(min(forth, back))

    scores = [
        max(score(text, answer) for answer in texts) for text, texts in zip(written, given, strict=True)
    ]
    return sum(scores) / len(scores)


def wups_not_computed() -> str | None:
    """Why WUPS cannot be computed here, None where it can."""
    try:
        _wordnet().ensure_loaded()
    except ImportError:
        return 'nltk is not installed: pip install "sightloop[evaluate]"'
    except LookupError:
        return "WordNet is not installed: python -m nltk.downloader wordnet"
    return None


def _members(answer: str) -> list[str]:
    return sorted({part.strip().lower() for part in answer.split(",")})


def _wordnet() -> Any:
    from nltk.corpus import wordnet

    return wordnet


def _wu_palmer(one: str, other: str) -> float:
    wordnet = _wordnet()
    ours, theirs = (wordnet.synsets(word.replace(" ", "_"), pos=wordnet.NOUN) for word in (one, other))
    return max((a.wup_similarity(b) or 0.0 for a in ours for b in theirs), default=0.0)
