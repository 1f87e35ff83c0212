"""Preprocessor and image encoder of a loaded model: images from callers -> pixels -> image tokens."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from sightloop.data.images.preprocess import normalize
from sightloop.data.images.reader import BatchSizer, read_images
from sightloop.data.images.tiles import tile_layout
from sightloop.data.video.pixels import read_video
from sightloop.data.video.sampling import Sampling
from sightloop.errors import ImageError, UsageError
from sightloop.inference.arguments import ImageInput, VisualSource, as_images, duplicate_groups
from sightloop.protocols import ImageNetwork, TiledNetwork, require
from sightloop.tasks.embed import require_finite
from sightloop.types import Encoded, ImageSource, ImageSpec, Integers, Limits, Pixels, Video

_TOKENS_AT_ONCE = 600  # image tokens in one pass on a CPU


class EncodedImage(NamedTuple):
    """An image and what the image tower makes of it: tokens `[N, D]`, without padding."""

    pixels: Pixels
    tokens: Tensor


@dataclass(eq=False)
class Preprocessor:
    """Reader of images for one model.

    Args:
        spec: resize, crop and normalization.
        sizer: images in a batch; memory depends on it, results do not.
        sampling: which frames of videos are read; None to refuse videos.
        parallel: batches at once.
    """

    spec: ImageSpec
    sizer: BatchSizer = field(default_factory=lambda: BatchSizer(8))
    sampling: Sampling | None = None
    parallel: int = 1

    def read(
        self,
        sources: Iterable[VisualSource],
        *,
        workers: int = 2,
        isolate: bool = True,
        limits: Limits | None = None,
    ) -> Generator[Pixels | ImageError]:
        """Preprocessed images, uint8 `[3, H, W]` each, in order; options and errors as of `Model.read`."""
        failed: dict[int, ImageError] = {}
        # One batch ahead, for each at once: the next is complete when the model has done this one.
        results = read_images(
            self._frames(sources, failed),
            self.spec,
            workers=workers,
            isolate=isolate,
            limits=limits or Limits(),
            ahead=self.parallel * self.sizer.most_ahead + workers,
        )
        try:
            for number, result in enumerate(results):
                yield failed.pop(number, result)
        finally:  # ends the workers now
            if isinstance(results, Generator):
                results.close()

    def _frames(
        self, sources: Iterable[VisualSource], failed: dict[int, ImageError]
    ) -> Iterator[ImageSource]:
        """Sources with the frames of videos in place of videos; those that cannot be read go to `failed`."""
        for number, source in enumerate(sources):
            if isinstance(source, Video):
                try:
                    yield self._read_video(source)
                except ImageError as error:
                    failed[number] = error.with_traceback(None)
                    yield b""  # its result is replaced
            else:
                yield source

    def batches(self, images: ImageInput) -> Iterator[list[Pixels]]:
        """Preprocessed images, a batch at a time. Raises the ImageError of the first that cannot be read.

        A video is an image of several frames; all of a batch have as many.
        """
        batch: list[Pixels] = []
        for pixels in self.read(as_images(images), isolate=False):
            if isinstance(pixels, ImageError):
                raise pixels
            if batch and batch[0].frames != pixels.frames:
                yield batch
                batch = []
            batch.append(pixels)
            if len(batch) >= self.sizer.size:
                yield batch
                batch = []
        if batch:
            yield batch

    def _read_video(self, video: Video) -> Pixels:
        if self.sampling is None:
            raise UsageError(
                f"{video.path}: a video goes with embed, classify, match, rank, caption and answer; "
                "for other verbs read its frames"
            )
        return read_video(video, self.sampling, self.spec)

    def read_distinct(self, images: Sequence[VisualSource]) -> list[Pixels]:
        """All images preprocessed; equal ones are read once. Raises the ImageError of the first that fails."""
        groups = duplicate_groups(images)
        distinct = chain(*self.batches([images[group[0]] for group in groups])) if groups else iter(())
        by_index = {i: pixels for group, pixels in zip(groups, distinct, strict=True) for i in group}
        return [by_index[i] for i in range(len(images))]


@dataclass(eq=False)
class ImageEncoder:
    """Image tower of a loaded model with its preprocessor.

    Args:
        network: the model's network.
        preprocessor: reads images for it.
        device: of the network.
        dtype: of weights and activations.
        remember: keep the tokens of the last batch, for callers that need them twice.
    """

    network: ImageNetwork
    preprocessor: Preprocessor
    device: torch.device
    dtype: torch.dtype
    remember: bool = False
    _last: tuple[list[Pixels], Encoded] | None = field(default=None, repr=False)

    def sampling(self, sampling: Sampling | None) -> ImageEncoder:
        """The same encoder with other frames of videos; None refuses videos."""
        return replace(self, preprocessor=replace(self.preprocessor, sampling=sampling))

    @torch.inference_mode()
    def encode(self, batch: Sequence[Pixels]) -> Encoded:
        """Image tokens of a batch.

        Returns:
            tokens `[B, N, D]`, pooled `[B, D]` or None; where images differ in size also a mask `[B, N]`, and zeros
            where it is False.

        Raises:
            CheckpointError: NaN or infinity among them (NaN weights, overflow of float16).
        """
        if self._last is not None and list(map(id, self._last[0])) == list(map(id, batch)):
            return self._last[1]
        encoded = self._encode(batch)
        require_finite(encoded.tokens, "image tokens", self.dtype)
        if self.remember:
            self._last = (list(batch), encoded)
        return encoded

    def _encode(self, batch: Sequence[Pixels]) -> Encoded:
        if any(pixels.frames > 1 for pixels in batch):
            return self._encode_videos(batch)
        if self.preprocessor.spec.patches or self.preprocessor.spec.tiles:
            return self._encode_sizes(batch)
        pixels = self._normalize(batch)
        if self.device.type != "cpu":
            return self.network.encode_image(pixels)
        # A few images at a time, whatever the batch: their activations then stay in the caches of a CPU.
        patch, (height, width) = self.network.config.vision.patch, pixels.shape[2:]
        count = max(1, _TOKENS_AT_ONCE // max(1, (height // patch) * (width // patch)))
        parts = [self.network.encode_image(part) for part in pixels.split(count)]
        pooled = [part.pooled for part in parts if part.pooled is not None]
        tokens = torch.cat([part.tokens for part in parts])
        return Encoded(tokens, torch.cat(pooled) if len(pooled) == len(parts) else None)

    def encode_each(self, batch: Sequence[Pixels]) -> list[EncodedImage]:
        """Image tokens `[N, D]` of every image; the same object is encoded once."""
        if not batch:
            return []
        distinct = {id(pixels): pixels for pixels in batch}
        encoded = self.encode(list(distinct.values()))
        tokens: dict[int, Tensor] = {}
        for row, key in enumerate(distinct):
            own = encoded.tokens[row]
            tokens[key] = own if encoded.mask is None else own[encoded.mask[row]]
        return [EncodedImage(pixels, tokens[id(pixels)]) for pixels in batch]

    def distinct_batches(
        self, images: Sequence[VisualSource]
    ) -> Iterator[tuple[list[Pixels], Encoded, list[Integers]]]:
        """Every distinct image once, in batches.

        Yields:
            The batch, its image tokens `[B, N, D]`, and for each image its indices in `images`.
        """
        groups = [np.array(group, dtype=np.int64) for group in duplicate_groups(images)]
        start = 0
        for batch in self.preprocessor.batches([images[group[0]] for group in groups]):
            yield batch, self.encode(batch), groups[start : start + len(batch)]
            start += len(batch)

    def batches_by_image(
        self, images: Sequence[VisualSource]
    ) -> Iterator[tuple[list[int], list[EncodedImage]]]:
        """Some rows at a time, those of one image after each other; each distinct image is encoded once.

        Encoded images are kept no longer than their rows need them.

        Yields:
            The rows' indices in `images`, and the encoded image of each.
        """
        groups = duplicate_groups(images)
        order = list(chain(*groups))
        first = [group[0] for group in groups for _ in group]
        kept: dict[int, EncodedImage] = {}
        size = self.preprocessor.sizer.default
        for start in range(0, len(order), size):
            part = slice(start, start + size)
            kept = {owner: kept[owner] for owner in first[part] if owner in kept}
            new = [owner for owner in dict.fromkeys(first[part]) if owner not in kept]
            pixels = self.preprocessor.read_distinct([images[i] for i in new])
            kept |= zip(new, self.encode_each(pixels), strict=True)
            yield order[part], [kept[owner] for owner in first[part]]

    def _encode_videos(self, batch: Sequence[Pixels]) -> Encoded:
        """The tokens of all frames in one sequence, and the mean of what is pooled."""
        parts = [self._encode(split_frames(pixels)) for pixels in batch]
        means = [part.pooled.mean(dim=0) for part in parts if part.pooled is not None]
        pooled = torch.stack(means) if len(means) == len(parts) else None
        rows = [part.tokens.flatten(0, 1) if part.mask is None else part.tokens[part.mask] for part in parts]
        lengths = torch.tensor([len(row) for row in rows], device=rows[0].device)
        tokens = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
        if bool((lengths == lengths[0]).all()):
            return Encoded(tokens, pooled, frames=batch[0].frames)
        return Encoded(
            tokens, pooled, torch.arange(tokens.shape[1], device=lengths.device) < lengths[:, None]
        )

    def _encode_sizes(self, batch: Sequence[Pixels]) -> Encoded:
        """Images of several sizes, or tile layouts: those of one size go together, so that no patch is padding."""
        spec, vision = self.preprocessor.spec, self.network.config.vision
        groups: dict[tuple[int, ...], list[int]] = {}
        for i, pixels in enumerate(batch):
            shape = pixels.values.shape
            if spec.tiles:
                shape = tile_layout(pixels.size, spec.tiles, vision.image_size, vision.patch)
            groups.setdefault(shape, []).append(i)
        parts: list[tuple[list[int], Encoded]] = []
        for shape, rows in groups.items():
            values = self._normalize([batch[i] for i in rows])
            if spec.tiles:
                top_left = (shape[0], shape[1], shape[2], shape[3])
                parts.append((rows, require(self.network, TiledNetwork).encode_tiles(values, top_left)))
            else:
                parts.append((rows, self.network.encode_image(values)))
        longest = max(part.tokens.shape[1] for _, part in parts)
        first = parts[0][1]
        tokens = first.tokens.new_zeros(len(batch), longest, first.tokens.shape[2])
        mask = torch.zeros(len(batch), longest, dtype=torch.bool, device=tokens.device)
        pooled = None if first.pooled is None else first.pooled.new_empty(len(batch), first.pooled.shape[1])
        for rows, part in parts:
            tokens[rows, : part.tokens.shape[1]] = part.tokens
            mask[rows, : part.tokens.shape[1]] = True
            if pooled is not None and part.pooled is not None:
                pooled[rows] = part.pooled
        return Encoded(tokens, pooled, mask)

    def _normalize(self, batch: Sequence[Pixels]) -> Tensor:
        """uint8 pixels -> `[B, 3, H, W]` on the network's device."""
        return normalize(batch, self.preprocessor.spec, device=self.device, dtype=self.dtype)


def split_frames(pixels: Pixels) -> list[Pixels]:
    """The frames of preprocessed pixels, uint8 `[3, H, W]` each; an image is one frame."""
    values = np.split(pixels.values, pixels.frames, axis=1)
    return [Pixels(pixels.name, np.ascontiguousarray(part), pixels.size) for part in values]
