"""Moving scenes of the synthetic world: short videos with captions and questions, some of which need order.

    a red circle moves left            a red circle appears            a red circle turns blue
    a red circle moves right           a red circle disappears         a red circle passes behind a blue square

Each clip is as likely as the same clip played backwards ("left" and "right", "appears" and "disappears", "red turns
blue" and "blue turns red"), whose frames are the same ones. What only sees a bag of frames, such as their mean, answers
questions of order at chance.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Final, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import ImageDraw

from sightloop.data.atomic import atomic_path, atomic_write
from sightloop.data.datasets.synthetic_grammar import COLORS, SHAPES, article
from sightloop.data.datasets.synthetic_scene import OUTLINES, SUPERSAMPLING, draw_background
from sightloop.data.rng import generator
from sightloop.data.video.writing import write_video
from sightloop.errors import UsageError
from sightloop.types import JsonDict

Motion: TypeAlias = Literal["left", "right", "appears", "disappears", "turns", "behind"]
MOTIONS: Final[tuple[Motion, ...]] = ("left", "right", "appears", "disappears", "turns", "behind")
RATE: Final = 25
_SECONDS: Final = (1.2, 3.0)  # shortest and longest scene
_RADIUS: Final = 0.2
TABLE_NAME: Final = "clips.jsonl"


@dataclass(frozen=True, slots=True)
class MovingScene:
    """A moving scene; its text is the caption.

    Args:
        shape: of the thing that moves.
        color: its color at first.
        motion: what it does.
        other: the color that it turns to, or of the square that it passes behind; "" for other motions.
    """

    shape: str
    color: str
    motion: Motion
    other: str = ""

    def __str__(self) -> str:
        thing = f"{article(self.color)} {self.color} {self.shape}"
        match self.motion:
            case "left" | "right":
                return f"{thing} moves {self.motion}"
            case "appears" | "disappears":
                return f"{thing} {self.motion}"
            case "turns":
                return f"{thing} turns {self.other}"
            case "behind":
                return f"{thing} passes behind {article(self.other)} {self.other} square"

    def backwards(self) -> MovingScene:
        """The clip whose frames are those of this one in the opposite order."""
        opposite: dict[Motion, Motion] = {
            "left": "right",
            "right": "left",
            "appears": "disappears",
            "disappears": "appears",
            "turns": "turns",
            "behind": "behind",
        }
        if self.motion == "turns":
            return MovingScene(self.shape, self.other, "turns", self.color)
        return MovingScene(self.shape, self.color, opposite[self.motion], self.other)

    def questions(self) -> list[JsonDict]:
        """Questions as {"question", "answer", "needs_order"}: whether the order of the frames is needed."""
        asked: list[tuple[str, str, bool]] = [("what shape moves or changes?", self.shape, False)]
        match self.motion:
            case "left" | "right":
                asked.append((f"does the {self.shape} move left or right?", self.motion, True))
            case "appears" | "disappears":
                asked.append((f"does the {self.shape} appear or disappear?", self.motion.rstrip("s"), True))
            case "turns":
                asked.append((f"what color is the {self.shape} at the end?", self.other, True))
            case "behind":
                asked.append(("what color is the square?", self.other, False))
        if self.motion != "turns":
            asked.append((f"what color is the {self.shape}?", self.color, False))
        return [{"question": q, "answer": a, "needs_order": order} for q, a, order in asked]


def random_clip(random: np.random.Generator) -> MovingScene:
    """A clip by chance; each is as likely as itself backwards."""
    motion = MOTIONS[random.integers(len(MOTIONS))]
    color, other = (list(COLORS)[i] for i in random.choice(len(COLORS), 2, replace=False))
    shapes = [shape for shape in SHAPES if motion != "behind" or shape != "square"]
    shape = shapes[random.integers(len(shapes))]
    return MovingScene(shape, color, motion, other if motion in ("turns", "behind") else "")


def render_clip(
    clip: MovingScene, random: np.random.Generator, count: int, size: int = 96
) -> NDArray[np.uint8]:
    """Frames uint8 `[count, size, size, 3]`.

    Args:
        clip: what they show.
        random: chooses what the caption does not say: background, height, noise.
        count: number of frames, 2 at least.
        size: width and height in pixels.
    """
    side = size * SUPERSAMPLING
    background = draw_background(side, random)
    y, noise = random.uniform(0.3, 0.7), random.uniform(1.0, 4.0)
    frames: list[NDArray[np.uint8]] = []
    for i in range(count):
        canvas = background.copy()
        draw = ImageDraw.Draw(canvas)
        done = i / (count - 1)
        x = {"left": 0.85 - 0.7 * done, "right": 0.15 + 0.7 * done, "behind": 0.1 + 0.8 * done}.get(
            clip.motion, 0.5
        )
        late = done > 0.5
        if not ((clip.motion == "appears" and not late) or (clip.motion == "disappears" and late)):
            color = clip.other if clip.motion == "turns" and late else clip.color
            _draw(draw, clip.shape, color, (x, y), side)
        if clip.motion == "behind":
            _draw(draw, "square", clip.other, (0.5, y), side)
        pixels = np.asarray(canvas.reduce(SUPERSAMPLING)).astype(np.float32)
        pixels += random.normal(0.0, noise, pixels.shape).astype(np.float32)
        frames.append(pixels.round().clip(0, 255).astype(np.uint8))
    return np.stack(frames)


def _draw(draw: ImageDraw.ImageDraw, shape: str, color: str, center: tuple[float, float], side: int) -> None:
    outline = (np.array(center) + _RADIUS * OUTLINES[shape]) * side
    red, green, blue = COLORS[color]
    draw.polygon([(float(x), float(y)) for x, y in outline], fill=(red, green, blue))


@dataclass(frozen=True, slots=True)
class SyntheticVideo:
    """A video of one or more moving scenes.

    Args:
        name: of its file.
        clips: in order.
        edges: beginning of each scene in seconds, and the end of the last.
        seed: of what the captions do not say.
        size: width and height in pixels.
    """

    name: str
    clips: tuple[MovingScene, ...]
    edges: tuple[float, ...]
    seed: int
    size: int

    def frames(self) -> Iterator[NDArray[np.uint8]]:
        """Its frames, uint8 `[size, size, 3]` each."""
        for i, clip in enumerate(self.clips):
            count = round((self.edges[i + 1] - self.edges[i]) * RATE)
            random = generator("world", "clip", self.name, self.seed, i)
            yield from render_clip(clip, random, count, self.size)

    def record(self) -> JsonDict:
        """Its line of `clips.jsonl`."""
        scenes = [
            {"start": start, "end": end, "caption": str(clip)}
            for clip, (start, end) in zip(self.clips, pairwise(self.edges), strict=True)
        ]
        alone = self.clips[0] if len(self.clips) == 1 else None
        return {
            "file_name": self.name,
            "captions": [", then ".join(map(str, self.clips))],
            "qa": [] if alone is None else alone.questions(),
            "scenes": scenes,
        }


def synthetic_videos(count: int, seed: int = 0, *, scenes: int = 1, size: int = 96) -> list[SyntheticVideo]:
    """Videos of moving scenes; equal arguments give equal videos, a smaller count the first of a larger one.

    Args:
        count: number of videos.
        seed: of all random choices.
        scenes: of each video, without a clip twice in a row.
        size: width and height in pixels, even.

    Raises:
        UsageError: an argument is out of range.
    """
    if count < 0 or scenes < 1 or size < 16 or size % 2:
        raise UsageError(
            f"count={count}, scenes={scenes}, size={size}: at least 0, at least 1, and even, 16 or more"
        )
    videos: list[SyntheticVideo] = []
    for number in range(count):
        random = generator("world", "clips", seed, number)
        clips: list[MovingScene] = []
        while len(clips) < scenes:
            clip = random_clip(random)
            if not clips or clip != clips[-1]:
                clips.append(clip)
        # Even, so that what happens halfway does so backwards too.
        least, most = (int(seconds * RATE / 2) for seconds in _SECONDS)
        lengths = [2 * int(random.integers(least, most)) for _ in clips]
        edges = np.cumsum([0, *lengths]) / RATE
        videos.append(SyntheticVideo(f"{number:06d}.mp4", tuple(clips), tuple(edges.tolist()), seed, size))
    return videos


def write_synthetic_videos(folder: str | os.PathLike[str], videos: list[SyntheticVideo]) -> Path:
    """Write MP4 files and `clips.jsonl`, a line for each: file_name, captions, qa, scenes with times.

    Args:
        folder: made if it does not exist; files of these names are replaced.
        videos: of `synthetic_videos`.

    Returns:
        Path of `clips.jsonl`, which is written last.
    """
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    for video in videos:
        with atomic_path(target / video.name) as temporary:
            write_video(temporary, video.frames(), rate=RATE, options={"crf": "18"}, container="mp4")
    table = target / TABLE_NAME
    atomic_write(table, "".join(json.dumps(video.record()) + "\n" for video in videos))
    return table
