"""Patches to tokens, and the resizing of learned position tables."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class PatchEmbed(nn.Module):
    """Cuts a picture into patches, projects each, puts a class token first, adds learned positions (ViT, section 3.1).

    pixels `[B, 3, H, W]` -> `[B, 1 + H/patch * W/patch, D]`.
    """

    def __init__(self, image_size: int, patch: int, dim: int, *, bias: bool) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, dim, patch, stride=patch, bias=bias)
        self.class_token = nn.Parameter(torch.empty(dim))
        self.position = nn.Parameter(torch.empty(1 + (image_size // patch) ** 2, dim))

    def forward(self, pixels: Tensor) -> Tensor:
        patches = self.proj(pixels).flatten(2).transpose(1, 2)
        first = self.class_token.expand(patches.shape[0], 1, -1)
        tokens = torch.cat([first, patches], dim=1) + self.position
        return tokens


def resize_positions(table: Tensor, grid: int) -> Tensor:
    """A learned position table `[1 + n*n, D]` (class token first) for another grid: `[1 + grid*grid, D]`.

    Bicubic, without aligned corners, as the BLIP and DINO code does it.
    """
    side = int((table.shape[0] - 1) ** 0.5)
    if side == grid:
        return table
    patches = table[1:].reshape(1, side, side, -1).permute(0, 3, 1, 2)
    patches = nn.functional.interpolate(patches, size=(grid, grid), mode="bicubic", align_corners=False)
    return torch.cat([table[:1], patches.permute(0, 2, 3, 1).reshape(grid * grid, -1)])
