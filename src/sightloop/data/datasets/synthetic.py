"""A small world: rendered scenes with captions, questions, boxes and outlines, to learn from in minutes.

A scene shows one combination of counts, sizes, colours, shapes, relations and words, and has one right caption:

    a big red circle                                   one thing
    three white stars                                  two to four alike
    two red circles above a blue square                two groups, above or left of
    a green ring inside a black square
    two red circles above the word sun

A fifth of all combinations is held out as "unseen": new images, new captions, only known words.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import os
import tarfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cache
from itertools import product
from pathlib import Path
from typing import Literal, TypeAlias, overload

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from sightloop.data.atomic import atomic_path
from sightloop.data.rng import generator
from sightloop.errors import UsageError
from sightloop.types import Question, Region, Sample

Part: TypeAlias = Literal["train", "unseen"]
Relation: TypeAlias = Literal["", "above", "left of", "inside"]
_Box: TypeAlias = tuple[float, float, float, float]  # left, top, right, bottom in 0..1

COLORS = {
    "red": (212, 36, 36),
    "orange": (244, 138, 28),
    "yellow": (250, 228, 48),
    "green": (36, 160, 68),
    "blue": (40, 80, 214),
    "purple": (138, 52, 172),
    "black": (22, 22, 22),
    "white": (244, 244, 244),
}
NUMBERS = ("zero", "one", "two", "three", "four")
WORDS = ("sun", "cat", "tea", "box", "key", "map", "ice", "owl")
# How often a scene is of each kind; most combinations are pairs, so uniform draws would be nearly all pairs.
_KINDS = {"one": 0.16, "alike": 0.16, "above": 0.22, "left of": 0.22, "inside": 0.10, "word": 0.14}
_HELD_OUT = 5  # one combination in this many
_FINER = 4  # scenes are drawn this many times larger, and averaged down
_FRAME: _Box = (0.0, 0.0, 1.0, 1.0)
_TOP, _BOTTOM = (0.0, 0.0, 1.0, 0.5), (0.0, 0.5, 1.0, 1.0)
_LEFT, _RIGHT = (0.0, 0.0, 0.5, 1.0), (0.5, 0.0, 1.0, 1.0)
_MIDDLE = (0.28, 0.28, 0.72, 0.72)
_OVER_WORD, _WORD = (0.0, 0.04, 1.0, 0.58), (0.04, 0.64, 0.96, 0.97)


@dataclass(frozen=True, slots=True)
class Group:
    """1 to 4 things of one colour and shape; size is "big", "small", or "" where it is not spoken of."""

    count: int
    color: str
    shape: str
    size: str = ""

    def __str__(self) -> str:
        return self.told()

    def told(self, without: str = "") -> str:
        """Its words; without "color", or "number" (of one thing: its size), where less is to be said."""
        color = "" if without == "color" else self.color
        size = "" if without == "number" else self.size
        words = [word for word in (size, color, _noun(self.shape, self.count)) if word]
        number = _article(words[0]) if self.count == 1 else NUMBERS[self.count]
        return " ".join(words if without == "number" and self.count > 1 else [number, *words])


@dataclass(frozen=True, slots=True)
class Combination:
    """What a scene shows: a group, perhaps in relation to another group, perhaps above a word."""

    first: Group
    relation: Relation = ""
    second: Group | None = None
    word: str = ""

    def __str__(self) -> str:
        other = self.second or (f"the word {self.word}" if self.word else "")
        return f"{self.first} {self.relation} {other}".rstrip()

    @property
    def groups(self) -> tuple[Group, ...]:
        """The first group, and the second where there is one."""
        return (self.first,) if self.second is None else (self.first, self.second)

    def partly(self) -> tuple[str, ...]:
        """Other true texts, which say less: each leaves out something that the caption says, and all the word."""
        told = [self.first.told("number"), self.first.told("color")]
        if self.second is not None:
            told = [
                f"{told[1]} {self.relation} {self.second.told('color')}",
                str(self.first),
                str(self.second),
            ]
        return tuple(text for text in dict.fromkeys(told) if text != str(self))


@dataclass(frozen=True, slots=True)
class Scene:
    """A rendered combination: pixels uint8 `[size, size, 3]`, and a region for each thing, the word included."""

    pixels: NDArray[np.uint8]
    regions: tuple[Region, ...]


class SyntheticWorld(Sequence[Sample]):
    """Samples of the small world, each rendered when it is asked for. Made by `world`."""

    def __init__(
        self, name: str, seed: int, size: int, shown: Sequence[Combination], told: Sequence[int]
    ) -> None:
        self.name, self.seed, self.size = name, seed, size
        self.shown = tuple(shown)
        self.told = tuple(told)  # which scene's words go with each image

    def __len__(self) -> int:
        return len(self.shown)

    @overload
    def __getitem__(self, index: int) -> Sample: ...
    @overload
    def __getitem__(self, index: slice) -> list[Sample]: ...
    def __getitem__(self, index: int | slice) -> Sample | list[Sample]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        index = range(len(self))[index]
        told = self.told[index]
        said = self.shown[told]
        picture = self._scene(index)
        regions = picture.regions if told == index else self._scene(told).regions
        return Sample(
            key=f"{self.name}-{self.seed}-{index:06d}",
            image=_png(picture.pixels),
            captions=(str(said),),
            questions=questions(said, generator("world", "questions", self.name, self.seed, told)),
            regions=regions,
        )

    def _scene(self, index: int) -> Scene:
        return scene(self.shown[index], generator("world", "picture", self.name, self.seed, index), self.size)


def synthetic_world(
    part: Part, count: int, seed: int = 0, *, size: int = 64, different: bool = False, shuffled: bool = False
) -> SyntheticWorld:
    """`count` samples of one part: images as PNG bytes, `size` px square, each with its one right caption.

    A function of its arguments; a smaller count gives the first samples of a larger one. Images of one caption
    differ in places, sizes, turns, shades, background and noise.
    different: no caption comes twice, so that each image of a retrieval test has one right text.
    shuffled: images keep their pixels and get the words, questions and regions of other images, so that there is
    nothing to learn but their frequencies: the negative control.
    Raises `UsageError` for a count below 0, a size below 16 and for more different captions than there are.
    """
    if part not in ("train", "unseen"):
        raise UsageError(f"part={part!r}: must be train or unseen.")
    if count < 0 or size < 16:
        raise UsageError(
            f"count={count}, size={size}: the count must be at least 0, the size at least 16 pixels."
        )
    kinds = combinations(part)
    if different and count > (most := sum(map(len, kinds.values()))):
        raise UsageError(f"count={count}: there are only {most:,} different captions in the part {part!r}.")
    random = generator("world", "combinations", part, seed)
    shown: list[Combination] = []
    seen: set[Combination] = set()
    while len(shown) < count:
        kind = kinds[str(random.choice(list(_KINDS), p=list(_KINDS.values())))]
        drawn = kind[random.integers(len(kind))]
        if not (different and drawn in seen):
            shown.append(drawn)
            seen.add(drawn)
    told = np.arange(count)
    if shuffled:  # a random cycle through all of them: no image keeps its own words
        order = generator("world", "shuffle", part, seed).permutation(count)
        told[order] = np.roll(order, 1)
    return SyntheticWorld(part, seed, size, shown, told.tolist())


@cache
def combinations(part: Part) -> dict[str, tuple[Combination, ...]]:
    """All combinations of one part, by kind. Which part one is in depends on its caption alone."""
    ones = [Group(1, color, shape) for color, shape in product(COLORS, _SHAPES)]
    few = [Group(count, one.color, one.shape) for count, one in product((1, 2), ones)]
    pairs = [(a, b) for a, b in product(few, few) if (a.color, a.shape) != (b.color, b.shape)]
    around = [one for one in ones if one.shape in ("circle", "square")]
    everything = {
        "one": [Combination(Group(1, g.color, g.shape, size)) for g, size in product(ones, ("big", "small"))],
        "alike": [Combination(Group(n, g.color, g.shape)) for g, n in product(ones, (2, 3, 4))],
        "above": [Combination(a, "above", b) for a, b in pairs],
        "left of": [Combination(a, "left of", b) for a, b in pairs],
        "inside": [Combination(a, "inside", b) for a, b in product(ones, around) if a.color != b.color],
        "word": [Combination(group, "above", word=word) for group, word in product(few, WORDS)],
    }
    return {
        kind: tuple(found for found in all_of_kind if _held_out(found) == (part == "unseen"))
        for kind, all_of_kind in everything.items()
    }


def write_synthetic_world(path: str | os.PathLike[str], samples: Sequence[Sample]) -> None:
    """Writes samples as one WebDataset shard: KEY.png and KEY.json (captions, qa, regions) for each.

    The same samples give the same bytes. The file is there whole or not at all. Raises `UsageError` where its folder is
    missing, and OSError.
    """
    if not Path(path).parent.is_dir():
        raise UsageError(f"{path}: there is no folder {Path(path).parent}; make it first.")
    with atomic_path(path) as temporary, tarfile.open(temporary, "w", format=tarfile.USTAR_FORMAT) as tar:
        for sample in samples:
            qa = [{"question": asked.question, "answer": asked.answers[0]} for asked in sample.questions]
            regions = [asdict(region) for region in sample.regions]
            said = json.dumps({"captions": sample.captions, "qa": qa, "regions": regions})
            assert isinstance(sample.image, bytes)
            for ending, data in (("png", sample.image), ("json", said.encode())):
                member = tarfile.TarInfo(f"{sample.key}.{ending}")  # its time and owner stay 0
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))


def vocabulary() -> list[str]:
    """Every word of the world's captions, questions and answers, sorted; the question mark is no word of it."""
    nouns = [_noun(shape, count) for shape in _SHAPES for count in (1, 2)]
    others = (
        "a above an are big bottom color how inside is left many of or right shape small the there things top"
    )
    others += " what where word written no yes"
    return sorted({*COLORS, *nouns, *NUMBERS[1:], *WORDS, *others.split()})


