"""Arguments of the verbs: a string where a list is meant is refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sightloop.data.datasets.dataset import open_dataset
from sightloop.errors import ImageError, UsageError, from_options
from sightloop.evaluation.task import EvalOptions
from sightloop.inference.arguments import as_list
from sightloop.inference.model import Model
from sightloop.tasks.decoding_options import Decoding
from sightloop.training.config import apply_settings
from sightloop.training.recipes import find_recipe
from tests.checkpoints.test_against_reference import pictures


@given(st.text())
def test_a_string_is_no_list(text: str) -> None:
    with pytest.raises(UsageError, match="labels="):
        as_list(text, "labels")


@given(st.lists(st.text(), min_size=1))
def test_a_list_stays(texts: list[str]) -> None:
    assert as_list(tuple(texts), "labels") == texts


def test_the_message_shows_the_list() -> None:
    with pytest.raises(UsageError) as caught:
        as_list("cat, dog", "labels")
    assert 'labels=["cat", "dog"]' in str(caught.value)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Model]:
    import sightloop
    from tests.tiny_checkpoints.clip_and_blip import write_blip, write_clip

    folder = tmp_path_factory.mktemp("models")
    write_clip(folder / "clip")
    write_blip(folder / "answer", head="answer")
    return {name: sightloop.load(folder / name, device="cpu") for name in ("clip", "answer")}


def test_verbs_refuse_a_string(model: dict[str, Model]) -> None:
    with pytest.raises(UsageError, match=r'labels=\["cat", "dog"\]'):
        model["clip"].classify(pictures(1), "cat,dog")
    with pytest.raises(UsageError, match=r'candidates=\["cat", "dog"\]'):
        model["answer"].answer(pictures(1), "what?", candidates="cat,dog")
    with pytest.raises(ImageError, match="download"):
        model["clip"].embed_images("https://example.org/cat.jpg")


def test_options_of_an_evaluation_refuse_a_string() -> None:
    for name in ("labels", "candidates"):
        with pytest.raises(UsageError, match=f"{name}="):
            EvalOptions(**{name: "cat,dog"})
    with pytest.raises(UsageError, match=r"rerank=\[16\]"):
        EvalOptions(rerank=16)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    "options",
    [
        {"rerank": "16"},
        {"rerank": 16},
        {"samples": "4"},
        {"samples": True},
        {"seed": 1.5},
        {"decoding": "num_beams=3"},
        {"labels": 3},
        {"candidates": "yes,no"},
        {"isolate": "no"},
    ],
    ids=str,
)
def test_options_of_a_wrong_type_are_named(options: dict[str, object]) -> None:
    with pytest.raises(UsageError, match=f"{next(iter(options))}="):
        from_options(EvalOptions, options)


def test_options_of_numpy_and_several_types_are_taken() -> None:
    taken = from_options(EvalOptions, {"samples": np.int64(3), "rerank": np.array([1, 2]), "clip": None})
    assert (taken.samples, list(taken.rerank)) == (3, [1, 2])
    assert from_options(Decoding, {"early_stopping": "never", "temperature": 1}).early_stopping == "never"


def test_settings_of_a_training_are_a_list() -> None:
    with pytest.raises(UsageError, match=r'settings=\["steps=1"\]'):
        apply_settings(find_recipe("captioner"), "steps=1")


@pytest.mark.parametrize("value", [None, 3, 2.5])
def test_no_text_no_image_no_path(model: dict[str, Model], value: Any) -> None:
    with pytest.raises(UsageError, match="texts="):
        model["clip"].embed_texts(value)
    with pytest.raises(UsageError, match="images="):
        model["clip"].embed_images(value)
    with pytest.raises(UsageError, match="source="):
        open_dataset(value)
