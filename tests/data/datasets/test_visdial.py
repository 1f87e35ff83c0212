"""Visual Dialog JSON of both versions with dense annotations, wrong ones, and dialogues through every format."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import sightloop
from sightloop.data.datasets import schema
from sightloop.data.datasets.convert import convert
from sightloop.data.datasets.dataset import Dataset
from sightloop.errors import ImageError, UsageError
from sightloop.types import Dialogue, Round, Sample
from tests.data.datasets.sources import make_image, put

QUESTIONS = ["is it sunny", "how many dogs", "what color is it", "any people"]
ANSWERS = [f"answer {number}" for number in range(150)]
NAMES = {"0.9": "COCO_val2014_%012d.jpg", "1.0": "VisualDialog_val2018_%012d.jpg"}


def visdial(version: str, ids: list[int], rounds: int = 10) -> dict[str, Any]:
    draw = random.Random(version)
    dialogs: list[Any] = []
    for image_id in ids:
        dialog = []
        for _ in range(rounds):
            options = draw.sample(range(len(ANSWERS)), 100)
            truth = draw.randrange(100)
            dialog.append(
                {
                    "question": draw.randrange(len(QUESTIONS)),
                    "answer": options[truth],
                    "answer_options": options,
                    "gt_index": truth,
                }
            )
        dialogs.append({"image_id": image_id, "caption": f"a dog {image_id}", "dialog": dialog})
    data = {"answers": ANSWERS, "dialogs": dialogs, "questions": QUESTIONS}
    head = {"version": version, "split": "val"}
    return {"data": data, **head} if version == "0.9" else {**head, "data": data}


def write(folder: Path, version: str = "1.0", ids: tuple[int, ...] = (42, 185565), **more: Any) -> Path:
    for image_id in ids:
        put(folder / "images" / "all" / (NAMES[version] % image_id), make_image(image_id))
    return put(folder / "visdial_val.json", visdial(version, list(ids), **more))


def opened(folder: Path, *files: Path) -> Dataset:
    return sightloop.open_dataset(list(files), images=folder / "images" / "all")


@pytest.mark.parametrize("version", ["0.9", "1.0"])
def test_both_versions_are_read(tmp_path: Path, version: str) -> None:
    path = write(tmp_path, version)
    dataset = opened(tmp_path, path)
    assert [sample.key for sample in dataset] == ["000000000042", "000000185565"]
    content = visdial(version, [42, 185565])
    for sample, dialog in zip(dataset, content["data"]["dialogs"], strict=True):
        (dialogue,) = sample.dialogues
        assert (sample.captions, dialogue.caption) == ((dialog["caption"],), dialog["caption"])
        assert sample.extra == {"image_id": dialog["image_id"]}
        assert Path(str(sample.image)).name == NAMES[version] % dialog["image_id"]
        for one, raw in zip(dialogue.rounds, dialog["dialog"], strict=True):
            assert one.question == QUESTIONS[raw["question"]]
            assert one.answer == ANSWERS[raw["answer"]]
            assert one.candidates == tuple(ANSWERS[i] for i in raw["answer_options"])
            assert one.truth is not None
            assert one.candidates[one.truth] == one.answer


@pytest.mark.parametrize("place", ["", "val2014", "images", "images/VisualDialog_val2018", "../train2014"])
@pytest.mark.parametrize(
    "name", ["COCO_train2014_%012d.jpg", "%012d.jpg", "VisualDialog_test2018_%012d.jpg", "%d.jpg"]
)
def test_images_are_found_beside_the_file(tmp_path: Path, place: str, name: str) -> None:
    put(tmp_path / "a" / place / (name % 7), make_image())
    path = put(tmp_path / "a" / "val.json", visdial("1.0", [7]))
    assert Path(str(sightloop.open_dataset(path)[0].image)).name == name % 7


def test_dense_annotations_belong_to_one_round(tmp_path: Path) -> None:
    path = write(tmp_path)
    relevance = [0.0] * 97 + [0.2, 0.4, 1.0]
    entries: list[Any] = [
        {"image_id": 42, "round_id": 3, "gt_relevance": relevance},
        {"image_id": 99, "round_id": 3, "gt_relevance": relevance},
        {"image_id": 185565, "round_id": 10, "relevance": relevance[::-1]},
        {"image_id": 42, "round_id": "3", "gt_relevance": relevance},
        7,
    ]
    dense = put(tmp_path / "val_dense.json", entries)
    dataset = opened(tmp_path, dense, path)
    first, second = (sample.dialogues[0].rounds for sample in dataset)
    assert [bool(one.relevance) for one in first] == [number == 3 for number in range(1, 11)]
    assert first[2].relevance == tuple(relevance)
    assert second[9].relevance == tuple(relevance[::-1])
    assert dataset.notes == (
        "2 entries of val_dense.json lack an image_id, a round_id or a relevance and are left out",
    )
    with pytest.raises(UsageError, match="name the file of the dialogues too"):
        opened(tmp_path, dense)
    assert dataset.fingerprint != opened(tmp_path, path).fingerprint


def test_the_last_round_of_a_test_set_has_no_answer(tmp_path: Path) -> None:
    content = visdial("1.0", [42], rounds=2)
    for name in ("answer", "gt_index"):
        del content["data"]["dialogs"][0]["dialog"][1][name]
    write(tmp_path)
    path = put(tmp_path / "test.json", content)
    known, secret = opened(tmp_path, path)[0].dialogues[0].rounds
    assert known.answer is not None
    assert (secret.answer, secret.truth, len(secret.candidates)) == (None, None, 100)


@pytest.mark.parametrize(
    ("where", "value", "words"),
    [
        (("image_id",), None, "image_id"),
        (("caption",), 3, "a caption is not a string"),
        (("dialog",), {}, "not a list of rounds"),
        (("dialog",), [], "not a list of rounds"),
        (("dialog", 1), "x", "round 2: it is not an object"),
        (("dialog", 1, "question"), "x", "round 2: its question is no number"),
        (("dialog", 1, "question"), 4, "round 2: its question has the number 4, and there are 4"),
        (("dialog", 0, "question"), -1, "number -1"),
        (("dialog", 0, "question"), True, "no number"),
        (("dialog", 0, "answer"), 150, "number 150, and there are 150"),
        (("dialog", 0, "answer_options"), 5, "answer_options are not a list"),
        (("dialog", 0, "answer_options", 9), 1.5, "its answer is no number"),
        (("dialog", 0, "answer_options", 9), 10**30, "has the number"),
        (("dialog", 0, "gt_index"), 100, "number 100 .from 0. of 100 candidates"),
        (("dialog", 0, "gt_index"), -1, "number -1"),
        (("dialog", 0, "gt_index"), "4", "gt_index"),
    ],
)
def test_a_broken_dialogue_is_named_and_the_others_are_read(
    tmp_path: Path, where: tuple[Any, ...], value: object, words: str
) -> None:
    content = visdial("1.0", [42, 185565])
    write(tmp_path)
    target = content["data"]["dialogs"][0]
    for name in where[:-1]:
        target = target[name]
    target[where[-1]] = value
    dataset = opened(tmp_path, put(tmp_path / "x.json", content))
    with pytest.raises(ImageError, match=words):
        _ = dataset[0]
    assert dataset[1].dialogues
    skipped: list[str] = []
    assert len(list(dataset.stream(lambda key, reason: skipped.append(key)))) == len(skipped) == 1


@pytest.mark.parametrize(
    ("relevance", "round_id", "words"),
    [
        ([1.0] * 99, 1, "99 of 100"),
        (["1"] * 100, 1, "finite numbers"),
        ([-1.0] * 100, 1, "negative"),
        ([1.0] * 100, 11, "round 11 of 10"),
        ([1.0] * 100, 0, "round 0 of 10"),
        ("high", 1, "no list of numbers"),
    ],
)
def test_wrong_relevance_is_named(tmp_path: Path, relevance: object, round_id: int, words: str) -> None:
    entry = {"image_id": 42, "round_id": round_id, "gt_relevance": relevance}
    dataset = opened(tmp_path, write(tmp_path), put(tmp_path / "dense.json", [entry]))
    with pytest.raises(ImageError, match=words):
        _ = dataset[0]
    assert dataset[1].dialogues


def test_files_of_another_form_are_refused(tmp_path: Path) -> None:
    write(tmp_path)
    for name in ("dialogs", "questions", "answers"):
        content = visdial("1.0", [42])
        content["data"][name] = {}
        with pytest.raises(UsageError, match=f"its {name} are missing or not a list"):
            opened(tmp_path, put(tmp_path / "x.json", content))
    with pytest.raises(UsageError, match="cannot be read as VisDial JSON"):
        opened(tmp_path, put(tmp_path / "x.json", '{"data": {"dialogs": ['))
    with pytest.raises(UsageError, match="'dialogs' occurs twice"):
        opened(tmp_path, put(tmp_path / "x.json", '{"data": {"dialogs": [], "dialogs": []}}'))
    with pytest.raises(UsageError, match=r"COCO_val2014_000000000043.jpg.*not found in .*images"):
        opened(tmp_path, put(tmp_path / "x.json", visdial("1.0", [43])))


@pytest.mark.parametrize("target", ["d.tar", "d.parquet", "d.jsonl", "d.csv", "d.tsv", "d.json", "folder"])
def test_dialogues_come_back_from_every_format(tmp_path: Path, target: str) -> None:
    relevance = [0.0] * 97 + [0.2, 0.4, 1.0]
    dense = put(tmp_path / "dense.json", [{"image_id": 42, "round_id": 3, "gt_relevance": relevance}])
    dataset = opened(tmp_path, write(tmp_path), dense)
    convert(dataset, tmp_path / "out" / target)
    again = {sample.key: sample for sample in sightloop.open_dataset(tmp_path / "out" / target)}
    for sample in dataset:
        assert again[sample.key].dialogues == sample.dialogues
        assert again[sample.key].captions == sample.captions


TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=5)


@st.composite
def rounds(draw: st.DrawFn) -> Round:
    candidates = tuple(draw(st.lists(TEXT, max_size=4)))
    truth = draw(st.none() | st.integers(0, len(candidates) - 1)) if candidates else None
    share = st.floats(0, 1)
    relevance = tuple(draw(st.lists(share, min_size=len(candidates), max_size=len(candidates))))
    return Round(
        draw(TEXT), draw(st.none() | TEXT), candidates, truth, draw(st.sampled_from([(), relevance]))
    )


@settings(max_examples=60, deadline=None)
@given(st.lists(st.builds(Dialogue, st.lists(rounds(), max_size=3).map(tuple), TEXT), max_size=2))
def test_fields_of_a_dialogue_give_it_back(dialogues: list[Dialogue]) -> None:
    sample = Sample("k", b"x", dialogues=tuple(dialogues))
    fields = json.loads(json.dumps(schema.fields_from_sample(sample)))
    assert schema.sample_from_fields("k", b"x", fields) == sample


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 3) | st.floats(allow_nan=False) | st.just("x"),
    lambda inner: (
        st.lists(inner, max_size=2)
        | st.dictionaries(
            st.sampled_from(["rounds", "question", "answer", "candidates", "truth", "relevance"]),
            inner,
            max_size=4,
        )
    ),
    max_leaves=8,
)


@settings(max_examples=150, deadline=None)
@given(JSON)
def test_any_other_value_is_a_value_error(value: object) -> None:
    try:
        sample = schema.sample_from_fields("k", b"x", {"dialogues": value})
    except ValueError:
        return
    assert all(isinstance(dialogue, Dialogue) for dialogue in sample.dialogues)
