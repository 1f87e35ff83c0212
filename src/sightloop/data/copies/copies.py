"""Finder of copies: images re-encoded, resized, recolored, stretched, framed, cropped, mirrored or turned.

1. Candidates: the pHash of an image, in one of 8 orientations, is within 8 bits of that of another image or of one of
   its 86 crop windows. Multi-index hashing finds them without comparing all pairs.
2. Check: the crop window is fitted, and 143 frequencies are compared through it; their cosine is the similarity.
3. Colors: pairs that differ in hue are no copies (see `colors`); gray ones, which have none, may be.

Measured: copies of photographs reach 0.95, crops that are mirrored or turned too 0.98; unrelated photographs 0.66
(Flickr8k), shirts before plain walls 0.94.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sightloop.data.copies import image_hash
from sightloop.data.copies.colors import CELLS, CHANNELS, have_same_colors
from sightloop.data.copies.hash_neighbors import HashNeighbors
from sightloop.types import Floats, Floats32, Integers

HASH_RADIUS = 8  # bits of 64
COPY_THRESHOLD = 0.95

_SURE = 0.98  # similarity from which the window is not fitted any more
_QUERIES_AT_ONCE = 1024
_PAIRS_AT_ONCE = 4096
_CROP_COST = 2  # bits
# More similarity is asked of crops that are mirrored or turned too, which can be fitted in 600 ways; less of framed
# images, whose frequencies hold the edge of the frame.
_TURNED_CROP, _FRAME = 0.02, 0.02
_MIN_WINDOW = 0.6  # shortest side of a fitted window
# Steps of the search for a window: each edge out or in, then both rows or both columns together (a shift).
_MOVES = np.array([*np.eye(4), *-np.eye(4), (1, 1, 0, 0), (-1, -1, 0, 0), (0, 0, 1, 1), (0, 0, -1, -1)])


@dataclass(frozen=True, slots=True, eq=False)
class Copies:
    """Pairs of images, and how alike they are.

    Args:
        first: rows of one set, int64 `[p]`.
        second: rows of the other, int64 `[p]`.
        bits: difference of the pHashes in the best orientation and window, uint8 `[p]`.
        similarity: of the frequencies, at most 1, float32 `[p]`.
        orientation: of one image that makes it resemble the other, 0 to 7 (see `image_hash.oriented`), int64 `[p]`.
        window: index in `image_hash.WINDOWS` of the crop that makes one resemble the other, int64 `[p]`.
    """

    first: Integers
    second: Integers
    bits: NDArray[np.uint8]
    similarity: Floats32
    orientation: Integers
    window: Integers

    def __len__(self) -> int:
        return len(self.first)

    def where(self, chosen: NDArray[np.bool_]) -> Copies:
        """The chosen pairs; chosen: bool `[p]`."""
        return Copies(
            self.first[chosen],
            self.second[chosen],
            self.bits[chosen],
            self.similarity[chosen],
            self.orientation[chosen],
            self.window[chosen],
        )

    def swapped(self) -> Copies:
        """The same pairs with first and second exchanged."""
        return Copies(self.second, self.first, self.bits, self.similarity, self.orientation, self.window)


class CopySet:
    """Images among which copies are searched.

    Attributes:
        same: rows of images with equal spectra and colors, groups of two or more; the first of each is compared.
    """

    def __init__(self, spectra: NDArray[np.int8], colors: NDArray[np.int8] | None = None) -> None:
        """Images by their hashes.

        Args:
            spectra: int8 `[n, 16, 16]`; images without contrast (all 0) resemble nothing.
            colors: int8 `[n, 4, 4, 2]`; None leaves colors out of account.
        """
        if colors is None:
            colors = np.zeros((len(spectra), CELLS, CELLS, CHANNELS), np.int8)
        both = np.concatenate([spectra.reshape(len(spectra), -1), colors.reshape(len(spectra), -1)], axis=1)
        _, first, group = np.unique(both, axis=0, return_index=True, return_inverse=True)
        order = np.argsort(group.ravel(), kind="stable")
        starts = np.flatnonzero(np.diff(group.ravel()[order], prepend=-1))
        groups = np.split(order, starts[1:]) if len(order) else []
        contrast: NDArray[np.bool_] = (spectra != 0).reshape(len(spectra), -1).any(axis=1)
        self.same = [rows for rows in groups if len(rows) > 1 and contrast[rows[0]]]
        self._rows: Integers = np.sort(first[contrast[first]])
        self._spectra, self._colors = spectra[self._rows], colors[self._rows]
        self._oriented = image_hash.phash_oriented(self._spectra)  # [m, 8]
        hashes = [image_hash.phash(self._spectra, window) for window in image_hash.WINDOWS]
        self._windows = HashNeighbors(np.stack(hashes, axis=1).ravel(), HASH_RADIUS)

    def copies_in(self, other: CopySet, threshold: float = COPY_THRESHOLD) -> Iterator[Copies]:
        """Copies between two sets; first: rows of this one, second: of the other. A pair may come twice."""
        yield from self._as_crops_of(other, threshold, lambda first, second: np.ones(len(first), np.bool_))
        for copies in other._as_crops_of(
            self, threshold, lambda first, second: np.ones(len(first), np.bool_)
        ):
            yield copies.swapped()

    def copies(
        self,
        threshold: float = COPY_THRESHOLD,
        *,
        wanted: Callable[[Integers, Integers], NDArray[np.bool_]] | None = None,
    ) -> Iterator[Copies]:
        """Copies within the set; the pairs of `same` are not repeated. A pair may come twice.

        Args:
            threshold: least similarity.
            wanted: called with the rows of pairs before they are compared; bool `[p]`, which are compared.
        """

        def different(first: Integers, second: Integers) -> NDArray[np.bool_]:
            return (first != second) & (True if wanted is None else wanted(first, second))

        return self._as_crops_of(self, threshold, different)

    def _as_crops_of(
        self, other: CopySet, threshold: float, wanted: Callable[[Integers, Integers], NDArray[np.bool_]]
    ) -> Iterator[Copies]:
        """Pairs of an image of this set and an image of the other that it is equal to, or a crop of."""
        orientations, windows = image_hash.ORIENTATIONS, len(image_hash.WINDOWS)
        for start in range(0, len(self._rows), _QUERIES_AT_ONCE):
            queries = self._oriented[start : start + _QUERIES_AT_ONCE].ravel()
            best: dict[str, NDArray[np.int64]] = {}
            for row, hit, bits in other._windows.search(queries):
                # One number a pair and one a match of it, ordered by bits, so that the best match is the smallest. A
                # crop must be better by 2 bits than the whole image.
                first, second = row // orientations + start, hit // windows
                pair = first * len(other._rows) + second
                window = hit % windows
                cost = bits.astype(np.int64) + _CROP_COST * (window > 0)
                match = (cost * orientations + row % orientations) * windows + window
                _keep_best(best, pair, match)
            if best:
                yield from self._compare(other, best["pair"], best["match"], threshold, wanted)

    def _compare(
        self,
        other: CopySet,
        pairs: Integers,
        matches: Integers,
        threshold: float,
        wanted: Callable[[Integers, Integers], NDArray[np.bool_]],
    ) -> Iterator[Copies]:
        """The candidates that are copies. pairs, matches: `[p]`, as `_as_crops_of` numbers them."""
        for start in range(0, len(pairs), _PAIRS_AT_ONCE):
            pair, match = pairs[start : start + _PAIRS_AT_ONCE], matches[start : start + _PAIRS_AT_ONCE]
            first, second = np.divmod(pair, len(other._rows))
            chosen = wanted(self._rows[first], other._rows[second])
            if not chosen.any():
                continue
            first, second, match = first[chosen], second[chosen], match[chosen]
            match, window = np.divmod(match, len(image_hash.WINDOWS))
            cost, orientation = np.divmod(match, image_hash.ORIENTATIONS)
            same = have_same_colors(self._colors[first], other._colors[second], orientation)
            first, second, window = first[same], second[same], window[same]
            cost, orientation = cost[same], orientation[same]
            bits = cost - _CROP_COST * (window > 0)
            similarity = _similarities(self._spectra[first], other._spectra[second], orientation, window)
            least = threshold + _TURNED_CROP * ((orientation > 0) & (window > 0))
            least = least - _FRAME * image_hash.IS_FRAME[window]
            pairs_compared = Copies(
                self._rows[first], other._rows[second], bits.astype(np.uint8), similarity, orientation, window
            ).where(similarity >= least)
            if len(pairs_compared):
                yield pairs_compared


def _keep_best(best: dict[str, Integers], pair: Integers, match: Integers) -> None:
    """Adds matches to those kept, and keeps the smallest of each pair: best["pair"] and best["match"], `[p]` each."""
    if best:
        pair, match = np.concatenate([best["pair"], pair]), np.concatenate([best["match"], match])
    order = np.lexsort((match, pair))
    pair, match = pair[order], match[order]
    is_first = np.diff(pair, prepend=-1) != 0
    best["pair"], best["match"] = pair[is_first], match[is_first]


def _similarities(
    full: NDArray[np.int8], cropped: NDArray[np.int8], orientation: Integers, window: Integers
) -> Floats32:
    """Similarities `[p]` of images, in an orientation, to others through the best crop window near a coarse one.

    Args:
        full: spectra `[p, 16, 16]`.
        cropped: spectra `[p, 16, 16]` of the images that are cut to the window.
        orientation: of the first images, `[p]`.
        window: index in `image_hash.WINDOWS`, `[p]`.
    """
    turned = full.copy()
    for number in np.unique(orientation).tolist():
        turned[orientation == number] = image_hash.oriented(full[orientation == number], number)
    target = image_hash.unit_vectors(turned)  # [p, 143]
    fitted: Floats = np.array(image_hash.WINDOWS)[window]  # [p, 4]
    best = np.einsum("pd,pd->p", image_hash.window_vectors(cropped, fitted), target)
    # Hill climbing: the best of 12 neighbors; where none is better, half the step.
    step = np.where(best < _SURE, 0.04, 0.0)
    while len(active := np.flatnonzero(step > 0.004)):
        neighbors = fitted[active, None] + step[active, None, None] * _MOVES  # [a, 12, 4]
        vectors = image_hash.window_vectors(
            np.repeat(cropped[active], len(_MOVES), axis=0), neighbors.reshape(-1, 4)
        )
        similarity = np.einsum("amd,ad->am", vectors.reshape(len(active), len(_MOVES), -1), target[active])
        sides = neighbors[:, :, 1::2] - neighbors[:, :, ::2]
        is_valid = (neighbors.min(2) >= 0) & (neighbors.max(2) <= 1) & (sides.min(2) >= _MIN_WINDOW)
        similarity[~is_valid] = -1
        choice = similarity.argmax(1)
        value = similarity[np.arange(len(active)), choice]
        is_better = value > best[active] + 1e-4
        better = active[is_better]
        best[better], fitted[better] = value[is_better], neighbors[is_better, choice[is_better]]
        step[active[~is_better]] /= 2
        step[better[best[better] >= _SURE]] = 0
    return best
