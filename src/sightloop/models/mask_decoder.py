"""The decoder of PaliGemma's segment words: 16 of 128 words, a grid of 4 x 4, become a mask of 64 x 64.

A VQ-VAE's codebook and decoder (van den Oord et al. 2017, arXiv 1711.00937; Ning et al. 2023, arXiv 2301.02229), as
PaliGemma reads them (Beyer et al. 2024, arXiv 2407.07726, section 3.2.4). The weights are those of the published
`vae-oid.npz`.
"""

from __future__ import annotations

from itertools import pairwise

from torch import Tensor, nn

_GRID = 4


class Residual(nn.Module):
    """Convolutions of 3x3, 3x3 and 1x1, beside a residual: `[B, C, H, W]` -> the same."""

    def __init__(self, width: int) -> None:
        super().__init__()
        first, second = (nn.Conv2d(width, width, 3, padding=1) for _ in range(2))
        self.net = nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), nn.Conv2d(width, width, 1))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.net(x)


class MaskDecoder(nn.Module):
    """Segment words `[B, 16]`, row by row -> how much of each place is the thing's: `[B, 64, 64]`, 0..1.

    words: how many there are. code: the width of a word's vector. width: of the first layers; each but the first of the
    four that double the sides halves it.
    """

    def __init__(self, words: int, code: int, width: int) -> None:
        super().__init__()
        self.words = nn.Embedding(words, code)
        layers: list[nn.Module] = [nn.Conv2d(code, width, 1), nn.ReLU(), Residual(width), Residual(width)]
        for before, after in pairwise((width, width, width // 2, width // 4, width // 8)):
            layers += [nn.ConvTranspose2d(before, after, 4, stride=2, padding=1), nn.ReLU()]
        self.decoder = nn.Sequential(*layers, nn.Conv2d(width // 8, 1, 1))

    def forward(self, segments: Tensor) -> Tensor:
        grid = self.words(segments).unflatten(1, (_GRID, _GRID)).permute(0, 3, 1, 2)  # [B, C, 4, 4]
        return (self.decoder(grid)[:, 0] * 0.5 + 0.5).clamp(0, 1)
