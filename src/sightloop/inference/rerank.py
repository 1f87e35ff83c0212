"""Re-ranking: the pairs that ITC ranks highest, and a cache of encoded images for ITM.

A re-ranked pair's score is its ITM logit of "match" plus its ITC similarity, as in the evaluation of the BLIP code.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from sightloop.types import Encoded, Floats32, Integers

# The score of a pair that ITC did not bring into the top k, as the evaluation of the BLIP code fills its matrix.
NOT_RANKED = -100.0

_SIMILARITIES_AT_ONCE = 1 << 24


class ImageCache:
    """CPU cache of encoded images, in their own precision.

    Images that do not fit are not kept and are encoded again when needed.

    Args:
        room: greatest size in bytes.
    """

    def __init__(self, room: int = 2 << 30) -> None:
        self._free = room
        self._images: dict[str, Encoded] = {}

    def put(self, key: str, image: Encoded, row: int) -> None:
        """Keeps one image of a batch, tokens `[B, N, D]`, if it fits."""
        tokens = image.tokens[row : row + 1]
        size = tokens.numel() * tokens.element_size()
        if size <= self._free:
            self._free -= size
            self._images[key] = Encoded(tokens.cpu())

    def pop(self, key: str) -> Encoded | None:
        """Removes an image and returns it, tokens `[1, N, D]`; None if it is not in the cache."""
        image = self._images.pop(key, None)
        if image is not None:
            self._free += image.tokens.numel() * image.tokens.element_size()
        return image


def cosines(images: Floats32, texts: Floats32) -> Floats32:
    """Cosines summed in float64, so that no machine orders them differently.

    Args:
        images: unit vectors `[n, P]`, or `[n, Q, P]`: the vector nearest to the text counts.
        texts: unit vectors `[m, P]`.

    Returns:
        float32 `[n, m]`.
    """
    similarities = np.empty((len(images), len(texts)), np.float32)
    columns = texts.astype(np.float64).T
    vectors = images.size // max(1, len(images) * images.shape[-1])  # Q
    step = max(1, _SIMILARITIES_AT_ONCE // max(1, len(texts) * vectors))
    for start in range(0, len(images), step):
        part = images[start : start + step].astype(np.float64) @ columns
        similarities[start : start + step] = part if part.ndim == 2 else part.max(axis=1)
    return similarities


def top_k(scores: NDArray[np.floating], k: int) -> Integers:
    """Columns of the k highest scores of each row, best first, ties in order: `[n, m]` -> `[n, min(k, m)]`."""
    k = min(k, scores.shape[1])
    columns = np.empty((len(scores), k), np.int64)
    for i, row in enumerate(scores):
        level = np.partition(row, -k)[-k]  # the k-th highest score
        above = np.flatnonzero(row > level)
        chosen = np.concatenate([above, np.flatnonzero(row == level)[: k - len(above)]])
        columns[i] = chosen[np.lexsort((chosen, -row[chosen]))]
    return columns


def pairs_to_match(texts_of: Integers, images_of: Integers) -> list[Integers]:
    """For each image the texts that ITM must see it with, ascending, no pair twice.

    Args:
        texts_of: `[n, k]`, the best texts of each image.
        images_of: `[m, k]`, the best images of each text.

    Returns:
        n arrays of rows in 0..m-1.
    """
    # A pair (image i, text j) is the number i * m + j.
    images, texts = len(texts_of), len(images_of)
    by_image = np.repeat(np.arange(images), texts_of.shape[1]) * texts + texts_of.ravel()
    by_text = images_of.ravel() * texts + np.repeat(np.arange(texts), images_of.shape[1])
    pairs: Integers = np.union1d(by_image, by_text)
    columns: Integers = pairs % texts
    return np.split(columns, np.searchsorted(pairs, np.arange(1, images) * texts))
