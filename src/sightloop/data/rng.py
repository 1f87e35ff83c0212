"""Random numbers that are a function of what they are for, never of the process, worker or order that asks."""

from __future__ import annotations

import hashlib

import numpy as np


def generator(*key: int | str) -> np.random.Generator:
    """The generator of this key, such as `generator(seed, epoch, sample_key)`; equal keys give equal numbers.

    Philox (Salmon et al. 2011), a counter-based generator, under the BLAKE2b hash of the key: neighbouring keys have
    nothing in common. 1 and "1" are different keys.
    """
    plain = [part if isinstance(part, str) else int(part) for part in key]
    digest = hashlib.blake2b(repr(plain).encode(), digest_size=16).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest, "little")))
