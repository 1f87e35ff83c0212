"""learned.bin: short digests of the images that a model has learned, beside its weights.

Each digest is the start of the BLAKE2b hash of an image's encoded bytes. They are short: of a million other images some
60 match one of a thousand digests by chance.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from hashlib import blake2b
from pathlib import Path

from sightloop.data.atomic import atomic_write

DIGESTS_FILE, DIGEST_BYTES = "learned.bin", 3  # file in a model's folder; bytes of an image's digest


def read_digests(folder: Path) -> frozenset[bytes]:
    """Digests of the images that the model in a folder has learned; empty if it comes without."""
    path = folder / DIGESTS_FILE
    known = path.read_bytes() if path.is_file() else b""
    return frozenset(known[at : at + DIGEST_BYTES] for at in range(0, len(known), DIGEST_BYTES))


def write_digests(folder: Path, digests: Collection[bytes]) -> None:
    """Writes the digests of a model's images into its folder."""
    atomic_write(folder / DIGESTS_FILE, b"".join(sorted(set(digests) - {b""})))


def digest_of_image(data: bytes) -> bytes:
    """Digest of an encoded image, DIGEST_BYTES long."""
    return blake2b(data, digest_size=DIGEST_BYTES).digest()


def count_learned(digests: Iterable[bytes], known: Collection[bytes]) -> int:
    """Number of images that are among the learned ones; 0 if chance explains the matches.

    Args:
        digests: Of the images.
        known: Of `read_digests`.
    """
    if not known:
        return 0
    learned = [digest in known for digest in digests]
    by_chance = len(learned) * len(known) / 256**DIGEST_BYTES  # a Poisson variable: its deviation is the root
    return sum(learned) if sum(learned) > by_chance + 4 * by_chance**0.5 else 0
