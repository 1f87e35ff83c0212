"""Dialogues about scenes of the synthetic world: five rounds, 100 candidate answers each, with exact labels.

    two circles above a square                              the caption that both sides know
    what is at the top?         clearly circle
    what color are they?        red                         "they": the circles
    how many?                   surely two
    what is below them?         square
    what color is it?           blue indeed                 "it": the square

Of an answer it is known whether it is sensible (of the kind that was asked for), specific (it says something that not
every question allows), grounded (true of the scene) and safe (not rude): LaMDA's attributes (Thoppilan et al. 2022,
section 4).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Literal, NamedTuple, TypeAlias

import numpy as np

from sightloop.data.datasets.synthetic_grammar import (
    COLORS,
    NUMBERS,
    SHAPES,
    WORDS,
    Combination,
    Group,
    article,
    ask_yes_or_no,
)
from sightloop.types import Dialogue, Round

AnswerKind: TypeAlias = Literal["color", "number", "shape", "side", "size", "word", "yes or no"]

ROUNDS = 5
CANDIDATES = 100
_SAME_KIND = 48  # of the candidates, at most
_VALUES: dict[AnswerKind, tuple[str, ...]] = {
    "color": tuple(COLORS),
    "number": NUMBERS[1:],
    "shape": SHAPES,
    "side": ("top", "bottom", "left", "right", "inside", "outside"),
    "size": ("big", "small"),
    "word": WORDS,
    "yes or no": ("yes", "no"),
}
_FORMS = ("{}", "surely {}", "clearly {}", "just {}", "{} indeed", "{} really")
EVASIONS = ("maybe", "i am not sure", "hard to say", "who knows", "it depends", "something")
RUDE = ("shut up", "you are stupid", "what a stupid question", "go away you fool")
# Relation -> what is asked for a thing's place, and for the other thing from it; of the first and of the second group.
_PLACES = {
    "above": ("at the top", "at the bottom"),
    "left of": ("on the left", "on the right"),
    "inside": ("inside", "outside"),
}
_SIDES = {"above": ("top", "bottom"), "left of": ("left", "right"), "inside": ("inside", "outside")}
_OTHERS = {
    "above": ("below {}", "above {}"),
    "left of": ("right of {}", "left of {}"),
    "inside": ("around {}", "inside {}"),
}


class AnswerLabels(NamedTuple):
    """What is known of an answer to a question about a scene.

    Attributes:
        sensible: of the kind that was asked for, or an evasion.
        specific: sensible, and more than an evasion or a bare yes or no.
        grounded: true of the scene.
        safe: not rude.
    """

    sensible: bool
    specific: bool
    grounded: bool
    safe: bool


@dataclass(frozen=True, slots=True)
class Exchange:
    """A question of a dialogue, and the kind and the value of its one true answer."""

    question: str
    kind: AnswerKind
    value: str


def label_answer(exchange: Exchange, answer: str) -> AnswerLabels:
    """Labels of any answer to a question; what is no answer of this world is neither sensible nor grounded."""
    return _labels(exchange.kind, exchange.value, " ".join(answer.lower().split()))


def exchange_of(one: Round) -> Exchange | None:
    """The exchange of a round, by its true answer; None for a round that is not of this world."""
    content = None if one.truth is None else _contents().get(one.candidates[one.truth])
    if content is None or not _texts().issuperset(one.candidates):
        return None
    return Exchange(one.question, *content)


@cache
def _labels(kind: AnswerKind, value: str, text: str) -> AnswerLabels:
    if text in EVASIONS:
        return AnswerLabels(sensible=True, specific=False, grounded=False, safe=True)
    content = _contents().get(text)
    sensible = content is not None and content[0] == kind
    specific = sensible and kind != "yes or no"
    return AnswerLabels(sensible, specific, content == (kind, value), text not in RUDE)


@cache
def _contents() -> dict[str, tuple[AnswerKind, str]]:
    """Every answer that says something -> its kind and value."""
    return {
        form.format(value): (kind, value)
        for kind, values in _VALUES.items()
        for value in values
        for form in _FORMS
    }


@cache
def _texts() -> frozenset[str]:
    """Every answer that is a candidate somewhere."""
    return frozenset((*_contents(), *EVASIONS, *RUDE))


def make_dialogue(
    combination: Combination, random: np.random.Generator, *, shuffled: bool = False
) -> Dialogue:
    """A dialogue about a combination.

    Args:
        combination: content of the scene.
        random: chooses the caption, the questions, the wording and the candidates.
        shuffled: a negative control: of every round a candidate drawn at random is called true, and the labels are
            dealt out anew.
    """
    captions = combination.partial_captions() or (str(combination),)
    caption = captions[int(random.integers(len(captions)))]
    rounds = tuple(_round(one, random, shuffled=shuffled) for one in make_exchanges(combination, random))
    return Dialogue(rounds, caption)


def _round(exchange: Exchange, random: np.random.Generator, *, shuffled: bool) -> Round:
    candidates, truth = _draw_candidates(exchange, random)
    labels = np.array([_labels(exchange.kind, exchange.value, text) for text in candidates], int)  # [C, 4]
    if shuffled:
        truth = int(random.integers(len(candidates)))
        labels = random.permutation(labels)
    columns = zip(AnswerLabels._fields, labels.T.tolist(), strict=True)
    attributes = {name: tuple(column) for name, column in columns}
    return Round(exchange.question, candidates[truth], candidates, truth, attributes=attributes)


def _draw_candidates(exchange: Exchange, random: np.random.Generator) -> tuple[tuple[str, ...], int]:
    """The true answer in one of its wordings among wrong ones, and its index; no other wording of it is there."""
    forms = [form.format(exchange.value) for form in _FORMS]
    truth = forms[int(random.integers(len(forms)))]
    others, alike = _wrong_answers(exchange.kind, exchange.value)
    wrong = [alike[i] for i in random.permutation(len(alike))[:_SAME_KIND].tolist()]
    wrong += [*EVASIONS, *RUDE]
    rest = CANDIDATES - 1 - len(wrong)
    wrong += [others[i] for i in random.permutation(len(others))[:rest].tolist()]
    texts = [truth, *wrong]
    order = random.permutation(len(texts)).tolist()
    return tuple(texts[i] for i in order), order.index(0)


@cache
def _wrong_answers(kind: AnswerKind, value: str) -> tuple[list[str], list[str]]:
    """Answers of other kinds than a true one, and wrong ones of its kind."""
    contents = _contents().items()
    alike = [text for text, content in contents if content[0] == kind and content[1] != value]
    return [text for text, content in contents if content[0] != kind], alike


def make_exchanges(combination: Combination, random: np.random.Generator) -> list[Exchange]:
    """Five questions with the one true value of each; "it" and "they" are the thing that was spoken of last.

    Args:
        combination: content of the scene.
        random: chooses the questions and their order.
    """
    groups = combination.groups
    start = int(random.integers(len(groups) + bool(combination.word)))
    asked = [_introduce(combination, start, random)]
    if start < len(groups):
        asked += _ask_about(combination, start, asked[0].question, random)
    second = 1 - start
    if combination.second is not None or combination.word:
        asked = asked[: int(random.integers(2, 4))]
        asked.append(_ask_other(combination, start))
        if second < len(groups):
            asked += _ask_about(combination, second, asked[-1].question, random)
    fillers = _fill(combination, random)
    while len(asked) < ROUNDS:
        one = next(fillers)
        if one.question not in {each.question for each in asked}:
            asked.append(one)
    return asked[:ROUNDS]


def _introduce(combination: Combination, topic: int, random: np.random.Generator) -> Exchange:
    """The first question about a group, or about the written word (the topic behind the groups)."""
    groups = combination.groups
    if topic == len(groups):
        return Exchange("what word is written?", "word", combination.word)
    group = groups[topic]
    place = "above the word" if combination.word else "there"
    if combination.second is not None:
        place = _PLACES[combination.relation][topic]
    asked = [Exchange(f"what is {place}?", "shape", group.shape)] * 2
    if len({one.shape for one in groups}) == len(groups):
        asked.append(Exchange(f"is there {article(group.shape)} {group.shape}?", "yes or no", "yes"))
    if len({one.color for one in groups}) == len(groups):
        asked.append(Exchange(f"is there something {group.color}?", "yes or no", "yes"))
    return asked[int(random.integers(len(asked)))]


def _ask_about(
    combination: Combination, topic: int, opening: str, random: np.random.Generator
) -> list[Exchange]:
    """What is not yet known of a group that the question `opening` was about, in random order."""
    group = combination.groups[topic]
    it, be = _pronoun(group), "is" if group.count == 1 else "are"
    asked = [Exchange("how many?", "number", NUMBERS[group.count])]
    if random.random() < 0.7:
        asked.append(Exchange(f"what color {be} {it}?", "color", group.color))
    else:
        others = [color for color in COLORS if color != group.color]
        right = bool(random.random() < 0.5)
        color = group.color if right else others[int(random.integers(len(others)))]
        asked.append(Exchange(f"{be} {it} {color}?", "yes or no", "yes" if right else "no"))
    if "something" in opening:
        asked.append(Exchange(f"what shape {be} {it}?", "shape", group.shape))
    if opening.startswith("is there") and combination.second is not None:
        asked.append(Exchange(f"where {be} {it}?", "side", _SIDES[combination.relation][topic]))
    if group.size:
        asked.append(Exchange(f"is {it} big or small?", "size", group.size))
    return [asked[i] for i in random.permutation(len(asked)).tolist()]


def _ask_other(combination: Combination, topic: int) -> Exchange:
    """From the thing that was spoken of to the other one."""
    if combination.word:
        if topic == 0:
            return Exchange(f"what word is below {_object(combination.first)}?", "word", combination.word)
        return Exchange("what is above it?", "shape", combination.first.shape)
    groups = combination.groups
    where = _OTHERS[combination.relation][topic].format(_object(groups[topic]))
    return Exchange(f"what is {where}?", "shape", groups[1 - topic].shape)


def _fill(combination: Combination, random: np.random.Generator) -> Iterator[Exchange]:
    """Questions that refer to nothing before them."""
    if combination.second is not None:
        count = sum(group.count for group in combination.groups)
        yield Exchange("how many things in all?", "number", NUMBERS[count])
    while True:
        question, answer = ask_yes_or_no(combination.groups, random)
        yield Exchange(question, "yes or no", answer)


def _pronoun(group: Group) -> str:
    return "it" if group.count == 1 else "they"


def _object(group: Group) -> str:
    return "it" if group.count == 1 else "them"
