"""Heat maps of what a score looks at: Grad-CAM of the attention to the patches of an image, for a text or a word."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from torch import Tensor

from sightloop.data.images.preprocess import input_box, normalize
from sightloop.data.text.tokenizer import Tokenizer
from sightloop.errors import UnsupportedError, UsageError
from sightloop.inference.image_encoding import ImageEncoder
from sightloop.inference.matching import TokenizedTexts
from sightloop.protocols import Embedder, Explainable, Matcher, PatchAttention, require
from sightloop.tasks.explain import grad_cam
from sightloop.types import Encoded, Floats32, ImageSpec, Integers, Pixels, Size

ExplainedScore: TypeAlias = Literal["match", "similarity"]
_TEXTS_AT_ONCE = 8
# Of L layers, the default is number 0.6 L: 7 of 12 in the demos of ALBEF and BLIP, the last of 3.
_DEPTH = 0.6


class HeatMap(np.ndarray[Any, np.dtype[np.float32]]):
    """Heat map of an image, float32 `[H, W]` in pixels of the upright image; at least 0, sums to 1.

    Attributes:
        text: what is explained.
        word: the word of it, "" for the whole text.
        score: "match" (ITM) or "similarity" (cosine).
        value: the score itself: probability or cosine.
        layer: index of the attention layer.
        head: index of its head; None for the mean of all.
        grid: float32 `[h, w]`, the evidence of each patch before it is sharpened and enlarged.
    """

    text: str
    word: str
    score: ExplainedScore
    value: float
    layer: int
    head: int | None
    grid: Floats32

    def __array_finalize__(self, source: object) -> None:
        """Slices and copies keep what is known of the map."""
        if isinstance(source, HeatMap):
            self.__dict__.update(source.__dict__)

    def mass(self, box: Sequence[float]) -> float:
        """Share of the map inside a box: left, top, right, bottom in pixels; 0..1."""
        left, top, right, bottom = box
        rows, columns = (np.arange(length, dtype=np.float64) for length in self.shape)
        down = (np.minimum(bottom, rows + 1) - np.maximum(top, rows)).clip(0, 1)  # [H]
        across = (np.minimum(right, columns + 1) - np.maximum(left, columns)).clip(0, 1)  # [W]
        return float(down @ np.asarray(self, np.float64) @ across)


@dataclass(eq=False)
class Explainer:
    """Maker of heat maps for a loaded model.

    Args:
        name: of the model, for messages.
        encoder: image tower.
        tokenizer: the model's.
        score: what is explained.
    """

    name: str
    encoder: ImageEncoder
    tokenizer: Tokenizer
    score: ExplainedScore

    def explain(
        self, pixels: Pixels, texts: Sequence[str], word: str | None, layer: int | None, head: int | None
    ) -> list[HeatMap]:
        """One map for each text.

        Args:
            pixels: the image.
            texts: what is explained.
            word: a word or phrase of every text; None for the whole.
            layer: index of the attention layer; None for the default, number 0.6 L of L.
            head: index of a head; None for the mean.

        Raises:
            UnsupportedError: the network has no attention to patches, or none that words ask for.
            UsageError: the word is not in a text, or there is no such layer or head.
        """
        attention = self._attention(word)
        chosen = _index("layer", len(attention.layers), layer, int(_DEPTH * len(attention.layers) + 0.5))
        watched = attention._replace(layers=[attention.layers[chosen]])
        tokens = TokenizedTexts(self.tokenizer, texts, self.encoder.device)
        rows = (
            None if word is None else [self._word_rows(tokens, i, text, word) for i, text in enumerate(texts)]
        )
        maps: list[HeatMap] = []
        for start in range(0, len(texts), _TEXTS_AT_ONCE):
            index = np.arange(start, min(start + _TEXTS_AT_ONCE, len(texts)))
            evidence, values = self._evidence(watched, pixels, tokens, index)  # [R, H, Q, N]
            if head is not None:
                evidence = evidence[:, [_index("head", evidence.shape[1], head, 0)]]
            patches = evidence.mean(1)[..., attention.skip :]  # [R, Q, N]
            for i, value, own in zip(index.tolist(), values, patches, strict=True):
                asking = _asking_rows(attention, int(tokens.lengths[i])) if rows is None else rows[i]
                grid = _grid(own[asking].mean(0), pixels, self.encoder.network.config.vision.patch)
                view = heat_map(grid, pixels.size, self.encoder.preprocessor.spec).view(HeatMap)
                view.text, view.word, view.score, view.value = texts[i], word or "", self.score, value
                view.layer, view.head, view.grid = chosen, head, grid
                maps.append(view)
        return maps

    def _attention(self, word: str | None) -> PatchAttention:
        network, spec = self.encoder.network, self.encoder.preprocessor.spec
        can = "BLIP, BLIP-2 (stage 1), CLIP with a vision transformer and SigLIP can"
        explained = network.patch_attention(self.score) if isinstance(network, Explainable) else None
        if explained is None or spec.tiles:
            raise UnsupportedError(f"{self.name} has no attention to patches that explains a score; {can}")
        if word is not None and explained.rows != "text":
            raise UnsupportedError(
                f'word="{word}": the words of {self.name} do not look at the image one by one; those of a BLIP with an '
                "ITM head do. Leave out word, or explain the word as a text"
            )
        return explained

    def _evidence(
        self, attention: PatchAttention, pixels: Pixels, texts: TokenizedTexts, index: Integers
    ) -> tuple[Tensor, list[float]]:
        """Evidence `[R, H, Q, N]` of one layer, and scores `[R]`, of R texts for one image."""
        ids, lengths = texts.rows(index)
        values: list[float] = []
        if self.score == "match":
            image = Encoded(self.encoder.encode([pixels]).tokens.clone())
            network = require(self.encoder.network, Matcher)

            def margin() -> Tensor:
                logits = network.match_logits(image, ids, lengths).float()  # [R, 2]
                values.extend(logits.detach().softmax(-1)[:, 1].tolist())
                return logits[:, 1] - logits[:, 0]

            (evidence,) = grad_cam(attention.layers, margin)  # text rows of one image: [1, H, R * Q, N]
            if len(evidence) == len(index):
                return evidence, values
            return evidence[0].unflatten(1, (len(index), -1)).transpose(0, 1), values
        return self._similarity_evidence(attention, pixels, (ids, lengths), values), values

    def _similarity_evidence(
        self, attention: PatchAttention, pixels: Pixels, text: tuple[Tensor, Tensor], values: list[float]
    ) -> Tensor:
        """Evidence `[R, H, Q, N]` for the cosines of an image with R texts: one copy of the image for each."""
        network, encoder = require(self.encoder.network, Embedder), self.encoder
        with torch.no_grad():
            vectors = network.embed_text(*text).float()  # [R, P]
        batch = normalize([pixels], encoder.preprocessor.spec, device=encoder.device, dtype=encoder.dtype)

        def cosine() -> Tensor:
            image = encoder.network.encode_image(batch.expand(len(vectors), -1, -1, -1))
            embedded = network.embed_image(image).float()  # [R, P], or [R, Q, P]
            cosines = (embedded.reshape(len(vectors), -1, vectors.shape[1]) * vectors[:, None]).sum(2).amax(1)
            values.extend(cosines.detach().tolist())
            return cosines

        return grad_cam(attention.layers, cosine)[0]

    def _word_rows(self, tokens: TokenizedTexts, row: int, text: str, word: str) -> Integers:
        """Positions of a word's tokens in a text."""
        ids = tokens.ids[row, : int(tokens.lengths[row])].tolist()
        own = TokenizedTexts(self.tokenizer, [word], torch.device("cpu"))
        wanted = own.ids[0, 1 : int(own.lengths[0]) - 1].tolist()  # without the first and last token
        starts = [i for i in range(len(ids)) if wanted and ids[i : i + len(wanted)] == wanted]
        if not starts:
            raise UsageError(f'word="{word}": is not in the text "{text}"; give a word of it')
        return np.array([start + offset for start in starts for offset in range(len(wanted))])


