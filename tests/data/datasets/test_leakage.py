"""Leakage: copies of evaluation images and captions in the training data are found, and only those."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from sightloop.data.datasets.leakage import CAPTION_THRESHOLD, IMAGE_THRESHOLD, find_leaks
from sightloop.types import Sample


@cache
def scene(seed: int, side: int = 128) -> Image.Image:
    """A random image with the spectrum of photographs: noise whose amplitude falls as 1 / frequency."""
    noise = np.random.default_rng(seed).normal(size=(3, side, side))
    y, x = np.fft.fftfreq(side)[:, None], np.fft.fftfreq(side)
    smooth = np.fft.ifft2(np.fft.fft2(noise) / (np.hypot(y, x) + 1 / side)).real
    low, high = smooth.min(), smooth.max()
    return Image.fromarray(((smooth - low) / (high - low) * 255).astype(np.uint8).transpose(1, 2, 0))


def encoded(image: Image.Image, kind: str = "PNG", **options: int) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def cropped(image: Image.Image, share: float) -> Image.Image:
    w, h = image.size
    left, top = int(w * (1 - share) * 0.3), int(h * (1 - share) * 0.8)
    return image.crop((left, top, left + int(w * share), top + int(h * share)))


COPIES: dict[str, Callable[[Image.Image], bytes]] = {
    "jpeg": lambda im: encoded(im, "JPEG", quality=40),
    "webp, small": lambda im: encoded(im.resize((70, 70)), "WEBP", quality=50),
    "stretched": lambda im: encoded(im.resize((im.width * 2, im.height))),
    "cropped": lambda im: encoded(cropped(im, 0.85), "JPEG"),
    "cropped a little": lambda im: encoded(cropped(im, 0.95)),
    "gray": lambda im: encoded(im.convert("L"), "JPEG"),
    "brighter": lambda im: encoded(im.point([min(255, int(v * 1.15) + 10) for v in range(256)] * 3)),
    "border": lambda im: encoded(ImageOps.expand(im, 5, 0)),
    "mirrored": lambda im: encoded(ImageOps.mirror(im), "JPEG"),
    "mirrored and cropped": lambda im: encoded(ImageOps.mirror(cropped(im, 0.9)), "JPEG"),
    "rotated by EXIF": lambda im: encoded(im.transpose(Image.Transpose.ROTATE_90), "JPEG", exif=_exif(6)),
}


def _exif(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


def samples(images: dict[str, bytes]) -> list[Sample]:
    return [Sample(key, data) for key, data in images.items()]


@pytest.mark.parametrize("copies_in_train", [False, True])
@pytest.mark.parametrize("kind", COPIES)
def test_copies_are_found_and_others_are_not(kind: str, copies_in_train: bool) -> None:
    originals = {f"original {n}": encoded(scene(n)) for n in range(6)}
    others = {f"other {n}": encoded(scene(100 + n)) for n in range(10)}
    copies = {f"copy {n}": COPIES[kind](scene(n)) for n in range(4)}
    train, evaluation = samples(originals | others), samples(copies | {"new": encoded(scene(200))})
    if copies_in_train:
        train, evaluation = evaluation, train
    leaks = find_leaks(train, evaluation)
    assert {(leak.train[-1], leak.evaluation[-1]) for leak in leaks.images} == {(n, n) for n in "0123"}
    assert not any(leak.exact for leak in leaks.images)
    assert all(IMAGE_THRESHOLD - 0.02 <= leak.similarity <= 1 for leak in leaks.images)  # frames: 0.02 less
    assert (leaks.train_samples, leaks.evaluation_samples) == (len(train), len(evaluation))


def test_equal_bytes_are_exact_copies(tmp_path: Path) -> None:
    data = encoded(scene(1))
    (tmp_path / "a.png").write_bytes(data)
    leaks = find_leaks([Sample("train", tmp_path / "a.png")], [Sample("x", data), Sample("y", data)])
    assert [(leak.evaluation, leak.train, leak.exact, leak.similarity) for leak in leaks.images] == [
        ("x", "train", True, 1.0),
        ("y", "train", True, 1.0),
    ]
    assert (
        "2 evaluation images are in the training data (2 exact, 0 near), for example x = train"
        in leaks.summary()
    )
    assert "memorization" in leaks.summary()


def test_flat_images_are_not_copies_of_each_other() -> None:
    whites = {
        str(n): encoded(
            Image.fromarray(np.full((80, 80, 3), 250, np.uint8) - (np.arange(80) % (n + 2) == 0)[:, None])
        )
        for n in range(4)
    }
    leaks = find_leaks(samples(whites)[:2], samples(whites)[2:])
    assert not leaks
    assert leaks.summary() == ""


def test_unreadable_images_are_listed_and_their_captions_compared(tmp_path: Path) -> None:
    caption = ("two dogs run over the wet sand",)
    leaks = find_leaks(
        [Sample("gone", tmp_path / "gone.jpg", caption), Sample("good", encoded(scene(1)))],
        [Sample("cut", encoded(scene(1), "JPEG")[:500], caption)],
    )
    assert leaks.unreadable == ("cut", "gone")
    assert not leaks.images
    assert [(leak.train, leak.exact) for leak in leaks.captions] == [("gone", True)]


def test_nothing_to_compare() -> None:
    assert not find_leaks([], [Sample("a", encoded(scene(1)), ("a",))])
    assert not find_leaks([Sample("a", encoded(scene(1)))], [])


def test_training_data_is_read_as_a_stream() -> None:
    held = 0

    def stream() -> Iterator[Sample]:
        nonlocal held
        for n in range(1100):
            held = n
            yield Sample(str(n), b"broken")

    leaks = find_leaks(stream(), iter([Sample("x", b"")]))
    assert (leaks.train_samples, held) == (1100, 1099)


@settings(max_examples=15)
@given(st.integers(0, 10**6), st.integers(0, 10**6))
def test_an_image_and_its_mirror_image_have_similarity_1(seed: int, other_seed: int) -> None:
    image, mirrored = scene(seed, 96), ImageOps.mirror(scene(seed, 96))
    # Another compression level: other bytes, the same pixels.
    train = [
        Sample("same", encoded(image, compress_level=1)),
        Sample("other", encoded(scene(other_seed, 96))),
    ]
    for evaluated in (image, mirrored):
        (leak,) = find_leaks(train[:1], [Sample("x", encoded(evaluated))]).images
        assert leak.similarity == pytest.approx(1, abs=1e-4)
        assert not leak.exact
        if seed != other_seed:
            assert not find_leaks(train[1:], [Sample("x", encoded(evaluated))])


@pytest.mark.parametrize(
    ("train", "evaluation", "is_exact", "is_leak"),
    [
        ("A dog runs over the GRASS.", "a dog runs, over the grass", True, True),
        ("A dog\u00a0runs over the grass", "a dog runs over the grass!", True, True),
        ("a brown dog runs over the long green grass", "a brown dog runs over the long grass", False, True),
        ("a man throws a ball to his boy", "a boy throws his ball to a man", False, False),
        ("a dog runs over the grass", "a cat sleeps below the table", False, False),
        ("a dog", "a dog", False, False),
        ("", "", False, False),
    ],
)  # fmt: skip
def test_captions(train: str, evaluation: str, is_exact: bool, is_leak: bool) -> None:
    leaks = find_leaks([Sample("t", b"", ("x", train))], [Sample("e", b"", (evaluation, "y"))])
    assert [(leak.train, leak.evaluation, leak.exact, leak.text) for leak in leaks.captions] == (
        [("t", "e", is_exact, evaluation)] if is_leak else []
    )


@settings(max_examples=60)
@given(
    st.lists(
        st.lists(st.sampled_from("abcd"), min_size=5, max_size=12).map(" ".join), min_size=1, max_size=8
    ),
    st.lists(
        st.lists(st.sampled_from("abcd"), min_size=5, max_size=12).map(" ".join), min_size=1, max_size=8
    ),
)
def test_the_caption_join_equals_comparing_all_pairs(train: list[str], evaluation: list[str]) -> None:
    def features(caption: str) -> set[tuple[str, int]]:
        words = caption.split()
        features = [*words, *(f"{words[i]} {words[i + 1]}" for i in range(len(words) - 1))]
        return {(f, features[:i].count(f)) for i, f in enumerate(features)}

    def similarity(a: str, b: str) -> float:
        x, y = features(a), features(b)
        return 1.0 if a == b else min(0.999, len(x & y) / len(x | y))

    best = {text: max(similarity(text, other) for other in train) for text in evaluation}
    leaks = find_leaks(
        [Sample(f"t{n}", b"", (text,)) for n, text in enumerate(train)],
        [Sample(f"e{n}", b"", (text,)) for n, text in enumerate(dict.fromkeys(evaluation))],
    )
    similarities = {leak.text: leak.similarity for leak in leaks.captions}
    assert similarities == pytest.approx({text: s for text, s in best.items() if s >= CAPTION_THRESHOLD})


def test_copies_of_photographs(shared_data: Path) -> None:
    def read(name: str, count: int) -> Iterator[Sample]:
        with tarfile.open(shared_data / "flickr8k" / name) as tar:
            members = [member for member in tar if member.name.endswith(".jpg")][:count]
            for member in members:
                file, texts = tar.extractfile(member), tar.extractfile(member.name[:-4] + ".json")
                assert file is not None
                assert texts is not None
                yield Sample(member.name, file.read(), tuple(json.loads(texts.read())["captions"]))

    evaluation = list(read("dev-000.tar", 150))
    planted = [
        Sample(f"planted {sample.key}", COPIES[kind](Image.open(io.BytesIO(sample.image))))
        for sample, kind in zip(evaluation, list(COPIES) * 3, strict=False)
        if isinstance(sample.image, bytes)
    ]
    leaks = find_leaks([*read("train-000.tar", 400), *planted], evaluation)
    assert {leak.evaluation for leak in leaks.images} == {s.key.removeprefix("planted ") for s in planted}
    assert all(leak.train == f"planted {leak.evaluation}" for leak in leaks.images)