def questions(combination: Combination, random: np.random.Generator) -> tuple[Question, ...]:
    """Questions about a combination, each with its one right answer, of one word; `random` chooses what is asked for
    with yes or no. Whatever is asked about is in the scene, except for "is there", where the chance is a half."""
    asked: list[tuple[str, str]] = []
    groups = combination.groups
    alone = len({group.shape for group in groups}) == len(groups)  # a shape names a group by itself
    for group in groups:
        be = "is" if group.count == 1 else "are"
        noun, many = _noun(group.shape, group.count), _noun(group.shape, 2)
        if alone:
            asked.append((f"what color {be} the {noun}?", group.color))
            asked.append((f"how many {many} are there?", NUMBERS[group.count]))
        else:
            asked.append((f"how many {group.color} {many} are there?", NUMBERS[group.count]))
        if group.size:
            asked.append((f"is the {noun} big or small?", group.size))
    asked.append(("how many things are there?", NUMBERS[sum(group.count for group in groups)]))
    asked.extend(_about_places(combination))
    if combination.word:
        asked.append(("what word is written?", combination.word))
    asked.append(_yes_or_no(groups, random))
    return tuple(Question(question, (answer,)) for question, answer in asked)


def _about_places(combination: Combination) -> list[tuple[str, str]]:
    first, relation, second = combination.first, combination.relation, combination.second
    if combination.word:
        return [("what shape is above the word?", first.shape)]
    if second is None:
        return []
    named = [f"the {group.color} {_noun(group.shape, group.count)}" for group in (first, second)]
    asked = [(f"what shape is {relation} {named[1]}?", first.shape)]
    if relation != "inside":
        ends = ("top", "bottom") if relation == "above" else ("left", "right")
        for group, name, end in zip((first, second), named, ends, strict=True):
            asked.append((f"where {'is' if group.count == 1 else 'are'} {name}?", end))
    return asked


