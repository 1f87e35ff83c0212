"""One unit of a bootstrap: consecutive samples in, one output shard and the evidence for every text out.

What a unit gives is a function of its samples and the job's settings. Float32 sums depend on the shape of a pass, so
the shapes are the unit's own: its samples go through the models in groups of `group` places, counted from its start,
whatever the batch size, the number of workers or the order. An image that cannot be read leaves its place empty.
"""

from __future__ import annotations

import hashlib
import warnings
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, suppress
from dataclasses import dataclass, field, replace
from itertools import islice, tee
from pathlib import Path
from typing import TypeAlias

import numpy as np
import torch

from sightloop.capfilt.filtering import DIGITS, TEXT_SOURCES, CandidateText, decide, drop_unusable
from sightloop.capfilt.options import CapFiltOptions
from sightloop.capfilt.remote_captioner import RemoteCaptioner, is_address
from sightloop.data.atomic import atomic_path, atomic_write
from sightloop.data.datasets import schema, writers
from sightloop.data.datasets.convert import encoded_image
from sightloop.data.datasets.dataset import Dataset
from sightloop.data.images.reader import read_images, worker_died
from sightloop.errors import ImageError, UnsupportedError
from sightloop.inference.load import load
from sightloop.inference.model import Model
from sightloop.protocols import Embedder, require
from sightloop.tasks.embed import embed_images
from sightloop.types import ImageSpec, JsonDict, Limits, Pixels, Sample

OnImage: TypeAlias = "Callable[[str, str], None]"

BINS = 20  # of the histograms of ITM probabilities


@dataclass(frozen=True, slots=True)
class Job:
    """What a process needs to work on any unit. units: (start, stop) of the dataset's records, each within one source.

    stamps: the fingerprint of each model, by its part: "captioner", "filter", "ranker".
    """

    dataset: Dataset
    options: CapFiltOptions
    models: dict[str, str]
    stamps: dict[str, str]
    shards: list[tuple[int, int]]
    out: Path

    def shard(self, unit: int) -> str:
        """The name of a unit's shard; its evidence has the same stem."""
        return f"{unit:06}.{self.options.to}"

    def evidence(self, unit: int) -> Path:
        """Where the evidence for a unit's texts lies."""
        return self.out / "evidence" / f"{unit:06}.jsonl"


@dataclass(eq=False)
class Models:
    """The loaded models of a job. A model that has two parts is loaded once."""

    captioner: Model | RemoteCaptioner | None
    judge: Model | None  # ITM, and ITC where no ranker does it
    ranker: Model | None

    @property
    def specs(self) -> list[ImageSpec]:
        """The ways in which images are prepared for them, each once."""
        models = (self.captioner, self.judge, self.ranker)
        return list(dict.fromkeys(model.image_spec for model in models if model is not None))


@dataclass(eq=False)
class ShardItem:
    """A place of a unit. shard: the name of the source. reason: why there is no such image, where there is none."""

    shard: str
    key: str
    sample: Sample | None = None
    data: bytes = b""
    ending: str = ""
    reason: str = ""
    unlucky: bool = False  # a decoder process died at it
    pixels: dict[ImageSpec, Pixels] = field(default_factory=dict[ImageSpec, Pixels])
    texts: list[CandidateText] = field(default_factory=list[CandidateText])


def load_models(job: Job) -> Models:
    """Loads what the job's mode needs. Raises `UnsupportedError` for a model that cannot do its part."""
    options = job.options
    loaded: dict[str, Model] = {}
    captioner: Model | RemoteCaptioner | None = None
    for part, source in job.models.items():
        if is_address(source):
            captioner = RemoteCaptioner(source)
            continue
        known = next((loaded[p] for p, s in job.models.items() if s == source and p in loaded), None)
        loaded[part] = known or load(source, device=options.device, dtype=options.dtype)
        loaded[part].batch_size = options.group or loaded[part].batch_size
        needs = {"captioner": "caption", "ranker": "embed", "filter": "match"}[part]
        if part == "filter" and options.keep == "top-k-itc" and options.ranker is None:
            needs = "embed"
        if needs not in loaded[part].capabilities:
            able = ", ".join(sorted(loaded[part].capabilities))
            raise UnsupportedError(
                f"{source}: cannot {needs}, which a {part} must (it can: {able}); "
                f"`sightloop models --capability {needs}` lists models that can"
            )
    return Models(captioner or loaded.get("captioner"), loaded.get("filter"), loaded.get("ranker"))


