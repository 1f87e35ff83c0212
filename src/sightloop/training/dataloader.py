"""Loader of training batches; order, draws and augmentation are functions of (seed, step) alone."""

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import NamedTuple, TypeAlias, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sightloop.data.datasets.dataset import Dataset
from sightloop.data.images.augment import View, augment, sample_view
from sightloop.data.images.preprocess import normalize
from sightloop.data.rng import generator
from sightloop.data.shuffle import rank_slice, shuffled_index
from sightloop.data.text.tokenizer import Tokenizer
from sightloop.errors import ImageError, UsageError
from sightloop.inference.prompting import check_special_tokens
from sightloop.tasks.region_parser import FORMATTERS, plain_label
from sightloop.training.config import DataSettings
from sightloop.training.decoded_images import DecodedImages, decoded_image, plain_image
from sightloop.training.dialogue_rows import DialogueRows, RoundDraw, dialogue_rows, draw_each, draw_rounds
from sightloop.training.label_texts import LabelTexts
from sightloop.training.masking import mask_words
from sightloop.training.text_ids import pad_caption_ids
from sightloop.types import Box, ImageSpec, JsonDict, Sample, Size

_PREFETCH = 2  # batches prepared ahead of the one in use
T = TypeVar("T")
LabeledBox: TypeAlias = tuple[str, Box]  # a label, and a box in pixels


class TextRows(NamedTuple):
    """Texts of a batch, R / I consecutive ones for each of I of its images.

    Args:
        ids: int64 `[R, L]`, padded at the end.
        lengths: int64 `[R]`, tokens without padding.
        image_rows: int64 `[I]`, batch rows of the images that have texts.
        prompt_length: tokens at the start without loss, BOS included.
        input_ids: int64 `[R, L]`, ids with some words masked, or `ids` itself.
    """

    ids: Tensor
    lengths: Tensor
    image_rows: Tensor
    prompt_length: int
    input_ids: Tensor

    def to(self, device: torch.device) -> TextRows:
        """A copy on another device."""
        ids, lengths, image_rows = (x.to(device, non_blocking=True) for x in self[:3])
        input_ids = ids if self.input_ids is self.ids else self.input_ids.to(device, non_blocking=True)
        return TextRows(ids, lengths, image_rows, self.prompt_length, input_ids)


class PromptedRows(NamedTuple):
    """Prompts with their answers, for prompted networks; one id is the placeholder of the image.

    Args:
        ids: int64 `[R, L]`, prompt, answer, EOS, padding.
        lengths: int64 `[R]`, tokens without padding.
        prompt_lengths: int64 `[R]`, tokens of the prompts, which get no loss.
        image_rows: int64 `[R]`, batch row of each text's image.
    """

    ids: Tensor
    lengths: Tensor
    prompt_lengths: Tensor
    image_rows: Tensor

    def to(self, device: torch.device) -> PromptedRows:
        """A copy on another device."""
        return PromptedRows(*(x.to(device, non_blocking=True) for x in self))


@dataclass(frozen=True, slots=True)
class PromptFormat:
    """Prompts and answers as a prompted network expects them.

    Args:
        prompts: task -> prompt (`protocols.PromptedNetwork`).
        end_id: EOS.
        answer_start: ids that every answer begins with.
        region_formats: task -> format of its regions (`protocols.RegionNetwork`).
        phrase_separator: what joins several phrases in one prompt; "" if it takes one at a time.
    """

    prompts: Mapping[str, str]
    end_id: int
    answer_start: tuple[int, ...] = ()
    region_formats: Mapping[str, str] = field(default_factory=dict[str, str])
    phrase_separator: str = ""

    def detection_prompt(
        self, regions: Sequence[LabeledBox], size: Size, classes: Sequence[str]
    ) -> tuple[str, list[str]]:
        """A detection prompt and its answer.

        Args:
            regions: labels and boxes of the image.
            size: (height, width) of the image in the pixels of the boxes.
            classes: labels in the prompt, if the network is prompted with labels; () for those of the regions.

        Returns:
            The prompt, and the text of each region.
        """
        task = "detect" if "detect" in self.region_formats else "find"
        phrases = self.phrase_separator.join(classes or dict.fromkeys(label for label, _ in regions))
        return self.prompts[task].replace("{}", phrases), FORMATTERS[self.region_formats[task]](regions, size)