def _yes_or_no(groups: Sequence[Group], random: np.random.Generator) -> tuple[str, str]:
    there = [(group.color, group.shape) for group in groups]
    color, shape = there[random.integers(len(there))]
    answer = "yes" if random.random() < 0.5 else "no"
    if answer == "no":  # nearly right: one of the two is another
        others = [(other, shape) for other in COLORS] + [(color, other) for other in _SHAPES]
        others = [other for other in others if other not in there]
        color, shape = others[random.integers(len(others))]
    return f"is there {_article(color)} {color} {shape}?", answer


def scene(combination: Combination, random: np.random.Generator, size: int = 64) -> Scene:
    """Renders a combination: what the caption does not say (places, turns, shades, background, noise) is `random`'s."""
    large = size * _FINER
    canvas = _background(large, random)
    draw = ImageDraw.Draw(canvas)
    regions: list[Region] = []
    for group, box, radii in _places(combination):
        for cell in _cells(group.count, box, random):
            # In a long cell things stay near the middle where a relation is told: above is never also left of.
            place = _square(cell) if combination.relation else cell
            outline = _outline(group.shape, place, radii, random)
            shade = np.clip(np.array(COLORS[group.color]) + random.integers(-12, 13, 3), 0, 255)
            draw.polygon([(float(x), float(y)) for x, y in outline * large], fill=_rgb(shade))
            regions.append(_region(f"{group.color} {group.shape}", outline * size, size))
    if combination.word:
        left, top, right, bottom = _write(canvas, combination.word, random)
        box = (left / _FINER, top / _FINER, right / _FINER, bottom / _FINER)
        regions.append(Region(f"word {combination.word}", box))
    pixels = np.asarray(canvas.reduce(_FINER)).astype(np.float32)
    pixels += random.normal(0.0, random.uniform(1.0, 5.0), pixels.shape)
    return Scene(pixels.round().clip(0, 255).astype(np.uint8), tuple(regions))


