"""Judging of captions that images already have: match scores, p-values against foreign captions, verdicts.

A raw ITM probability says little: a model may call every caption of a folder a match. The scores of captions of *other*
images of the same dataset say what chance looks like there. The p-value of a caption is conformal (Vovk et al. 2005):

    p = (1 + number of foreign scores >= its score) / (1 + number of foreign scores)

If a caption belongs to an image drawn at random, p <= a has a probability of at most a.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeAlias

import numpy as np

from sightloop.annotation import runner
from sightloop.annotation.caption_record import caption_writer
from sightloop.annotation.result_table import ResultTable
from sightloop.data.datasets.dataset import Dataset
from sightloop.data.rng import generator
from sightloop.errors import ImageError
from sightloop.types import Done, Event, Failed, Floats, ImageSource, JsonDict, Limits, Pixels, Skipped, Video

MIN_IMAGES = 20  # fewest captioned images for p-values
MAX_P = 0.05  # of a caption that fits
COLUMNS = ("name", "caption", "match", "p", "verdict")
FITS, DOUBTFUL, MISFIT = "fits", "doubtful", "does not fit"
_FOREIGN_SCORES = 1000  # wanted altogether
_MAX_FOREIGN = 50  # for one image
_LIMITS = Limits()

Scorer: TypeAlias = Callable[[list[Pixels], list[list[str]]], Sequence[Sequence[float]]]

_COMMIT_EVERY = 8  # images between two commits of the journal


@dataclass(frozen=True, slots=True)
class CaptionedImage:
    """An image with the captions to judge.

    Args:
        name: Path of the image, or the key of its sample.
        image: Path or encoded bytes.
        captions: At least one.
        writers: Identity of the model that wrote each caption, "" if that is not known.
    """

    name: str
    image: ImageSource
    captions: tuple[str, ...]
    writers: tuple[str, ...]


@dataclass(slots=True)
class CaptionList:
    """Captions of a dataset, without its images.

    Args:
        todo: Indices of samples to judge.
        events: Samples that are not judged, with the reason: no caption, broken, or judged already.
        pool: Captions to draw foreign ones from, each once.
        images: Number of images with a caption.
        writers: Identities of the models that wrote captions, and how many each.
        keys: Indices of samples whose image an earlier sample has too; they are named by their key.
    """

    todo: list[int] = field(default_factory=list[int])
    events: dict[int, Skipped | Failed] = field(default_factory=dict[int, "Skipped | Failed"])
    pool: list[str] = field(default_factory=list[str])
    images: int = 0
    writers: Counter[str] = field(default_factory=Counter[str])
    keys: set[int] = field(default_factory=set[int])

    @property
    def has_null(self) -> bool:
        """Whether there are enough images for p-values."""
        return self.images >= MIN_IMAGES and len(self.pool) >= MIN_IMAGES

    @property
    def foreign(self) -> int:
        """Number of foreign captions scored with each image."""
        if not self.has_null or not self.todo:
            return 0
        return min(_MAX_FOREIGN, max(1, -(-_FOREIGN_SCORES // len(self.todo))), len(self.pool) - 1)


def list_captions(dataset: Dataset, table: ResultTable | None) -> CaptionList:
    """Reads the captions of a dataset.

    Args:
        dataset: Not a stream.
        table: Images that it has with the same captions are `Skipped`; None judges all.
    """
    listed, pool, names = CaptionList(), dict[str, None](), set[str]()
    for index in range(len(dataset)):
        try:
            item = captioned_image(dataset, index)
        except ImageError as error:
            listed.events[index] = Failed(error.name, error.reason)
            continue
        if item.name in names:
            listed.keys.add(index)
            item = captioned_image(dataset, index, by_key=True)
        names.add(item.name)
        if not item.captions:
            listed.events[index] = Skipped(item.name, "it has no caption")
            continue
        listed.images += 1
        listed.writers.update(writer for writer in item.writers if writer)
        pool.update(dict.fromkeys(item.captions))
        if table is not None and sorted(item.captions) == _judged(table, item.name):
            listed.events[index] = Skipped(item.name, "its captions are judged already")
        else:
            listed.todo.append(index)
    listed.pool = list(pool)
    return listed


def captioned_image(dataset: Dataset, index: int, *, by_key: bool = False) -> CaptionedImage:
    """A sample with its captions, and who wrote them as far as the dataset or the folder's record says.

    Args:
        dataset: Not a stream.
        index: Of the sample.
        by_key: Name it by its key instead of its path.

    Raises:
        ImageError: The sample is broken.
    """
    sample = dataset[index]
    own = sample.extra.get("writer")
    writers = tuple(
        own
        if isinstance(own, str)
        else caption_writer(sample.image, caption)
        if isinstance(sample.image, Path)
        else ""
        for caption in sample.captions
    )
    name = sample.key if by_key or not isinstance(sample.image, Path) else str(sample.image)
    return CaptionedImage(name, sample.image, sample.captions, writers)


def judge_captions(
    reader: runner.ImageReader,
    score: Scorer,
    dataset: Dataset,
    listed: CaptionList,
    table: ResultTable,
    loader: runner.LoaderConfig,
) -> Generator[Event[list[float]], None, None]:
    """Scores the captions of a dataset; yields one event for each sample, in order.

    Args:
        reader: Preprocesses the images.
        score: Scores of images with texts of their own, higher for a better match.
        dataset: The images.
        listed: Of `list_captions`.
        table: Gets a row for each caption, and in its journal the scores of foreign captions; committed after every
            batch. `arrange_judgments` makes its rows.
        loader: Batch size and image reading.
    """
    opened: dict[str, CaptionedImage] = {}  # images that are read or waiting, by name
    wanted = set(listed.todo)

    def inputs() -> Iterator[str | Skipped | Failed]:
        for index in range(len(dataset)):
            if index not in wanted:
                yield listed.events[index]
                continue
            item = captioned_image(dataset, index, by_key=index in listed.keys)
            opened[item.name] = item
            yield item.name

    def judge(images: list[Pixels]) -> Sequence[Sequence[float]]:
        items = [opened[image.name] for image in images]
        return score(images, [[*i.captions, *foreign_captions(i, listed)] for i in items])

    with closing(runner.run([_NamedReader(reader, opened)], inputs(), judge, loader)) as events:
        uncommitted = 0
        for event in events:
            if isinstance(event, Skipped):
                table.note_skipped(event.name)
            elif isinstance(event, Done):
                item = opened.pop(event.name)
                # Significant digits, because the worst scores differ by powers of ten.
                scores = [float(f"{value:.6g}") for value in event.value]
                own, null = scores[: len(item.captions)], scores[len(item.captions) :]
                table.add(item.name, _rows(item, own), null=null)
                event = Done(event.name, own)
                uncommitted += 1
                if uncommitted >= _COMMIT_EVERY:
                    table.commit()
                    uncommitted = 0
            yield event


def foreign_captions(item: CaptionedImage, listed: CaptionList) -> list[str]:
    """`listed.foreign` captions of other images, drawn by the image's name alone."""
    own = {" ".join(caption.casefold().split()) for caption in item.captions}
    order = generator("match", "foreign", item.name).permutation(len(listed.pool)) if listed.foreign else ()
    texts = (listed.pool[i] for i in order)
    drawn = (text for text in texts if " ".join(text.casefold().split()) not in own)
    return [text for text, _ in zip(drawn, range(listed.foreign), strict=False)]


