"""Processing of one CapFilt shard: consecutive samples in, one output shard and the evidence for every text out.

The output depends on the samples and the job's settings alone. Float32 sums depend on the shape of a forward pass, so
shapes are fixed: the samples of a shard go through the models in groups of `options.group`, counted from its start,
whatever the batch size, the number of workers or the order of shards. An unreadable image leaves its place in the
group empty.
"""

from __future__ import annotations

import hashlib
import warnings
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, suppress
from dataclasses import dataclass, replace
from itertools import islice, tee
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

import numpy as np

from sightloop.capfilt import dialogues
from sightloop.capfilt.filtering import SCORE_DIGITS, CandidateText, decide, drop_unusable
from sightloop.capfilt.options import CapFiltOptions
from sightloop.capfilt.records import ShardItem, ShardTally
from sightloop.capfilt.remote_captioner import RemoteCaptioner, is_address
from sightloop.data.atomic import atomic_path, atomic_write
from sightloop.data.datasets import schema, writers
from sightloop.data.datasets.convert import encoded_image
from sightloop.data.datasets.dataset import Dataset
from sightloop.data.images.reader import is_retryable, read_images
from sightloop.errors import ImageError, UnsupportedError
from sightloop.protocols import Embedder, require
from sightloop.types import ImageSpec, JsonDict, Limits, Pixels, Sample

if TYPE_CHECKING:
    from sightloop.inference.model import Model

# Called with the key of a sample and the reason of its failure, "" if it did not fail.
OnSampleDone: TypeAlias = "Callable[[str, str], None]"

_EMPTY_TAR = bytes(1024)  # two zero blocks: the end mark alone


@dataclass(frozen=True, slots=True)
class Job:
    """Everything a process needs to work on any shard of a run.

    Attributes:
        dataset: The input.
        options: Options, with `group` and `threads` set.
        models: Model source by role: "captioner", "filter", "ranker".
        fingerprints: Fingerprint of each model, by role.
        shards: (start, stop) of each output shard's samples in the dataset, all of one input shard.
        out: The output folder.
    """

    dataset: Dataset
    options: CapFiltOptions
    models: dict[str, str]
    fingerprints: dict[str, str]
    shards: list[tuple[int, int]]
    out: Path

    def shard_name(self, index: int) -> str:
        """File name of a shard; its evidence has the same stem."""
        return f"{index:06}.{self.options.to}"

    def evidence_path(self, index: int) -> Path:
        """Path of the evidence of a shard."""
        return self.out / "evidence" / f"{index:06}.jsonl"


@dataclass(eq=False)
class Models:
    """The loaded models of a job; a source with two roles is loaded once.

    Attributes:
        captioner: Writes synthetic texts; None in mode "filter-only".
        filter: Computes ITM, and ITC if there is no ranker; None in mode "captioner-only".
        ranker: Computes ITC.
    """

    captioner: Model | RemoteCaptioner | None
    filter: Model | None
    ranker: Model | None

    @property
    def specs(self) -> list[ImageSpec]:
        """The distinct preprocessings of the models."""
        models = (self.captioner, self.filter, self.ranker)
        return list(dict.fromkeys(model.image_spec for model in models if model is not None))


def load_models(job: Job) -> Models:
    """Loads the models that the job's mode needs. Raises `UnsupportedError` for a model that cannot do its part."""
    from sightloop.inference.load import load  # imports torch, which a finished run does not need

    options = job.options
    loaded: dict[str, Model] = {}
    captioner: Model | RemoteCaptioner | None = None
    for role, source in job.models.items():
        if is_address(source):
            captioner = RemoteCaptioner(source)
            continue
        shared = next((loaded[r] for r, s in job.models.items() if s == source and r in loaded), None)
        loaded[role] = shared or load(source, device=options.device, dtype=options.dtype)
        loaded[role].batch_size = options.group or loaded[role].batch_size
        talks = options.task == "dialogue"
        writes = "answer" if talks else "caption"
        capability = {"captioner": writes, "ranker": "embed", "filter": "match"}[role]
        if role == "filter" and options.keep == "top-k-itc" and options.ranker is None:
            capability = "embed"
        if capability not in loaded[role].capabilities:
            capabilities = ", ".join(sorted(loaded[role].capabilities))
            raise UnsupportedError(
                f"{source}: cannot {capability}, which a {role} must (it can: {capabilities}); "
                f"`sightloop models --capability {capability}` lists models that can"
            )
        if talks and role == "filter":
            dialogues.check_judge(loaded[role])
    return Models(captioner or loaded.get("captioner"), loaded.get("filter"), loaded.get("ranker"))


