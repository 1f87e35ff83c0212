"""Samples become training batches: which, in what order, cut and turned how is a function of (seed, step) alone."""

from __future__ import annotations

import threading
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sightloop.data.datasets.dataset import Dataset
from sightloop.data.images.augment import View, augment, view_of
from sightloop.data.images.decode import decode
from sightloop.data.images.preprocess import normalize, preprocess
from sightloop.data.rng import generator
from sightloop.data.shuffle import rank_slice, shuffled_index
from sightloop.data.text.tokenizer import Tokenizer
from sightloop.errors import ImageError, UsageError
from sightloop.inference.prompting import check_special_tokens
from sightloop.tasks.region_parser import FORMATTERS, plain_label
from sightloop.training.config import DataSettings
from sightloop.training.masking import mask_words
from sightloop.types import Box, ImageSpec, JsonDict, Limits, Sample, Size

_AHEAD = 2  # batches that are prepared while the networks work
LabeledBox: TypeAlias = tuple[str, Box]  # a label, and a box in pixels


class TextRows(NamedTuple):
    """Texts of a batch, the same number for each of some of its images.

    ids int64 `[R, L]`, lengths `[R]`; images `[P]`: the batch rows that have texts, R/P consecutive texts each.
    prompt: tokens at the start, the first one included, that are not to be learned. read: the ids that a network
    gets to read, with some words hidden, or `ids` itself.
    """

    ids: Tensor
    lengths: Tensor
    image_rows: Tensor
    prompt_length: int
    input_ids: Tensor

    def to(self, device: torch.device) -> TextRows:
        """The same on another device."""
        ids, lengths, pictures = (x.to(device, non_blocking=True) for x in self[:3])
        read = ids if self.input_ids is self.ids else self.input_ids.to(device, non_blocking=True)
        return TextRows(ids, lengths, pictures, self.prompt_length, read)


class PromptedRows(NamedTuple):
    """Texts behind their prompts, in which the image stands as one id, for networks that write on from a prompt.

    ids int64 `[R, L]`; lengths `[R]`, of which the first `prompts` `[R]` are given; images `[R]`: the batch rows.
    """

    ids: Tensor
    lengths: Tensor
    prompt_lengths: Tensor
    image_rows: Tensor

    def to(self, device: torch.device) -> PromptedRows:
        """The same on another device."""
        return PromptedRows(*(x.to(device, non_blocking=True) for x in self))


@dataclass(frozen=True, slots=True)
class PromptFormat:
    """Prompts and answers as a prompted network expects them.

    Args:
        prompts: task -> prompt (`protocols.PromptedNetwork`).
        end_id: EOS.
        begin: ids that every answer begins with.
        region_formats: task -> format of its regions (`protocols.RegionNetwork`).
        phrase_separator: what joins several phrases in one prompt; "" if it takes one at a time.
    """

    prompts: Mapping[str, str]
    end_id: int
    answer_start: tuple[int, ...] = ()
    region_formats: Mapping[str, str] = field(default_factory=dict[str, str])
    phrase_separator: str = ""

    def detection_prompt(
        self, things: Sequence[LabeledBox], size: Size, names: Sequence[str]
    ) -> tuple[str, list[str]]:
        """The prompt that asks for all things, or for those of these names (without any: the names that there are), and
        the answer in pieces, one a thing."""
        job = "detect" if "detect" in self.region_formats else "find"
        asked = self.phrase_separator.join(names or dict.fromkeys(label for label, _ in things))
        return self.prompts[job].replace("{}", asked), FORMATTERS[self.region_formats[job]](things, size)


@dataclass(frozen=True, slots=True)
class Batch:
    """This process's part of one global batch.

    Args:
        step: of the batch, from 0.
        epoch: passes over the data before this batch.
        keys: of the b samples.
        places: row of each sample in the global batch, int64 `[b]`.
        identities: index of each sample in the dataset, int64 `[b]`.
        pixels: uint8 `[b, 3, S, S]`.
        captions: as written.
        lm_captions: behind the recipe's prompt.
        questions: of all samples.
        answers: one a question.
        prompted: captions, answers and regions behind their prompts, for prompted networks.
        labels: class of each sample, int64 `[b]`, -1 without.
        skipped: (key, reason) of samples that could not be used.
    """

    step: int
    epoch: float
    keys: tuple[str, ...]
    row_indices: Tensor
    sample_indices: Tensor
    pixels: Tensor
    captions: TextRows | None
    lm_captions: TextRows | None
    questions: TextRows | None
    answers: TextRows | None
    prompted: PromptedRows | None
    labels: Tensor
    skipped: tuple[tuple[str, str], ...]


