"""Heat maps of what a score looks at: Grad-CAM of the attention to the patches of an image, for a text or a word.

A grid of patches is coarse, and the score of a whole image mixes what its objects say. So the map is that of several
views: the image, four crops of 5/8 and nine of 1/2 of its sides. The evidence in a view sums to the square root of the
odds of a match in this view, so that a view without what the text names hardly counts. What has less than half of the
greatest evidence is then taken for none, as in weakly supervised localization (Zhou et al. 2016). Root and half were
chosen by measurement on rendered scenes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from sightloop.data.images.decode import decode, source_name
from sightloop.data.images.preprocess import input_box, normalize
from sightloop.data.text.tokenizer import Tokenizer
from sightloop.errors import UnsupportedError, UsageError
from sightloop.inference.image_encoding import ImageEncoder
from sightloop.inference.matching import TokenizedTexts
from sightloop.protocols import Embedder, Explainable, Matcher, PatchAttention, require
from sightloop.tasks.text_scores import grad_cam
from sightloop.types import Box, Encoded, Floats32, ImageSource, ImageSpec, Integers, Pixels, Size

ExplainedScore: TypeAlias = Literal["match", "similarity"]
_ROWS_AT_ONCE = 56  # views times texts
# Of L layers, the default is number 0.6 L: 7 of 12 in the demos of ALBEF and BLIP, 1 of 3.
_DEPTH = 0.6
# Views as shares of the sides: (side, distance between neighbors).
_CROPS = ((0.625, 0.375), (0.5, 0.25))
_MIN_SIDE = 16  # pixels of an image that is cropped


class HeatMap(np.ndarray[Any, np.dtype[np.float32]]):
    """Heat map of an image, float32 `[H, W]` in pixels of the upright image; at least 0, sums to 1.

    Pixels with less than half of the greatest evidence are 0.

    Attributes:
        text: what is explained.
        word: the word of it, "" for the whole text.
        score: "match" (ITM) or "similarity" (cosine).
        value: the score itself of the whole image: probability or cosine.
        layer: index of the attention layer.
        head: index of its head; None for the mean of all.
        grid: float32 `[h, w]`, Grad-CAM of each patch of the whole image: nothing is cut off, no crop counts.
        views: box of each view in pixels, and its share of the evidence.
    """

    text: str
    word: str
    score: ExplainedScore
    value: float
    layer: int
    head: int | None
    grid: Floats32
    views: tuple[tuple[Box, float], ...]

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

    def as_rows(self, side: int = 64) -> list[list[float]]:
        """A small version for drawing, as lists: sums over blocks, the longer side at most `side` long; sums to 1."""
        step = max(1, -(-max(self.shape) // side))
        edges = [np.arange(0, length, step) for length in self.shape]
        blocks = np.add.reduceat(np.add.reduceat(np.asarray(self, np.float64), edges[0], 0), edges[1], 1)
        return blocks.round(6).tolist()


@dataclass(frozen=True, slots=True)
class ExplainOptions:
    """What is to be explained.

    Args:
        texts: one map for each.
        word: a word or phrase of every text; None for the whole.
        layer: index of the attention layer; None for the default, number 0.6 L of L.
        head: index of a head; None for the mean.
        crops: whether crops count beside the whole image.
    """

    texts: Sequence[str]
    word: str | None = None
    layer: int | None = None
    head: int | None = None
    crops: bool = True


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

    def explain(self, image: ImageSource, options: ExplainOptions) -> list[HeatMap]:
        """One map for each text. Crops are left out for `Pixels` and for images with a side below 16 pixels.

        Raises:
            ImageError: the image cannot be read.
            UnsupportedError: the network has no attention to patches, or none that words ask for.
            UsageError: the word is not in a text, or there is no such layer or head.
        """
        word, texts = options.word, options.texts
        attention = self._attention(word)
        count = len(attention.layers)
        layer = _index("layer", count, options.layer, int(_DEPTH * count))
        if attention.rows == "text" and layer == count - 1:  # the ITM head reads the first token alone
            if word is not None:
                raise UsageError(
                    f'word="{word}": words do not count in layer {layer}, the last; leave out layer'
                )
            attention = attention._replace(rows="class")
        attention = attention._replace(layers=[attention.layers[layer]])
        tokens = TokenizedTexts(self.tokenizer, texts, self.encoder.device)
        rows = [self._asking_rows(attention, tokens, i, text, word) for i, text in enumerate(texts)]
        size, boxes, views = self._views(image, crops=options.crops)
        maps: list[HeatMap] = []
        step = max(1, _ROWS_AT_ONCE // len(views))
        for start in range(0, len(texts), step):
            index = np.arange(start, min(start + step, len(texts)))
            evidence, odds, values = self._evidence(attention, views, tokens, index)
            for i, own, weights, value in zip(index.tolist(), evidence, odds, values, strict=True):
                if options.head is not None:
                    own = own[:, [_index("head", own.shape[1], options.head, 0)]]
                asked = own.mean(1)[:, rows[i], attention.skip :].mean(1)  # [V, N]
                grids = [self._grid(part, view) for part, view in zip(asked, views, strict=True)]
                view = self._merge(grids, boxes, weights, size).view(HeatMap)
                view.text, view.word, view.score, view.value = texts[i], word or "", self.score, value
                view.layer, view.head, view.grid = layer, options.head, grids[0]
                view.views = tuple(zip(boxes, weights, strict=True))
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

    def _views(self, source: ImageSource, *, crops: bool) -> tuple[Size, list[Box], list[Pixels]]:
        """Size of the image, and the box and pixels of each view, the whole image first."""
        preprocessor = self.encoder.preprocessor
        if isinstance(source, Pixels):
            height, width = source.size
            return source.size, [(0.0, 0.0, float(width), float(height))], [source]
        image = decode(source)
        boxes = [(0, 0, image.width, image.height)]
        if crops and min(image.size) >= _MIN_SIDE:
            boxes += _crop_boxes(image)
        named = [image.crop(box) for box in boxes]
        views = preprocessor.read_distinct(named)
        views[0] = Pixels(source_name(source), views[0].values, views[0].size)
        floats = [
            (float(left), float(top), float(right), float(bottom)) for left, top, right, bottom in boxes
        ]
        return (image.height, image.width), floats, views

    def _evidence(
        self, attention: PatchAttention, views: Sequence[Pixels], texts: TokenizedTexts, index: Integers
    ) -> tuple[list[Tensor], list[list[float]], list[float]]:
        """Of R texts: evidence `[V, H, Q, N]` in V views, the views' shares by the root of the odds, and the score."""
        ids, lengths = texts.rows(index)
        if self.score == "match":
            image = Encoded(self.encoder.encode(views).tokens.clone())
            network = require(self.encoder.network, Matcher)
            kept: list[Tensor] = []

            def margins() -> Tensor:
                logits = network.match_logits(
                    image, ids.repeat(len(views), 1), lengths.repeat(len(views))
                ).float()
                kept.append(logits.detach())
                return logits[:, 1] - logits[:, 0]

            (evidence,) = grad_cam(
                attention.layers, margins
            )  # [V, H, R * Q, N], or [V * R, H, Q, N] of queries
            logits = kept[0].view(len(views), len(index), 2)
            values = logits[0].softmax(-1)[:, 1]  # [R]
            log_odds = logits[..., 1] - logits[..., 0]  # [V, R]
            if len(evidence) == len(views):
                parts = evidence.unflatten(2, (len(index), -1)).unbind(2)
            else:
                parts = evidence.unflatten(0, (len(views), -1)).unbind(1)
        else:
            parts, values, log_odds = self._similarity_evidence(attention, views, (ids, lengths))
        return list(parts), (log_odds / 2).softmax(0).T.tolist(), values.tolist()

    def _similarity_evidence(
        self, attention: PatchAttention, views: Sequence[Pixels], text: tuple[Tensor, Tensor]
    ) -> tuple[list[Tensor], Tensor, Tensor]:
        """The same for cosines: evidence, cosines `[R]` of the whole image, logits `[V, R]` of all views."""
        network, encoder = require(self.encoder.network, Embedder), self.encoder
        with torch.no_grad():
            vectors = network.embed_text(*text).float()  # [R, P]
        evidence: list[Tensor] = []
        kept: list[Tensor] = []
        for pixels in views:
            batch = normalize([pixels], encoder.preprocessor.spec, device=encoder.device, dtype=encoder.dtype)

            def cosines(batch: Tensor = batch) -> Tensor:
                image = encoder.network.encode_image(
                    batch.expand(len(vectors), -1, -1, -1)
                )  # a copy for each text
                embedded = network.embed_image(image).float()  # [R, P], or [R, Q, P]
                each = embedded.reshape(len(vectors), -1, vectors.shape[1]) * vectors[:, None]
                kept.append(each.detach().sum(2).amax(1))
                return each.sum(2).amax(1)

            evidence += grad_cam(attention.layers, cosines)  # [R, H, Q, N]
        all_cosines = torch.stack(kept)  # [V, R]
        with torch.no_grad():
            logits = network.class_logits(all_cosines).float()
        return list(torch.stack(evidence, 1)), all_cosines[0], logits

    def _asking_rows(
        self, attention: PatchAttention, tokens: TokenizedTexts, row: int, text: str, word: str | None
    ) -> Integers | slice:
        """Rows of attention that ask: those of a word or of all words, the class token's, or all queries'."""
        if attention.rows != "text":
            return slice(0, 1) if attention.rows == "class" else slice(None)
        length = int(tokens.lengths[row])
        if word is None:  # without the first and last token
            return slice(1, max(2, length - 1))
        ids = tokens.ids[row, :length].tolist()
        own = TokenizedTexts(self.tokenizer, [word], torch.device("cpu"))
        wanted = own.ids[0, 1 : int(own.lengths[0]) - 1].tolist()
        starts = [i for i in range(length) if wanted and ids[i : i + len(wanted)] == wanted]
        if not starts:
            raise UsageError(f'word="{word}": is not in the text "{text}"; give a word of it')
        return np.array([start + offset for start in starts for offset in range(len(wanted))])

    def _grid(self, evidence: Tensor, pixels: Pixels) -> Floats32:
        """Evidence of patches `[N]` as `[h, w]`."""
        patch = self.encoder.network.config.vision.patch
        height, width = (side // patch for side in pixels.values.shape[1:])
        return evidence.cpu().numpy().astype(np.float32).reshape(height, width)

    def _merge(
        self, grids: Sequence[Floats32], boxes: Sequence[Box], weights: Sequence[float], size: Size
    ) -> Floats32:
        """The map `[H, W]` of all views."""
        merged = np.zeros(size, np.float32)
        for grid, (left, top, right, bottom), weight in zip(grids, boxes, weights, strict=True):
            part = (slice(int(top), int(bottom)), slice(int(left), int(right)))
            inner = (int(bottom) - int(top), int(right) - int(left))
            merged[part] += weight * enlarge(grid, inner, self.encoder.preprocessor.spec)
        merged = np.maximum(merged - merged.max() / 2, 0)
        return merged / merged.sum(dtype=np.float64).astype(np.float32)


def enlarge(grid: Floats32, size: Size, spec: ImageSpec) -> Floats32:
    """Evidence of patches as a map of one view: each pixel gets that of its patch.

    Args:
        grid: `[h, w]`, at least 0.
        size: (height, width) of the view.
        spec: preprocessing, which says what part of it the patches cover; pixels that the model does not see get none.

    Returns:
        float32 `[height, width]`, sums to 1; uniform over what the model sees if there is no evidence.
    """
    evidence = grid if grid.max() > 0 else np.ones_like(grid)
    left, top, right, bottom = input_box(size, spec)
    rows = _patch_of(size[0], top, bottom, grid.shape[0])
    columns = _patch_of(size[1], left, right, grid.shape[1])
    padded = np.pad(evidence, ((0, 1), (0, 1)))  # the last row and column are what the model does not see
    enlarged = padded[rows[:, None], columns]  # [H, W]
    total = float(enlarged.sum(dtype=np.float64))
    return (enlarged / total if total > 0 else np.full(size, 1 / (size[0] * size[1]))).astype(np.float32)


def _crop_boxes(image: Image.Image) -> list[tuple[int, int, int, int]]:
    """Boxes of the crops, in pixels."""
    boxes: list[tuple[int, int, int, int]] = []
    for side, step in _CROPS:
        starts = np.arange(0, 1 - side + 1e-9, step)
        boxes += [
            (
                round(x * image.width),
                round(y * image.height),
                round((x + side) * image.width),
                round((y + side) * image.height),
            )
            for y in starts
            for x in starts
        ]
    return boxes


def _patch_of(length: int, start: float, end: float, patches: int) -> Integers:
    """Index of the patch at each of `length` pixels' centers, `patches` for none; patches lie from start to end."""
    position = (np.arange(length) + 0.5 - start) / (end - start) * patches
    return np.where((position >= 0) & (position < patches), position, patches).astype(np.int64)


def _index(what: str, count: int, value: int | None, default: int) -> int:
    """A layer or head, from 0; negative ones count from the last."""
    if value is None:
        return min(default, count - 1)
    if not -count <= value < count:
        raise UsageError(f"{what}={value}: must be from 0 to {count - 1}")
    return value % count
