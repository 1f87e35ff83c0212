"""The verbs: batches change nothing, seeds are kept, wrong use is told plainly."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import sightloop
from sightloop.inference.model import Model
from tests.checkpoints.test_against_reference import TEXTS, pictures
from tests.tiny_checkpoints.clip_and_blip import write_blip, write_clip


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoints")
    write_clip(folder / "clip")
    for head in ("caption", "answer", "match"):
        write_blip(folder / head, head=head)
    return folder


@pytest.fixture(scope="module")
def captioner(checkpoints: Path) -> Model:
    return sightloop.load(checkpoints / "caption", device="cpu")


@pytest.mark.parametrize("batch_size", [1, 3, 16])
def test_batches_change_nothing(checkpoints: Path, batch_size: int) -> None:
    images = pictures(7)
    for name in ("clip", "caption", "answer", "match"):
        model = sightloop.load(checkpoints / name, device="cpu")
        alone = [_everything(model, [image]) for image in images]
        model.batch_size = batch_size
        for verb, together in _everything(model, images).items():
            apart = [one[verb] for one in alone]
            if isinstance(together, list):
                assert together == [text for texts in apart for text in texts], verb
            else:
                assert np.abs(together - np.concatenate(apart)).max() < 2e-6, verb


def _everything(model: Model, images: list[Image.Image]) -> dict[str, object]:
    verbs = {
        "embed": lambda: model.embed_images(images),
        "classify": lambda: model.classify(images, ["dog", "cat"]),
        "match": lambda: model.match(images, TEXTS[1]),
        "rank": lambda: model.rank(images, TEXTS, k=2),
        "caption": lambda: model.caption(images, "a", num_beams=3),
        "caption sampled": lambda: model.caption(images, top_p=0.9, num_return=2),
        "answer": lambda: model.answer(images, TEXTS[2], top_k=20, seed=5),
    }
    return {verb: run() for verb, run in verbs.items() if verb.split()[0] in model.capabilities}


def test_sampling_keeps_its_seed(captioner: Model) -> None:
    image = pictures(1)[0]
    options = {"top_p": 0.95, "temperature": 1.5, "num_return": 4}
    first = captioner.caption(image, seed=1, **options)
    assert captioner.caption(image, seed=1, **options) == first
    assert captioner.caption(image, seed=2, **options) != first
    assert captioner.caption(image, seed=-1, **options) != captioner.caption(image, seed=-2, **options)
    assert len(set(first)) > 1


def test_prompts_of_different_lengths(captioner: Model) -> None:
    images = pictures(5)
    prompts = ["a", "a photo of", "the small red", "a photo of", "two"]
    together = captioner.caption(images, prompts)
    assert together == [captioner.caption(i, p)[0] for i, p in zip(images, prompts, strict=True)]
    assert all(text.startswith(prompt) for text, prompt in zip(together, prompts, strict=True))


def test_pictures_in_every_form(captioner: Model, tmp_path: Path) -> None:
    image = pictures(1)[0]
    path = tmp_path / "picture.png"
    image.save(path)
    forms = [path, str(path), path.read_bytes(), image, np.asarray(image), next(captioner.read([path]))]
    wanted = captioner.caption(image)
    assert [captioner.caption(form) for form in forms] == [wanted] * len(forms)
    assert captioner.caption(forms) == wanted * len(forms)
    assert captioner.caption(form for form in forms) == wanted * len(forms)
    assert captioner.caption(np.stack([np.asarray(image)] * 2)) == wanted * 2
    assert captioner.caption([]) == []


def test_a_broken_picture_is_named(captioner: Model, tmp_path: Path) -> None:
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(b"no image")
    with pytest.raises(sightloop.ImageError, match=r"broken\.jpg"):
        captioner.caption([pictures(1)[0], broken])


def test_an_unsupported_verb_names_a_model_that_can(checkpoints: Path) -> None:
    clip = sightloop.load(checkpoints / "clip", device="cpu")
    captioner = sightloop.load(checkpoints / "caption", device="cpu")
    with pytest.raises(sightloop.UnsupportedError, match="Salesforce/blip-image-captioning"):
        clip.caption(pictures(1))
    with pytest.raises(sightloop.UnsupportedError, match="CLIP"):
        captioner.classify(pictures(1), ["dog"])
    with pytest.raises(sightloop.UnsupportedError, match="blip-itm"):
        captioner.match(pictures(1), "a dog")
    with pytest.raises(sightloop.UnsupportedError, match="blip-vqa"):
        captioner.answer(pictures(1), "what?")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"beams": 3}, "num_beams"),
        ({"num_beams": 0}, "at least 1"),
        ({"num_beams": 2, "top_p": 0.9}, "sampling"),
        ({"top_p": 1.5}, "at most 1"),
        ({"temperature": 0.0}, "above 0"),
        ({"num_return": 2}, "num_beams"),
        ({"min_new_tokens": 30}, "max_new_tokens"),
        ({"max_new_tokens": 1000}, "room"),
        ({"prompt": ["a", "b", "c"]}, "3 prompts"),
    ],
)
def test_wrong_options_are_told(captioner: Model, options: dict[str, object], message: str) -> None:
    with pytest.raises(sightloop.UsageError, match=message):
        captioner.caption(pictures(2), **options)


def test_wrong_pairs_and_labels_are_told(checkpoints: Path) -> None:
    clip = sightloop.load(checkpoints / "clip", device="cpu")
    judge = sightloop.load(checkpoints / "match", device="cpu")
    with pytest.raises(sightloop.UsageError, match="2 images and 3 texts"):
        judge.match(pictures(2), TEXTS[:3])
    with pytest.raises(sightloop.UsageError, match="labels"):
        clip.classify(pictures(1), [])
    with pytest.raises(sightloop.UsageError, match="template"):
        clip.classify(pictures(1), ["dog"], templates="a photo")
    with pytest.raises(sightloop.UsageError, match="at least 1"):
        judge.rank(pictures(1), TEXTS, k=0)
    with pytest.raises(sightloop.UsageError, match="device"):
        sightloop.load(checkpoints / "clip", device="tpu")
    with pytest.raises(sightloop.UsageError, match="dtype"):
        sightloop.load(checkpoints / "clip", dtype="int3")  # pyright: ignore[reportArgumentType]


def test_half_precision_is_close(checkpoints: Path) -> None:
    images = pictures(4)
    full = sightloop.load(checkpoints / "clip", device="cpu").embed_images(images)
    half = sightloop.load(checkpoints / "clip", device="cpu", dtype="bfloat16").embed_images(images)
    assert half.dtype == np.float32
    assert 0 < np.abs(full - half).max() < 0.05
    text = sightloop.load(checkpoints / "caption", device="cpu", dtype="bfloat16").caption(
        images, num_beams=2
    )
    assert len(text) == 4


def test_a_model_may_bring_its_own_decoding(tmp_path: Path) -> None:
    write_blip(tmp_path / "source", head="caption")
    model = sightloop.load(tmp_path / "source")
    picture = np.random.default_rng(0).integers(0, 256, (40, 40, 3), np.uint8)
    beams, greedy = model.caption(picture, num_beams=3), model.caption(picture)
    model.decoding = {"num_beams": 3}
    assert model.caption(picture) == beams
    assert model.caption(picture, num_beams=1) == greedy
    model.save(tmp_path / "own")
    again = sightloop.load(tmp_path / "own")
    assert again.decoding == {"num_beams": 3}
    assert again.caption(picture, max_new_tokens=4) == model.caption(picture, num_beams=3, max_new_tokens=4)
    assert len(again.caption(picture, top_p=0.9, num_return=2)) == 2
