"""The command that writes the small world: rendered scenes to train and test on."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter

from sightloop.apps.cli.options import at_least, whole
from sightloop.apps.cli.output import say


def synthetic(
    dst: Annotated[Path, Parameter(name="DST")],
    *,
    count: Annotated[int, Parameter(converter=whole)] = 3000,
    seed: Annotated[int, Parameter(converter=whole)] = 0,
    part: Literal["train", "unseen"] = "train",
    size: Annotated[int, Parameter(converter=whole)] = 64,
    different: Annotated[bool, Parameter(negative=(), show_default=False)] = False,
    shuffled: Annotated[bool, Parameter(negative=(), show_default=False)] = False,
) -> int:
    """Write rendered scenes with captions, questions, boxes and outlines, to learn from in minutes.

    DST becomes one tar shard, the same bytes for the same options: KEY.png and KEY.json for each scene, such as
    "two red circles above a blue square".

    Parameters
    ----------
    dst
        The shard, such as world.tar; an older one is replaced.
    count
        How many scenes.
    seed
        Another number gives other scenes.
    part
        train, or unseen: combinations of the same words that no train scene shows.
    size
        Width and height of each image in pixels.
    different
        No caption twice: so that each image of a retrieval test has one right caption.
    shuffled
        Captions and answers of other images: nothing can be learned from it, as a control.
    """
    from sightloop.data.datasets.synthetic import synthetic_world, write_synthetic_world

    at_least("--count", count, 1)
    scenes = synthetic_world(part, count, seed, size=size, different=different, shuffled=shuffled)
    write_synthetic_world(dst, scenes)
    say(f"{dst}: {count:,} scenes.")
    return 0


COMMANDS = {synthetic: "Examples:\n  sightloop synthetic world.tar --count 3000 --seed 1"}
