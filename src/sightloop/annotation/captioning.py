"""Captioning many images: write a caption for each, drop those not worth keeping, put the rest where they go."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any, Protocol

from sightloop.annotation import runner
from sightloop.tasks.caption_filter import CaptionFilter, drop_reason
from sightloop.types import Done, Event, Failed, Pixels, Skipped


class Captioner(runner.ImageReader, Protocol):
    """What writes captions: a `Model` with the capability "caption"."""

    def caption(self, images: Any, prompt: str | None = None, **decoding: Any) -> list[str]:
        """One caption for each image."""
        ...


class CaptionJudge(runner.ImageReader, Protocol):
    """What scores captions: a `Model` with the capability "match"."""

    def match(self, images: Any, texts: Any) -> Any:
        """float32 `[n]`: the probability that each text matches its image."""
        ...


class CaptionSink(Protocol):
    """Where captions go: beside their images, or into one table."""

    def check(self, picture: str) -> Skipped | Failed | None:
        """None where a caption of this image is wanted."""
        ...

    def keep(self, picture: str, caption: Caption) -> Skipped | Failed | None:
        """Takes one caption, a dropped one too; None where that was done."""
        ...

    def skipped(self, picture: str) -> None:
        """Is told, in the order of the inputs, which of them were skipped."""
        ...

    def commit(self) -> None:
        """Makes all that was kept so far last."""
        ...

    def finish(self) -> None:
        """Is called once, after the last input."""
        ...


@dataclass(frozen=True, slots=True)
class Caption:
    """What was written for one image. `text` is the caption with prefix and suffix. Where it is dropped, `text` is
    what the model wrote, `dropped` the kind ("empty", "looping", "unwanted" by `drop_if`, "unmatched" by the judge)
    and `why` the cause in words. `score`: the judge's probability in 0..1, where one was asked."""

    text: str
    dropped: str = ""
    why: str = ""
    score: float | None = None


def caption_images(
    models: tuple[Captioner, CaptionJudge | None],
    inputs: Iterable[str | Skipped | Failed],
    sink: CaptionSink,
    rules: CaptionFilter,
    reading: runner.LoaderConfig,
) -> Generator[Event[Caption], None, None]:
    """Captions what `inputs` name and puts each caption into `sink`; yields one event for each input, in order.

    `models` are the one that writes and the one that judges; the judge may be the same model, and is None without
    `rules.min_match`. What the sink does not want is not read at all. A dropped caption is `Done`, with the reason in
    its value.
    """
    writer, judge = models
    # A second reading only where the judge sees images prepared in another way.
    apart = judge is not None and getattr(judge, "image_spec", None) != getattr(writer, "image_spec", None)
    readers: list[runner.ImageReader] = [writer, judge] if judge is not None and apart else [writer]

    def verb(pictures: list[Pixels], for_judge: list[Pixels] | None = None) -> list[Caption]:
        texts = [" ".join(text.split()) for text in writer.caption(pictures, rules.prompt, **rules.decoding)]
        return _judged(texts, judge, pictures if for_judge is None else for_judge, rules)

    wanted = (item if not isinstance(item, str) else sink.check(item) or item for item in inputs)
    with closing(runner.run(readers, wanted, verb, reading)) as events:
        uncommitted = 0
        for event in events:
            if isinstance(event, Skipped):
                sink.skipped(event.name)
            elif isinstance(event, Done):
                event = sink.keep(event.name, event.value) or event
                uncommitted += 1
                if uncommitted >= reading.batch_size:
                    sink.commit()
                    uncommitted = 0
            yield event
        sink.finish()


def _judged(
    texts: Sequence[str], judge: CaptionJudge | None, pictures: Sequence[Pixels], rules: CaptionFilter
) -> list[Caption]:
    drops = [drop_reason(text, rules) for text in texts]
    kept = [i for i, (kind, _) in enumerate(drops) if not kind]
    scores: dict[int, float] = {}
    if judge is not None and rules.min_match is not None and kept:
        given = judge.match([pictures[i] for i in kept], [texts[i] for i in kept])
        scores = {i: float(score) for i, score in zip(kept, given, strict=True)}
        for i, score in scores.items():
            if not score >= rules.min_match:
                drops[i] = (
                    "unmatched",
                    f"the judge gives it {score:.3f}, less than {rules.min_match:g}: {texts[i]!r}",
                )
    return [
        Caption(text if kind else f"{rules.prefix}{text}{rules.suffix}", kind, why, scores.get(i))
        for i, (text, (kind, why)) in enumerate(zip(texts, drops, strict=True))
    ]
