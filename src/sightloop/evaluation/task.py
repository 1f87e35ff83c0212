"""What every task of an evaluation is made of: options, phases that fill the predictions, a score."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, fields
from typing import Literal, Protocol, TypeAlias

from sightloop.errors import UsageError
from sightloop.evaluation.dataset import EvalDataset, ImageVerb, Reading
from sightloop.evaluation.predictions import Records
from sightloop.evaluation.results import TaskScores
from sightloop.evaluation.templates import TEMPLATES
from sightloop.inference.model import Model
from sightloop.types import Done, Failed, JsonDict, JsonMapping, Sample

Events: TypeAlias = "Iterator[Done[JsonDict] | Failed]"


@dataclass(frozen=True, slots=True, kw_only=True)
class EvalOptions:
    """How to evaluate; what a task has no use for is left alone.

    samples: so many, drawn by seed; None for all. seed: of that draw, of mismatched pairs, folds and resampled sets.
    device, dtype, batch_size: as of `load`. workers, isolate: as of `Model.read`.
    decoding: the fields of `tasks.generate.Decoding`. prompt: of captions. clip: a model for CLIPScore.
    rerank: ITM re-ranks the top k, for each of these k; empty for ITC alone.
    labels: the classes; None for those of the data. To detect: what to look for; None for what the model knows.
    templates: sentences with {}, or a name in `TEMPLATES`.
    answer_by: "generate" answers, or "rank" `candidates` (None: all answers of the data) by likelihood.
    match_by: the score of a pair: "itm", the ITM probability, or "itc", the cosine of the embeddings.
    """

    samples: int | None = None
    seed: int = 0
    device: str = "auto"
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    batch_size: int | None = None
    workers: int = 2
    isolate: bool = True
    decoding: JsonMapping = field(default_factory=JsonDict)
    prompt: str | None = None
    clip: str | None = None
    rerank: Sequence[int] = (16,)
    labels: Sequence[str] | None = None
    templates: str | Sequence[str] = "simple"
    answer_by: Literal["generate", "rank"] = "generate"
    candidates: Sequence[str] | None = None
    match_by: Literal["itm", "itc"] = "itm"

    def __post_init__(self) -> None:
        """Raises `UsageError` for values that cannot be."""
        for name, allowed in (("answer_by", ("generate", "rank")), ("match_by", ("itm", "itc"))):
            if getattr(self, name) not in allowed:
                raise UsageError(f"{name}={getattr(self, name)!r}: must be {' or '.join(allowed)}")
        if any(k < 1 for k in self.rerank):
            raise UsageError(f"rerank={list(self.rerank)}: each must be at least 1")

    def told(self) -> JsonDict:
        """What the numbers depend on, as JSON values: with it, a file of predictions is scored as it was made."""
        machine = ("device", "dtype", "batch_size", "workers", "isolate")
        return {each.name: getattr(self, each.name) for each in fields(self) if each.name not in machine}

    @property
    def sentences(self) -> tuple[str, ...]:
        """The templates themselves."""
        if isinstance(self.templates, str) and self.templates not in TEMPLATES:
            raise UsageError(
                f"templates={self.templates!r}: give sentences, or one of {', '.join(TEMPLATES)}"
            )
        return TEMPLATES[self.templates] if isinstance(self.templates, str) else tuple(self.templates)


@dataclass(frozen=True, slots=True)
class TaskContext:
    """What a phase works with. model: loaded when it is first asked for. load: another model, for the same device."""

    model: Callable[[], Model]
    load: Callable[[str], Model]
    material: EvalDataset
    records: Records
    reading: Reading

    def pictures(self, samples: Sequence[Sample], verb: ImageVerb) -> Events:
        """The verb over the samples' images."""
        return self.material.run(self.model(), self.reading, samples, verb)

    def good(self) -> list[Sample]:
        """The samples whose images were read."""
        return [s for s in self.material.samples if "failed" not in self.records.get(s.key, {})]


@dataclass(frozen=True, slots=True)
class TaskPhase:
    """One pass over the samples. what: for the progress. gives: the field that a sample has when it is done. needs: the
    verb of the model; without: what to do where it has none."""

    what: str
    gives: str
    run: Callable[[TaskContext, list[Sample]], Events]
    needs: str = ""
    without: str = ""


class EvalTask(Protocol):
    """Made of the material and the options. `settings` are what predictions depend on; `wants` says which samples."""

    settings: JsonDict

    def wants(self, sample: Sample) -> bool: ...

    def phases(self) -> Sequence[TaskPhase]: ...

    def score(self, samples: Sequence[Sample], records: Records) -> TaskScores: ...


def row(key: str, index: int) -> str:
    """What one of several texts of a sample is called."""
    return f"{key}#{index + 1}"
