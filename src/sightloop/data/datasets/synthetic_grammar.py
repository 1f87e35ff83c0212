"""Grammar of the synthetic world: combinations of counts, sizes, colors, shapes, relations and words.

Every combination has exactly one correct caption:

    a big red circle                                   one object
    three white stars                                  two to four equal objects
    two red circles above a blue square                two groups, one above or left of the other
    a green ring inside a black square
    two red circles above the word sun

A fifth of all combinations is held out as the part "unseen": new images and new captions of known words.

Plain scenes, for drawing, have one to four equal objects, or one above or left of another, all large. Their part
"unseen" holds out `HELD_OUT_PAIRS` of a color and a shape: no "train" scene shows one of them in any caption.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import product
from typing import Literal, TypeAlias

import numpy as np

from sightloop.types import Question

Part: TypeAlias = Literal["train", "unseen"]
Relation: TypeAlias = Literal["", "above", "left of", "inside"]
SceneKind: TypeAlias = Literal["all", "plain"]

COLORS = {  # name -> RGB
    "red": (212, 36, 36),
    "orange": (244, 138, 28),
    "yellow": (250, 228, 48),
    "green": (36, 160, 68),
    "blue": (40, 80, 214),
    "purple": (138, 52, 172),
    "black": (22, 22, 22),
    "white": (244, 244, 244),
}
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
NUMBERS = ("zero", "one", "two", "three", "four")
WORDS = ("sun", "cat", "tea", "box", "key", "map", "ice", "owl")
_HELD_OUT = 5  # one combination in this many
# A shape for each color, so that every color and every shape is learned from others.
HELD_OUT_PAIRS = frozenset((color, SHAPES[(2 * i + i // 3) % len(SHAPES)]) for i, color in enumerate(COLORS))


@dataclass(frozen=True, slots=True)
class Group:
    """Objects of one color and shape.

    Attributes:
        count: 1 to 4.
        color: one of `COLORS`.
        shape: one of `SHAPES`.
        size: "big", "small", or "" if the caption does not mention it.
    """

    count: int
    color: str
    shape: str
    size: str = ""

    def __str__(self) -> str:
        return self.describe()

    def describe(self, without: Literal["", "color", "number"] = "") -> str:
        """The phrase of the caption, or a shorter one.

        ""         two red circles     a big red circle
        "color"    two circles         a big circle
        "number"   red circles         a red circle        (of one object, the size is omitted)
        """
        color = "" if without == "color" else self.color
        size = "" if without == "number" else self.size
        words = [word for word in (size, color, _noun(self.shape, self.count)) if word]
        number = article(words[0]) if self.count == 1 else NUMBERS[self.count]
        return " ".join(words if without == "number" and self.count > 1 else [number, *words])


@dataclass(frozen=True, slots=True)
class Combination:
    """Content of a scene; its text is the caption.

    Attributes:
        first: the first group.
        relation: of the first group to the second, or to the word; "" if there is neither.
        second: the second group.
        word: the written word.
    """

    first: Group
    relation: Relation = ""
    second: Group | None = None
    word: str = ""

    def __str__(self) -> str:
        other = self.second or (f"the word {self.word}" if self.word else "")
        return f"{self.first} {self.relation} {other}".rstrip()

    @property
    def groups(self) -> tuple[Group, ...]:
        """One or two groups."""
        return (self.first,) if self.second is None else (self.first, self.second)

    def partial_captions(self) -> tuple[str, ...]:
        """Other correct captions, which leave out some of the content; the written word is always left out.

        "two red circles above a blue square" -> "two circles above a square", "two red circles", "a blue square"
        """
        captions = [self.first.describe("number"), self.first.describe("color")]
        if self.second is not None:
            captions = [
                f"{captions[1]} {self.relation} {self.second.describe('color')}",
                str(self.first),
                str(self.second),
            ]
        return tuple(caption for caption in dict.fromkeys(captions) if caption != str(self))


@cache
def plain_combinations(part: Part) -> dict[str, tuple[Combination, ...]]:
    """All combinations of plain scenes of a part, by kind."""
    singles = [Group(1, color, shape) for color, shape in product(COLORS, SHAPES)]
    pairs = [(a, b) for a, b in product(singles, singles) if a != b]
    by_kind = {
        "one": [Combination(single) for single in singles],
        "alike": [Combination(Group(n, one.color, one.shape)) for one, n in product(singles, (2, 3, 4))],
        "above": [Combination(a, "above", b) for a, b in pairs],
        "left of": [Combination(a, "left of", b) for a, b in pairs],
    }
    return {
        kind: tuple(
            combination
            for combination in members
            if any((one.color, one.shape) in HELD_OUT_PAIRS for one in combination.groups)
            == (part == "unseen")
        )
        for kind, members in by_kind.items()
    }


@cache
def combinations(part: Part) -> dict[str, tuple[Combination, ...]]:
    """All combinations of a part, by kind. The part of a combination is a function of its caption."""
    singles = [Group(1, color, shape) for color, shape in product(COLORS, SHAPES)]
    groups = [Group(count, single.color, single.shape) for count, single in product((1, 2), singles)]
    pairs = [(a, b) for a, b in product(groups, groups) if (a.color, a.shape) != (b.color, b.shape)]
    frames = [single for single in singles if single.shape in ("circle", "square")]
    by_kind = {
        "one": [
            Combination(Group(1, single.color, single.shape, size))
            for single, size in product(singles, ("big", "small"))
        ],
        "alike": [
            Combination(Group(n, single.color, single.shape)) for single, n in product(singles, (2, 3, 4))
        ],
        "above": [Combination(a, "above", b) for a, b in pairs],
        "left of": [Combination(a, "left of", b) for a, b in pairs],
        "inside": [Combination(a, "inside", b) for a, b in product(singles, frames) if a.color != b.color],
        "word": [Combination(group, "above", word=word) for group, word in product(groups, WORDS)],
    }
    return {
        kind: tuple(combination for combination in members if _is_held_out(combination) == (part == "unseen"))
        for kind, members in by_kind.items()
    }


def _is_held_out(combination: Combination) -> bool:
    digest = hashlib.blake2b(str(combination).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") % _HELD_OUT == 0


def vocabulary() -> list[str]:
    """All words of captions, questions (without the question mark) and answers, sorted."""
    nouns = [_noun(shape, count) for shape in SHAPES for count in (1, 2)]
    others = (
        "a above an are big bottom color how inside is left many of or right shape small the there things top"
    )
    others += " what where word written no yes"
    return sorted({*COLORS, *nouns, *NUMBERS[1:], *WORDS, *others.split()})


def make_questions(combination: Combination, random: np.random.Generator) -> tuple[Question, ...]:
    """Questions about a combination, each with one correct answer of one word.

    What a question refers to is in the scene, except for "is there ...?", whose answer is "no" half the time.

    Args:
        combination: content of the scene.
        random: chooses the yes-or-no question.
    """
    pairs: list[tuple[str, str]] = []  # question, answer
    groups = combination.groups
    # "the circle" is unambiguous if the groups differ in shape.
    has_distinct_shapes = len({group.shape for group in groups}) == len(groups)
    for group in groups:
        verb = "is" if group.count == 1 else "are"
        noun, plural = _noun(group.shape, group.count), _noun(group.shape, 2)
        if has_distinct_shapes:
            pairs.append((f"what color {verb} the {noun}?", group.color))
            pairs.append((f"how many {plural} are there?", NUMBERS[group.count]))
        else:
            pairs.append((f"how many {group.color} {plural} are there?", NUMBERS[group.count]))
        if group.size:
            pairs.append((f"is the {noun} big or small?", group.size))
    pairs.append(("how many things are there?", NUMBERS[sum(group.count for group in groups)]))
    pairs.extend(_ask_relation(combination))
    if combination.word:
        pairs.append(("what word is written?", combination.word))
    pairs.append(ask_yes_or_no(groups, random))
    return tuple(Question(question, (answer,)) for question, answer in pairs)


def _ask_relation(combination: Combination) -> list[tuple[str, str]]:
    first, relation, second = combination.first, combination.relation, combination.second
    if combination.word:
        return [("what shape is above the word?", first.shape)]
    if second is None:
        return []
    names = [f"the {group.color} {_noun(group.shape, group.count)}" for group in (first, second)]
    pairs = [(f"what shape is {relation} {names[1]}?", first.shape)]
    if relation != "inside":
        sides = ("top", "bottom") if relation == "above" else ("left", "right")
        for group, name, side in zip((first, second), names, sides, strict=True):
            pairs.append((f"where {'is' if group.count == 1 else 'are'} {name}?", side))
    return pairs


def ask_yes_or_no(groups: Sequence[Group], random: np.random.Generator) -> tuple[str, str]:
    """A question "is there a red circle?" about groups, and its answer, "no" half of the time."""
    present = [(group.color, group.shape) for group in groups]
    color, shape = present[random.integers(len(present))]
    answer = "yes" if random.random() < 0.5 else "no"
    if answer == "no":  # replace either the color or the shape
        others = [(other, shape) for other in COLORS] + [(color, other) for other in SHAPES]
        others = [other for other in others if other not in present]
        color, shape = others[random.integers(len(others))]
    return f"is there {article(color)} {color} {shape}?", answer


def article(word: str) -> str:
    """The article of a word: "an" before a vowel, else "a"."""
    return "an" if word[0] in "aeiou" else "a"


def _noun(shape: str, count: int) -> str:
    return shape if count == 1 else f"{shape}es" if shape.endswith("s") else f"{shape}s"
