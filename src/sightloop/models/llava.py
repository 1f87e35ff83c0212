"""LLaVA 1.5 and 1.6: patches of a CLIP tower, projected, stand among the words that a language model goes on from.

Liu et al. 2023, arXiv 2310.03744 (1.5: one image of 336 pixels, an MLP between the towers); Liu et al. 2024,
"LLaVA-NeXT" (1.6: beside the whole image its tiles, at the resolution of a list that fits it best).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor, nn

from sightloop.models.chat_templates import render_chat, template_prompts
from sightloop.nn.attention import Linear
from sightloop.nn.blocks import ACTIVATIONS
from sightloop.towers.text import LanguageConfig, LanguageModel, TextConfig, insert_image_tokens
from sightloop.towers.vit import Vit, VitConfig
from sightloop.types import Encoded, Message


@dataclass(frozen=True, slots=True)
class LlavaConfig:
    """Both towers, and what stands between them.

    depths: after how many blocks of the image tower its states are taken; several stand side by side. class_token:
    whether the class token's are among them. activation, projector_bias: of the MLP. image_id: the id in whose place a
    image's tokens stand. tiles: the resolutions (height, width) that images are cut at, () for 1.5. dialogue: the
    form of its prompts (`models.chat_templates`), "" where its checkpoint has one that is not known.
    """

    vision: VitConfig
    language: LanguageConfig
    depths: tuple[int, ...]
    class_token: bool
    activation: str
    projector_bias: bool
    image_id: int
    end_id: int
    tiles: tuple[tuple[int, int], ...] = ()
    chat_template: str = "vicuna"
    start_ids: tuple[int, ...] = ()
    labels: tuple[str, ...] = ()

    @property
    def text(self) -> TextConfig:
        """The language tower's sizes."""
        return self.language.text


class Projector(nn.Module):
    """Patches to vectors that stand among words: two linear layers (section 3.3), `[B, N, V]` -> `[B, N, D]`."""

    def __init__(self, config: LlavaConfig) -> None:
        super().__init__()
        dim = config.text.dim
        self.fc1 = Linear(config.vision.dim * len(config.depths), dim, bias=config.projector_bias)
        self.fc2 = Linear(dim, dim, bias=config.projector_bias)
        self.activation = ACTIVATIONS[config.activation]

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.activation(self.fc1(x)))


class Llava(nn.Module):
    """Image tower, projector, language model; with tiles also a learned vector that ends each row of patches."""

    def __init__(self, config: LlavaConfig) -> None:
        super().__init__()
        self.config = config
        self.vision = Vit(config.vision)
        self.projector = Projector(config)
        if config.tiles:
            self.newline = nn.Parameter(torch.empty(config.text.dim))
        self.language = LanguageModel(config.language)

    @property
    def capabilities(self) -> frozenset[str]:
        """The verbs that it has."""
        return frozenset(("caption", "answer", "chat"))

    @property
    def prompts(self) -> Mapping[str, str]:
        """Job -> prompt, with "<image>" where the image stands and "{}" for the caller's words."""
        return template_prompts(self.config.chat_template)

    def render_chat(self, messages: Sequence[Message]) -> str:
        """The prompt of a conversation, "<image>" for each of its images."""
        return render_chat(self.config.chat_template, messages)

    def encode_image(self, pixels: Tensor, grid: tuple[int, int, int, int] | None = None) -> Encoded:
        """pixels `[B, 3, S, S]` -> Encoded(tokens `[B, N, D]`).

        grid, with tiles: rows and columns of them, and how many patches at the top (and bottom) and at the left (and
        right) only cover margins. pixels are then `[B, 3, (1 + rows * columns) * S, S]`: the whole image, and below
        it its tiles, row by row.
        """
        side = self.config.vision.image_size
        parts = pixels.unflatten(2, (-1, side)).transpose(1, 2).flatten(0, 1)  # [B * T, 3, S, S]
        states = self._states(parts)
        tokens = self.projector(states if self.config.class_token else states[:, 1:])
        if grid is None:
            return Encoded(tokens)
        return Encoded(self._packed(tokens.unflatten(0, (pixels.shape[0], -1)), grid))

    def _states(self, pixels: Tensor) -> Tensor:
        """What stands in the image tower after each of `depths` blocks, side by side, without its last norm."""
        x = self.vision.norm_in(self.vision.embed(pixels))
        found = {0: x}
        for depth, block in enumerate(islice(self.vision.blocks, max(self.config.depths)), start=1):
            found[depth] = x = block(x)
        return torch.cat([found[depth] for depth in self.config.depths], dim=-1)

    def _packed(self, tokens: Tensor, grid: tuple[int, int, int, int]) -> Tensor:
        """The whole image's tokens, then those of its tiles as rows of one image without its margins, `newline`
        after each: `[B, T, N, D]` -> `[B, N', D]`."""
        rows, columns, top, left = grid
        patches = self.config.vision.image_size // self.config.vision.patch
        x = tokens[:, 1:].unflatten(2, (patches, patches)).unflatten(1, (rows, columns))
        x = x.transpose(2, 3).flatten(3, 4).flatten(1, 2)  # [B, rows * patches, columns * patches, D]
        x = x[:, top : x.shape[1] - top, left : x.shape[2] - left]
        ends = self.newline.expand(*x.shape[:2], 1, -1)
        return torch.cat([tokens[:, 0], torch.cat([x, ends], dim=2).flatten(1, 2)], dim=1)

    def build_prefix(self, image_tokens: Tensor, ids: Tensor, valid_mask: Tensor) -> Encoded:
        """What `language` goes on from: ids `[R, L]`, padded in front where `real` is False, with the tokens `[K, D]`
        of all their images in place of `image_id`."""
        words = self.language.text.embed_tokens(ids)
        return Encoded(
            insert_image_tokens(words, image_tokens, ids, self.config.image_id, valid_mask), mask=valid_mask
        )
