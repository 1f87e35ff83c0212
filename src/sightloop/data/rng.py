"""Keyed random generators: numbers depend on the key alone, not on the process, worker or order of calls."""

from __future__ import annotations

import hashlib

import numpy as np


def generator(*key: int | str) -> np.random.Generator:
    """NumPy generator for a key; equal keys give equal numbers.

    Philox (Salmon et al. 2011), a counter-based generator, keyed with the BLAKE2b hash of the key. Hashing makes
    the streams of neighboring keys, such as epochs 3 and 4, independent.

    Args:
        *key: Integers and strings, such as `generator(seed, epoch, sample_key)`. `1` and `"1"` are different keys.
    """
    parts = [
        part if isinstance(part, str) else int(part) for part in key
    ]  # int(): NumPy integers print otherwise
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=16).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest, "little")))