@dataclass(frozen=True, slots=True)
class Batch:
    """This process's part of one global batch.

    Args:
        step: of the batch, from 0.
        epoch: passes over the data before this batch.
        keys: of the b samples.
        row_indices: row of each sample in the global batch, int64 `[b]`.
        sample_indices: index of each sample in the dataset, int64 `[b]`.
        pixels: uint8 `[b, 3, S, S]`; with `data.features` float16 `[b, C, h, w]`, the trunk's.
        captions: as written, or made of labels.
        text_ids: id of each of these captions, int64 `[R]`.
        caption_ids: ids of all captions of each sample, int64 `[b, M]`, padded.
        lm_captions: the same, each after the recipe's prompt.
        questions: of all samples.
        answers: one a question.
        dialogue: rounds of dialogues with their answers; None for other recipes.
        prompted: captions, answers and regions after their prompts, for prompted networks; None for others.
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
    text_ids: Tensor
    caption_ids: Tensor
    lm_captions: TextRows | None
    questions: TextRows | None
    answers: TextRows | None
    dialogue: DialogueRows | None
    prompted: PromptedRows | None
    labels: Tensor
    skipped: tuple[tuple[str, str], ...]


class _Row(NamedTuple):
    number: int  # row of the global batch
    sample: int
    key: str
    values: NDArray[np.uint8] | NDArray[np.float16]  # [3, S, S], or the features of a trunk [C, h, w]
    captions: list[str]
    text_ids: list[int]  # of these
    caption_ids: list[int]  # of all texts that are true of the sample
    questions: list[tuple[str, str]]
    rounds: list[RoundDraw]
    regions: list[LabeledBox]
    size: Size  # of the augmented image, in the pixels of the boxes
    label: int
    writes: bool  # whether LM learns its captions


class _Skip(NamedTuple):
    key: str
    reason: str


@dataclass(frozen=True, slots=True, eq=False)
class BatchLoader:
    """Loader of a dataset's batches; a batch depends on the seed and its step, not on earlier ones.

    Args:
        dataset: samples.
        settings: batch size, texts a sample, augmentation, workers.
        tokenizer: of the texts.
        spec: preprocessing of the images.
        seed: of shuffling and all draws.
        labels: name -> class, for recipes that learn classes.
        rank: of this process.
        world_size: number of processes.
        prompts: of a prompted network, None for others.
        attributes: names of those of answers, for recipes that learn dialogues; None for others.
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
    attributes: tuple[str, ...] | None = None

    def batches(self, first: int, last: int) -> Iterator[Batch]:
        """Batches of the steps `first` to `last - 1`, prepared by threads."""
        cache = DecodedImages(self.settings.cache, self.settings.features)
        with ThreadPoolExecutor(self.settings.workers) as pool:
            waiting: deque[tuple[int, list[Future[_Row | _Skip]]]] = deque()
            try:
                for step in range(first, last):
                    waiting.append(
                        (step, [pool.submit(self._row, cache, *where) for where in self.rows_of_step(step)])
                    )
                    if len(waiting) > _PREFETCH:
                        yield self._collect(*waiting.popleft())
                while waiting:
                    yield self._collect(*waiting.popleft())
            finally:
                pool.shutdown(wait=False, cancel_futures=True)

    def rows_of_step(self, step: int) -> list[tuple[int, int, int]]:
        """(row of the global batch, epoch, index in the dataset) of this process's rows of a step.

        Each epoch has each sample once. A batch may span two epochs, so that all are full: with 5 samples and a batch
        of 2, step 2 has the last sample of epoch 0 and the first of epoch 1.
        """
        count, batch = len(self.dataset), self.settings.batch
        numbers = rank_slice(np.arange(batch, dtype=np.int64), self.rank, self.world_size)
        epochs, offsets = np.divmod(step * batch + numbers, count)
        rows: list[tuple[int, int, int]] = []
        for epoch in np.unique(epochs).tolist():
            in_epoch = epochs == epoch
            indices = shuffled_index(offsets[in_epoch], count=count, seed=self.seed, epoch=epoch)
            rows += [
                (number, epoch, index)
                for number, index in zip(numbers[in_epoch].tolist(), indices.tolist(), strict=True)
            ]
        return rows

    def _row(self, cache: DecodedImages, number: int, epoch: int, index: int) -> _Row | _Skip:
        key = str(index)
        try:
            sample = self.dataset[index]
            key = sample.key
            random = generator("texts", self.seed, epoch, index)
            source = LabelTexts(self.settings.label_texts)
            captions = draw_each(random, source.texts(sample), self.settings.texts)
            drawn = draw_each(random, sample.questions, self.settings.questions)
            questions = [(q.question, q.answers[int(random.integers(len(q.answers)))]) for q in drawn]
            rounds = self._rounds(sample, epoch, index)
            label = -1 if sample.label is None else self.labels.get(sample.label, -1)
            regions = self._regions(sample, epoch, index)
            if self.prompts is not None:
                _check_texts(self.tokenizer, key, [*captions, *chain(*questions), *(n for n, _ in regions)])
            if cache.features is not None:
                values, size = cache.features.get(sample, epoch + index), (0, 0)
            else:
                values, regions, size = self._pixels(cache, index, sample, epoch, regions)
        except ImageError as error:
            return _Skip(key, str(error))
        ids = source.ids(sample, captions), source.all_ids(sample)
        writes = self.settings.write_labeled or sample.label is None
        return _Row(
            number, index, key, values, captions, *ids, questions, rounds, regions, size, label, writes
        )

    def _rounds(self, sample: Sample, epoch: int, index: int) -> list[RoundDraw]:
        if self.attributes is None:
            return []
        settings, random = self.settings, generator("rounds", self.seed, epoch, index)
        return draw_rounds(
            random,
            sample,
            settings.rounds,
            settings.wrong_answers,
            captioned=settings.dialogue_captions,
            names=self.attributes,
        )

    def _regions(self, sample: Sample, epoch: int, index: int) -> list[LabeledBox]:
        """Up to `regions` regions of the classes to learn, drawn at random, in the sample's order."""
        regions = [(plain_label(region.label), region.box) for region in sample.regions]
        classes, limit = self.settings.classes, self.settings.regions
        if limit and not all(label for label, _ in regions):
            raise ImageError(sample.key, "one of its regions has no label: add a label, or remove the region")
        regions = [region for region in regions if not classes or region[0] in classes] if limit else []
        if len(regions) > limit:
            drawn = generator("regions", self.seed, epoch, index).permutation(len(regions))[:limit]
            regions = [regions[i] for i in sorted(drawn.tolist())]
        return regions

    def _pixels(
        self, cache: DecodedImages, index: int, sample: Sample, epoch: int, regions: list[LabeledBox]
    ) -> tuple[NDArray[np.uint8], list[LabeledBox], Size]:
        """The augmented image `[3, S, S]`, the boxes in it, and its size in the pixels of the boxes."""
        options = self.settings.augment
        if options is None:
            values, (height, width) = cache.get(index, lambda: plain_image(sample, self.spec))
            view, scale = View((0, 0, width, height)), (1.0, 1.0)
        else:
            side = (self.spec.crop or self.spec.resize or (224, 224))[0]
            image, (height, width) = cache.get(index, lambda: decoded_image(sample, cache.side))
            texts = [
                *sample.captions,
                *(text for q in sample.questions for text in (q.question, *q.answers)),
                *(
                    text
                    for d in sample.dialogues
                    for one in d.rounds
                    for text in (one.question, one.answer or "")
                ),
                *(name for name, _ in regions),
            ]
            draws: JsonDict = {"seed": self.seed, "epoch": epoch, "key": sample.key, "texts": texts}
            values = augment(image, side, options, **draws)
            view = sample_view((image.shape[0], image.shape[1]), options, **draws)
            scale = image.shape[1] / width, image.shape[0] / height
        mapped = [(label, view.map_box(_scaled(box, scale))) for label, box in regions]
        return values, [(label, box) for label, box in mapped if box is not None], view.size

    def _collect(self, step: int, futures: Sequence[Future[_Row | _Skip]]) -> Batch:
        results = [future.result() for future in futures]
        rows = [result for result in results if isinstance(result, _Row)]
        side = (self.spec.crop or self.spec.resize or (224, 224))[0]
        pixels = np.stack([row.values for row in rows]) if rows else np.zeros((0, 3, side, side), np.uint8)
        captions = [row.captions for row in rows]
        prompt = self.settings.prompt
        row_indices = torch.tensor([row.number for row in rows], dtype=torch.int64)
        plain = self._mask(self._texts(captions), step, row_indices)
        behind_prompt = plain
        written = [row.captions if row.writes else [] for row in rows]
        if prompt or written != captions:
            start = f"{prompt} " if prompt else ""
            texts = self._texts([[start + text for text in row] for row in written], prompt)
            behind_prompt = self._mask(texts, step, row_indices)
        return Batch(
            step=step,
            epoch=step * self.settings.batch / len(self.dataset),
            keys=tuple(row.key for row in rows),
            row_indices=row_indices,
            sample_indices=torch.tensor([row.sample for row in rows], dtype=torch.int64),
            pixels=torch.from_numpy(pixels),
            captions=plain,
            text_ids=torch.tensor([each for row in rows for each in row.text_ids], dtype=torch.int64),
            caption_ids=pad_caption_ids([row.caption_ids for row in rows]),
            lm_captions=behind_prompt,
            questions=self._texts([[question for question, _ in row.questions] for row in rows]),
            answers=self._texts([[answer for _, answer in row.questions] for row in rows]),
            dialogue=dialogue_rows(self.tokenizer, [row.rounds for row in rows], self.settings.max_tokens),
            prompted=None if self.prompts is None else self._prompted(self.prompts, rows),
            labels=torch.tensor([row.label for row in rows], dtype=torch.int64),
            skipped=tuple((result.key, result.reason) for result in results if isinstance(result, _Skip)),
        )

    def _texts(self, texts: Sequence[Sequence[str]], prompt: str = "") -> TextRows | None:
        """Tokens of the texts of each image."""
        flat = [text for row in texts for text in row]
        if not flat:
            return None
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # texts truncated to max_tokens
            tokens = self.tokenizer.encode(flat, max_length=self.settings.max_tokens)
            start = int(self.tokenizer.encode([prompt]).lengths[0]) - 1 if prompt else 1
        image_rows = torch.tensor([row for row, own in enumerate(texts) if own], dtype=torch.int64)
        ids = torch.from_numpy(tokens.ids)
        return TextRows(ids, torch.from_numpy(tokens.lengths), image_rows, start, ids)

    def _mask(self, rows: TextRows | None, step: int, row_indices: Tensor) -> TextRows | None:
        """The same texts with some words of `input_ids` masked (`caption_dropout`)."""
        if rows is None or not self.settings.caption_dropout:
            return rows
        words = mask_words(
            rows.ids.numpy(),
            rows.lengths.numpy(),
            mask_id=self.tokenizer.token_id("[MASK]"),
            vocab=self.tokenizer.vocab_size,
            share=self.settings.caption_dropout,
            seed=self.seed,
            step=step,
            rows=row_indices[rows.image_rows].numpy(),
        )
        return rows._replace(input_ids=torch.from_numpy(words.ids))

    def _truncate(self, pieces: list[str]) -> str:
        """As many of the pieces, from the first, as `max_tokens` holds with EOS."""
        has_bos, has_eos = self.tokenizer.bos_id is not None, self.tokenizer.eos_id is not None
        for count in range(len(pieces), 0, -1):
            text = "".join(pieces[:count])
            if int(self.tokenizer.encode([text]).lengths[0]) - has_bos - has_eos < self.settings.max_tokens:
                return text
        return ""

    def _prompted(self, formats: PromptFormat, rows: Sequence[_Row]) -> PromptedRows | None:
        """Prompt, answer and EOS for each caption, question and detection; answers are truncated to `max_tokens`."""
        examples: list[tuple[int, str, str]] = []  # (row, prompt, answer)
        caption = formats.prompts["caption"]
        if self.settings.prompt:
            caption = formats.prompts["prompt"].replace("{}", self.settings.prompt)
        question = formats.prompts.get("answer", formats.prompts["prompt"])
        for number, row in enumerate(rows):
            examples += [(number, caption, text) for text in row.captions]
            examples += [(number, question.replace("{}", q), text) for q, text in row.questions]
            if row.regions or (self.settings.regions and self.settings.classes):
                prompt, pieces = formats.detection_prompt(row.regions, row.size, self.settings.classes)
                examples.append((number, prompt, self._truncate(pieces)))
        if not examples:
            return None
        image_rows, *columns = zip(*examples, strict=True)
        prompts, texts = (self.tokenizer.encode([str(text) for text in column]) for column in columns)
        bos, eos, most = self.tokenizer.bos_id, self.tokenizer.eos_id, self.settings.max_tokens - 1
        sequences: list[NDArray[np.int64]] = []
        for prompt, length, text, end in zip(
            prompts.ids, prompts.lengths, texts.ids, texts.lengths, strict=True
        ):
            last = end - int(text[end - 1] == eos)  # OPT names an EOS, and its tokenizer puts none
            answer = [*formats.answer_start, *text[int(bos is not None) : last][:most], formats.end_id]
            sequences.append(np.array([*prompt[:length], *answer], np.int64))
        lengths = [len(sequence) for sequence in sequences]
        ids = np.full((len(sequences), max(lengths)), self.tokenizer.pad_id, np.int64)  # [R, L]
        for row, sequence in zip(ids, sequences, strict=True):
            row[: len(sequence)] = sequence
        return PromptedRows(
            torch.from_numpy(ids),
            torch.tensor(lengths),
            torch.from_numpy(prompts.lengths),
            torch.tensor(image_rows),
        )