def process_shard(
    job: Job, models: Models, unit: int, quarantined: Mapping[str, str], watch: OnImage | None = None
) -> JsonDict:
    """Works on one unit and puts its two files into place; returns what the manifest says about it.

    quarantined: samples that are not to be touched, and why. watch: is told of each sample its key and, where it
    failed, why. Raises OSError where a file cannot be written.
    """
    tally = ShardTally()
    lines: list[bytes] = []
    with atomic_path(job.out / job.shard(unit)) as temporary:
        temporary.unlink()  # the writers make their own
        with ExitStack() as stack:
            writer = _writer(job, temporary)
            stack.callback(_close_quietly, writer)
            with closing(worked(job, models, unit, quarantined)) as items:
                for item in items:
                    sample = _kept(item, writer)
                    if sample is not None:
                        writer.add(sample, item.data, item.ending)
                    lines += evidence_lines(job, item)
                    tally.add(item, sample)
                    if watch is not None:
                        watch(item.key, item.reason)
            writer.close()
        if not temporary.exists():  # nothing was kept: an archive of nothing but its end mark
            temporary.write_bytes(bytes(1024))
        found = {"shard": job.shard(unit), **_digest(temporary)}
    evidence = b"".join(lines)
    atomic_write(job.evidence(unit), evidence)
    told = {"evidence": hashlib.sha256(evidence).hexdigest(), "evidence_bytes": len(evidence)}
    return {"unit": unit, **found, **told, **tally.told()}


