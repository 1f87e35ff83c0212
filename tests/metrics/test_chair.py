"""CHAIR against a reference that reads the same list by itself, and the list against COCO's names."""

from __future__ import annotations

import math
import random
import re
from pathlib import Path

import pytest

import sightloop.metrics
from sightloop.errors import UsageError
from sightloop.metrics import ObjectNames, chair_counts, chair_scores, coco_objects, present_objects

LIST = Path(sightloop.metrics.__file__).with_name("coco_objects.txt")
# The published rules: what `baby` and `adult` qualify, and vehicles for passengers.
ANIMALS = "bird cat dog horse sheep cow elephant bear zebra giraffe animal cub".split()
SPECIAL = {f"{age} {animal}": animal for age in ("baby", "adult") for animal in ANIMALS} | {
    "passenger jet": "jet",
    "passenger train": "train",
    "bow tie": "tie",
    "toilet seat": "toilet",
}
COCO = (
    """
person, bicycle, car, motorcycle, airplane, bus, train, truck, boat, traffic light, fire hydrant, stop sign, parking
meter, bench, bird, cat, dog, horse, sheep, cow, elephant, bear, zebra, giraffe, backpack, umbrella, handbag,
tie, suitcase, frisbee, skis, snowboard, sports ball, kite, baseball bat, baseball glove, skateboard, surfboard, tennis
racket, bottle, wine glass, cup, fork, knife, spoon, bowl, banana, apple, sandwich, orange, broccoli, carrot, hot
dog, pizza, donut, cake, chair, couch, potted plant, bed, dining table, toilet, tv, laptop, mouse, remote, keyboard,
cell phone, microwave, oven, toaster, sink, refrigerator, book, clock, vase, scissors, teddy bear, hair drier,
toothbrush
""".replace("\n", " ")
    .strip()
    .split(", ")
)
PLURALS = {
    "person": "people",
    "knife": "knives",
    "bus": "buses",
    "sandwich": "sandwiches",
    "puppy": "puppies",
} | {name: name for name in ("skis", "scissors", "sheep", "broccoli")}


def synonyms() -> dict[str, str]:
    """Word -> object."""
    found: dict[str, str] = {}
    for line in LIST.read_text().splitlines():
        if line and line[0] != "#" and "->" not in line:
            name, _, others = line.partition(":")
            found |= {word.strip(): name for word in [name, *others.split(",")] if word.strip()}
    return found


def reference_mentions(words: list[str]) -> list[str]:
    """Objects of words that are in the singular already."""
    names, joined = synonyms(), []
    while words:
        pair = " ".join(words[:2])
        if pair in SPECIAL or (" " in pair and pair in names):
            joined.append(SPECIAL.get(pair, pair))
            words = words[2:]
        else:
            joined.append(words[0])
            words = words[1:]
    if "toilet" in joined:
        joined = [word for word in joined if word != "seat"]
    return [names[word] for word in joined if word in names]


def test_thousand_random_captions_equal_the_reference() -> None:
    draw = random.Random(0)
    names = synonyms()
    words = sorted({part for text in (*names, *SPECIAL) for part in text.split() if "-" not in part})
    captions, labels, references = [], [], []
    wrong = mentions = hallucinated_captions = 0
    for _ in range(1000):
        chosen = [
            w for t in draw.choices([*names, *SPECIAL, *words, "a", "red", "seat"], k=6) for w in t.split()
        ]
        chosen = [word for word in chosen if "-" not in word]
        people = draw.choices(words, k=2)
        boxes = draw.sample(COCO, 5)
        truth = {*boxes, *reference_mentions(people)}
        expected = reference_mentions(chosen)
        caption = " ".join(chosen)
        assert [mention.name for mention in coco_objects().mentions(caption.title())] == expected, caption
        lies = [name for name in expected if name not in truth]
        counts = chair_counts(caption, present_objects(boxes, [" ".join(people)]))
        assert counts == (len(expected), len(lies), len(truth & set(expected)), len(truth))
        captions.append(caption)
        labels.append(boxes)
        references.append([" ".join(people)])
        wrong, mentions = wrong + len(lies), mentions + len(expected)
        hallucinated_captions += bool(lies)
    scores = chair_scores(captions, labels, references)
    assert scores["CHAIRi"] == wrong / mentions
    assert scores["CHAIRs"] == hallucinated_captions / 1000
    assert 0 < scores["object recall"] < 1


def test_the_list_has_cocos_objects_and_the_published_pairs() -> None:
    assert list(coco_objects().names) == COCO
    for name in COCO:
        assert coco_objects().of_label(name) == {name}
        assert coco_objects().of_label(name.replace(" ", "_").title()) == {name}
    for pair, word in SPECIAL.items():
        expected = [synonyms()[word]] if word in synonyms() else []
        assert [mention.name for mention in coco_objects().mentions(f"the {pair}")] == expected


@pytest.mark.parametrize("name", [*COCO, "puppy"])
def test_plurals_name_the_same(name: str) -> None:
    plural = PLURALS.get(name, name + ("es" if name.endswith(("ss", "ch", "sh")) else "s"))
    expected = [mention.name for mention in coco_objects().mentions(name)]
    assert len(expected) == 1
    assert [mention.name for mention in coco_objects().mentions(f"Two {plural}, at rest.")] == expected


@pytest.mark.parametrize(
    ("caption", "objects"),
    [
        ("A hot dog, and hot, dogs", ["hot dog", "dog"]),
        ("a man's dog's bowl", ["person", "dog", "bowl"]),
        ("Women with a hot-dog and a cat-like t-shirt", ["person", "hot dog"]),
        ("a toilet with a broken seat", ["toilet"]),
        ("two baby elephants and a baby", ["elephant", "person"]),
        ("glasses of wine", []),
        ("wine glasses", ["wine glass"]),
        ("a couple of zebras", ["zebra"]),
        ("", []),
    ],
)
def test_captions(caption: str, objects: list[str]) -> None:
    assert [mention.name for mention in coco_objects().mentions(caption)] == objects


def test_labels_of_other_sets_name_cocos_objects() -> None:
    for label, name in {
        "tvmonitor": "tv",
        "diningtable": "dining table",
        "Motorbike": "motorcycle",
        "puppies": "dog",
    }.items():
        assert coco_objects().of_label(label) == {name}
    assert coco_objects().of_label("red square") == set()


def test_a_list_of_ones_own() -> None:
    names = ObjectNames(["# shapes", "circle: disk, round thing", "square", "", "black hole -> hole"])
    assert names.names == ("circle", "square")
    assert [m.name for m in names.mentions("disks, a round thing and a square in a circle")] == [
        "circle",
        "circle",
        "square",
        "circle",
    ]
    scores = chair_scores(["a circle"], [["square"]], names=names)
    assert scores == {"CHAIRs": 1, "CHAIRi": 1, "object recall": 0}
    assert math.isnan(chair_scores(["a fox"], [[]])["CHAIRi"])
    for lines, words in {
        ("a: b", "c: b"): "line 2: 'b' names 'a' already",
        (): "there is none",
        (": b",): "line 1",
        ("a b c -> d",): "two words",
    }.items():
        with pytest.raises(UsageError, match=re.escape(words)):
            ObjectNames(lines)
    with pytest.raises(UsageError, match="at least one image"):
        chair_scores(["a"], [])
