"""Re-ranking: pairs chosen by ITC similarity, judged by ITM, all texts of an image against one image memory.

The score of a pair is its ITM logit of "match" plus its ITC similarity, as in the evaluation of the BLIP code.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from sightloop.inference.model import Model
from sightloop.tasks.match import match_logits
from sightloop.types import Encoded, Floats32, Integers

_TOKENS_AT_ONCE = 4096  # text tokens in one pass
_ROWS = 1 << 24  # similarities sorted at a time
_CALL = 64  # what a pass costs beside its tokens, in text tokens
_MEMORY = 7  # image tokens whose keys and values cost as much as one text token


class TokenizedTexts:
    """Texts tokenised once, for many images."""

    def __init__(self, model: Model, texts: Sequence[str]) -> None:
        tokens = model.tokenizer.encode(list(texts))
        self._ids = torch.from_numpy(tokens.ids).to(model.device)
        self._lengths = torch.from_numpy(tokens.lengths).to(model.device)
        self.lengths: Integers = tokens.lengths

    def rows(self, index: Integers) -> tuple[torch.Tensor, torch.Tensor]:
        """ids `[n, L]`, cut to the longest of these texts, and lengths `[n]`."""
        where = torch.from_numpy(index).to(self._ids.device)
        return self._ids[where, : int(self.lengths[index].max())], self._lengths[where]


class ImageCache:
    """Encoded images, kept in their own precision on the CPU as long as there is room (bytes); the rest is encoded
    again by who needs it."""

    def __init__(self, room: int = 2 << 30) -> None:
        self._left = room
        self._kept: dict[str, Encoded] = {}

    def keep(self, key: str, image: Encoded, row: int) -> None:
        """Keep one image of a batch, if there is room."""
        tokens = image.tokens[row : row + 1]
        size = tokens.numel() * tokens.element_size()
        if size <= self._left:
            self._left -= size
            self._kept[key] = Encoded(tokens.cpu())

    def take(self, key: str) -> Encoded | None:
        """Hand an image out, once."""
        image = self._kept.pop(key, None)
        if image is not None:
            self._left += image.tokens.numel() * image.tokens.element_size()
        return image


def match_scores(
    model: Model, image: Encoded, texts: TokenizedTexts, rows_of: Sequence[Integers]
) -> list[Floats32]:
    """ITM logits (no match, match), float32 `[n, 2]`, of each of B images with its own n texts.

    rows_of: for each image the rows of `texts`. An image's texts are query rows against its one memory, those of
    like length together; images with one text each go together.
    """
    tokens = image.tokens.to(model.device)
    out = [np.zeros((len(rows), 2), np.float32) for rows in rows_of]
    single = [b for b, rows in enumerate(rows_of) if len(rows) == 1]
    own = np.array([rows_of[b][0] for b in single], np.int64)
    for part in _like_lengths(texts.lengths[own], _CALL):
        logits = match_logits(
            model.network, Encoded(tokens[[single[i] for i in part]]), *texts.rows(own[part])
        )
        for i, values in zip(part, logits.cpu().numpy(), strict=True):
            out[single[i]][0] = values
    for b, rows in enumerate(rows_of):
        if len(rows) > 1:
            memory = Encoded(tokens[b : b + 1])
            for part in _like_lengths(texts.lengths[rows], _CALL + tokens.shape[1] // _MEMORY):
                out[b][part] = match_logits(model.network, memory, *texts.rows(rows[part])).cpu().numpy()
    return out


def _like_lengths(lengths: Integers, price: int) -> Iterator[Integers]:
    """Texts for one pass each, so that padding and passes (each at a price, in tokens) cost least together."""
    order = np.argsort(lengths, kind="stable")
    levels, counts = np.unique(lengths, return_counts=True)
    ends = np.concatenate([[0], np.cumsum(counts)])
    # best[j]: the least cost of the texts of the j shortest lengths, and where their last pass starts.
    best: list[tuple[int, int]] = [(0, 0)]
    for j in range(1, len(ends)):
        best.append(min((best[i][0] + price + int((ends[j] - ends[i]) * levels[j - 1]), i) for i in range(j)))
    cuts = [len(ends) - 1]
    while cuts[-1]:
        cuts.append(best[cuts[-1]][1])
    for high, low in pairwise(cuts):
        rows = max(1, _TOKENS_AT_ONCE // int(levels[high - 1]))
        passes = order[ends[low] : ends[high]]
        yield from np.split(passes, range(rows, len(passes), rows))


def cosines(images: Floats32, texts: Floats32) -> Floats32:
    """float32 `[images, texts]`; summed in float64, so that no machine orders them differently.

    Of several vectors an image, `[images, q, d]`, the nearest to a text counts.
    """
    out = np.empty((len(images), len(texts)), np.float32)
    turned = texts.astype(np.float64).T
    step = max(1, _ROWS // max(1, len(texts) * (images.size // max(1, len(images) * images.shape[-1]))))
    for low in range(0, len(images), step):
        part = images[low : low + step].astype(np.float64) @ turned
        out[low : low + step] = part if part.ndim == 2 else part.max(axis=1)
    return out


def top_k(scores: NDArray[Any], k: int) -> Integers:
    """The k highest of each row, `[rows, min(k, columns)]`, best first; of equal ones the first."""
    k = min(k, scores.shape[1])
    out = np.empty((len(scores), k), np.int64)
    for place, row in enumerate(scores):
        level = np.partition(row, -k)[-k]
        above = np.flatnonzero(row > level)
        chosen = np.concatenate([above, np.flatnonzero(row == level)[: k - len(above)]])
        out[place] = chosen[np.lexsort((chosen, -row[chosen]))]
    return out


def pairs_to_judge(texts_of: Integers, pictures_of: Integers) -> list[Integers]:
    """For each image the texts that it must be judged with, ascending, no pair twice.

    texts_of `[images, k]`: the best texts of each image; pictures_of `[texts, k]`: the best images of each text.
    """
    pictures, texts = len(texts_of), len(pictures_of)
    forth = np.repeat(np.arange(pictures), texts_of.shape[1]) * texts + texts_of.ravel()
    back = pictures_of.ravel() * texts + np.repeat(np.arange(texts), pictures_of.shape[1])
    both: Integers = np.union1d(forth, back)
    rest: Integers = both % texts
    return np.split(rest, np.searchsorted(both, np.arange(1, pictures) * texts))