def _places(combination: Combination) -> list[tuple[Group, _Box, tuple[float, float]]]:
    """Who is drawn where, and the smallest and largest radius as parts of the cell; what is inside comes last."""
    first, second = combination.first, combination.second
    if second is None:
        box = _OVER_WORD if combination.word else _FRAME
        return [(first, box, (0.20, 0.24) if first.size == "small" else (0.41, 0.48))]
    if combination.relation == "inside":
        return [(second, _FRAME, (0.44, 0.48)), (first, _MIDDLE, (0.41, 0.48))]
    boxes = (_TOP, _BOTTOM) if combination.relation == "above" else (_LEFT, _RIGHT)
    return [(group, box, (0.41, 0.48)) for group, box in zip((first, second), boxes, strict=True)]


def _cells(count: int, box: _Box, random: np.random.Generator) -> list[_Box]:
    """Parts of the box for 1 to 4 things: the box, its halves along the longer side, or its quarters."""
    left, top, right, bottom = box
    x, y = (left + right) / 2, (top + bottom) / 2
    if count == 1:
        return [box]
    if count == 2:
        wide, high = right - left, bottom - top
        if wide > high or (wide == high and random.random() < 0.5):
            return [(left, top, x, bottom), (x, top, right, bottom)]
        return [(left, top, right, y), (left, y, right, bottom)]
    quarters = [(left, top, x, y), (x, top, right, y), (left, y, x, bottom), (x, y, right, bottom)]
    return [quarters[i] for i in sorted(random.permutation(4)[:count].tolist())]


def _square(box: _Box) -> _Box:
    """The square in the middle of a box."""
    left, top, right, bottom = box
    half, x, y = min(right - left, bottom - top) / 2, (left + right) / 2, (top + bottom) / 2
    return (x - half, y - half, x + half, y + half)


def _outline(
    shape: str, cell: _Box, radii: tuple[float, float], random: np.random.Generator
) -> NDArray[np.float64]:
    """A shape somewhere in its cell, a little turned: points `[n, 2]`."""
    left, top, right, bottom = cell
    radius = min(right - left, bottom - top) * random.uniform(*radii)
    x, y = random.uniform(left + radius, right - radius), random.uniform(top + radius, bottom - radius)
    angle = random.uniform(-0.1, 0.1)
    turn = np.array([[math.cos(angle), math.sin(angle)], [-math.sin(angle), math.cos(angle)]])
    return np.array([x, y]) + radius * (_SHAPES[shape] @ turn)


