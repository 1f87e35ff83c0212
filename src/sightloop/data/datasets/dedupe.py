"""A dataset without the copies in it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from sightloop.data.copies.duplicates import ImageFacts, find_duplicates
from sightloop.data.datasets.dataset import Dataset
from sightloop.data.images.decode import read_file
from sightloop.errors import ImageError, UsageError


@dataclass(frozen=True, slots=True)
class LeftOut:
    """A sample that is left out.

    Args:
        key: of the sample.
        kept: key of the sample that stays in its place.
        is_same: whether the bytes of the images are equal.
    """

    key: str
    kept: str
    is_same: bool


def without_copies(
    dataset: Dataset, notify: Callable[[], None] | None = None
) -> tuple[Dataset, tuple[LeftOut, ...]]:
    """The dataset with one sample of each group of identical images and copies, in its order.

    The image with the most pixels stays, then the one with the most bytes, then the first. Every image is read once
    (0.3 kB of each stay in memory). Samples that cannot be read stay, for others to report.

    Args:
        dataset: not a stream.
        notify: called for every sample that was read.

    Raises:
        UsageError: the dataset is a stream, which can be read only once.
    """
    if dataset.is_stream:
        raise UsageError("--dedupe: a stream can be read only once; convert it to shards or a folder first.")
    facts: list[ImageFacts] = []
    indices: list[int] = []
    for index in range(len(dataset)):
        try:
            sample = dataset[index]
            data = sample.image if isinstance(sample.image, bytes) else read_file(str(sample.image))
            facts.append(ImageFacts.of(sample.key, data))
            indices.append(index)
        except ImageError:
            pass  # whoever reads the dataset reports it
        if notify is not None:
            notify()
    extras = find_duplicates(facts, kinds=("identical", "copy")).extras()
    left_out = tuple(
        LeftOut(facts[row].name, facts[kept].name, facts[row].sha256 == facts[kept].sha256)
        for row, kept in sorted(extras.items())
    )
    dropped = {indices[row] for row in extras}
    return dataset.select(i for i in range(len(dataset)) if i not in dropped), left_out