def _scaled(box: Box, scale: tuple[float, float]) -> Box:
    x, y = scale
    return box[0] * x, box[1] * y, box[2] * x, box[3] * y


def _check_texts(tokenizer: Tokenizer, key: str, texts: Sequence[str]) -> None:
    """Raises ImageError if a text spells a special token, which would be read as an image or an end."""
    try:
        for text in texts:
            check_special_tokens(tokenizer, text)
    except UsageError as error:
        raise ImageError(key, str(error)) from None


def on_device(batch: Batch, spec: ImageSpec, device: torch.device) -> tuple[Batch, Tensor]:
    """The batch on a device, and its normalized pixels, float32 `[b, 3, S, S]`."""
    moved = replace(
        batch,
        row_indices=batch.row_indices.to(device),
        sample_indices=batch.sample_indices.to(device),
        text_ids=batch.text_ids.to(device),
        caption_ids=batch.caption_ids.to(device),
        labels=batch.labels.to(device),
        captions=None if batch.captions is None else batch.captions.to(device),
        lm_captions=None if batch.lm_captions is None else batch.lm_captions.to(device),
        questions=None if batch.questions is None else batch.questions.to(device),
        answers=None if batch.answers is None else batch.answers.to(device),
        dialogue=None if batch.dialogue is None else batch.dialogue.to(device),
        prompted=None if batch.prompted is None else batch.prompted.to(device),
    )
    if batch.pixels.dtype == torch.float16:  # features, not pixels
        return moved, batch.pixels.to(device, torch.float32)
    return moved, normalize(batch.pixels, spec, device)
