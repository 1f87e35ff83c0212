"""The synthetic world: its captions, questions and regions agree with each other and with the pixels."""

from __future__ import annotations

import io
import json
import re
import tarfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw

from sightloop.apps.cli import main
from sightloop.data.datasets.synthetic import synthetic_world, write_synthetic_world
from sightloop.data.datasets.synthetic_grammar import (
    COLORS,
    NUMBERS,
    SHAPES,
    Combination,
    combinations,
    make_questions,
    vocabulary,
)
from sightloop.data.datasets.synthetic_scene import render_scene
from sightloop.data.rng import generator
from sightloop.errors import UsageError
from sightloop.types import Sample

PLURALS = {"crosses": "cross"} | {f"{shape}s": shape for shape in SHAPES if shape != "cross"}
COMBINATIONS = [c for part in ("train", "unseen") for kind in combinations(part).values() for c in kind]
any_combination = st.sampled_from(COMBINATIONS)


def pixels(sample: Sample) -> np.ndarray:
    assert isinstance(sample.image, bytes)
    return np.asarray(Image.open(io.BytesIO(sample.image)))


def parse(caption: str) -> list[tuple[int, str, str]]:
    """The (count, color, shape) of each group, read from the caption."""
    number = "|".join(["an?", *NUMBERS[2:]])
    groups = re.findall(rf"({number}) (?:big |small )?({'|'.join(COLORS)}) (\w+)", caption)
    return [
        (max(1, NUMBERS.index(n) if n in NUMBERS else 1), color, PLURALS.get(noun, noun))
        for n, color, noun in groups
    ]


def answer(caption: str, question: str) -> str:
    """The answer that follows from the caption."""
    groups = parse(caption)
    words = question.rstrip("?").split()
    shapes = [PLURALS.get(word, word) for word in words if PLURALS.get(word, word) in SHAPES]
    colors = [word for word in words if word in COLORS]
    matches = [g for g in groups if g[2] in shapes and (not colors or g[1] in colors)]
    if question.startswith("what color"):
        return matches[0][1]
    if question.startswith("how many things"):
        return NUMBERS[sum(g[0] for g in groups)]
    if question.startswith("how many"):
        return NUMBERS[matches[0][0]]
    if question.startswith("what word"):
        return caption.split()[-1]
    if question.startswith("what shape"):
        return groups[0][2]
    if question.startswith("where"):
        sides = ("left", "right") if " left of " in caption else ("top", "bottom")
        return sides[groups.index(matches[0])]
    if question.startswith("is there"):
        return "yes" if matches else "no"
    assert question.endswith("big or small?")
    return caption.split()[1]


def test_captions_differ_and_parts_share_none() -> None:
    train, unseen = ([str(c) for kind in combinations(p).values() for c in kind] for p in ("train", "unseen"))
    assert len(train) == len(set(train)) > 10_000
    assert len(unseen) == len(set(unseen)) > 1_000
    assert not set(train) & set(unseen)
    assert 0.17 < len(unseen) / len(train + unseen) < 0.23
    for kind in combinations("train"):
        assert {w for c in combinations("unseen")[kind] for w in str(c).split()} <= {
            w for c in combinations("train")[kind] for w in str(c).split()
        }


def test_examples_of_captions() -> None:
    captions = {str(c) for c in COMBINATIONS}
    assert {
        "a big red circle",
        "a small orange cross",
        "three white stars",
        "two orange crosses",
        "two red circles above a blue square",
        "an orange ring left of two black rings",
        "a green ring inside a black square",
        "two red circles above the word sun",
    } <= captions
    assert not any(re.search(r"\ba [aeiou]|\ban [^aeiou]", caption) for caption in captions)


@given(any_combination, st.integers(0, 99))
def test_answers_follow_from_the_caption(combination, seed: int) -> None:
    questions = make_questions(combination, generator("test", seed))
    assert len(questions) >= 4
    assert len({q.question for q in questions}) == len(questions)
    for q in questions:
        assert q.answers == (answer(str(combination), q.question),), q


