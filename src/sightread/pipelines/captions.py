"""Captioning many pictures: write a caption for each, drop those not worth keeping, put the rest where they go."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Generator, Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any, Protocol

from sightread.pipelines import jobs
from sightread.pipelines.events import Done, Event, Failed, Skipped
from sightread.types import Pixels


class Captioner(jobs.Reader, Protocol):
    """What writes captions: a `Model` with the capability "caption"."""

    def caption(self, images: Any, prompt: str | None = None, **decoding: Any) -> list[str]:
        """One caption for each picture."""
        ...


class Judge(jobs.Reader, Protocol):
    """What scores captions: a `Model` with the capability "match"."""

    def match(self, images: Any, texts: Any) -> Any:
        """float32 `[n]`: the probability that each text matches its picture."""
        ...


class Sink(Protocol):
    """Where captions go: beside their pictures, or into one table."""

    def check(self, picture: str) -> Skipped | Failed | None:
        """None where a caption of this picture is wanted."""
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
    """What was written for one picture. `text` is the caption with prefix and suffix. Where it is dropped, `text` is
    what the model wrote, `dropped` the kind ("empty", "looping", "unwanted" by `drop_if`, "unmatched" by the judge)
    and `why` the cause in words. `score`: the judge's probability in 0..1, where one was asked."""

    text: str
    dropped: str = ""
    why: str = ""
    score: float | None = None


@dataclass(frozen=True, slots=True)
class Rules:
    """How captions are asked for, which are dropped, and what is put around those that stay.

    `drop_if` is searched for in the caption; `min_match` is the least probability that the judge must give. Empty and
    looping captions are dropped unless `keep_all`. Prefix and suffix are added last and are not judged.
    """

    prompt: str | None = None
    prefix: str = ""
    suffix: str = ""
    drop_if: re.Pattern[str] | None = None
    min_match: float | None = None
    keep_all: bool = False
    decoding: Mapping[str, Any] = field(default_factory=dict[str, Any])


def caption_pictures(
    models: tuple[Captioner, Judge | None],
    inputs: Iterable[str | Skipped | Failed],
    sink: Sink,
    rules: Rules,
    reading: jobs.Reading,
) -> Generator[Event[Caption], None, None]:
    """Captions what `inputs` name and puts each caption into `sink`; yields one event for each input, in order.

    `models` are the one that writes and the one that judges; the judge may be the same model, and is None without
    `rules.min_match`. What the sink does not want is not read at all. A dropped caption is `Done`, with the reason in
    its value.
    """
    writer, judge = models
    # A second reading only where the judge sees pictures prepared in another way.
    apart = judge is not None and getattr(judge, "image_spec", None) != getattr(writer, "image_spec", None)
    readers: list[jobs.Reader] = [writer, judge] if judge is not None and apart else [writer]

    def verb(pictures: list[Pixels], for_judge: list[Pixels] | None = None) -> list[Caption]:
        texts = [" ".join(text.split()) for text in writer.caption(pictures, rules.prompt, **rules.decoding)]
        return _judged(texts, judge, pictures if for_judge is None else for_judge, rules)

    wanted = (item if not isinstance(item, str) else sink.check(item) or item for item in inputs)
    with closing(jobs.run(readers, wanted, verb, reading)) as events:
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
    texts: Sequence[str], judge: Judge | None, pictures: Sequence[Pixels], rules: Rules
) -> list[Caption]:
    drops = [why_drop(text, rules) for text in texts]
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


def why_drop(text: str, rules: Rules) -> tuple[str, str]:
    """The kind and the cause for which a caption is dropped before any judge sees it; ("", "") where it is kept."""
    if rules.drop_if is not None and rules.drop_if.search(text):
        return "unwanted", f"its caption matches {rules.drop_if.pattern!r}: {text!r}"
    if rules.keep_all:
        return "", ""
    words = _words(text)
    if not words:
        return "empty", "its caption is empty"
    if words == _words(rules.prompt or ""):
        return "empty", "its caption is empty beyond the prompt"
    if loop := find_loop(text):
        return "looping", f"its caption repeats {loop!r}: {text!r}"
    return "", ""


def find_loop(text: str, longest: int = 8) -> str:
    """The words that a caption repeats, "" where it does not.

    A loop is one word that stands 4 times or more in a row, or a phrase of 2 to `longest` words that stands 3 times or
    more in a row. Case does not count, nor does punctuation at the ends of words: "a dog, a dog, a dog." is a loop,
    "ha ha ha" is none. The shortest phrase is given. Linear in the length of the text.
    """
    words = _words(text)
    for length in range(1, longest + 1):
        needed = length * (
            3 if length == 1 else 2
        )  # so many words in a row equal the word `length` places before
        run = 0
        for i in range(length, len(words)):
            run = run + 1 if words[i] == words[i - length] else 0
            if run >= needed:
                return " ".join(words[i - length + 1 : i + 1])
    return ""


def _words(text: str) -> list[str]:
    """The words of a text, case folded, without punctuation at their ends; words of punctuation alone are left out."""
    words = (_stripped(word) for word in text.casefold().split())
    return [word for word in words if word]


def _stripped(word: str) -> str:
    start, end = 0, len(word)
    while start < end and unicodedata.category(word[start])[0] in "PSCZ":
        start += 1
    while end > start and unicodedata.category(word[end - 1])[0] in "PSCZ":
        end -= 1
    return word[start:end]
