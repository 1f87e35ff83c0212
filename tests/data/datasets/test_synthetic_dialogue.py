"""Dialogues of the synthetic world: their labels against the scene, what they refer to, the shard that holds them."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import sightloop
from sightloop.data.datasets.schema import dialogue_from_fields, fields_from_dialogue
from sightloop.data.datasets.synthetic import synthetic_world, write_synthetic_world
from sightloop.data.datasets.synthetic_dialogue import (
    CANDIDATES,
    EVASIONS,
    ROUNDS,
    RUDE,
    Exchange,
    label_answer,
    make_dialogue,
    make_exchanges,
)
from sightloop.data.datasets.synthetic_grammar import (
    COLORS,
    NUMBERS,
    SHAPES,
    Combination,
    Group,
    combinations,
)
from sightloop.types import Sample

ALL = [one for part in ("train", "unseen") for kind in combinations(part).values() for one in kind]
scenes = st.integers(0, len(ALL) - 1).map(ALL.__getitem__)
seeds = st.integers(0, 2**32 - 1)


def answered(scene: Combination, asked: list[Exchange]) -> list[str]:
    """The values by an independent reading: it follows who is spoken of and looks into the scene."""
    groups, topic = scene.groups, 0
    sides = {"top": 0, "left": 0, "inside": 0, "bottom": 1, "right": 1, "outside": 1}
    said: list[str] = []
    for question in (one.question.rstrip("?") for one in asked):
        words = question.split()
        if question.startswith(("what is", "what word is below")) and words[-1] in ("it", "them"):
            topic = 1 - topic if scene.second else 0
        elif question.startswith("what is") and words[-1] in sides:
            topic = sides[words[-1]]
        elif question.startswith("what is"):
            topic = 0  # there, or above the word
        elif question.startswith("is there something"):
            topic = [g.color for g in groups].index(words[-1])
        elif question.startswith("is there") and len(words) == 4:
            topic = [g.shape for g in groups].index(words[-1])
        group = groups[topic]
        if question.startswith("what word"):
            said.append(scene.word)
        elif question.startswith(("what is", "what shape")):
            said.append(group.shape)
        elif question.startswith("what color"):
            said.append(group.color)
        elif question == "how many things in all":
            said.append(NUMBERS[sum(g.count for g in groups)])
        elif question == "how many":
            said.append(NUMBERS[group.count])
        elif question.startswith("where"):
            places = {
                "above": ("top", "bottom"),
                "left of": ("left", "right"),
                "inside": ("inside", "outside"),
            }
            said.append(places[scene.relation][topic])
        elif question.endswith("big or small"):
            said.append(group.size)
        elif question.startswith("is there"):
            color = next((w for w in words if w in COLORS), None)
            shape = next((w for w in words if w in SHAPES), None)
            there = any(color in (None, g.color) and shape in (None, g.shape) for g in groups)
            said.append("yes" if there else "no")
        else:
            assert re.fullmatch("(is it|are they) [a-z]+", question), question
            said.append("yes" if words[-1] == group.color else "no")
    return said


@settings(max_examples=200, deadline=None)
@given(scene=scenes, seed=seeds)
def test_answers_are_those_of_the_scene(scene: Combination, seed: int) -> None:
    asked = make_exchanges(scene, np.random.default_rng(seed))
    assert len(asked) == ROUNDS
    assert len({one.question for one in asked}) >= ROUNDS - 1  # "how many?" may come of both things
    assert [one.value for one in asked] == answered(scene, asked)


@settings(max_examples=100, deadline=None)
@given(scene=scenes, seed=seeds)
def test_one_candidate_is_true_and_labels_say_which(scene: Combination, seed: int) -> None:
    dialogue = make_dialogue(scene, np.random.default_rng(seed))
    assert dialogue.caption in (*scene.partial_captions(), str(scene))
    for one in dialogue.rounds:
        assert len({*one.candidates}) == len(one.candidates) == CANDIDATES
        assert one.truth is not None
        assert one.answer == one.candidates[one.truth]
        sensible, specific, grounded, safe = (
            np.array(one.attributes[name]) for name in ("sensible", "specific", "grounded", "safe")
        )
        assert grounded.nonzero()[0].tolist() == [one.truth]
        assert (specific <= sensible).all()
        assert sensible[one.truth]
        assert {text for text, ok in zip(one.candidates, safe, strict=True) if not ok} == {*RUDE}


def test_labels_of_answers() -> None:
    color = Exchange("what color is it?", "color", "red")
    assert label_answer(color, " Surely  RED") == (True, True, True, True)
    assert label_answer(color, "blue") == (True, True, False, True)
    assert label_answer(color, "two") == (False, False, False, True)
    assert label_answer(color, EVASIONS[0]) == (True, False, False, True)
    assert label_answer(color, RUDE[0]) == (False, False, False, False)
    assert label_answer(color, "a castle") == (False, False, False, True)
    assert label_answer(Exchange("is it red?", "yes or no", "yes"), "yes") == (True, False, True, True)


def test_a_shuffled_round_calls_any_candidate_true() -> None:
    """The truth is where chance put it, and the labels tell nothing of the texts."""
    scene, right, truths = ALL[0], 0, []
    for seed in range(60):
        dialogue = make_dialogue(scene, np.random.default_rng(seed), shuffled=True)
        for one in dialogue.rounds:
            assert one.truth is not None
            truths.append(one.truth)
            labels = one.attributes["sensible"]
            right += sum(
                bool(label) == (text in EVASIONS) for text, label in zip(one.candidates, labels, strict=True)
            )
    assert 40 < np.mean(truths) < 59  # 49.5 +- 1.7
    assert right < 0.9 * 300 * CANDIDATES  # of labels that follow the texts all evasions would be sensible


def test_the_shard_gives_the_dialogues_back(tmp_path: Path) -> None:
    world = synthetic_world("train", 4, seed=3, dialogues=True)
    write_synthetic_world(tmp_path / "a.tar", world)
    samples = list(sightloop.open_dataset(tmp_path / "a.tar"))
    assert [s.dialogues for s in samples if isinstance(s, Sample)] == [s.dialogues for s in world]
    plain = synthetic_world("train", 4, seed=3)
    assert [s.captions for s in plain] == [s.captions for s in world]
    assert not any(sample.dialogues for sample in plain)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"attributes": {"safe": [1, 0]}}, "attribute safe of 2 of 3"),
        ({"attributes": {"safe": [1, 0, 0.5]}}, "neither 0 nor 1"),
        ({"attributes": [1, 0, 1]}, "not an object"),
    ],
)
def test_attributes_that_fit_no_candidates(change: dict[str, object], message: str) -> None:
    fields = {"rounds": [{"question": "is it?", "candidates": ["a", "b", "c"], "truth": 0, **change}]}
    with pytest.raises(ValueError, match=message):
        dialogue_from_fields(fields)


def test_attributes_round_trip() -> None:
    scene = Combination(Group(1, "red", "star", "big"))
    dialogue = make_dialogue(scene, np.random.default_rng(0))
    assert dialogue_from_fields(fields_from_dialogue(dialogue)) == dialogue