def test_yes_and_no_are_equally_frequent() -> None:
    answers = [
        q.answers[0]
        for i, c in enumerate(COMBINATIONS[::20])
        for q in make_questions(c, generator(i))
        if q.question.startswith("is there")
    ]
    assert 0.45 < answers.count("yes") / len(answers) < 0.55


def test_the_vocabulary_has_the_words_of_all_texts() -> None:
    words: set[str] = set()
    for i, combination in enumerate(COMBINATIONS):
        words.update(str(combination).split())
        for q in make_questions(combination, generator(i)):
            words.update(q.question.rstrip("?").split(), q.answers)
    assert vocabulary() == sorted(words)


@settings(deadline=None, max_examples=60)
@given(any_combination, st.integers(0, 999), st.sampled_from([32, 64, 96]))
def test_regions_are_where_the_caption_says(combination, seed: int, size: int) -> None:
    scene = render_scene(combination, generator(seed), size)
    assert scene.pixels.shape == (size, size, 3)
    assert scene.pixels.dtype == np.uint8
    objects = [r for r in scene.regions if r.polygons]
    expected = sorted(f"{color} {shape}" for n, color, shape in parse(str(combination)) for _ in range(n))
    assert sorted(r.label for r in objects) == expected
    centers: dict[str, list[np.ndarray]] = {}
    for region in scene.regions:
        left, top, right, bottom = region.box
        assert 0 <= left < right <= size
        assert 0 <= top < bottom <= size
        centers.setdefault(region.label, []).append(np.array([(left + right) / 2, (top + bottom) / 2]))
    for region in objects:
        points = np.array(region.polygons[0]).reshape(-1, 2)
        assert (*points.min(0), *points.max(0)) == region.box
    groups = [np.mean(centers[f"{g.color} {g.shape}"], axis=0) for g in combination.groups]
    if combination.word:
        groups.append(centers[f"word {combination.word}"][0])
    if combination.relation in ("above", "left of"):
        x, y = (groups[1] - groups[0]) / size
        along, aside = (y, x) if combination.relation == "above" else (x, y)
        assert along > 0.3
        assert abs(aside) < 0.3
    if combination.relation == "inside":
        inner = next(
            r.box for r in objects if r.label == f"{combination.first.color} {combination.first.shape}"
        )
        outer = objects[0].box
        assert outer[0] < inner[0] < inner[2] < outer[2]
        assert outer[1] < inner[1] < inner[3] < outer[3]


@settings(deadline=None, max_examples=40)
@given(any_combination, st.integers(0, 999))
def test_outlines_contain_their_color(combination, seed: int) -> None:
    size = 64
    scene = render_scene(combination, generator(seed), size)
    for region in (r for r in scene.regions if r.polygons):
        mask = Image.new("1", (size, size))
        points = [tuple(p) for p in np.array(region.polygons[0]).reshape(-1, 2).tolist()]
        ImageDraw.Draw(mask).polygon(points, fill=1)
        color = np.median(scene.pixels[np.asarray(mask)], axis=0)
        inside = combination.relation == "inside" and region.label.startswith(str(combination.second.color))
        nearest = min(COLORS, key=lambda name: np.abs(color - COLORS[name]).sum())
        assert inside or nearest == region.label.split()[0]


def test_images_of_one_caption_differ() -> None:
    combination = combinations("train")["above"][0]
    a, b = (render_scene(combination, generator(i)).pixels.astype(int) for i in (1, 2))
    assert np.abs(a - b).mean() > 5
    assert (a == render_scene(combination, generator(1)).pixels).all()


def test_a_synthetic_world_is_a_function_of_its_arguments() -> None:
    few, more, other = (
        synthetic_world("train", 5, 3),
        synthetic_world("train", 9, 3),
        synthetic_world("train", 5, 4),
    )
    assert list(few) == more[:5]
    assert few[-1] == few[4]
    assert [s.captions for s in few] != [s.captions for s in other]
    assert len({s.key for s in more}) == 9
    with pytest.raises(IndexError):
        few[5]
    assert pixels(synthetic_world("unseen", 1, 0, size=48)[0]).shape == (48, 48, 3)


