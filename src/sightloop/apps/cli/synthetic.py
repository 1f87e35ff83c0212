"""The command `sightloop synthetic`: a dataset of rendered scenes, to train and test on."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter

from sightloop.apps.cli.checks import check_output_folder
from sightloop.apps.cli.options import check_at_least, integer
from sightloop.apps.cli.output import print_message
from sightloop.errors import UsageError


@Parameter(name="*")
@dataclass(frozen=True, slots=True, kw_only=True)
class SceneTexts:
    """What is said of the scenes."""

    different: Annotated[bool, Parameter(negative=(), show_default=False)] = False
    """Give every scene another caption, so that each image of a retrieval test has one correct caption."""

    shuffled: Annotated[bool, Parameter(negative=(), show_default=False)] = False
    """Give every image the caption and answers of another one: a control set that teaches nothing."""

    dialogues: Annotated[bool, Parameter(negative=(), show_default=False)] = False
    """Also write a dialogue of five rounds about every scene, each round with 100 candidate answers."""


_TEXTS = SceneTexts()


def synthetic(
    dst: Annotated[Path, Parameter(name="DST")],
    /,
    *,
    count: Annotated[int, Parameter(converter=integer)] = 3000,
    seed: Annotated[int, Parameter(converter=integer)] = 0,
    part: Literal["train", "unseen"] = "train",
    size: Annotated[int, Parameter(converter=integer)] = 64,
    video_scenes: Annotated[int, Parameter(converter=integer, show_default=False)] = 0,
    texts: SceneTexts = _TEXTS,
    scenes: Literal["all", "plain"] = "all",
) -> int:
    """Write a synthetic dataset of rendered scenes with captions, questions, boxes and outlines.

    The dataset is one WebDataset shard: KEY.png and KEY.json for each scene, such as "two red circles above a blue
    square". A small model learns it in minutes. The same options give the same bytes.

    With --video-scenes, videos of moving scenes instead, such as "a red circle moves left": MP4 files in a folder, with
    their captions, times and questions in its clips.jsonl.

    Args:
        dst: The .tar file to write; an existing one is replaced. For videos, a folder.
        count: Number of scenes, or of videos.
        seed: Random seed of the scenes.
        part: train, or unseen: combinations of the same words that do not occur in any train scene.
        size: Width and height of the images in pixels.
        video_scenes: Write videos, each of so many moving scenes one after another.
        scenes: all, or plain: large objects on a background of one gray, for drawing (recipe painter_world); their
            unseen part has pairs of a color and a shape that no plain train scene shows.
    """
    from sightloop.data.datasets.synthetic import synthetic_world, write_synthetic_world

    check_at_least("--count", count, 1)
    if video_scenes:
        check_at_least("--video-scenes", video_scenes, 1)
        if part != "train" or texts != _TEXTS:
            raise UsageError("--video-scenes: goes without --part, --different, --shuffled and --dialogues")
        return _videos(dst, count, seed, video_scenes, size)
    if dst.suffix.lower() != ".tar":
        raise UsageError(f"DST {dst}: must end in .tar; `sightloop convert` makes other formats of it.")
    check_output_folder("DST", dst.parent)
    world = synthetic_world(
        part,
        count,
        seed,
        size=size,
        different=texts.different,
        shuffled=texts.shuffled,
        dialogues=texts.dialogues,
        scenes=scenes,
    )
    write_synthetic_world(dst, world)
    print_message(f"{dst}: {count:,} scenes.")
    return 0


def _videos(folder: Path, count: int, seed: int, scenes: int, size: int) -> int:
    from sightloop.data.datasets.synthetic import synthetic_videos, write_synthetic_videos

    table = write_synthetic_videos(folder, synthetic_videos(count, seed, scenes=scenes, size=size))
    print_message(f"{folder}: {count:,} videos; their captions, scenes and questions are in {table}.")
    return 0


COMMANDS = {
    synthetic: "Examples:\n  sightloop synthetic world.tar --count 3000 --seed 1\n"
    "  sightloop synthetic clips/ --count 20 --video-scenes 3 --size 96"
}
