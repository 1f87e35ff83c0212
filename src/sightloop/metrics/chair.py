"""CHAIR: objects that captions name and images do not show (Rohrbach et al. 2018, "Object Hallucination").

The rules are those of the published code (LisaAnne/Hallucination): lower case, tokens, singular, pairs of words first,
then words that name an object. The list of words is this project's own, `coco_objects.txt`, so that scores are near
those of the published list and not equal to them.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from sightloop.errors import UsageError

_COCO_FILE = Path(__file__).with_name("coco_objects.txt")
_TOKEN = re.compile(r"[^\W_]+(?:-[^\W_]+)*|[^\w\s]|_")  # a word with its hyphens, or one mark
_IRREGULAR = {
    "people": "person",
    "children": "child",
    "mice": "mouse",
    "geese": "goose",
    "oxen": "ox",
    "busses": "bus",
    "feet": "foot",
    "teeth": "tooth",
}
# Ends of plurals, and of their singulars. The first one that gives a known word counts.
_ENDINGS = (("men", "man"), ("ies", "y"), ("ves", "f"), ("ves", "fe"), ("es", ""), ("s", ""))


class Mention(NamedTuple):
    """A word of a caption, in the singular, and the object that it names: ("puppy", "dog")."""

    word: str
    name: str


class ChairCounts(NamedTuple):
    """Objects of one caption.

    Attributes:
        mentions: objects that it names, each as often as it is named.
        hallucinated: those of them that are not in the image.
        recalled: different objects of the image that it names.
        present: different objects of the image.
    """

    mentions: int
    hallucinated: int
    recalled: int
    present: int


class ObjectNames:
    """The objects that are looked for in captions, and the words that name them.

    Attributes:
        names: of the objects, in the order of the list.
    """

    def __init__(self, lines: Iterable[str]) -> None:
        """Reads a list.

        Args:
            lines: "name: other words, with commas" for an object, all in the singular; "two words -> word" for what a
                pair counts as; those that begin with # and empty ones are ignored.

        Raises:
            UsageError: a line of another form, a word that names two objects, or no object.
        """
        self._object_of: dict[str, str] = {}  # word or words -> object
        self._pairs: dict[str, str] = {}  # two words -> what they count as
        self.names: tuple[str, ...] = ()
        for number, line in enumerate(lines, 1):
            text = " ".join(line.lower().split())
            if not text or text.startswith("#"):
                continue
            if "->" in text:
                pair, _, word = (part.strip() for part in text.partition("->"))
                if len(pair.split()) != 2 or not word:
                    raise UsageError(f"objects, line {number}: {line.strip()!r} is not 'two words -> word'")
                self._pairs[pair] = word
                continue
            name, *words = (part.strip() for part in text.replace(":", ",").split(","))
            if not name:
                raise UsageError(f"objects, line {number}: {line.strip()!r} is not 'name: other words'")
            self.names = (*self.names, name)
            for word in (name, *filter(None, words)):
                if self._object_of.setdefault(word, name) != name:
                    raise UsageError(
                        f"objects, line {number}: {word!r} names {self._object_of[word]!r} already"
                    )
        if not self.names:
            raise UsageError("objects: there is none; give lines such as 'dog: puppy, hound'")
        for words in list(self._object_of):
            if len(words.split()) == 2:
                self._pairs.setdefault(words, words)
        texts = (*self._object_of, *self._pairs, *self._pairs.values())
        self._known = frozenset(word for text in texts for word in text.split())

    def mentions(self, caption: str) -> list[Mention]:
        """The objects that a caption names, in its order; an object named twice counts twice."""
        words = [self._singular(word) for word in _TOKEN.findall(caption.lower())]
        joined: list[str] = []
        position = 0
        while position < len(words):
            pair = " ".join(words[position : position + 2])
            joined.append(self._pairs.get(pair, words[position]))
            position += 2 if pair in self._pairs else 1
        if "toilet" in joined:  # its seat is no chair
            joined = [word for word in joined if word != "seat"]
        return [Mention(word, self._object_of[word]) for word in joined if word in self._object_of]

    def of_label(self, label: str) -> set[str]:
        """The objects that the label of a box names: "dining table", "dining_table" and "diningtable" alike."""
        text = " ".join(re.split(r"[\s_-]+", label.lower().strip()))
        if text in self._object_of:
            return {self._object_of[text]}
        return {mention.name for mention in self.mentions(text)}

    def _singular(self, word: str) -> str:
        """A word in the singular, where the list knows that; with a hyphen as two words, likewise."""
        if "-" in word and word not in self._object_of and word.replace("-", " ") in self._object_of:
            return word.replace("-", " ")
        if word in self._known:
            return word
        if _IRREGULAR.get(word, "") in self._known:
            return _IRREGULAR[word]
        for plural, singular in _ENDINGS:
            if word.endswith(plural) and (stem := word.removesuffix(plural) + singular) in self._known:
                return stem
        return word


@lru_cache(maxsize=1)
def coco_objects() -> ObjectNames:
    """The 80 objects of COCO."""
    return ObjectNames(_COCO_FILE.read_text("utf-8").splitlines())


def chair_counts(caption: str, present: Collection[str], names: ObjectNames | None = None) -> ChairCounts:
    """Objects of a caption, against those of its image.

    Args:
        caption: what a model wrote.
        present: names of the objects in the image: of boxes, and of what people's captions mention.
        names: the objects that are looked for; None for COCO's.
    """
    named = [mention.name for mention in (names or coco_objects()).mentions(caption)]
    wrong = sum(name not in present for name in named)
    return ChairCounts(len(named), wrong, len(set(named) & set(present)), len(set(present)))


def chair_scores(
    captions: Sequence[str],
    labels: Sequence[Iterable[str]],
    references: Sequence[Sequence[str]] | None = None,
    names: ObjectNames | None = None,
) -> dict[str, float]:
    """CHAIR of captions.

    Args:
        captions: one for each of N images.
        labels: for each image the labels of its boxes.
        references: for each image captions that people wrote; what they name is in the image too. None for none.
        names: the objects that are looked for; None for COCO's.

    Returns:
        `CHAIRs`, the share of captions with an object that is not in the image; `CHAIRi`, the share of mentions of
        such objects (NaN without a mention); `object recall`, the share of the images' objects that are named (NaN
        without one).

    Raises:
        UsageError: no caption, or lengths that differ.
    """
    texts = [[]] * len(captions) if references is None else references
    if not len(captions) or len(labels) != len(captions) or len(texts) != len(captions):
        raise UsageError(
            f"{len(captions)} captions, {len(labels)} lists of labels, {len(texts)} of references: expected one of "
            "each for every image, and at least one image"
        )
    known = names or coco_objects()
    counts = [
        chair_counts(caption, present_objects(own, people, known), known)
        for caption, own, people in zip(captions, labels, texts, strict=True)
    ]
    mentions, wrong, recalled, present = (sum(column) for column in zip(*counts, strict=True))
    return {
        "CHAIRs": sum(each.hallucinated > 0 for each in counts) / len(counts),
        "CHAIRi": wrong / mentions if mentions else float("nan"),
        "object recall": recalled / present if present else float("nan"),
    }


def present_objects(
    labels: Iterable[str], references: Iterable[str], names: ObjectNames | None = None
) -> set[str]:
    """The objects of an image: those that labels of boxes name, and those that people's captions mention."""
    known = names or coco_objects()
    from_labels = {name for label in labels for name in known.of_label(label)}
    return from_labels | {mention.name for text in references for mention in known.mentions(text)}