def test_different_gives_no_caption_twice() -> None:
    samples = synthetic_world("unseen", 1000, 1, different=True)
    assert len({str(c) for c in samples.combinations}) == 1000
    assert {str(c) for c in samples.combinations} <= {
        str(c) for k in combinations("unseen").values() for c in k
    }
    train = synthetic_world("train", 3000, 1)
    assert len({str(c) for c in train.combinations}) > 1500
    assert {w for c in samples.combinations for w in str(c).split()} <= {
        w for c in train.combinations for w in str(c).split()
    }


def test_shuffled_moves_all_texts_to_other_images() -> None:
    plain, shuffled = synthetic_world("train", 40, 2), synthetic_world("train", 40, 2, shuffled=True)
    assert [s.image for s in plain] == [s.image for s in shuffled]
    assert [s.key for s in plain] == [s.key for s in shuffled]
    original = [(s.captions, s.questions, s.regions) for s in plain]
    moved = [(s.captions, s.questions, s.regions) for s in shuffled]
    assert sorted(map(repr, original)) == sorted(map(repr, moved))
    assert all(a != b for a, b in zip(original, moved, strict=True))


@pytest.mark.parametrize(
    ("arguments", "options"),
    [
        (("test", 1), {}),
        (("train", -1), {}),
        (("train", 1), {"size": 8}),
        (("unseen", 10**6), {"different": True}),
    ],
)
def test_wrong_arguments_are_refused(arguments: tuple, options: dict) -> None:
    with pytest.raises(UsageError):
        synthetic_world(*arguments, **options)


def test_the_shard_holds_the_samples(tmp_path: Path) -> None:
    samples = synthetic_world("train", 6, 1)
    write_synthetic_world(tmp_path / "a.tar", samples)
    write_synthetic_world(tmp_path / "b.tar", samples)
    assert (tmp_path / "a.tar").read_bytes() == (tmp_path / "b.tar").read_bytes()
    with tarfile.open(tmp_path / "a.tar") as tar:
        files = {member.name: tar.extractfile(member).read() for member in tar}  # type: ignore[union-attr]
    assert list(files) == [f"{s.key}.{ending}" for s in samples for ending in ("png", "json")]
    for sample in samples:
        record = json.loads(files[f"{sample.key}.json"])
        assert files[f"{sample.key}.png"] == sample.image
        assert tuple(record["captions"]) == sample.captions
        assert [(q["question"], (q["answer"],)) for q in record["qa"]] == [
            (q.question, q.answers) for q in sample.questions
        ]
        assert [r["label"] for r in record["regions"]] == [r.label for r in sample.regions]
        assert [tuple(r["box"]) for r in record["regions"]] == [r.box for r in sample.regions]
    with pytest.raises(UsageError, match="there is no folder"):
        write_synthetic_world(tmp_path / "none" / "a.tar", samples)


def test_the_command_writes_the_shard(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "w.tar"
    options = "--count 4 --seed 7 --part unseen --shuffled --different --size 32".split()
    assert main.main(["synthetic", str(target), *options]) == 0
    write_synthetic_world(
        tmp_path / "x.tar", synthetic_world("unseen", 4, 7, size=32, different=True, shuffled=True)
    )
    assert target.read_bytes() == (tmp_path / "x.tar").read_bytes()
    assert "4 scenes" in capsys.readouterr().err
    assert main.main(["synthetic", str(target), "--count", "0"]) == 2
    for argument in main.app["synthetic"].assemble_argument_collection(parse_docstring=True):
        assert argument.parameter.help or not argument.show, argument.name


@given(any_combination)
def test_partial_captions_use_fewer_words_of_the_caption(combination: Combination) -> None:
    caption = str(combination)
    assert combination.partial_captions()
    for text in combination.partial_captions():
        words = {"a" if word == "an" else word for word in text.split()}
        assert text != caption
        assert words < {*caption.replace("an ", "a ").split(), "a"}
        nouns = [PLURALS.get(word, word) for word in text.split() if PLURALS.get(word, word) in SHAPES]
        assert nouns
        assert set(nouns) <= {group.shape for group in combination.groups}
