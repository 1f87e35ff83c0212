"""Captioning of many images: generate a caption for each, drop poor ones, hand the rest to a sink."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Protocol

from sightloop.annotation import runner
from sightloop.annotation.result_table import ResultTable
from sightloop.annotation.scene_captions import SceneCaption as SceneCaption
from sightloop.annotation.scene_captions import SceneFile as SceneFile
from sightloop.annotation.scene_captions import caption_scenes as caption_scenes
from sightloop.annotation.scene_captions import check_installed as check_installed
from sightloop.tasks.caption_filter import CaptionFilter, drop_reason
from sightloop.types import Done, Event, Failed, Floats32, ImageSpec, JsonDict, JsonMapping, Pixels, Skipped


class Captioner(runner.ImageReader, Protocol):
    """Model with the capability "caption"."""

    @property
    def image_spec(self) -> ImageSpec:
        """How its images are preprocessed."""
        ...

    def caption(self, images: Sequence[Pixels], prompt: str | None = None, **decoding: Any) -> list[str]:
        """One caption for each image; `decoding` as in `tasks.decoding_options.Decoding`."""
        ...


class CaptionMatcher(runner.ImageReader, Protocol):
    """Model with the capability "match" (an ITM head)."""

    @property
    def image_spec(self) -> ImageSpec:
        """How its images are preprocessed."""
        ...

    def match(self, images: Sequence[Pixels], texts: Sequence[str]) -> Floats32:
        """float32 `[n]`: the probability that each text matches its image."""
        ...


class CaptionSink(Protocol):
    """Destination of captions: sidecar files or one table."""

    def check(self, image: str) -> Skipped | Failed | None:
        """Called before the image is read; None if its caption is needed."""
        ...

    def add(self, image: str, caption: Caption) -> Skipped | Failed | None:
        """Takes one caption, also one that is dropped; None on success."""
        ...

    def note_skipped(self, image: str) -> None:
        """Called for each skipped image, in input order."""
        ...

    def commit(self) -> None:
        """Makes everything added so far durable."""
        ...

    def finish(self) -> None:
        """Called once, after the last input."""
        ...


@dataclass(frozen=True, slots=True)
class Caption:
    """Caption of one image.

    Attributes:
        text: The caption with prefix and suffix; if it is dropped, the model's text without them.
        dropped: Why it is dropped: "empty", "looping", "unwanted" (matches `drop_if`) or "unmatched" (below
            `min_match`); "" if it is kept.
        reason: The same in words, for people.
        score: ITM probability in 0..1; None if the caption was not scored.
    """

    text: str
    dropped: str = ""
    reason: str = ""
    score: float | None = None


class CaptionTable:
    """Sink that writes captions to a table: name, caption, if they are scored match, and if it is known writer.

    Args:
        path, mode, settings: See `ResultTable`.
        writer: Identity of the captioning model, for the column "writer": a model that later judges its own captions is
            told from others by it. "" for no such column.

    Raises:
        UsageError: FILE cannot be read or written, or another run is writing it.
    """

    def __init__(
        self,
        path: Path,
        mode: Literal["skip", "overwrite"] = "skip",
        settings: JsonMapping | None = None,
        writer: str = "",
    ) -> None:
        self._table = ResultTable(path, mode, settings, ("name", "caption"))
        self._writer = writer

    def check(self, image: str) -> Skipped | Failed | None:
        """`Skipped` if the table has a row of this image already; called before the image is read."""
        return Skipped(image, "it has a row already") if image in self._table else None

    def add(self, image: str, caption: Caption) -> Skipped | Failed | None:
        """Adds one line to the journal; a dropped caption is recorded there but not written to FILE."""
        row: JsonDict = {"caption": caption.text}
        if caption.score is not None:
            row["match"] = round(caption.score, 6)
        if self._writer:
            row["writer"] = self._writer
        self._table.add(image, [] if caption.dropped else [row])
        return None

    def note_skipped(self, image: str) -> None:
        """Puts the existing row of a skipped image at its position among the inputs."""
        self._table.note_skipped(image)

    def commit(self) -> None:
        """Forces the journal onto the disk (fsync)."""
        self._table.commit()

    def finish(self) -> None:
        """Writes FILE and removes the journal.

        Raises `SightloopError`, and keeps the journal, if another program changed FILE during the run.
        """
        self._table.finish()

    def close(self) -> None:
        """Closes the journal and deletes it if it has no new rows; does nothing after `finish`."""
        self._table.close()


def caption_images(
    models: tuple[Captioner, CaptionMatcher | None],
    inputs: Iterable[str | Skipped | Failed],
    sink: CaptionSink,
    rules: CaptionFilter,
    loader: runner.LoaderConfig,
) -> Generator[Event[Caption], None, None]:
    """Captions the input images, puts each caption into `sink` and yields one event for each input, in order.

    Args:
        models: The captioner, and the model that scores its captions; they may be the same model. The second may be
            None if `rules.min_match` is None.
        inputs: Image paths, and events that are passed on. Images that the sink does not need are not read.
        sink: Destination; committed after batch of captions and finished after the last input.
        rules: Prompt, decoding and filter. A dropped caption is `Done`, with the reason in its value.
        loader: Batch size and image reading.
    """
    captioner, matcher = models
    readers: list[runner.ImageReader] = [captioner]
    if matcher is not None and matcher.image_spec != captioner.image_spec:  # other preprocessing: read twice
        readers.append(matcher)

    def caption_batch(images: list[Pixels], matcher_images: list[Pixels] | None = None) -> list[Caption]:
        texts = [" ".join(text.split()) for text in captioner.caption(images, rules.prompt, **rules.decoding)]
        return _filter_captions(texts, matcher, images if matcher_images is None else matcher_images, rules)

    pending = (item if not isinstance(item, str) else sink.check(item) or item for item in inputs)
    sizer = loader.sizer()
    loader = replace(loader, batch_size=sizer)
    with closing(runner.run(readers, pending, caption_batch, loader)) as events:
        uncommitted = 0
        for event in events:
            if isinstance(event, Skipped):
                sink.note_skipped(event.name)
            elif isinstance(event, Done):
                event = sink.add(event.name, event.value) or event
                uncommitted += 1
                if uncommitted >= sizer.size:
                    sink.commit()
                    uncommitted = 0
            yield event
        sink.finish()


def _filter_captions(
    texts: Sequence[str], matcher: CaptionMatcher | None, images: Sequence[Pixels], rules: CaptionFilter
) -> list[Caption]:
    """Decides which captions are dropped; only those that pass the text rules are scored by the matcher."""
    drops = [drop_reason(text, rules) for text in texts]
    kept = [i for i, (kind, _) in enumerate(drops) if not kind]
    scores: dict[int, float] = {}
    if matcher is not None and rules.min_match is not None and kept:
        probabilities = matcher.match([images[i] for i in kept], [texts[i] for i in kept])
        scores = {i: float(score) for i, score in zip(kept, probabilities, strict=True)}
        for i, score in scores.items():
            if not score >= rules.min_match:  # also NaN
                drops[i] = ("unmatched", f"match score {score:.3f}, below {rules.min_match:g}: {texts[i]!r}")
    return [
        Caption(text if kind else f"{rules.prefix}{text}{rules.suffix}", kind, reason, scores.get(i))
        for i, (text, (kind, reason)) in enumerate(zip(texts, drops, strict=True))
    ]
