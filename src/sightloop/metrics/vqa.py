"""Answer metrics: the official VQA accuracy, exact match, WUPS.

Answers are normalized as by the evaluation script of the VQA challenge (Antol et al. 2015), oddities included: with a
comma between digits ("1,000") punctuation is removed without leaving a space, and where all people gave the same answer
nothing is normalized at all.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable, Mapping, Sequence
from functools import lru_cache
from typing import Any

import numpy as np

from sightloop.errors import UsageError, install_command
from sightloop.metrics.align import KeyedPredictions, KeyedReferences, align, align_types
from sightloop.types import Floats

_NUMBERS = {"none": "0"} | {
    word: str(number)
    for number, word in enumerate("zero one two three four five six seven eight nine ten".split())
}
_ARTICLES = {"a", "an", "the"}
# A word without one of its apostrophes -> the word: "dont" -> "don't", "couldnt've" and "couldn'tve" -> "couldn't've".
# The list is the challenge's: "lets" and "shes" are not in it.
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
_MAX_PERIODS = 32  # that the official script removes from one answer
_COMMA = re.compile(r"\d,\d")


def vqa_accuracy(
    predictions: KeyedPredictions,
    answers: KeyedReferences,
    question_types: Mapping[Hashable, str] | Sequence[str] | None = None,
) -> dict[str, float]:
    """The official VQA accuracy (Antol et al. 2015).

    The accuracy of a prediction against some answers is min(1, matches / 3); that of a question is the mean over all
    ways to leave one answer out.

    Args:
        predictions: one answer per question, as a mapping or a sequence.
        answers: the answers that people gave to each question, 10 in VQA.
        question_types: type of every question, with the same keys or in the same order.

    Returns:
        `accuracy`, 0..1; `overall`: the same as the official script prints it, in percent with two decimals;
        `accuracy[type]` of every question type.

    Raises:
        UsageError: keys that differ, or a question without answer.
    """
    keys, texts, answer_lists = align(predictions, answers)
    scores = _accuracies(texts, answer_lists)
    result = {"accuracy": float(scores.mean()), "overall": round(100 * sum(scores.tolist()) / len(scores), 2)}
    if question_types is not None:
        types = np.array(align_types(keys, question_types))
        result |= {
            f"accuracy[{name}]": float(scores[types == name].mean()) for name in np.unique(types).tolist()
        }
    return result


def vqa_accuracies(predictions: KeyedPredictions, answers: KeyedReferences) -> Floats:
    """`vqa_accuracy` of every question, float64 `[N]`, in the order of the predictions."""
    _, texts, answer_lists = align(predictions, answers)
    return _accuracies(texts, answer_lists)


def exact_match(predictions: KeyedPredictions, answers: KeyedReferences) -> float:
    """Share of predictions that equal one of their answers, both normalized as for VQA; for data with one answer."""
    _, texts, answer_lists = align(predictions, answers)
    hits = [
        normalize_answer(text) in map(normalize_answer, own_answers)
        for text, own_answers in zip(texts, answer_lists, strict=True)
    ]
    return sum(hits) / len(hits)


def normalize_answer(answer: str) -> str:
    """An answer as the official script compares it: lower case, no articles, digits for words, no punctuation.

    "The two dogs, running." -> "2 dogs running"; "1,000!" -> "1000"; "a dont-know" -> "don't know".
    """
    text = _strip(answer)
    has_digit_comma = _COMMA.search(text) is not None
    bare = text
    for mark in _PUNCTUATION:
        touches_space = f"{mark} " in text or f" {mark}" in text
        bare = bare.replace(mark, "" if has_digit_comma or touches_space else " ")
    bare = _PERIOD.sub("", bare, count=_MAX_PERIODS)
    words = (_NUMBERS.get(word, word) for word in bare.lower().split())
    return " ".join(_CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)


def _strip(answer: str) -> str:
    return answer.replace("\n", " ").replace("\t", " ").strip()


def _accuracies(texts: list[str], answer_lists: list[list[str]]) -> Floats:
    """Official accuracy of every question, `[N]`."""
    normalize = lru_cache(1 << 16)(normalize_answer)
    scores = np.zeros(len(texts))
    for index, (text, own_answers) in enumerate(zip(texts, answer_lists, strict=True)):
        prediction, answers = _strip(text), [_strip(answer) for answer in own_answers]
        if len(set(answers)) > 1:
            prediction, answers = normalize(text), [normalize(answer) for answer in own_answers]
        matches, total = answers.count(prediction), len(answers)
        # Without a matching answer one match fewer is left, without another answer all of them. 2 matches of 10:
        # (2 * 1/3 + 8 * 2/3) / 10 = 0.6
        left = matches * min(1, (matches - 1) / 3) + (total - matches) * min(1, matches / 3)
        scores[index] = left / total
    return scores


def wups(
    predictions: KeyedPredictions,
    answers: KeyedReferences,
    threshold: float = 0.9,
    similarity: Callable[[str, str], float] | None = None,
) -> float:
    """WUPS (Malinowski and Fritz 2014), 0..1: accuracy in which words near in WordNet count as nearly right.

    Args:
        predictions: one answer per question; an answer may be a set, "knife, fork".
        answers: one or more answers per question; the best counts.
        threshold: a similarity below it counts a tenth; 0 gives WUPS@0.0.
        similarity: of two words, 0..1; default Wu-Palmer over the nouns of WordNet.

    Raises:
        UsageError: WordNet is not installed (see `wups_not_computed`).
    """
    if similarity is None:
        if reason := wups_not_computed():
            raise UsageError(f"WUPS: {reason}")
        similarity = lru_cache(1 << 16)(_wu_palmer)
    _, texts, answer_lists = align(predictions, answers)

    def weighted(first: str, second: str) -> float:
        value = 1.0 if first == second else similarity(first, second)
        return value if value >= threshold else 0.1 * value

    def score(text: str, answer: str) -> float:
        predicted, true = _members(text), _members(answer)
        precision = np.prod([max(weighted(p, t) for t in true) for p in predicted])
        recall = np.prod([max(weighted(p, t) for p in predicted) for t in true])
        return float(min(precision, recall))

    scores = [
        max(score(text, answer) for answer in own_answers)
        for text, own_answers in zip(texts, answer_lists, strict=True)
    ]
    return sum(scores) / len(scores)


def wups_not_computed() -> str | None:
    """The reason why WUPS cannot be computed here; None if it can."""
    try:
        _wordnet().ensure_loaded()
    except ImportError:
        return f"nltk is not installed: {install_command('evaluate')}"
    except LookupError:
        return "WordNet is not installed: python -m nltk.downloader wordnet"
    return None


def _members(answer: str) -> list[str]:
    return sorted({part.strip().lower() for part in answer.split(",")})


def _wordnet() -> Any:  # nltk has no type hints
    from nltk.corpus import wordnet

    return wordnet


def _wu_palmer(first: str, second: str) -> float:
    """Highest Wu-Palmer similarity of a sense of one word with a sense of the other, 0..1."""
    wordnet = _wordnet()
    senses, other_senses = (
        wordnet.synsets(word.replace(" ", "_"), pos=wordnet.NOUN) for word in (first, second)
    )
    return max((a.wup_similarity(b) or 0.0 for a in senses for b in other_senses), default=0.0)