def heat_map(grid: Floats32, size: Size, spec: ImageSpec) -> Floats32:
    """Evidence of patches as a map of the whole image.

    Evidence at or below the mean is taken for none, as in weakly supervised localization (Zhou et al. 2016); each pixel
    gets that of its patch. Pixels that the model does not see get none.

    Args:
        grid: `[h, w]`, at least 0.
        size: (height, width) of the image.
        spec: preprocessing, which says what part of the image the patches cover.

    Returns:
        float32 `[height, width]`, sums to 1; uniform over what the model sees if there is no evidence.
    """
    sharp = np.maximum(grid - grid.mean(), 0)
    if not sharp.any():
        sharp = np.ones_like(grid)
    left, top, right, bottom = input_box(size, spec)
    rows = _patch_of(size[0], top, bottom, grid.shape[0])
    columns = _patch_of(size[1], left, right, grid.shape[1])
    padded = np.pad(sharp, ((0, 1), (0, 1)))  # the last row and column are what the model does not see
    enlarged = padded[rows[:, None], columns]  # [H, W]
    total = float(enlarged.sum(dtype=np.float64))
    return (enlarged / total if total > 0 else np.full(size, 1 / (size[0] * size[1]))).astype(np.float32)


def _patch_of(length: int, start: float, end: float, patches: int) -> Integers:
    """Index of the patch at each of `length` pixels' centers, `patches` for none; patches lie from start to end."""
    position = (np.arange(length) + 0.5 - start) / (end - start) * patches
    return np.where((position >= 0) & (position < patches), position, patches).astype(np.int64)


def _grid(evidence: Tensor, pixels: Pixels, patch: int) -> Floats32:
    """Evidence of patches `[N]` as `[h, w]`."""
    height, width = (side // patch for side in pixels.values.shape[1:])
    return evidence.cpu().numpy().astype(np.float32).reshape(height, width)


def _asking_rows(attention: PatchAttention, length: int) -> slice | list[int]:
    """Rows that ask for the whole text: its tokens, the class token, or all queries."""
    return {"text": slice(0, length), "class": [0], "queries": slice(None)}[attention.rows]


def _index(what: str, count: int, value: int | None, default: int) -> int:
    """A layer or head, from 0; negative ones count from the last."""
    if value is None:
        return min(default, count - 1)
    if not -count <= value < count:
        raise UsageError(f"{what}={value}: must be from 0 to {count - 1}")
    return value % count