def process_shard(
    job: Job,
    models: Models,
    index: int,
    quarantined: Mapping[str, str],
    on_sample: OnSampleDone | None = None,
) -> JsonDict:
    """Processes one shard and writes its two files by atomic rename.

    Args:
        job: The job.
        models: Its loaded models.
        index: Number of the shard.
        quarantined: Key and reason of samples that are reported as failed without being read.
        on_sample: Called for each sample.

    Returns:
        The shard's manifest entry: "unit" (its index), its files with sizes and checksums, and its counts.

    Raises:
        OSError: A file cannot be written.
    """
    with closing(process_samples(job, models, index, quarantined)) as items:
        return write_shard(job, index, items, on_sample)


def write_shard(
    job: Job, index: int, items: Iterable[ShardItem], on_sample: OnSampleDone | None = None
) -> JsonDict:
    """Writes the two files of a shard, of samples whose texts are decided; arguments and result as `process_shard`."""
    tally = ShardTally()
    lines: list[bytes] = []
    with atomic_path(job.out / job.shard_name(index)) as temporary:
        temporary.unlink()  # the writers create their file
        with ExitStack() as stack:
            writer = _open_writer(job, temporary)
            stack.callback(_close_quietly, writer)
            for item in items:
                sample = _output_sample(item, writer, talks=job.options.task == "dialogue")
                if sample is not None:
                    writer.add(sample, item.data, item.ending)
                lines += evidence_lines(job, item)
                tally.add(item, sample is not None)
                if on_sample is not None:
                    on_sample(item.key, item.reason)
            writer.close()
        if not temporary.exists():  # no sample was written
            temporary.write_bytes(_EMPTY_TAR)
        file = _file_digest(temporary)
    evidence = b"".join(lines)
    atomic_write(job.evidence_path(index), evidence)
    entry: JsonDict = {"unit": index, "shard": job.shard_name(index), **file, "rule": job.options.rule}
    entry |= {"evidence": hashlib.sha256(evidence).hexdigest(), "evidence_bytes": len(evidence)}
    return entry | tally.to_json()