def arrange_judgments(entries: Iterable[JsonDict], threshold: float | None) -> list[JsonDict]:
    """Rows of the table, worst first, with p-values and verdicts.

    Args:
        entries: Journal entries: rows with "match", and the scores "null" of foreign captions. Rows of an older table
            keep their p-value and verdict.
        threshold: Least score of a match by the model's own calibration; None if it has none.
    """
    rows: list[JsonDict] = []
    fresh: list[JsonDict] = []
    null: list[float] = []
    for entry in entries:
        rows += entry["rows"]
        if "null" in entry:
            fresh += entry["rows"]
            null += entry["null"]
    p_values = conformal_p([row["match"] for row in fresh], null) if null else None
    for i, row in enumerate(fresh):
        p = None if p_values is None else float(p_values[i])
        row["p"] = None if p is None else round(p, 6)
        row["verdict"] = verdict(row["match"], p, threshold)
    for row in rows:  # of a CSV they are texts
        row |= {key: number for key in ("match", "p") if np.isfinite(number := _number(row.get(key)))}
    return sorted(rows, key=lambda row: (_number(row.get("match")), -_number(row.get("p"))))


def conformal_p(scores: Sequence[float], null: Sequence[float]) -> Floats:
    """Share of null scores `[m]` that reach each of the scores `[n]`, with one added to both counts: float64 `[n]`."""
    ordered = np.sort(np.asarray(null, np.float64))
    at_least = len(ordered) - np.searchsorted(ordered, np.asarray(scores, np.float64), side="left")
    return (1 + at_least) / (1 + len(ordered))


def verdict(score: float, p: float | None, threshold: float | None) -> str:
    """What a score says of a caption.

    "fits": the score reaches the calibrated threshold or, without one, p <= 0.05. "does not fit": at least half of the
    foreign captions fit as well. "doubtful": between the two. "" if nothing calibrates the score.
    """
    if threshold is not None and (score >= threshold or p is None):
        return FITS if score >= threshold else MISFIT
    if p is None:
        return ""
    if threshold is None and p <= MAX_P:
        return FITS
    return MISFIT if p >= 0.5 else DOUBTFUL


def _rows(item: CaptionedImage, scores: Sequence[float]) -> list[JsonDict]:
    return [
        {"caption": caption, "match": score} | ({"writer": writer} if writer else {})
        for caption, score, writer in zip(item.captions, scores, item.writers, strict=True)
    ]


def _judged(table: ResultTable, name: str) -> list[str]:
    """The captions of an image that a table has, sorted."""
    return sorted(str(row.get("caption", "")) for row in table.entry(name).get("rows", ()))


def _number(value: object) -> float:
    """A cell as a number; what is none comes last."""
    try:
        return float(value) if isinstance(value, int | float | str) else np.inf
    except ValueError:
        return np.inf


@dataclass(frozen=True, slots=True)
class _NamedReader:
    """Reader of images by the name under which they were opened."""

    reader: runner.ImageReader
    opened: dict[str, CaptionedImage]

    def read(
        self,
        sources: Iterable[ImageSource | Video],
        *,
        workers: int = 2,
        isolate: bool = True,
        limits: Limits = _LIMITS,
    ) -> Iterator[Pixels | ImageError]:
        """One result for each name, in order; its pixels are named as it is."""
        names: list[str] = []

        def images() -> Iterator[ImageSource]:
            for name in sources:
                assert isinstance(name, str)
                names.append(name)
                yield self.opened[name].image

        results = self.reader.read(images(), workers=workers, isolate=isolate, limits=limits)
        for result in results:
            name = names.pop(0)
            yield result if isinstance(result, ImageError) else Pixels(name, result.values, result.size)
