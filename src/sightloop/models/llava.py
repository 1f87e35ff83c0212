"""LLaVA 1.5 and 1.6: projected patch tokens of a CLIP tower among the words of a language model's prompt.

Liu et al. 2023, arXiv 2310.03744 (1.5: one image of 336 pixels, an MLP between the towers); Liu et al. 2024,
"LLaVA-NeXT" (1.6: the whole image and its tiles, at the resolution of a list that fits it best).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import ClassVar

import torch
from torch import Tensor, nn

from sightloop.models.chat_templates import CHAT_TEMPLATES, render_chat, template_prompts
from sightloop.nn.attention import Linear
from sightloop.nn.blocks import ACTIVATIONS
from sightloop.towers.text import LanguageConfig, LanguageModel, TextConfig, insert_image_tokens
from sightloop.towers.vit import Vit, VitConfig
from sightloop.types import ChatTemplate, Encoded, Message


@dataclass(frozen=True, slots=True)
class LlavaConfig:
    """Sizes of LLaVA's towers and projector, and the special tokens.

    Args:
        vision: the image tower's config.
        language: the language model's.
        depths: after how many blocks of the image tower its states are taken; several are concatenated.
        class_token: whether the class token's state is among the image tokens.
        activation: of the projector.
        projector_bias: whether the projector's layers have a bias.
        image_id: id of one image token in a prompt.
        end_id: id of EOS.
        tiles: resolutions (height, width) at which images are tiled, () for 1.5.
        chat_template: name of its chat template (`models.chat_templates`), "" if the checkpoint's is not known.
        start_ids: always (); its texts continue the prompt.
        labels: names of fine-tuned classes; always ().
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
        """The language tower's config."""
        return self.language.text


class Projector(nn.Module):
    """MLP of two layers that maps patches to the language model's width (section 3.3): `[B, N, V]` -> `[B, N, D]`."""

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

    capabilities = frozenset({"caption", "answer", "chat"})
    objectives = frozenset({"prompted"})
    chat_templates: ClassVar[Mapping[str, ChatTemplate]] = CHAT_TEMPLATES

    def __init__(self, config: LlavaConfig) -> None:
        super().__init__()
        self.config = config
        self.vision = Vit(config.vision)
        self.projector = Projector(config)
        if config.tiles:
            self.newline = nn.Parameter(torch.empty(config.text.dim))
        self.language = LanguageModel(config.language)

    @property
    def prompts(self) -> Mapping[str, str]:
        """Task -> prompt, IMAGE_PLACEHOLDER for the image and "{}" for the caller's words."""
        return template_prompts(self.config.chat_template)

    def render_chat(self, messages: Sequence[Message]) -> str:
        """The prompt of a conversation, IMAGE_PLACEHOLDER for each of its images."""
        return render_chat(self.config.chat_template, messages)

    @property
    def answer_start(self) -> tuple[int, ...]:
        """Ids that every answer begins with: none."""
        return ()

    def encode_image(self, pixels: Tensor) -> Encoded:
        """pixels `[B, 3, S, S]` -> image tokens `[B, N, D]`."""
        return Encoded(self._project(pixels))

    def encode_tiles(self, pixels: Tensor, grid: tuple[int, int, int, int]) -> Encoded:
        """Image tokens of tiled images of one layout (1.6).

        Args:
            pixels: `[B, 3, (1 + rows * columns) * S, S]`: the whole image, and below it its tiles, row by row.
            grid: rows and columns of tiles, and how many rows of patches at the top (and bottom) and columns at the
                left (and right) cover only margins.

        Returns:
            tokens `[B, N, D]`: those of the whole image, then those of the tiles as one image without its margins, with
            the learned newline vector after each row.
        """
        side = self.config.vision.image_size
        tiles = pixels.unflatten(2, (-1, side)).transpose(1, 2).flatten(0, 1)  # [B * T, 3, S, S]
        tokens = self._project(tiles)
        return Encoded(self._pack_tiles(tokens.unflatten(0, (pixels.shape[0], -1)), grid))

    def _project(self, pixels: Tensor) -> Tensor:
        """pixels `[B, 3, S, S]` -> image tokens `[B, N, D]`."""
        states = self._states(pixels)
        return self.projector(states if self.config.class_token else states[:, 1:])

    def _states(self, pixels: Tensor) -> Tensor:
        """The image tower's states after each of `depths` blocks, concatenated, without its last norm: `[B, N, V]`."""
        x = self.vision.norm_in(self.vision.embed(pixels))
        states = {0: x}
        for depth, block in enumerate(islice(self.vision.blocks, max(self.config.depths)), start=1):
            states[depth] = x = block(x)
        return torch.cat([states[depth] for depth in self.config.depths], dim=-1)

    def _pack_tiles(self, tokens: Tensor, grid: tuple[int, int, int, int]) -> Tensor:
        """Tokens of the whole image and its T - 1 tiles, `[B, T, N, D]` -> `[B, N', D]`; see `encode_tiles`."""
        rows, columns, top, left = grid
        patches = self.config.vision.image_size // self.config.vision.patch
        x = tokens[:, 1:].unflatten(2, (patches, patches)).unflatten(1, (rows, columns))
        x = x.transpose(2, 3).flatten(3, 4).flatten(1, 2)  # [B, rows * patches, columns * patches, D]
        x = x[:, top : x.shape[1] - top, left : x.shape[2] - left]
        newlines = self.newline.expand(*x.shape[:2], 1, -1)
        return torch.cat([tokens[:, 0], torch.cat([x, newlines], dim=2).flatten(1, 2)], dim=1)

    def build_prefix(self, image_tokens: Tensor, ids: Tensor, valid_mask: Tensor) -> Encoded:
        """Prefix of the language model: word vectors, with image tokens at the places of `image_id`.

        Args:
            image_tokens: `[K, D]`, those of all images in the order of their places.
            ids: `[R, L]`, `image_id` for each image token.
            valid_mask: bool `[R, L]`, False for padding, which comes first.

        Returns:
            tokens `[R, L, D]`, mask `valid_mask`.
        """
        # The original code's vocabulary has no row for an image token.
        words = self.language.text.embed_tokens(ids.masked_fill(ids == self.config.image_id, 0))
        x = insert_image_tokens(words, image_tokens, ids, self.config.image_id, valid_mask)
        return Encoded(x, mask=valid_mask)