def process_samples(
    job: Job, models: Models, index: int, quarantined: Mapping[str, str]
) -> Generator[ShardItem, None, None]:
    """Yields the samples of a shard in order, with their texts written, scored and kept or dropped."""
    group_size = job.options.group or 8
    groups_ahead = -(-_ahead(job.options) // group_size)  # rounded up
    with closing(_read_items(job, models, index, quarantined)) as items:
        while ready := list(islice(items, groups_ahead * group_size)):
            for start in range(0, len(ready), group_size):
                group = ready[start : start + group_size]
                _retry_decoding(job, models, group)
                _caption_and_filter(job, models, [item for item in group if not item.reason])
                yield from group


def _ahead(options: CapFiltOptions) -> int:
    """Images that are decoded ahead of the models."""
    wanted = 64 if options.batch_size == "auto" else options.batch_size or 0
    return max(wanted, options.group or 8)


def _open_writer(job: Job, path: Path) -> writers.DatasetWriter:
    if job.options.to == "parquet":
        return writers.ParquetWriter(path, refer=job.options.by_reference)
    return writers.ShardWriter(path.parent, lambda _: path.name, 0)


def _close_quietly(writer: writers.DatasetWriter) -> None:
    with suppress(OSError, ValueError):  # closed already, or the temporary file is removed anyway
        writer.close()


def _output_sample(item: ShardItem, writer: writers.DatasetWriter, *, talks: bool) -> Sample | None:
    """The sample with its kept texts; None if it has no annotation left or cannot be written."""
    if item.sample is None or item.reason:
        return None
    if talks:
        sample = replace(item.sample, dialogues=dialogues.kept_dialogues(item.sample, item.texts))
    else:
        sample = replace(item.sample, captions=tuple(text.text for text in item.texts if text.kept))
    texts = sample.captions or sample.questions or sample.dialogues
    if not (texts or sample.regions or sample.label is not None):
        return None
    try:
        writer.check(sample)
    except ImageError as error:
        item.reason, item.texts = error.reason, []
        return None
    return sample


def _read_items(
    job: Job, models: Models, index: int, quarantined: Mapping[str, str]
) -> Generator[ShardItem, None, None]:
    """Yields the samples of a shard in order, each with its pixels for every model, or with a reason.

    The decoders pull images ahead of their results; `waiting` holds the samples pulled and not yet yielded.
    """
    waiting: deque[ShardItem] = deque()

    def encoded_images() -> Iterator[bytes]:
        for sample_index in range(*job.shards[index]):
            item = load_item(job.dataset, sample_index, quarantined)
            waiting.append(item)
            if not item.reason:
                yield item.data

    with ExitStack() as stack:
        streams = [
            stack.enter_context(closing(_decode(job, spec, feed)))
            for spec, feed in zip(models.specs, tee(encoded_images(), len(models.specs)), strict=True)
        ]
        for results in zip(*streams, strict=True):
            while waiting[0].reason:
                yield waiting.popleft()
            item = waiting.popleft()
            _set_pixels(item, models, results)
            yield item
        yield from waiting


def _decode(job: Job, spec: ImageSpec, images: Iterable[bytes]) -> Generator[Pixels | ImageError, None, None]:
    options = job.options
    limits = Limits(max_pixels=options.max_pixels)
    ahead = _ahead(options) + options.readers
    yield from read_images(
        images, spec, workers=options.readers, isolate=options.isolate, limits=limits, ahead=ahead
    )


def load_item(dataset: Dataset, index: int, quarantined: Mapping[str, str]) -> ShardItem:
    """A sample with its encoded image, or with the reason why it is not processed."""
    source, key = dataset.source_name(index), f"#{index}"
    try:
        key = dataset.key(index)
        if key in quarantined:
            return ShardItem(source, key, reason=quarantined[key])
        sample = dataset[index]
        data, ending = encoded_image(sample, read_all=True)
    except ImageError as error:
        return ShardItem(source, error.name, reason=error.reason or "cannot be read")
    except OSError as error:  # the input shard itself is gone
        return ShardItem(source, key, reason=error.strerror or str(error))
    return ShardItem(source, key, sample, data or b"", ending)


def _set_pixels(item: ShardItem, models: Models, results: Sequence[Pixels | ImageError]) -> None:
    """Stores the result of each preprocessing, or the first failure."""
    item.reason, item.decoder_died, item.pixels = "", False, {}
    for spec, result in zip(models.specs, results, strict=True):
        if isinstance(result, ImageError):
            item.reason, item.decoder_died = result.reason or "cannot be read", is_retryable(result)
            return
        item.pixels[spec] = result


def _retry_decoding(job: Job, models: Models, group: Sequence[ShardItem]) -> None:
    """Decodes once more the images whose decoder died: another process may have exhausted the memory."""
    failed = [item for item in group if item.decoder_died]
    if failed:
        streams = [list(_decode(job, spec, [item.data for item in failed])) for spec in models.specs]
        for item, results in zip(failed, zip(*streams, strict=True), strict=True):
            _set_pixels(item, models, results)


def _caption_and_filter(job: Job, models: Models, items: Sequence[ShardItem]) -> None:
    """Writes, scores and decides the texts of one group of readable images."""
    if not items:
        return
    options = job.options
    if options.task == "dialogue":
        for item in items:
            _answer_and_filter(models, item, options)
        return
    for item in items:
        assert item.sample is not None
        item.texts = [CandidateText("web", text) for text in item.sample.captions]
    if models.captioner is not None:
        for item, texts in zip(items, _synthetic_texts(models.captioner, items, options), strict=True):
            if isinstance(texts, ImageError):
                item.reason, item.texts = texts.reason, []
                continue
            item.texts += [CandidateText("synthetic", " ".join(text.split())) for text in texts]
        items = [item for item in items if not item.reason]
    remaining = [drop_unusable(item.texts, options.prompt) for item in items]
    if any(remaining):
        with warnings.catch_warnings():  # about texts that are longer than a model reads
            warnings.simplefilter("ignore", UserWarning)
            score_texts(models, items, remaining)
    for texts in remaining:
        decide(texts, options)


def _answer_and_filter(models: Models, item: ShardItem, options: CapFiltOptions) -> None:
    """Writes, scores and decides the answers of one image's dialogues."""
    writer, judge, sample = models.captioner, models.filter, item.sample
    assert sample is not None
    assert judge is not None
    assert not isinstance(writer, RemoteCaptioner)
    image = None if writer is None else item.pixels[writer.image_spec]
    with warnings.catch_warnings():  # about texts that are longer than a model reads
        warnings.simplefilter("ignore", UserWarning)
        item.texts = dialogues.answers_of(writer, sample, image, options)
        remaining = dialogues.drop_unusable_answers(item.texts)
        dialogues.score_answers(judge, sample, item.pixels[judge.image_spec], remaining)
    decide(remaining, options)


def _synthetic_texts(
    captioner: Model | RemoteCaptioner, items: Sequence[ShardItem], options: CapFiltOptions
) -> Sequence[Sequence[str] | ImageError]:
    """`options.captions` texts for each image, or why a remote captioner refused it."""
    images = [item.pixels[captioner.image_spec] for item in items]
    if isinstance(captioner, RemoteCaptioner):
        return captioner.caption(images, [item.key for item in items], options)
    texts = captioner.caption(images, options.prompt, **options.decoding())  # those of an image in a row
    return [texts[start : start + options.captions] for start in range(0, len(texts), options.captions)]


def score_texts(
    models: Models, items: Sequence[ShardItem], texts_of: Sequence[Sequence[CandidateText]]
) -> None:
    """Sets the ITM probability and ITC similarity of every text with its image.

    An image is encoded once for all of its texts. A text longer than the model reads is scored by its beginning.

    Args:
        models: Filter and ranker.
        items: B images.
        texts_of: The texts of each image, R in all.
    """
    import torch

    from sightloop.tasks.embed import embed_images

    texts = [text for image_texts in texts_of for text in image_texts]  # R
    strings = [text.text for text in texts]
    ends = np.cumsum([len(image_texts) for image_texts in texts_of])
    # Rows of each image's texts; for 2, 0 and 3 texts: [0, 1], [], [2, 3, 4].
    rows_of = [
        np.arange(end - len(image_texts), end) for end, image_texts in zip(ends, texts_of, strict=True)
    ]
    with torch.inference_mode():
        for model in dict.fromkeys(m for m in (models.filter, models.ranker) if m is not None):
            encoded = model.encode([item.pixels[model.image_spec] for item in items])  # [B, N, D]
            if model is models.filter and "match" in model.capabilities:
                logits = np.concatenate(
                    model.match_scores(encoded, model.tokenize(strings), rows_of)
                )  # [R, 2]
                for text, (no_match, match) in zip(texts, logits.astype(np.float64).tolist(), strict=True):
                    # softmax over two logits = sigmoid of their difference
                    text.itm = round(1 / (1 + float(np.exp(no_match - match))), SCORE_DIGITS)
            if model is (models.ranker or models.filter) and "embed" in model.capabilities:
                # [B, P], or [B, Q, P] with several vectors for each image, of which the nearest counts
                image_embeddings = (
                    embed_images(require(model.network, Embedder), encoded).cpu().numpy().astype(np.float64)
                )
                text_embeddings = model.embed_texts(strings).astype(np.float64)  # [R, P]
                for image_embedding, rows in zip(image_embeddings, rows_of, strict=True):
                    for row in rows.tolist():
                        texts[row].itc = round(
                            float((image_embedding @ text_embeddings[row]).max()), SCORE_DIGITS
                        )


def evidence_lines(job: Job, item: ShardItem) -> Iterator[bytes]:
    """JSON lines about one image: one for each text, kept or not, or one with the reason of its failure."""
    if item.reason:
        failed = {"key": item.key, "shard": item.source, "failed": item.reason}
        yield schema.json_text(failed).encode() + b"\n"
    talks = job.options.task == "dialogue"
    used = job.options.answering() if talks else job.options.decoding()
    decoding = {name: value for name, value in used.items() if value is not None}
    for text in item.texts:
        line: JsonDict = {"key": item.key, "source": text.source, "text": text.text}
        if text.turn is not None and item.sample is not None:
            question = dialogues.question_of(item.sample, text.turn)
            line |= {"turn": text.turn, "question": question, "attributes": text.attributes}
        line |= {"itm": text.itm, "itc": text.itc, "verdict": "kept" if text.kept else "dropped"}
        line |= {"reason": text.reason, "filter": job.fingerprints.get("filter")}
        if "ranker" in job.fingerprints:
            line["ranker"] = job.fingerprints["ranker"]
        if text.source == "synthetic":
            line |= {"captioner": job.fingerprints["captioner"], "prompt": job.options.prompt}
            line["decoding"] = decoding
        yield schema.json_text(line).encode() + b"\n"


def _file_digest(path: Path) -> JsonDict:
    with path.open("rb") as file:
        return {"sha256": hashlib.file_digest(file, "sha256").hexdigest(), "bytes": path.stat().st_size}