class _Row(NamedTuple):
    place: int
    sample: int
    key: str
    values: NDArray[np.uint8]
    captions: list[str]
    questions: list[tuple[str, str]]
    things: list[LabeledBox]
    size: Size  # of what is shown, in the pixels in which the things are
    label: int


class _Skip(NamedTuple):
    key: str
    reason: str


@dataclass(frozen=True, slots=True, eq=False)
class BatchLoader:
    """Loader of a dataset's batches, the same for a seed and a step whatever was loaded before.

    Args:
        dataset: samples.
        settings: batch size, texts a sample, augmentation, workers.
        tokenizer: of the texts.
        spec: preprocessing of the images.
        seed: of shuffling and all draws.
        labels: name -> class, for recipes that learn classes.
        rank: of this process.
        world: number of processes.
        prompts: of a prompted network, None for others.
    """

    dataset: Dataset
    settings: DataSettings
    tokenizer: Tokenizer
    spec: ImageSpec
    seed: int
    labels: Mapping[str, int]
    rank: int = 0
    world_size: int = 1
    prompts: PromptFormat | None = None

    def batches(self, first: int, last: int) -> Iterator[Batch]:
        """Those of steps `first` to `last - 1`, prepared ahead by threads; the same whatever was drawn before."""
        cache = _Cache(self.settings.cache)
        with ThreadPoolExecutor(self.settings.workers) as pool:
            waiting: deque[tuple[int, list[Future[_Row | _Skip]]]] = deque()
            try:
                for step in range(first, last):
                    waiting.append(
                        (step, [pool.submit(self._row, cache, *where) for where in self.rows_of_step(step)])
                    )
                    if len(waiting) > _AHEAD:
                        yield self._collect(*waiting.popleft())
                while waiting:
                    yield self._collect(*waiting.popleft())
            finally:
                pool.shutdown(wait=False, cancel_futures=True)

    def rows_of_step(self, step: int) -> list[tuple[int, int, int]]:
        """(place in the global batch, epoch, index in the dataset) of this process's rows of a step.

        The epochs follow each other without a gap: each sample once in each, and every batch is full.
        """
        count, batch = len(self.dataset), self.settings.batch
        places = rank_slice(np.arange(batch, dtype=np.int64), self.rank, self.world_size)
        epochs, offsets = np.divmod(step * batch + places, count)
        rows: list[tuple[int, int, int]] = []
        for epoch in np.unique(epochs).tolist():
            chosen = epochs == epoch
            indices = shuffled_index(offsets[chosen], count=count, seed=self.seed, epoch=epoch)
            rows += [
                (place, epoch, index)
                for place, index in zip(places[chosen].tolist(), indices.tolist(), strict=True)
            ]
        return rows

    def _row(self, cache: _Cache, place: int, epoch: int, index: int) -> _Row | _Skip:
        key = str(index)
        try:
            sample = self.dataset[index]
            key = sample.key
            random = generator("texts", self.seed, epoch, index)
            captions = _draw(random, [c for c in sample.captions if c.strip()], self.settings.texts)
            asked = _draw(random, list(sample.questions), self.settings.questions)
            questions = [(q.question, q.answers[int(random.integers(len(q.answers)))]) for q in asked]
            label = -1 if sample.label is None else self.labels.get(sample.label, -1)
            things = self._things(sample, epoch, index)
            if self.prompts is not None:
                _check_words(self.tokenizer, key, [*captions, *chain(*questions), *(n for n, _ in things)])
            values, things, size = self._pixels(cache, index, sample, epoch, things)
        except ImageError as error:
            return _Skip(key, str(error))
        return _Row(place, index, key, values, captions, questions, things, size, label)

    def _things(self, sample: Sample, epoch: int, index: int) -> list[LabeledBox]:
        """Up to `regions` things of those that are to be named, in the sample's order."""
        found = [(plain_label(region.label), region.box) for region in sample.regions]
        names, most = self.settings.classes, self.settings.regions
        if most and not all(label for label, _ in found):
            raise ImageError(sample.key, "one of its regions has no label: name it, or leave the region out")
        found = [thing for thing in found if not names or thing[0] in names] if most else []
        if len(found) > most:
            some = generator("regions", self.seed, epoch, index).permutation(len(found))[:most]
            found = [found[i] for i in sorted(some.tolist())]
        return found

    def _pixels(
        self, cache: _Cache, index: int, sample: Sample, epoch: int, things: list[LabeledBox]
    ) -> tuple[NDArray[np.uint8], list[LabeledBox], Size]:
        """What is shown of an image, the things in it, and its size in the pixels of their boxes."""
        options = self.settings.augment
        if options is None:
            values, (height, width) = cache.get(index, lambda: _plain(sample, self.spec))
            view, scale = View((0, 0, width, height)), (1.0, 1.0)
        else:
            side = (self.spec.crop or self.spec.resize or (224, 224))[0]
            picture, (height, width) = cache.get(index, lambda: _decoded(sample, cache.side))
            texts = [*sample.captions, *(q.question for q in sample.questions), *(name for name, _ in things)]
            about: JsonDict = {"seed": self.seed, "epoch": epoch, "key": sample.key, "texts": texts}
            values = augment(picture, side, options, **about)
            view = view_of((picture.shape[0], picture.shape[1]), options, **about)
            scale = picture.shape[1] / width, picture.shape[0] / height
        shown = [(label, view.map_box(_scaled(box, scale))) for label, box in things]
        return values, [(label, box) for label, box in shown if box is not None], view.size

    def _collect(self, step: int, futures: Sequence[Future[_Row | _Skip]]) -> Batch:
        results = [future.result() for future in futures]
        rows = [result for result in results if isinstance(result, _Row)]
        side = (self.spec.crop or self.spec.resize or (224, 224))[0]
        pixels = np.stack([row.values for row in rows]) if rows else np.zeros((0, 3, side, side), np.uint8)
        captions = [row.captions for row in rows]
        prompt = self.settings.prompt
        places = torch.tensor([row.place for row in rows], dtype=torch.int64)
        plain = self._hide(self._texts(captions), step, places)
        prompted = plain
        if prompt:
            texts = self._texts([[f"{prompt} {text}" for text in row] for row in captions], prompt)
            prompted = self._hide(texts, step, places)
        return Batch(
            step=step,
            epoch=step * self.settings.batch / len(self.dataset),
            keys=tuple(row.key for row in rows),
            row_indices=places,
            sample_indices=torch.tensor([row.sample for row in rows], dtype=torch.int64),
            pixels=torch.from_numpy(pixels),
            captions=plain,
            lm_captions=prompted,
            questions=self._texts([[question for question, _ in row.questions] for row in rows]),
            answers=self._texts([[answer for _, answer in row.questions] for row in rows]),
            prompted=None if self.prompts is None else self._prompted(self.prompts, rows),
            labels=torch.tensor([row.label for row in rows], dtype=torch.int64),
            skipped=tuple((result.key, result.reason) for result in results if isinstance(result, _Skip)),
        )

    def _texts(self, texts: Sequence[Sequence[str]], prompt: str = "") -> TextRows | None:
        flat = [text for row in texts for text in row]
        if not flat:
            return None
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # texts cut to max_tokens, at every visit
            tokens = self.tokenizer.encode(flat, max_length=self.settings.max_tokens)
            start = int(self.tokenizer.encode([prompt]).lengths[0]) - 1 if prompt else 1
        owners = torch.tensor([row for row, its in enumerate(texts) if its], dtype=torch.int64)
        ids = torch.from_numpy(tokens.ids)
        return TextRows(ids, torch.from_numpy(tokens.lengths), owners, start, ids)

    def _hide(self, rows: TextRows | None, step: int, places: Tensor) -> TextRows | None:
        """The same texts with some words hidden from whoever reads them."""
        if rows is None or not self.settings.caption_dropout:
            return rows
        hidden = mask_words(
            rows.ids.numpy(),
            rows.lengths.numpy(),
            mask_id=self.tokenizer.token_id("[MASK]"),
            vocab=self.tokenizer.vocab_size,
            share=self.settings.caption_dropout,
            seed=self.seed,
            step=step,
            rows=places[rows.image_rows].numpy(),
        )
        return rows._replace(read=torch.from_numpy(hidden.ids))

    def _fitting(self, pieces: list[str]) -> str:
        """As many whole pieces of a text as `max_tokens` has room for, its end included."""
        begins, ends = self.tokenizer.bos_id is not None, self.tokenizer.eos_id is not None
        for count in range(len(pieces), 0, -1):
            text = "".join(pieces[:count])
            if int(self.tokenizer.encode([text]).lengths[0]) - begins - ends < self.settings.max_tokens:
                return text
        return ""

    def _prompted(self, formats: PromptFormat, rows: Sequence[_Row]) -> PromptedRows | None:
        """Each caption and answer after its prompt, and the id that ends it; texts are cut to `max_tokens`."""
        asked: list[tuple[int, str, str]] = []
        caption = formats.prompts["caption"]
        if self.settings.prompt:
            caption = formats.prompts["prompt"].replace("{}", self.settings.prompt)
        question = formats.prompts.get("answer", formats.prompts["prompt"])
        for place, row in enumerate(rows):
            asked += [(place, caption, text) for text in row.captions]
            asked += [(place, question.replace("{}", q), text) for q, text in row.questions]
            if row.things or (self.settings.regions and self.settings.classes):
                ask, pieces = formats.detection_prompt(row.things, row.size, self.settings.classes)
                asked.append((place, ask, self._fitting(pieces)))
        if not asked:
            return None
        owners, before, after = zip(*asked, strict=True)
        prompts, texts = (self.tokenizer.encode(list(given)) for given in (before, after))
        begins, ends = self.tokenizer.bos_id is not None, self.tokenizer.eos_id is not None
        whole: list[NDArray[np.int64]] = []
        for prompt, long, text, end in zip(
            prompts.ids, prompts.lengths, texts.ids, texts.lengths, strict=True
        ):
            kept = text[begins : end - ends][: self.settings.max_tokens - 1]
            whole.append(np.array([*prompt[:long], *formats.answer_start, *kept, formats.end_id], np.int64))
        lengths = [len(row) for row in whole]
        ids = np.full((len(whole), max(lengths)), self.tokenizer.pad_id, np.int64)
        for row, found in zip(ids, whole, strict=True):
            row[: len(found)] = found
        known = torch.from_numpy(ids), torch.tensor(lengths), torch.from_numpy(prompts.lengths)
        return PromptedRows(*known, torch.tensor(owners))


