"""learned.bin: short digests of the images that a model has learned, beside its weights.

Each digest is the start of the BLAKE2b hash of an image's encoded bytes. They are short: of a million other images some
60 match one of a thousand digests by chance.
"""

from __future__ import annotations

from collections.abc import Collection
from hashlib import blake2b
from pathlib import Path

from sightloop.data.atomic import atomic_write
from sightloop.data.datasets.dataset import Dataset
from sightloop.data.images.decode import read_file
from sightloop.errors import ImageError

DIGESTS_FILE, DIGEST_BYTES = "learned.bin", 3  # file in a model's folder; bytes of an image's digest


def read_digests(folder: Path) -> frozenset[bytes]:
    """Digests of the images that the model in a folder has learned; empty if it comes without."""
    path = folder / DIGESTS_FILE
    known = path.read_bytes() if path.is_file() else b""
    return frozenset(known[at : at + DIGEST_BYTES] for at in range(0, len(known), DIGEST_BYTES))


def write_digests(folder: Path, digests: Collection[bytes]) -> None:
    """Writes the digests of a model's images into its folder."""
    atomic_write(folder / DIGESTS_FILE, b"".join(sorted(set(digests) - {b""})))


def image_digest(dataset: Dataset, index: int) -> bytes:
    """Digest of a sample's encoded image, DIGEST_BYTES long; empty if the image cannot be read."""
    try:
        image = dataset[index].image
        data = image if isinstance(image, bytes) else read_file(str(image))
    except ImageError:
        return b""
    return blake2b(data, digest_size=DIGEST_BYTES).digest()


def count_learned(dataset: Dataset, known: Collection[bytes]) -> int:
    """Number of a dataset's images that are among the learned ones; 0 if chance explains the matches.

    Args:
        dataset: No stream.
        known: Of `read_digests`.
    """
    if not known:
        return 0
    matches = sum(image_digest(dataset, index) in known for index in range(len(dataset)))
    by_chance = len(dataset) * len(known) / 256**DIGEST_BYTES  # a Poisson variable: its deviation is the root
    return matches if matches > by_chance + 4 * by_chance**0.5 else 0
