"""Heads of training objectives that no checkpoint keeps."""

from __future__ import annotations

from sightloop.models.blip import LmHead
from sightloop.towers.text import TextConfig


class WordHead(LmHead):
    """BERT's head for masked language modeling, states `[..., D]` -> logits `[..., V]`.

    Args:
        config: sizes of the text tower.
        mask_id: id of [MASK].
    """

    def __init__(self, config: TextConfig, mask_id: int) -> None:
        super().__init__(config)
        self.mask_id = mask_id
