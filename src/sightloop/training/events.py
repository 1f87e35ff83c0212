"""What a training run says while it goes on: frozen records, each one line of RUN/metrics.jsonl."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any, Final, TypeAlias, cast

from sightloop.errors import SightloopError
from sightloop.types import JsonDict, JsonMapping


@dataclass(frozen=True, slots=True)
class RunStarted:
    """The run starts, or goes on at `first_step`.

    recipe: its name. steps: of the whole run. batch: images a step, over all processes. samples: in the training
    data. parameters, trainable: numbers of weights.
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
    """The optimizer has taken step `step` (from 1).

    epoch: how often the data has been seen. loss: the weighted sum. values: the terms ("itc", "itm", "lm"), each of
    which `chances` gives the value of where nothing was learned, and facts ("itm.accuracy", "gradient_norm").
    rate: the learning rate. seconds, samples: since the record before, so that their ratio is the throughput.
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
    """The evaluation after a step. values: metrics by name. texts: (key of the image, caption written now)."""

    step: int
    values: dict[str, float]
    texts: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, slots=True)
class Calibrated:
    """The threshold of the judge was set. data: where the pairs come from; empty: kept out of the training.

    images, pairs: how many. area: under the ROC curve. before, after: at a probability of 0.5, the shares of true
    pairs that were "kept" and of wrong ones that were "dropped". cosine: what ITC's cosine counts beside ITM's logit.
    start: the model whose share of dropped texts was kept, as it has learned from these images; else empty.
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
        """In a sentence or two."""
        (kept, dropped), (now, gone) = ((at["kept"], at["dropped"]) for at in (self.before, self.after))
        if self.start:
            return (
                f"ITM's threshold is carried over from {self.start}, which has learned from the {self.images:,} "
                f"images that it could be set on: 0.5 drops {gone:.1%} of their wrong texts, as there (before: "
                f"{dropped:.1%}). Images that are new to both would tell more: --evaluate DATA"
            )
        return (
            f"ITM's threshold is set: 0.5 keeps {now:.1%} of true texts and drops {gone:.1%} of wrong ones (before: "
            f"{kept:.1%} and {dropped:.1%}; ROC area {self.area:.3f}), measured on {self.pairs:,} pairs with "
            f"{self.images:,} images {f'of {self.data}' if self.data else 'kept out of the training'}"
            + (f". ITC's cosine counts {self.cosine:g} times beside ITM's logit" if self.cosine else "")
        )


@dataclass(frozen=True, slots=True)
class WarningRaised:
    """Something is wrong. about: the term or fact; text: what was seen, what it means, what to try.

    over: it was wrong, and is right again.
    """

    step: int
    about: str
    text: str
    over: bool = False


@dataclass(frozen=True, slots=True)
class SampleSkipped:
    """A sample could not be used; `reason` says why."""

    key: str
    reason: str


@dataclass(frozen=True, slots=True)
class CheckpointSaved:
    """A whole checkpoint lies in `folder`."""

    step: int
    folder: Path


@dataclass(frozen=True, slots=True)
class RunEnded:
    """The run is over after `seconds`. folder: the finished model; None where there is none."""

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
    """The event as JSON values: "kind" first, then its fields. What JSON has no number for is "nan", "inf", "-inf"."""
    record = {field.name: _plain(getattr(event, field.name)) for field in fields(event)}
    return {"kind": _KIND_OF[type(event)], **record}


def from_json(record: JsonMapping) -> RunEvent:
    """The event that `to_json` made `record` of; fields that it does not know are ignored.

    Raises SightloopError where the kind is unknown, or a field without a default is missing, or of the wrong type.
    """
    made = KINDS.get(str(record.get("kind")))
    if made is None:
        raise SightloopError(f"not an event of a training run: its kind is {record.get('kind')!r}")
    try:
        read = {
            field.name: _READERS[str(field.type)](record[field.name])
            for field in fields(made)
            if field.name in record or field.default is MISSING
        }
    except (KeyError, TypeError, ValueError) as error:
        raise SightloopError(f"a damaged {record['kind']!r} event: {error!r}") from error
    return made(**read)


def _plain(value: Any) -> Any:
    match value:
        case float():
            return value if math.isfinite(value) else str(value)
        case dict():
            return {key: _plain(one) for key, one in cast("JsonDict", value).items()}
        case tuple():
            return [_plain(one) for one in cast("tuple[Any, ...]", value)]
        case Path():
            return value.as_posix()
        case _:
            return value


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is not text")
    return value


def _numbers(value: Any) -> dict[str, float]:
    if not isinstance(value, dict):
        raise TypeError(f"{value!r} is not a table of numbers")
    return {_text(name): float(number) for name, number in cast("dict[Any, Any]", value).items()}


def _pairs(value: Any) -> tuple[tuple[str, str], ...]:
    return tuple((_text(key), _text(text)) for key, text in value)


# By the annotation of the field.
_READERS: Final[dict[str, Callable[[Any], Any]]] = {
    "str": _text,
    "int": int,
    "bool": bool,
    "float": float,
    "dict[str, float]": _numbers,
    "tuple[tuple[str, str], ...]": _pairs,
    "Path": lambda value: Path(_text(value)),
    "Path | None": lambda value: None if value is None else Path(_text(value)),
}
