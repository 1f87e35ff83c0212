from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageChops

from sightloop.data.images.augment import (
    OPERATIONS,
    Augment,
    View,
    augment,
    has_guard_word,
    randaugment,
    sample_crop_box,
    sample_view,
)
from sightloop.data.rng import generator
from sightloop.errors import UsageError

sides = st.integers(1, 700)
PLAIN = Augment(scale=(1.0, 1.0), ratio=(1.0, 1.0), flip=0.0, randaugment=None)


def noise(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def smooth(side: int = 48) -> Image.Image:
    """Something with low and high values, so that contrast has room: three different slopes."""
    y, x = np.mgrid[:side, :side] / (side - 1)
    return Image.fromarray((60 + 120 * np.stack([x, y, (x + y) / 2], 2)).astype(np.uint8))


def values(image: Image.Image) -> np.ndarray:
    return np.asarray(image).astype(np.float64)


# The crop.


@given(sides, sides, st.tuples(st.floats(0.05, 1), st.floats(0.05, 1)), st.integers(0, 999))
def test_a_crop_lies_in_the_picture_and_within_its_bounds(
    width: int, height: int, scale: tuple[float, float], seed: int
) -> None:
    options = Augment(scale=(min(scale), max(scale)))
    left, top, right, bottom = sample_crop_box(width, height, options, generator(seed))
    assert 0 <= left < right <= width
    assert 0 <= top < bottom <= height
    wide, tall = right - left, bottom - top
    # both sides are rounded to whole pixels
    area = ((wide - 0.5) * (tall - 0.5), (wide + 0.5) * (tall + 0.5))
    aspect = ((wide - 0.5) / (tall + 0.5), (wide + 0.5) / (tall - 0.5))
    fits = area[1] >= options.scale[0] * width * height and area[0] <= options.scale[1] * width * height
    # or ten draws did not fit the image, and it is the largest with an allowed aspect
    largest = wide == min(width, max(1, round(height * 4 / 3))) and tall == min(
        height, max(1, round(width * 4 / 3))
    )
    assert (fits and aspect[0] <= 4 / 3 and aspect[1] >= 3 / 4) or largest


def test_the_area_is_uniform_and_the_place_too() -> None:
    random = generator("boxes")
    boxes = np.array([sample_crop_box(1000, 1000, Augment(scale=(0.2, 0.6)), random) for _ in range(4000)])
    wide, tall = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
    area, aspect = wide * tall / 1e6, np.log(wide / tall)
    assert np.quantile(area, [0, 0.25, 0.5, 0.75, 1]) == pytest.approx([0.2, 0.3, 0.4, 0.5, 0.6], abs=0.02)
    third = math.log(4 / 3)
    assert np.quantile(aspect, [0.25, 0.5, 0.75]) == pytest.approx([-third / 2, 0, third / 2], abs=0.03)
    assert np.mean(boxes[:, 0] / np.maximum(1000 - wide, 1)) == pytest.approx(0.5, abs=0.03)


@pytest.mark.parametrize(
    ("width", "height", "box"),
    [(1000, 100, (433, 0, 566, 100)), (100, 1000, (0, 433, 100, 566)), (1, 1, (0, 0, 1, 1))],
)
def test_a_picture_too_narrow_gives_its_middle(width: int, height: int, box: tuple[int, ...]) -> None:
    assert sample_crop_box(width, height, Augment(scale=(0.9, 1.0)), generator(0)) == box


# The whole.


@settings(deadline=None)
@given(sides, sides, st.integers(1, 64), st.integers(0, 99))
def test_every_picture_becomes_a_square(width: int, height: int, size: int, seed: int) -> None:
    made = augment(noise(height, width), size, Augment(), seed=seed, epoch=0, key="a")
    assert made.shape == (3, size, size)
    assert made.dtype == np.uint8
    assert made.flags.c_contiguous
    assert made.flags.writeable


def test_without_options_it_is_a_resize() -> None:
    picture = noise(40, 40)
    expected = np.asarray(Image.fromarray(picture).resize((24, 24), Image.Resampling.BICUBIC))
    made = augment(picture, 24, PLAIN, seed=0, epoch=0, key="a")
    assert (made.transpose(1, 2, 0) == expected).all()


def test_it_is_a_function_of_seed_epoch_and_key() -> None:
    picture = noise(50, 60)

    def made(source: object = picture, seed: int = 0, epoch: int = 0, key: str = "a") -> bytes:
        return augment(source, 32, Augment(), seed=seed, epoch=epoch, key=key).tobytes()  # type: ignore[arg-type]

    assert made() == made() == made(Image.fromarray(picture))
    assert len({made(), made(seed=1), made(epoch=1), made(key="b"), made(key="a0")}) == 5
    grey = Image.fromarray(picture[:, :, 0])
    assert made(grey) == made(grey.convert("RGB"))


def test_half_are_mirrored_but_never_where_a_text_says_left() -> None:
    picture = noise(16, 16)
    options = Augment(scale=(1.0, 1.0), ratio=(1.0, 1.0), randaugment=None)
    mirrored = picture[:, ::-1].transpose(2, 0, 1)

    def flips(texts: list[str], options: Augment = options) -> int:
        made = [augment(picture, 16, options, seed=0, epoch=e, key="k", texts=texts) for e in range(200)]
        flipped = sum((m == mirrored).all() for m in made)
        assert flipped + sum((m == picture.transpose(2, 0, 1)).all() for m in made) == 200
        return int(flipped)

    assert 70 < flips([]) < 130
    assert flips(["a leftover cake", "is it bright?"]) == flips([])
    assert flips(["a dog", "What is LEFT of it?"]) == flips(["turn right."]) == flips(["the word map"]) == 0
    assert flips(["a left hand"], Augment((1.0, 1.0), (1.0, 1.0), 1.0, None, ())) == 200
    assert flips(["a dog"], Augment((1.0, 1.0), (1.0, 1.0), 1.0, None, ("dog",))) == 0


def test_the_guard_changes_nothing_but_the_flip() -> None:
    picture, options = noise(64, 64), Augment(randaugment=None)
    for epoch in range(20):
        free = augment(picture, 32, options, seed=0, epoch=epoch, key="k")
        held = augment(picture, 32, options, seed=0, epoch=epoch, key="k", texts=["left"])
        assert (free == held).all() or (free == held[:, :, ::-1]).all()


def test_guard_words_are_whole_words() -> None:
    assert has_guard_word(["", "to the right, a cat"])
    assert has_guard_word(["a Left-handed player"])
    assert not has_guard_word(["upright", "copyright", "leftovers"])
    assert not has_guard_word([])
    assert has_guard_word(["a+b"], ("a+b",))


# RandAugment's operations against definitions of their own. The strength is from 0 to 1.


def test_there_are_blips_ten() -> None:
    assert set(OPERATIONS) == {
        *("identity", "autocontrast", "equalize", "brightness", "sharpness"),
        *("shear_x", "shear_y", "translate_x", "translate_y", "rotate"),
    }


def test_autocontrast_uses_the_whole_range() -> None:
    image = smooth()
    made = values(OPERATIONS["autocontrast"](image, 0.5, 1))
    before = values(image)
    low, high = before.min((0, 1)), before.max((0, 1))
    assert np.abs(made - 255 * (before - low) / (high - low)).max() <= 1


def test_equalize_evens_the_histogram() -> None:
    dark = Image.fromarray((values(smooth(64)) ** 2 / 256).astype(np.uint8))
    made = np.asarray(OPERATIONS["equalize"](dark, 0.5, 1))
    for channel in range(3):
        before = np.asarray(dark)[..., channel]
        counts = np.bincount(before.ravel(), minlength=256)
        below = np.cumsum(counts) - counts
        step = (counts.sum() - counts[before.max()]) // 255  # pixels a grey value
        assert (made[..., channel] == ((below + step // 2) // step)[before].clip(0, 255)).all()


@pytest.mark.parametrize("strength", [0.0, 0.2, 0.5, 1.0])
def test_brightness_multiplies(strength: float) -> None:
    image = smooth()
    made = values(OPERATIONS["brightness"](image, strength, 1))
    assert np.abs(made - np.clip(values(image) * (0.1 + 1.8 * strength), 0, 255)).max() <= 1


@pytest.mark.parametrize("strength", [0.0, 0.3, 0.5, 0.9])
def test_sharpness_goes_from_smooth_to_sharp(strength: float) -> None:
    image = Image.fromarray(noise(20, 20))
    before = values(image)
    soft = before.copy()
    around = sum(before[y : 18 + y, x : 18 + x] for y in range(3) for x in range(3))
    soft[1:-1, 1:-1] = (around + 4 * before[1:-1, 1:-1]) / 13  # 1 1 1, 1 5 1, 1 1 1
    wanted = np.clip(soft + (0.1 + 1.8 * strength) * (before - soft), 0, 255)
    assert np.abs(values(OPERATIONS["sharpness"](image, strength, 1)) - wanted).max() <= 2


def moved(image: Image.Image, source: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Bilinear values at the places `source` `[H, W, 2]` (x, y of pixel middles), and which are well inside."""
    pixels, side = values(image), image.width
    x, y = source[..., 0], source[..., 1]
    inside = (x >= 1) & (y >= 1) & (x <= side - 2) & (y <= side - 2)
    x, y = np.clip(x, 0, side - 1.001), np.clip(y, 0, side - 1.001)
    i, j = x.astype(int), y.astype(int)
    u, v = (x - i)[..., None], (y - j)[..., None]
    upper = pixels[j, i] * (1 - u) + pixels[j, i + 1] * u
    lower = pixels[j + 1, i] * (1 - u) + pixels[j + 1, i + 1] * u
    return upper * (1 - v) + lower * v, inside


@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("name", ["shear_x", "shear_y", "translate_x", "translate_y", "rotate"])
def test_places_move_as_defined(name: str, sign: float) -> None:
    image, strength, side = smooth(), 0.5, 48
    y, x = np.mgrid[:side, :side] + 0.5
    angle = math.radians(30 * strength * sign)
    centre, shift = side / 2, 10 / 224 * side * strength * sign
    sources = {
        "shear_x": (x - 0.3 * strength * sign * y, y),
        "shear_y": (x, y - 0.3 * strength * sign * x),
        "translate_x": (x - shift, y),
        "translate_y": (x, y - shift),
        "rotate": (  # a positive angle turns the image counterclockwise
            centre + math.cos(angle) * (x - centre) - math.sin(angle) * (y - centre),
            centre + math.sin(angle) * (x - centre) + math.cos(angle) * (y - centre),
        ),
    }
    wanted, inside = moved(image, np.stack(sources[name], 2) - 0.5)
    made = values(OPERATIONS[name](image, strength, sign))
    assert inside.mean() > 0.7
    assert np.abs(made - wanted)[inside].max() <= 2
    outside = np.stack(sources[name], 2)
    gone = ((outside < -0.01) | (outside > side + 0.01)).any(2)
    assert gone.any()
    assert (made[gone] == 128).all()


def test_magnitude_0_moves_nothing_and_identity_is_one() -> None:
    image = smooth()
    for name in ("identity", "shear_x", "shear_y", "translate_x", "translate_y", "rotate"):
        assert (values(OPERATIONS[name](image, 0.0, 1)) == values(image)).all()
    assert (values(OPERATIONS["identity"](image, 1.0, 1)) == values(image)).all()


def test_operations_are_drawn_with_a_chance_of_one_half() -> None:
    image = Image.fromarray(noise(24, 24))
    alone = {
        values(operation(image, 0.9, sign)).tobytes()
        for operation in OPERATIONS.values()
        for sign in (1.0, -1.0)
    }
    made = [randaugment(image, 1, 9, generator(i)) for i in range(600)]
    assert {values(m).tobytes() for m in made} == alone
    same = sum(ImageChops.difference(m, image).getbbox() is None for m in made) / 600
    assert same == pytest.approx(0.5 + 0.5 * 0.1, abs=0.06)  # left out, or the identity
    assert randaugment(image, 0, 9, generator(0)) is image


@pytest.mark.parametrize(
    "options",
    [
        {"scale": (0.0, 1.0)},
        {"scale": (0.5, 0.2)},
        {"scale": (0.5, 1.2)},
        {"ratio": (2.0, 1.0)},
        {"ratio": (0.0, 1.0)},
        {"flip": 1.5},
        {"randaugment": (2, 11)},
        {"randaugment": (-1, 5)},
    ],
)
def test_wrong_options_are_said(options: dict) -> None:
    with pytest.raises(UsageError, match=next(iter(options))):
        Augment(**options)


def test_keys_are_told_apart() -> None:
    def first(*key: int | str) -> int:
        return int(generator(*key).integers(2**62))

    assert first(1, "a") == first(1, "a") == first(int(np.int64(1)), "a")
    assert (
        len({first(1), first("1"), first(1, 1), first(11), first("1, 1"), first(0), first(-1), first()}) == 8
    )


def test_boxes_follow_crops_and_flips() -> None:
    """A patch of one colour is where its box says, whatever is shown of it; what is hardly there is left out."""
    seen = {True: 0, False: 0, None: 0}
    options = Augment(scale=(0.1, 0.9), flip=0.5, randaugment=None)
    picture = np.zeros((120, 160, 3), np.uint8)
    box = (96.0, 32.0, 144.0, 88.0)
    picture[32:88, 96:144] = 255
    for epoch in range(60):
        about = {"seed": 3, "epoch": epoch, "key": "k"}
        values = augment(picture, 64, options, **about)[0] > 127
        view = sample_view((120, 160), options, **about)
        placed = view.map_box(box)
        shown = float(values.mean()) * view.size[0] * view.size[1]  # in the image's pixels
        if placed is None:
            seen[None] += 1
            assert shown < 0.3 * 48 * 56
            continue
        seen[view.flipped] += 1
        left, top, right, bottom = placed
        inside = np.zeros_like(values)
        across, down = 64 / view.size[1], 64 / view.size[0]
        inside[round(top * down) : round(bottom * down), round(left * across) : round(right * across)] = True
        assert (inside & values).sum() >= 0.9 * (inside | values).sum()
    assert min(seen.values()) > 3
    whole = View((0, 0, 160, 120))
    assert whole.map_box((-5, -5, 20, 20)) == (0, 0, 20, 20)
    assert whole.map_box((5, 5, 5, 20)) is None
    assert whole.map_box((-90, 0, 10, 10)) is None
    assert View((0, 0, 160, 120), flipped=True).map_box((10, 20, 30, 40)) == (130, 20, 150, 40)


def test_words_about_sides_keep_boxes_unmirrored() -> None:
    options = Augment(flip=1.0, randaugment=None)
    about = {"seed": 0, "epoch": 0, "key": "k"}
    assert sample_view((10, 10), options, **about).flipped
    assert not sample_view((10, 10), options, **about, texts=["left wing"]).flipped
