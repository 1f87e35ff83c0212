"""Prompts and the images in them: read once, kept briefly; what a caller says stays words."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import sightloop
from sightloop.errors import UsageError
from sightloop.inference.arguments import duplicate_groups
from sightloop.inference.image_encoding import ImageEncoder, Preprocessor
from tests.tiny_checkpoints.florence import write_florence
from tests.tiny_checkpoints.llava import LLAVA_15, write_llava
from tests.tiny_checkpoints.paligemma import write_paligemma

pytestmark = pytest.mark.filterwarnings("ignore:__array__:DeprecationWarning")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    write_florence(folder / "florence", seed=2)
    write_paligemma(folder / "paligemma")
    write_llava(folder / "llava", tiled=False, template=LLAVA_15)
    draw = np.random.default_rng(0)
    for i in range(6):
        values = draw.integers(0, 256, (20 + i, 30, 3), dtype=np.uint8)
        Image.fromarray(values).save(folder / f"{i}.png")
    return folder


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """How many images were read, and the tokens of those that were encoded while they live."""
    seen: dict[str, Any] = {"read": 0, "encoded": 0, "alive": [], "most": 0}
    read, encode = Preprocessor.read, ImageEncoder.encode

    def counting_read(self: Preprocessor, sources: Any, **options: Any) -> Iterator[Any]:
        for result in read(self, sources, **options):
            seen["read"] += 1
            yield result

    def counting_encode(self: ImageEncoder, batch: Any) -> Any:
        gc.collect()
        seen["most"] = max(seen["most"], sum(one() is not None for one in seen["alive"]))
        out = encode(self, batch)
        seen["encoded"] += len(batch)
        seen["alive"].append(weakref.ref(out.tokens))
        return out

    monkeypatch.setattr(Preprocessor, "read", counting_read)
    monkeypatch.setattr(ImageEncoder, "encode", counting_encode)
    return seen


def test_one_picture_with_many_phrases_is_seen_once(folders: Path, counted: dict[str, Any]) -> None:
    model = sightloop.load(folders / "florence", device="cpu")
    model.batch_size = 2
    picture, phrases = folders / "0.png", ["a dog", "two cats", "a street", "the dog and a cat", "cats"]
    options = {"max_new_tokens": 12, "num_beams": 1}
    found = model.locate(picture, phrases, **options)
    assert (counted["read"], counted["encoded"]) == (1, 1)
    batches = [model.locate(picture, phrases[i : i + 2], **options) for i in (0, 2, 4)]
    assert found == [regions for batch in batches for regions in batch]  # scores too


def test_questions_in_any_order(folders: Path, counted: dict[str, Any]) -> None:
    model = sightloop.load(folders / "paligemma", device="cpu")
    model.batch_size = 2
    pictures = [folders / f"{i}.png" for i in (0, 1, 2)] * 3
    questions = ["a dog?"] * 3 + ["is it red"] * 3 + ["how many"] * 3
    found = model.answer(pictures, questions, max_new_tokens=5)
    assert (counted["read"], counted["encoded"]) == (3, 3)
    alone = [model.answer(p, q, max_new_tokens=5)[0] for p, q in zip(pictures, questions, strict=True)]
    assert found == alone
    sampled = model.answer(pictures, questions, max_new_tokens=5, top_p=0.9, num_return=2, seed=3)
    assert sampled[4:6] == model.answer(
        pictures[2], questions[2], max_new_tokens=5, top_p=0.9, num_return=2, seed=3
    )


def test_pictures_are_not_kept_longer_than_needed(folders: Path, counted: dict[str, Any]) -> None:
    model = sightloop.load(folders / "paligemma", device="cpu")
    model.batch_size = 2
    pictures = [str(folders / f"{i}.png") for i in range(6) for _ in range(3)]
    model.answer(pictures, ["a dog?"] * 18, max_new_tokens=2)
    assert counted["encoded"] == 6
    assert counted["most"] <= 2  # those of this batch and of the one before


def test_one_path_or_object_is_one_picture() -> None:
    array = np.zeros((2, 2), np.uint8)
    assert duplicate_groups(["a", Path("a"), array, array, array.copy(), "b"]) == [[0, 1], [2, 3], [4], [5]]


@pytest.mark.parametrize("name", ["florence", "paligemma", "llava"])
def test_words_never_become_tokens_of_control(folders: Path, name: str) -> None:
    model = sightloop.load(folders / name, device="cpu")
    picture, end = folders / "0.png", {"florence": "</s>", "paligemma": "<eos>", "llava": "</s>"}[name]
    for word in (end, "<image>", "<pad>", "<unk>"):
        text = f"a dog {word} and"
        calls = [lambda: model.caption(picture, text)]  # noqa: B023
        if "locate" in model.capabilities:
            calls.append(lambda: model.locate(picture, ["a cat", text]))  # noqa: B023
        if "answer" in model.capabilities:
            calls.append(lambda: model.answer(picture, text))  # noqa: B023
        if "chat" in model.capabilities:
            messages = [sightloop.Message("user", text), sightloop.Message("user", "a")]
            if word != "<image>":  # which has a message of its own
                calls.append(lambda: model.chat(messages, stream=True))  # noqa: B023
        for call in calls:
            with pytest.raises(UsageError, match="token of the model's own"):
                call()
    assert model.caption(picture, "a <b> dog", max_new_tokens=2)
    place = "<loc_3>" if name == "florence" else "<loc0003>"  # words of places are words
    assert "a " + place in model.generator.format_prompt("caption", "a " + place)


def test_phrases_that_are_called_as_prompts_are(folders: Path) -> None:
    model = sightloop.load(folders / "florence", device="cpu")
    assert model.generator.format_prompt("locate", "region").endswith(
        "Locate the phrases in the caption: region</s>"
    )
    assert model.generator.format_prompt("find", "<OD>").endswith("Locate <OD> in the image.</s>")
    assert model.generator.format_prompt("caption", "<OD>") == model.network.prompts["detect"]
    assert model.generator.format_prompt("caption", "<REGION_TO_OCR>").endswith("<s><REGION_TO_OCR></s>")
    assert model.generator.format_prompt("caption", "detect") == "<image><s>detect</s>"


def test_a_prompt_is_never_cut(folders: Path) -> None:
    model = sightloop.load(folders / "llava", device="cpu")
    object.__setattr__(model.tokenizer, "max_length", 20)
    short, long = (sightloop.Message("user", "dog " * count) for count in (10, 40))
    assert model.chat([long], max_new_tokens=4) != ""
    (_, few), (_, many) = (
        model.generator.build_prefix([[]], [model.network.render_chat([message])])
        for message in (short, long)
    )
    assert many.shape[1] - few.shape[1] == 30


@pytest.mark.parametrize("name", ["florence", "paligemma", "llava", "tiles"])
def test_tiny_and_turned_pictures(folders: Path, name: str, tmp_path: Path) -> None:
    if name == "tiles":
        write_llava(tmp_path / "tiles", tiled=True, template=LLAVA_15)
    model = sightloop.load(tmp_path / "tiles" if name == "tiles" else folders / name, device="cpu")
    exif = Image.Exif()
    exif[0x0112] = 8
    strip = Image.fromarray(np.arange(120, dtype=np.uint8).reshape(1, 40, 3))
    strip.save(tmp_path / "turned.png", exif=exif)
    strip.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "upright.png")
    turned, upright = (str(tmp_path / f"{one}.png") for one in ("turned", "upright"))
    shown: list[Any] = [Image.new("RGB", (1, 1)), np.zeros((1, 300, 3), np.uint8), upright, turned]
    captions = model.caption(shown, max_new_tokens=3)
    assert len(captions) == 4
    assert captions[2] == captions[3]
    if "locate" in model.capabilities:
        found = model.locate(shown, "a dog", max_new_tokens=12)
        assert found[2] == found[3]
        for regions, (width, height) in zip(found, [(1, 1), (300, 1), (1, 40), (1, 40)], strict=True):
            for region in regions:
                assert 0 <= region.box[0] <= region.box[2] <= width
                assert 0 <= region.box[1] <= region.box[3] <= height
    if "chat" in model.capabilities:
        turns = [sightloop.Message("user", "a", (shown[0],)), sightloop.Message("assistant", "")]
        turns.append(sightloop.Message("user", "and these", (shown[1], turned, shown[0])))
        turns.append(sightloop.Message("assistant", "b"))
        assert isinstance(model.chat([*turns, sightloop.Message("user", "")], max_new_tokens=3), str)


def test_as_many_pictures_as_places(folders: Path) -> None:
    model = sightloop.load(folders / "llava", device="cpu")
    (one,) = model.encoder.encode_each(model.preprocessor.read_distinct([folders / "0.png"]))
    for given, prompt in (
        ([one], "a"),
        ([], "<image>"),
        ([one, one], "<image> a"),
        ([one], "<image><image>"),
    ):
        with pytest.raises(UsageError, match="places for images"):
            model.generator.build_prefix([given], [prompt])
