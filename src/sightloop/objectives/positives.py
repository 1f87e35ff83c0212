"""Pairs of images and texts that match: those of one sample, and a text that is also a caption of another sample."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

NO_TEXT, NO_CAPTION = -1, -2  # padding; never equal to each other or to the id of a text


@dataclass(frozen=True, slots=True)
class Positives:
    """Which images and texts of C pairs match.

    Args:
        ids: int64 `[C]`, the sample of each pair.
        texts: int64 `[C]`, an id of each text, equal for equal texts, `NO_TEXT` if unknown. None if no text belongs
            to several samples: then a pair matches if its ids are equal.
        captions: int64 `[C, M]`, ids of the texts that describe each image, padded with `NO_CAPTION`.
    """

    ids: Tensor
    texts: Tensor | None = None
    captions: Tensor | None = None

    @classmethod
    def from_texts(cls, ids: Tensor, texts: Tensor, captions: Tensor) -> Positives:
        """Keeps of the captions only those that several samples share, usually none.

        Args:
            ids: int64 `[C]`, the sample of each pair.
            texts: int64 `[C]`, id of each text.
            captions: int64 `[C, M]`, ids of all captions of each sample, padded.
        """
        texts_of = torch.cat([texts[:, None], captions], dim=1)  # [C, 1 + M]
        known = texts_of >= 0
        owner = ids[:, None].expand_as(texts_of)[known]
        values, which = texts_of[known].unique(return_inverse=True)
        none = torch.zeros_like(values)
        low = none.scatter_reduce(0, which, owner, "amin", include_self=False)
        high = none.scatter_reduce(0, which, owner, "amax", include_self=False)
        shared = values[low != high]
        if not len(shared):
            return cls(ids)
        captions = torch.where(torch.isin(captions, shared), captions, NO_CAPTION)
        width = max(1, int((captions >= 0).sum(1).max()))
        return cls(ids, texts, captions.sort(dim=1, descending=True).values[:, :width])

    def of_images(self, rows: Tensor, columns: slice = slice(None)) -> Tensor:
        """bool `[n, c]`: whether the image of each of n rows matches the text of each column."""
        same = self.ids[rows, None] == self.ids[columns]
        if self.texts is not None and self.captions is not None:
            for captions in self.captions[rows].T:
                same |= captions[:, None] == self.texts[columns]
        return same

    def of_texts(self, rows: Tensor) -> Tensor:
        """bool `[n, C]`: whether the text of each of n rows matches the image of each column."""
        same = self.ids[rows, None] == self.ids
        if self.texts is not None and self.captions is not None:
            for captions in self.captions.T:
                same |= self.texts[rows, None] == captions
        return same
