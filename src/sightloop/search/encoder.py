"""Encoder of queries: a model for vectors, a judge for ITM, and a cache of image memories for re-ranking."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from sightloop.errors import ImageError
from sightloop.inference.model import Model
from sightloop.inference.rerank import NOT_RANKED
from sightloop.search.sources import read_row
from sightloop.types import Encoded, Floats32, ImageSource, JsonDict

_MEMORY_BYTES = 1 << 30


class MemoryCache:
    """Image tokens of the images that were re-ranked last, in float16 on the CPU; the oldest leave first.

    Args:
        budget: greatest size in bytes.
    """

    def __init__(self, budget: int = _MEMORY_BYTES) -> None:
        self.budget = budget
        self.size = 0
        self._tokens: OrderedDict[str, Tensor] = OrderedDict()

    def __len__(self) -> int:
        return len(self._tokens)

    def get(self, key: str) -> Tensor | None:
        """Tokens `[N, D]` in float16, which become the youngest; None if they are not there."""
        tokens = self._tokens.get(key)
        if tokens is not None:
            self._tokens.move_to_end(key)
        return tokens

    def put(self, key: str, tokens: Tensor) -> None:
        """Keeps tokens `[N, D]`, if they fit at all."""
        kept = tokens.to("cpu", torch.float16)
        size = kept.numel() * 2
        if key in self._tokens or size > self.budget:
            return
        self._tokens[key] = kept.clone()  # not a view of the whole batch
        self.size += size
        while self.size > self.budget:
            _, oldest = self._tokens.popitem(last=False)
            self.size -= oldest.numel() * 2


@dataclass(eq=False)
class ModelEncoder:
    """Encoder by loaded models.

    Args:
        model: of the space.
        judge: with an ITM head; None if re-ranking is not possible.
        memories: of images, for the judge.
    """

    model: Model
    judge: Model | None = None
    memories: MemoryCache = field(default_factory=MemoryCache)

    def embed_text(self, text: str) -> Floats32:
        """float32 `[d]`, unit length."""
        return self.model.embed_texts(text)[0]

    def embed_image(self, image: ImageSource) -> Floats32:
        """float32 `[q, d]`, unit length. Raises ImageError for an image that cannot be read."""
        vectors = self.model.embed_images([image])
        return vectors.reshape(-1, vectors.shape[-1])

    def match(self, text: str, rows: Sequence[JsonDict]) -> tuple[Floats32, Floats32]:
        """ITM logits of "match" and probabilities, float32 `[n]` each.

        An image that cannot be read any more gets `NOT_RANKED` and NaN.
        """
        judge = self.judge or self.model
        tokens = judge.tokenize([text])
        logits = np.full(len(rows), NOT_RANKED, np.float32)
        probabilities = np.full(len(rows), np.nan, np.float32)
        memories = self._memories(judge, rows)
        index = [i for i, memory in enumerate(memories) if memory is not None]
        for start in range(0, len(index), judge.sizer.default):
            part = index[start : start + judge.sizer.default]
            stacked = torch.stack([m for i in part if (m := memories[i]) is not None])
            image = Encoded(stacked.to(judge.device, judge.dtype))
            own = np.zeros(1, np.int64)
            for i, pair in zip(part, judge.match_scores(image, tokens, [own] * len(part)), strict=True):
                logits[i] = pair[0, 1]
                probabilities[i] = torch.from_numpy(pair[0]).softmax(dim=-1)[1]
        return logits, probabilities

    def _memories(self, judge: Model, rows: Sequence[JsonDict]) -> list[Tensor | None]:
        """Tokens `[N, D]` of the image of each row, from the cache or from the image."""
        # Scenes of a video have its hash.
        keys = [f"{judge.name}\0{row['sha256'] or row['id']}\0{row.get('start')}" for row in rows]
        memories = [self.memories.get(key) for key in keys]
        missing = [i for i, memory in enumerate(memories) if memory is None]
        sources: list[str | bytes] = []
        readable: list[int] = []
        for i in missing:
            try:
                sources.append(read_row(rows[i]))
                readable.append(i)
            except ImageError:
                continue
        batch: list[tuple[int, object]] = []
        for i, pixels in zip(readable, judge.read(sources, isolate=False), strict=True):
            if not isinstance(pixels, ImageError):
                batch.append((i, pixels))
                encoded = judge.encode([pixels])
                memories[i] = encoded.tokens[0].to("cpu", torch.float16)
                self.memories.put(keys[i], encoded.tokens[0])
        return memories
