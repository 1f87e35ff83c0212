"""The parser of plain scenes, on true renders and on wrong ones, and the held-out pairs."""

from __future__ import annotations

import numpy as np
import pytest

from sightloop.data.datasets.synthetic import (
    check_scene,
    parse_scene,
    plain_combination,
    synthetic_world,
)
from sightloop.data.datasets.synthetic_grammar import (
    COLORS,
    HELD_OUT_PAIRS,
    SHAPES,
    Combination,
    Group,
    plain_combinations,
)
from sightloop.data.datasets.synthetic_parser import relations
from sightloop.data.datasets.synthetic_scene import render_scene
from sightloop.data.rng import generator


def _objects(combination: Combination, number: int = 0, size: int = 64) -> list[tuple[str, str]]:
    scene = render_scene(combination, generator("parser", number), size, plain=True)
    return sorted((one.color, one.shape) for one in parse_scene(scene.pixels))


@pytest.mark.parametrize("part", ["train", "unseen"])
def test_it_reads_true_renders(part: str) -> None:
    """99.5 %: the 400 of both parts here are a sample, of which at most two may be wrong."""
    world = synthetic_world(part, 200, seed=5, scenes="plain")  # pyright: ignore
    wrong = [
        str(combination)
        for index, combination in enumerate(world.combinations)
        if not check_scene(parse_scene(world._render(index).pixels), combination).correct  # pyright: ignore
    ]
    assert len(wrong) <= 1, wrong


def test_a_wrong_text_is_told_by_what_is_wrong() -> None:
    shown = Combination(Group(1, "red", "star"), "above", Group(1, "blue", "ring"))
    objects = parse_scene(render_scene(shown, generator("a"), plain=True).pixels)
    assert check_scene(objects, shown).correct
    other = check_scene(objects, Combination(Group(1, "red", "circle"), "above", Group(1, "blue", "ring")))
    assert (other.object, other.color, other.count, other.position) == (False, False, False, False)
    color = check_scene(objects, Combination(Group(1, "green", "star"), "above", Group(1, "blue", "ring")))
    assert (color.object, color.color, color.count, color.position) == (True, False, True, False)
    turned = check_scene(objects, Combination(Group(1, "blue", "ring"), "above", Group(1, "red", "star")))
    assert (turned.object, turned.color, turned.count, turned.position) == (True, True, True, False)
    beside = check_scene(objects, Combination(Group(1, "red", "star"), "left of", Group(1, "blue", "ring")))
    assert beside.position is False
    alone = check_scene(objects, Combination(Group(1, "red", "star")))
    assert (alone.object, alone.color, alone.count, alone.position) == (True, True, False, None)
    assert not alone.correct
    three = parse_scene(
        render_scene(Combination(Group(3, "white", "cross")), generator("b"), plain=True).pixels
    )
    assert check_scene(three, Combination(Group(3, "white", "cross"))).correct
    assert not check_scene(three, Combination(Group(4, "white", "cross"))).count


def test_noise_and_emptiness_are_no_scene() -> None:
    assert parse_scene(np.full((64, 64, 3), 140, np.uint8)) == []
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3)).astype(np.uint8)
    combination = Combination(Group(1, "red", "star"))
    assert not check_scene(parse_scene(noise), combination).correct


def test_geneval_rule() -> None:
    """Offset (0, -20), sizes 10 and 10: less 0.1 * 20 leaves 18 of 20, above; beside each other in part, neither."""
    assert relations((10, 0, 20, 10), (10, 20, 20, 30)) == {"above"}
    assert relations((10, 20, 20, 30), (10, 0, 20, 10)) == {"below"}
    assert relations((0, 0, 10, 10), (20, 0, 30, 10)) == {"left of"}
    assert relations((0, 0, 10, 10), (20, 20, 30, 30)) == {"left of", "above"}
    assert relations((0, 0, 10, 10), (0, 0, 10, 10)) == frozenset()
    assert relations((0, 0, 20, 20), (0, 3, 20, 23)) == frozenset()  # less than a tenth of both heights


def test_held_out_pairs_are_in_no_train_scene_and_in_each_unseen_one() -> None:
    assert {color for color, _ in HELD_OUT_PAIRS} == set(COLORS)
    assert {shape for _, shape in HELD_OUT_PAIRS} == set(SHAPES)
    for part, holds in (("train", False), ("unseen", True)):
        for members in plain_combinations(part).values():  # pyright: ignore
            assert members
            for one in members:
                assert any((g.color, g.shape) in HELD_OUT_PAIRS for g in one.groups) == holds
                assert plain_combination(str(one)) == one
    assert plain_combination("a photo of a dog") is None