class _Cache:
    """Decoded images and their sizes by index, shared by threads; side 0 keeps nothing."""

    def __init__(self, side: int) -> None:
        self.side = side
        self._kept: dict[int, tuple[NDArray[np.uint8], Size]] = {}
        self._lock = threading.Lock()

    def get(
        self, index: int, make: Callable[[], tuple[NDArray[np.uint8], Size]]
    ) -> tuple[NDArray[np.uint8], Size]:
        if (kept := self._kept.get(index)) is not None:
            return kept
        made = make()
        if self.side:
            with self._lock:
                self._kept[index] = made
        return made


def _plain(sample: Sample, spec: ImageSpec) -> tuple[NDArray[np.uint8], Size]:
    """Prepared, and the (height, width) that the image had."""
    try:
        pixels = preprocess(_source(sample), spec, limits=Limits())
    except ImageError as error:
        raise ImageError(sample.key, error.reason) from None
    return pixels.values, pixels.size


def _decoded(sample: Sample, side: int) -> tuple[NDArray[np.uint8], Size]:
    """uint8 `[H, W, 3]`, with a side made smaller so that the shorter edge is that long; and the size before that."""
    try:
        picture = decode(_source(sample), Limits())
    except ImageError as error:
        raise ImageError(sample.key, error.reason) from None
    size = picture.height, picture.width
    if side and min(size) > side:
        scale = side / min(size)
        picture = picture.resize((round(picture.width * scale), round(picture.height * scale)), 3)
    return np.asarray(picture), size