def worked(
    job: Job, models: Models, unit: int, quarantined: Mapping[str, str]
) -> Generator[ShardItem, None, None]:
    """The places of a unit in order, their texts written, scored and decided."""
    size = job.options.group or 8
    ready = -(-(job.options.batch_size or size) // size) * size
    with closing(_read(job, models, unit, quarantined)) as items:
        while held := list(islice(items, ready)):
            for start in range(0, len(held), size):
                group = held[start : start + size]
                _read_again(job, models, group)
                _work(job, models, [item for item in group if not item.reason])
                yield from group


def _writer(job: Job, path: Path) -> writers.DatasetWriter:
    if job.options.to == "parquet":
        return writers.ParquetWriter(path, refer=job.options.by_reference)
    return writers.ShardWriter(path.parent, lambda _: path.name, 0)


def _close_quietly(writer: writers.DatasetWriter) -> None:
    with suppress(OSError, ValueError):  # closed already, or the file goes away anyway
        writer.close()


def _kept(item: ShardItem, writer: writers.DatasetWriter) -> Sample | None:
    """The sample with its kept texts; None where nothing is left to learn from, or it cannot be written."""
    if item.sample is None or item.reason:
        return None
    sample = replace(item.sample, captions=tuple(text.text for text in item.texts if text.kept))
    if not (sample.captions or sample.questions or sample.regions or sample.label is not None):
        return None
    try:
        writer.check(sample)
    except ImageError as error:
        item.reason, item.texts = error.reason, []
        return None
    return sample


def _read(
    job: Job, models: Models, unit: int, quarantined: Mapping[str, str]
) -> Generator[ShardItem, None, None]:
    """The unit's places in order, each with its image for every model, or a reason why not."""
    waiting: deque[ShardItem] = deque()

    def sources() -> Iterator[bytes]:
        for index in range(*job.shards[unit]):
            item = _item(job.dataset, index, quarantined)
            waiting.append(item)
            if not item.reason:
                yield item.data

    with ExitStack() as stack:
        streams = [
            stack.enter_context(closing(_stream(job, spec, feed)))
            for spec, feed in zip(models.specs, tee(sources(), len(models.specs)), strict=True)
        ]
        for results in zip(*streams, strict=True):
            while waiting[0].reason:
                yield waiting.popleft()
            item = waiting.popleft()
            _take(item, models, results)
            yield item
        yield from waiting


def _stream(
    job: Job, spec: ImageSpec, sources: Iterable[bytes]
) -> Generator[Pixels | ImageError, None, None]:
    options = job.options
    limits = Limits(max_pixels=options.max_pixels)
    yield from read_images(sources, spec, workers=options.readers, isolate=options.isolate, limits=limits)


def _item(dataset: Dataset, index: int, quarantined: Mapping[str, str]) -> ShardItem:
    shard, key = dataset.origin(index), f"#{index}"
    try:
        key = dataset.key(index)
        if key in quarantined:
            return ShardItem(shard, key, reason=quarantined[key])
        sample = dataset[index]
        data, ending = encoded_image(sample, whole=True)
    except ImageError as error:
        return ShardItem(shard, error.name, reason=error.reason or "cannot be read")
    except OSError as error:  # the shard itself has gone
        return ShardItem(shard, key, reason=error.strerror or str(error))
    return ShardItem(shard, key, sample, data or b"", ending)


def _take(item: ShardItem, models: Models, results: Sequence[Pixels | ImageError]) -> None:
    item.reason, item.unlucky, item.pixels = "", False, {}
    for spec, result in zip(models.specs, results, strict=True):
        if isinstance(result, ImageError):
            item.reason, item.unlucky = result.reason or "cannot be read", worker_died(result)
            return
        item.pixels[spec] = result


def _read_again(job: Job, models: Models, group: Sequence[ShardItem]) -> None:
    """A second try for images that could not be decoded: a decoder may have been killed by others' hunger."""
    failed = [item for item in group if item.unlucky]
    if failed:
        streams = [list(_stream(job, spec, [item.data for item in failed])) for spec in models.specs]
        for item, results in zip(failed, zip(*streams, strict=True), strict=True):
            _take(item, models, results)


def _work(job: Job, models: Models, items: Sequence[ShardItem]) -> None:
    """Writes, scores and decides the texts of one group."""
    if not items:
        return
    options = job.options
    for item in items:
        assert item.sample is not None
        item.texts = [CandidateText("web", text) for text in item.sample.captions]
    if models.captioner is not None:
        pictures = [item.pixels[models.captioner.image_spec] for item in items]
        if isinstance(models.captioner, RemoteCaptioner):
            written = models.captioner.caption(pictures, [item.key for item in items], options)
        else:
            flat = models.captioner.caption(pictures, options.prompt, **options.decoding())
            written = [flat[at : at + options.captions] for at in range(0, len(flat), options.captions)]
        for item, texts in zip(items, written, strict=True):
            if isinstance(texts, ImageError):
                item.reason, item.texts = texts.reason, []
                continue
            item.texts += [CandidateText("synthetic", " ".join(text.split())) for text in texts]
        items = [item for item in items if not item.reason]
    left = [drop_unusable(item.texts, options.prompt) for item in items]
    if any(left):
        with warnings.catch_warnings():  # one a pass, for texts that are longer than a model reads
            warnings.simplefilter("ignore", UserWarning)
            score(models, items, left)
    for texts in left:
        decide(texts, options)


@torch.inference_mode()
def score(models: Models, items: Sequence[ShardItem], texts_of: Sequence[Sequence[CandidateText]]) -> None:
    """ITM and ITC of every text with its image; an image is encoded once for all of its texts.

    A text that is longer than a model reads is judged by its beginning.
    """
    texts = [text for texts in texts_of for text in texts]
    ends = np.cumsum([len(texts) for texts in texts_of])
    rows = [np.arange(end - len(mine), end) for end, mine in zip(ends, texts_of, strict=True)]
    strings = [text.text for text in texts]
    for model in dict.fromkeys(m for m in (models.judge, models.ranker) if m is not None):
        image = model.encode([item.pixels[model.image_spec] for item in items])
        if model is models.judge and "match" in model.capabilities:
            logits = np.concatenate(model.match_scores(image, model.tokenize(strings), rows))
            logits = logits.astype(np.float64)
            for text, (no, yes) in zip(texts, logits.tolist(), strict=True):
                text.itm = round(1 / (1 + float(np.exp(no - yes))), DIGITS)
        if model is (models.ranker or models.judge) and "embed" in model.capabilities:
            pictures = embed_images(require(model.network, Embedder), image).cpu().numpy().astype(np.float64)
            words = model.embed_texts(strings).astype(np.float64)
            for picture, mine in zip(pictures, rows, strict=True):
                for row in mine.tolist():
                    texts[row].itc = round(float((picture @ words[row]).max()), DIGITS)


def evidence_lines(job: Job, item: ShardItem) -> Iterator[bytes]:
    """A line for each text of an image, kept or not, or one that says why there is no image."""
    if item.reason:
        failed = {"key": item.key, "shard": item.shard, "failed": item.reason}
        yield schema.json_text(failed).encode() + b"\n"
    how = {name: value for name, value in job.options.decoding().items() if value is not None}
    for text in item.texts:
        line: JsonDict = {"key": item.key, "source": text.source, "text": text.text}
        line |= {"itm": text.itm, "itc": text.itc, "verdict": "kept" if text.kept else "dropped"}
        line |= {"reason": text.reason, "filter": job.stamps.get("filter")}
        if "ranker" in job.stamps:
            line["ranker"] = job.stamps["ranker"]
        if text.source == "synthetic":
            line |= {"captioner": job.stamps["captioner"], "prompt": job.options.prompt, "decoding": how}
        yield schema.json_text(line).encode() + b"\n"


@dataclass(eq=False)
class ShardTally:
    """What a unit came to, as the manifest holds it: enough for the report's totals without reading any evidence."""

    samples: int = 0
    written: int = 0
    # (shard of the source, key, reason)
    failed: list[list[str]] = field(default_factory=list[list[str]])
    texts: Counter[str] = field(default_factory=Counter[str])
    bins: dict[str, list[int]] = field(
        default_factory=lambda: {source: [0] * BINS for source in TEXT_SOURCES}
    )

    def add(self, item: ShardItem, sample: Sample | None) -> None:
        """One place, and what was written of it."""
        self.samples += 1
        self.written += sample is not None
        if item.reason:
            self.failed.append([item.shard, item.key, item.reason])
        for text in item.texts:
            self.texts[f"{text.source} {text.reason}"] += 1
            if text.itm is not None:
                self.bins[text.source][min(BINS - 1, int(text.itm * BINS))] += 1

    def told(self) -> JsonDict:
        """As JSON values, the same for the same unit."""
        counts = dict(sorted(self.texts.items()))
        return {"samples": self.samples, "written": self.written, "texts": counts} | {
            "itm": self.bins,
            "failed": self.failed,
        }


def _digest(path: Path) -> JsonDict:
    with path.open("rb") as file:
        return {"sha256": hashlib.file_digest(file, "sha256").hexdigest(), "bytes": path.stat().st_size}