def _background(side: int, random: np.random.Generator) -> Image.Image:
    """A calm background of middle brightness, with a tint: plain, shaded or striped."""
    tone = float(random.uniform(115, 180))
    tint = tone + random.uniform(-12, 12, 3)
    along = np.linspace(-1, 1, side) * random.choice([-1.0, 1.0])
    kind = random.integers(3)
    wave = along if kind == 1 else np.sign(np.sin(along * math.pi * random.uniform(3, 7)))
    lines = tint + (0.0 if kind == 0 else random.uniform(4, 12)) * wave[:, None]
    rows = np.broadcast_to(lines[:, None].clip(0, 255).astype(np.uint8), (side, side, 3))
    turned = rows if random.random() < 0.5 else rows.transpose(1, 0, 2)
    return Image.fromarray(np.ascontiguousarray(turned))


def _write(canvas: Image.Image, word: str, random: np.random.Generator) -> tuple[int, int, int, int]:
    """Writes the word, in dark capitals, into the lower part; returns its box on the canvas."""
    stamp = _stamp(word)
    left, top, right, bottom = (int(edge * canvas.width) for edge in _WORD)
    scale = min((right - left) / stamp.width, (bottom - top) / stamp.height) * random.uniform(0.9, 1.0)
    size = (int(stamp.width * scale), int(stamp.height * scale))
    x = left + int(random.integers(right - left - size[0] + 1))
    y = top + int(random.integers(bottom - top - size[1] + 1))
    canvas.paste((20, 20, 20), (x, y), stamp.resize(size, Image.Resampling.NEAREST))
    return (x, y, x + size[0], y + size[1])


@cache
def _stamp(word: str) -> Image.Image:
    """The word in Pillow's own bitmap font, which is the same on every machine: mode L, cut to its ink."""
    page = Image.new("L", (16 * len(word), 32))
    ImageDraw.Draw(page).text((2, 2), word.upper(), fill=255, font=ImageFont.load_default_imagefont())
    return page.crop(page.getbbox())


def _region(label: str, points: NDArray[np.float64], size: int) -> Region:
    inside = points.clip(0, size).round(2)
    (left, top), (right, bottom) = inside.min(0).tolist(), inside.max(0).tolist()
    return Region(label, (left, top, right, bottom), (tuple(inside.ravel().tolist()),))


def _png(pixels: NDArray[np.uint8]) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG", compress_level=1)
    return file.getvalue()


def _held_out(combination: Combination) -> bool:
    digest = hashlib.blake2b(str(combination).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") % _HELD_OUT == 0


def _rgb(color: NDArray[np.int64]) -> tuple[int, int, int]:
    red, green, blue = color.tolist()
    return (red, green, blue)


def _article(word: str) -> str:
    return "an" if word[0] in "aeiou" else "a"


def _noun(shape: str, count: int) -> str:
    return shape if count == 1 else f"{shape}es" if shape.endswith("s") else f"{shape}s"


def _round(points: int, radius: float) -> NDArray[np.float64]:
    """The corners of a regular polygon around (0, 0), from the top on: `[points, 2]`."""
    angles = np.arange(points) * (2 * math.pi / points)
    return radius * np.stack([np.sin(angles), -np.cos(angles)], axis=1)


def _star() -> NDArray[np.float64]:
    points = _round(10, 1.08)
    points[1::2] *= 0.42
    return points


def _ring() -> NDArray[np.float64]:
    """Once around outside, then back around inside: one outline that has a hole."""
    loop = np.concatenate([_round(32, 1.0), _round(32, 1.0)[:1]])
    return np.concatenate([loop, 0.52 * loop[::-1]])


def _cross(arm: float) -> NDArray[np.float64]:
    corner = np.array([(-arm, -1.0), (arm, -1.0), (arm, -arm)])
    turns = [np.array([[c, s], [-s, c]]) for c, s in ((1, 0), (0, 1), (-1, 0), (0, -1))]
    return np.concatenate([corner @ turn for turn in turns])


_SHAPES: dict[str, NDArray[np.float64]] = {
    "circle": _round(32, 1.0),
    "square": 0.84 * np.array([[-1, -1], [1, -1], [1, 1], [-1, 1]]),
    "triangle": _round(3, 1.12) + np.array([0.0, 0.16]),
    "star": _star(),
    "cross": _cross(0.34),
    "ring": _ring(),
}