def _scaled(box: Box, scale: tuple[float, float]) -> Box:
    across, down = scale
    return box[0] * across, box[1] * down, box[2] * across, box[3] * down


def _check_words(tokenizer: Tokenizer, key: str, texts: Sequence[str]) -> None:
    """Texts that hold a token of the model's own are not learned: its place would not be an image's, or an end."""
    try:
        for text in texts:
            check_special_tokens(tokenizer, text)
    except UsageError as error:
        raise ImageError(key, str(error)) from None


def _source(sample: Sample) -> bytes | str:
    return sample.image if isinstance(sample.image, bytes) else str(sample.image)


def _draw(random: np.random.Generator, items: list[Any], count: int) -> list[Any]:
    """`count` of the items, each as often as any other, in random order; none where there are none."""
    if not items or not count:
        return []
    order = np.concatenate([random.permutation(len(items)) for _ in range(-(-count // len(items)))])
    return [items[i] for i in order[:count].tolist()]


def on_device(batch: Batch, spec: ImageSpec, device: torch.device) -> tuple[Batch, Tensor]:
    """The batch's tensors on the device, and its normalised pixels, float32 `[b, 3, S, S]`."""
    move = replace(
        batch,
        row_indices=batch.row_indices.to(device),
        sample_indices=batch.sample_indices.to(device),
        labels=batch.labels.to(device),
        captions=None if batch.captions is None else batch.captions.to(device),
        lm_captions=None if batch.lm_captions is None else batch.lm_captions.to(device),
        questions=None if batch.questions is None else batch.questions.to(device),
        answers=None if batch.answers is None else batch.answers.to(device),
        prompted=None if batch.prompted is None else batch.prompted.to(device),
    )
    return move, normalize(batch.pixels, spec, device)
