"""The synthetic world: rendered scenes with captions, questions, boxes and outlines, to train and test in minutes.

`synthetic_grammar` defines what scenes show, `synthetic_scene` renders them.
"""

from __future__ import annotations

import io
import json
import os
import tarfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import overload

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from sightloop.data.atomic import atomic_path
from sightloop.data.datasets.schema import fields_from_dialogue
from sightloop.data.datasets.synthetic_clips import synthetic_videos as synthetic_videos
from sightloop.data.datasets.synthetic_clips import write_synthetic_videos as write_synthetic_videos
from sightloop.data.datasets.synthetic_dialogue import exchange_of as exchange_of
from sightloop.data.datasets.synthetic_dialogue import label_answer as label_answer
from sightloop.data.datasets.synthetic_dialogue import make_dialogue
from sightloop.data.datasets.synthetic_grammar import (
    Combination,
    Part,
    SceneKind,
    combinations,
    make_questions,
    plain_combinations,
)
from sightloop.data.datasets.synthetic_parser import SceneCheck as SceneCheck
from sightloop.data.datasets.synthetic_parser import SceneObject as SceneObject
from sightloop.data.datasets.synthetic_parser import check_scene as check_scene
from sightloop.data.datasets.synthetic_parser import parse_scene as parse_scene
from sightloop.data.datasets.synthetic_parser import plain_combination as plain_combination
from sightloop.data.datasets.synthetic_scene import Scene, render_scene
from sightloop.data.rng import generator
from sightloop.errors import UsageError
from sightloop.types import Dialogue, JsonDict, Sample

# Share of each kind of scene. Most combinations are pairs, so uniform draws would give almost only pairs.
_PLAIN_SHARES = {"one": 0.2, "alike": 0.36, "above": 0.22, "left of": 0.22}
_KIND_SHARES = {"one": 0.16, "alike": 0.16, "above": 0.22, "left of": 0.22, "inside": 0.10, "word": 0.14}


class SyntheticWorld(Sequence[Sample]):
    """Samples of the synthetic world, each rendered when it is indexed; made by `synthetic_world`.

    Attributes:
        name: part.
        seed: of all random choices.
        size: width and height of the images in pixels.
        combinations: content of each image.
        text_indices: for each image, the index of the combination whose texts and regions it gets.
        talks: each sample has a dialogue.
        plain: whether the scenes are plain.
    """

    def __init__(
        self,
        name: str,
        seed: int,
        size: int,
        combinations: Sequence[Combination],
        text_indices: Sequence[int],
        *,
        talks: bool = False,
        plain: bool = False,
    ) -> None:
        self.name, self.seed, self.size, self.talks, self.plain = name, seed, size, talks, plain
        self.combinations = tuple(combinations)
        self.text_indices = tuple(text_indices)

    def __len__(self) -> int:
        return len(self.combinations)

    @overload
    def __getitem__(self, index: int) -> Sample: ...
    @overload
    def __getitem__(self, index: slice) -> list[Sample]: ...
    def __getitem__(self, index: int | slice) -> Sample | list[Sample]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        index = range(len(self))[index]  # also negative; raises IndexError
        text_index = self.text_indices[index]
        text_combination = self.combinations[text_index]
        scene = self._render(index)
        regions = scene.regions if text_index == index else self._render(text_index).regions
        random = generator("world", "questions", self.name, self.seed, text_index)
        return Sample(
            key=f"{self.name}-{self.seed}-{index:06d}",
            image=_encode_png(scene.pixels),
            captions=(str(text_combination),),
            questions=make_questions(text_combination, random),
            regions=regions,
            dialogues=(self._dialogue(index),) if self.talks else (),
        )

    def _dialogue(self, index: int) -> Dialogue:
        """The dialogue about an image. Of a shuffled world any candidate is called true, as its caption and the answers
        before are true of one another, whatever image they are shown with."""
        text_index = self.text_indices[index]
        random = generator("world", "dialogue", self.name, self.seed, text_index)
        return make_dialogue(self.combinations[text_index], random, shuffled=text_index != index)

    def _render(self, index: int) -> Scene:
        random = generator("world", "picture", self.name, self.seed, index)  # the key is part of the pixels
        return render_scene(self.combinations[index], random, self.size, plain=self.plain)


