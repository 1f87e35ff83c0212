"""Features of a frozen trunk, computed once: a training that reads them runs no convolution.

A folder of features has, for each image, some views in half precision: the image as evaluation sees it, then random
crops and flips. Images are found by the digest of their encoded bytes, so that any dataset with them can use it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from hashlib import blake2b
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from sightloop.data.atomic import write_json
from sightloop.data.datasets.dataset import Dataset
from sightloop.data.images.augment import Augment, augment
from sightloop.data.images.decode import decode, read_file
from sightloop.data.images.preprocess import normalize, preprocess
from sightloop.errors import ImageError, UsageError
from sightloop.types import ImageSpec, Limits, Sample

_ABOUT, _INDEX, _DATA = "features.json", "digests.bin", "features.bin"
_DIGEST_BYTES = 16
_BATCH = 4  # images whose views are computed at a time


class FeatureStore:
    """The features in some folders: view v of an image -> float16 `[C, h, w]`.

    Args:
        folders: that `cache_features` wrote.

    Raises:
        UsageError: a folder has no features.
    """

    def __init__(self, folders: Sequence[str | Path]) -> None:
        self._places: dict[bytes, tuple[NDArray[np.float16], int]] = {}
        for folder in map(Path, folders):
            if not (folder / _ABOUT).is_file():
                raise UsageError(
                    f"data.features={folder}: holds no features; recipes/nano/features.py makes them"
                )
            about = json.loads((folder / _ABOUT).read_text("utf-8"))
            digests = _read_digests(folder)
            shape = (len(digests), about["views"], *about["shape"])
            rows = np.memmap(folder / _DATA, np.float16, "r", shape=shape)
            self._places |= {digest: (rows, row) for row, digest in enumerate(digests)}

    def get(self, sample: Sample, view: int) -> NDArray[np.float16]:
        """One view of a sample's image, `[C, h, w]`; the number counts modulo the views that there are.

        Raises:
            ImageError: there are no features of it.
        """
        place = self._places.get(image_digest(sample))
        if place is None:
            raise ImageError(sample.key, "data.features has no features of this image; compute them first")
        rows, row = place
        return rows[row, view % rows.shape[1]]


def image_digest(sample: Sample) -> bytes:
    """Digest of a sample's encoded image, 16 bytes."""
    image = sample.image
    data = image if isinstance(image, bytes) else read_file(str(image))
    return blake2b(data, digest_size=_DIGEST_BYTES).digest()


@torch.no_grad()
def cache_features(
    trunk: Callable[[torch.Tensor], torch.Tensor],
    spec: ImageSpec,
    dataset: Dataset,
    folder: Path,
    *,
    views: int,
    options: Augment,
) -> Iterator[int]:
    """Computes the features of a dataset's images that the folder lacks; what an interrupted call wrote is kept.

    Args:
        trunk: normalized pixels `[B, 3, S, S]` -> features `[B, C, h, w]`.
        spec: preprocessing of the images.
        dataset: the images; unreadable ones are left out.
        folder: of the features, made if it is not there.
        views: of each image: the first as evaluation sees it, the others augmented.
        options: augmentation of the others.

    Yields:
        Images of the dataset that are done.

    Raises:
        UsageError: the folder has features with another number of views.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if (folder / _ABOUT).is_file():
        known_views = json.loads((folder / _ABOUT).read_text("utf-8"))["views"]
        if known_views != views:
            raise UsageError(
                f"{folder}: has {known_views} views of each image; use another folder for {views}"
            )
    known = _read_digests(folder)
    done = set(known)
    with (folder / _DATA).open("ab") as data, (folder / _INDEX).open("ab") as index:
        _cut(folder, data.fileno(), index.fileno(), len(known))
        waiting: list[tuple[bytes, NDArray[np.uint8]]] = []
        for number, sample in enumerate(dataset, 1):
            digest = image_digest(sample)
            if digest not in done:
                done.add(digest)
                waiting.append((digest, _views(sample, spec, views, options)))
            if waiting and (len(waiting) == _BATCH or number == len(dataset)):
                pixels = torch.from_numpy(np.concatenate([each for _, each in waiting]))
                features = trunk(normalize(pixels, spec)).to(torch.float16).contiguous()
                if not (folder / _ABOUT).is_file():
                    write_json({"views": views, "shape": list(features.shape[1:])}, folder / _ABOUT)
                data.write(features.numpy().tobytes())
                data.flush()
                index.write(b"".join(digest for digest, _ in waiting))
                index.flush()
                waiting = []
            yield number


def _views(sample: Sample, spec: ImageSpec, views: int, options: Augment) -> NDArray[np.uint8]:
    """The views of an image, uint8 `[V, 3, S, S]`."""
    side = (spec.crop or spec.resize or (224, 224))[0]
    source = sample.image if isinstance(sample.image, bytes) else str(sample.image)
    image = decode(source, Limits())
    texts = [*sample.captions, *(question.question for question in sample.questions)]
    plain = preprocess(source, spec, limits=Limits()).values
    more = [
        augment(image, side, options, seed=0, epoch=view, key=sample.key, texts=texts)
        for view in range(1, views)
    ]
    return np.stack([plain, *more])


def _read_digests(folder: Path) -> list[bytes]:
    path = folder / _INDEX
    known = path.read_bytes() if path.is_file() else b""
    whole = len(known) // _DIGEST_BYTES * _DIGEST_BYTES
    return [known[at : at + _DIGEST_BYTES] for at in range(0, whole, _DIGEST_BYTES)]


def _cut(folder: Path, data: int, index: int, count: int) -> None:
    """Removes what an interrupted call wrote in part."""
    os.ftruncate(index, count * _DIGEST_BYTES)
    if count:
        about = json.loads((folder / _ABOUT).read_text("utf-8"))
        os.ftruncate(data, count * about["views"] * int(np.prod(about["shape"])) * 2)
    else:
        os.ftruncate(data, 0)
