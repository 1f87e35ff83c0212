"""Events of a training run: frozen records, each one line of RUN/metrics.jsonl."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Final, TypeAlias

from sightloop.errors import SightloopError
from sightloop.types import JsonDict, JsonMapping


@dataclass(frozen=True, slots=True)
class RunStarted:
    """Start or resumption of a run.

    Args:
        recipe: its name.
        steps: of the run.
        batch: images a step, over all processes.
        samples: number of samples in the training data.
        parameters: number of weights.
        trainable: number of weights that are not frozen.
        first_step: steps done before; 0 for a new run.
    """

    recipe: str
    steps: int
    batch: int
    samples: int
    parameters: int
    trainable: int
    first_step: int


@dataclass(frozen=True, slots=True)
class StepDone:
    """An optimizer step.

    Args:
        step: from 1.
        epoch: passes over the data so far.
        loss: weighted sum of the terms.
        values: losses by term ("itc", "itm", "lm"), and facts ("itm.accuracy", "gradient_norm").
        chances: term -> its loss at chance level.
        lr: learning rate.
        seconds: duration of the step.
        samples: images of the step; samples / seconds is the throughput.
    """

    step: int
    epoch: float
    loss: float
    values: dict[str, float]
    chances: dict[str, float]
    lr: float
    seconds: float
    samples: int


@dataclass(frozen=True, slots=True)
class Evaluated:
    """Evaluation after a step.

    Args:
        step: steps done.
        values: metrics by name.
        texts: (key of the image, generated caption).
        drawn: keys of the images whose captions were drawn.
    """

    step: int
    values: dict[str, float]
    texts: tuple[tuple[str, str], ...] = ()
    drawn: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Calibrated:
    """Calibration of the ITM threshold.

    Args:
        step: steps done.
        data: dataset of the pairs; "" for images held out of the training.
        images: number of images.
        pairs: number of pairs, true and false.
        area: under the ROC curve, 0..1.
        before: at a probability of 0.5, the share of true pairs "kept" and of false pairs "dropped".
        after: the same, calibrated.
        cosine: weight of the ITC cosine in the logit of "match".
        start: model from which the share of dropped pairs was taken, if it has learned these images; else "".
    """

    step: int
    data: str
    images: int
    pairs: int
    area: float
    before: dict[str, float]
    after: dict[str, float]
    cosine: float = 0.0
    start: str = ""

    def summary(self) -> str:
        """The calibration in a sentence or two."""
        (kept, dropped), (now, gone) = ((at["kept"], at["dropped"]) for at in (self.before, self.after))
        if self.start:
            return (
                f"ITM's threshold is carried over from {self.start}, which has learned from the {self.images:,} "
                f"images to calibrate on: 0.5 drops {gone:.1%} of their wrong texts, as there (before: "
                f"{dropped:.1%}). Calibrate on images new to both instead: --evaluate DATA"
            )
        return (
            f"ITM's threshold is set: 0.5 keeps {now:.1%} of true texts and drops {gone:.1%} of wrong ones (before: "
            f"{kept:.1%} and {dropped:.1%}; ROC area {self.area:.3f}), measured on {self.pairs:,} pairs with "
            f"{self.images:,} images {f'of {self.data}' if self.data else 'kept out of the training'}"
            + (f". ITC's cosine is added to ITM's logit with weight {self.cosine:g}" if self.cosine else "")
        )


@dataclass(frozen=True, slots=True)
class WarningRaised:
    """A warning.

    Args:
        step: steps done.
        about: the term or fact.
        text: observation, meaning, remedy.
        over: an earlier warning about this no longer holds.
    """

    step: int
    about: str
    text: str
    over: bool = False


@dataclass(frozen=True, slots=True)
class SampleSkipped:
    """A sample that cannot be used; `reason` gives the cause."""

    key: str
    reason: str


@dataclass(frozen=True, slots=True)
class CheckpointSaved:
    """A complete checkpoint of a step in `folder`."""

    step: int
    folder: Path


@dataclass(frozen=True, slots=True)
class RunEnded:
    """End of a run.

    Args:
        step: steps done.
        seconds: duration since start or resumption.
        folder: the result, or None.
    """

    step: int
    seconds: float
    folder: Path | None


RunEvent: TypeAlias = (
    RunStarted
    | StepDone
    | Evaluated
    | Calibrated
    | WarningRaised
    | SampleSkipped
    | CheckpointSaved
    | RunEnded
)

KINDS: Final[dict[str, type[RunEvent]]] = {
    "start": RunStarted,
    "step": StepDone,
    "evaluation": Evaluated,
    "calibration": Calibrated,
    "warning": WarningRaised,
    "skipped": SampleSkipped,
    "saved": CheckpointSaved,
    "end": RunEnded,
}
_KIND_OF: Final = {record: kind for kind, record in KINDS.items()}


def to_json(event: RunEvent) -> JsonDict:
    """JSON values of an event: "kind" first, then its fields. NaN and infinities become "nan", "inf", "-inf"."""
    record = {field.name: _plain(getattr(event, field.name)) for field in fields(event)}
    return {"kind": _KIND_OF[type(event)], **record}


def from_json(record: JsonMapping) -> RunEvent:
    """The event of `to_json`; unknown fields are ignored.

    Raises:
        SightloopError: the kind is unknown, a field without a default is missing, or a value is of the wrong type.
    """
    kind = KINDS.get(str(record.get("kind")))
    if kind is None:
        raise SightloopError(f"not an event of a training run: its kind is {record.get('kind')!r}")
    try:
        values: JsonDict = {
            field.name: _READERS[str(field.type)](record[field.name])
            for field in fields(kind)
            if field.name in record or field.default is MISSING
        }
    except (KeyError, TypeError, ValueError) as error:
        raise SightloopError(f"a damaged {record['kind']!r} event: {error!r}") from error
    return kind(**values)


def _plain(value: object) -> object:
    match value:
        case float():
            return value if math.isfinite(value) else str(value)
        case dict():
            return {key: _plain(item) for key, item in value.items()}
        case tuple():
            return [_plain(item) for item in value]
        case Path():
            return value.as_posix()
        case _:
            return value


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is not text")
    return value


def _integer(value: object) -> int:
    if not isinstance(value, (int, float, str)):
        raise TypeError(f"{value!r} is not a whole number")
    return int(value)


def _float(value: object) -> float:
    if not isinstance(value, (int, float, str)):  # "nan", "inf"
        raise TypeError(f"{value!r} is not a number")
    return float(value)


def _floats(value: object) -> dict[str, float]:
    if not isinstance(value, dict):
        raise TypeError(f"{value!r} is not a table of numbers")
    return {_text(name): _float(number) for name, number in value.items()}


def _pairs(value: object) -> tuple[tuple[str, str], ...]:
    if not isinstance(value, (list, tuple)):
        raise TypeError(f"{value!r} is not a list of pairs")
    return tuple((_text(key), _text(text)) for key, text in value)


def _texts(value: object) -> tuple[str, ...]:
    if not isinstance(value, (list, tuple)):
        raise TypeError(f"{value!r} is not a list of texts")
    return tuple(_text(text) for text in value)


def _path(value: object) -> Path:
    return Path(_text(value))


# By the annotation of the field.
_READERS: Final[dict[str, Callable[[object], object]]] = {
    "str": _text,
    "int": _integer,
    "bool": bool,
    "float": _float,
    "dict[str, float]": _floats,
    "tuple[tuple[str, str], ...]": _pairs,
    "tuple[str, ...]": _texts,
    "Path": _path,
    "Path | None": lambda value: None if value is None else _path(value),
}