def synthetic_world(
    part: Part,
    count: int,
    seed: int = 0,
    *,
    size: int = 64,
    different: bool = False,
    shuffled: bool = False,
    dialogues: bool = False,
    scenes: SceneKind = "all",
) -> SyntheticWorld:
    """Samples of one part: PNG images, each with its one correct caption, questions and regions.

    Equal arguments give equal bytes, and a smaller count gives the first samples of a larger one. Images of one caption
    differ in positions, sizes, rotations, shades, background and noise.

    Args:
        part: "train" or "unseen" (combinations that no scene of "train" shows).
        count: number of samples, at least 0.
        seed: of all random choices.
        size: width and height in pixels, at least 16.
        different: no caption occurs twice, so that each image of a retrieval test has one correct text.
        shuffled: a negative control. Images get captions, questions and regions of other images, so that only their
            frequencies can be learned.
        dialogues: each sample has a dialogue of five rounds (`synthetic_dialogue`).
        scenes: "all", or "plain" ones: large objects alone on a background of one gray, for drawing; their part
            "unseen" has combinations of a color and a shape that no plain scene of "train" shows.

    Raises:
        UsageError: an argument is out of range, or there are fewer different captions than `count`.
    """
    if part not in ("train", "unseen"):
        raise UsageError(f"part={part!r}: must be train or unseen.")
    if count < 0 or size < 16:
        raise UsageError(
            f"count={count}, size={size}: the count must be at least 0, the size at least 16 pixels."
        )
    plain = scenes == "plain"
    by_kind, shares = (
        (plain_combinations(part), _PLAIN_SHARES) if plain else (combinations(part), _KIND_SHARES)
    )
    name = f"plain-{part}" if plain else part
    if different and count > (most := sum(map(len, by_kind.values()))):
        raise UsageError(f"count={count}: there are only {most:,} different captions in the part {part!r}.")
    random = generator("world", "combinations", name, seed)
    chosen: list[Combination] = []
    used: set[Combination] = set()
    while len(chosen) < count:
        candidates = by_kind[str(random.choice(list(shares), p=list(shares.values())))]
        combination = candidates[random.integers(len(candidates))]
        if not (different and combination in used):
            chosen.append(combination)
            used.add(combination)
    text_indices = np.arange(count)
    if shuffled:
        # A random cycle through all images, so that none keeps its own text. order [2, 0, 3, 1], rolled [1, 2, 0, 3]:
        # image 2 gets text 1, image 0 text 2, image 3 text 0, image 1 text 3.
        order = generator("world", "shuffle", name, seed).permutation(count)
        text_indices[order] = np.roll(order, 1)
    return SyntheticWorld(name, seed, size, chosen, text_indices.tolist(), talks=dialogues, plain=plain)


def write_synthetic_world(path: str | os.PathLike[str], samples: Sequence[Sample]) -> None:
    """Writes samples as a WebDataset shard: KEY.png and KEY.json (captions, qa, regions, dialogues) for each.

    Equal samples give equal bytes. The shard is written completely or not at all.

    Raises:
        UsageError: the folder does not exist.
        OSError: the file cannot be written.
    """
    if not Path(path).parent.is_dir():
        raise UsageError(f"{path}: there is no folder {Path(path).parent}; make it first.")
    with atomic_path(path) as temporary, tarfile.open(temporary, "w", format=tarfile.USTAR_FORMAT) as tar:
        for sample in samples:
            qa = [{"question": item.question, "answer": item.answers[0]} for item in sample.questions]
            fields: JsonDict = {"captions": sample.captions, "qa": qa}
            fields["regions"] = [asdict(region) for region in sample.regions]
            if sample.dialogues:
                fields["dialogues"] = list(map(fields_from_dialogue, sample.dialogues))
            record = json.dumps(fields)
            assert isinstance(sample.image, bytes)
            for extension, data in (("png", sample.image), ("json", record.encode())):
                member = tarfile.TarInfo(f"{sample.key}.{extension}")  # time and owner are 0
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))


def _encode_png(pixels: NDArray[np.uint8]) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG", compress_level=1)
    return file.getvalue()
