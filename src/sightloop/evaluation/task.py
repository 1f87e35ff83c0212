"""What every evaluation task consists of: options, phases that fill the predictions, a score."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Literal, Protocol, TypeAlias

from sightloop.data.images.reader import BatchSize
from sightloop.errors import UsageError, refuse_string
from sightloop.evaluation.dataset import EvalDataset, PredictBatch, PredictionEvents
from sightloop.evaluation.predictions import Records
from sightloop.evaluation.results import TaskScores
from sightloop.evaluation.templates import TEMPLATES
from sightloop.types import Bits, JsonDict, JsonMapping, Pixels, Sample

if TYPE_CHECKING:
    from sightloop.inference.model import Model

Events: TypeAlias = PredictionEvents
# (context, samples without this phase's field) -> one event per sample, in order
RunPhase: TypeAlias = "Callable[[TaskContext, list[Sample]], Events]"


_CHOICES: dict[str, tuple[str | None, ...]] = {
    "answer_by": ("generate", "rank"),
    "match_by": ("itm", "itc"),
    "score_by": ("likelihood", "itm", "both", None),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class EvalOptions:
    """Options of `evaluate`. Options that a task does not use are ignored.

    Args:
        samples: number of samples, drawn by `seed`; None for all.
        seed: of the drawn samples, mismatched pairs, folds and resampled sets.
        device: as in `load`.
        dtype, quantize: as in `load`; a model of `clip` is not quantized.
        batch_size: images per forward pass, or "auto": as many as fit the memory; None: that of the model.
        workers: of the image reader, as in `Model.read`.
        isolate: decode in child processes, as in `Model.read`.
        decoding: fields of `tasks.decoding_options.Decoding` (captions, vqa).
        prompt: prefix of the captions (captions).
        clip: source of an embedding model for CLIPScore (captions, draw), CMMD and MMD (draw).
        rerank: ITM re-ranks the top k, for each of these k; empty for ITC alone (retrieval).
        labels: classes, None for those of the data (classify); what to look for, None for what the model knows
            (detect).
        templates: sentences with {}, or a name in `TEMPLATES` (classify).
        answer_by: answers are generated, or ranked among `candidates` (vqa).
        candidates: answers to rank; None for all answers of the data (vqa).
        match_by: score of a pair: the ITM probability, or the ITC cosine (matching).
        score_by: an answer is scored by its likelihood, or by ITM (dialogue, pope), or by the sum of both (dialogue);
            None: by both if the model was trained for dialogues, by likelihood if it answers, else by ITM (dialogue),
            or the answer is written freely (pope).
        history: rounds before a question that are read with it; None for all, 0 for the question alone (dialogue).
        objects: what to look for in captions, one line an object, "dog: puppy, hound"; None for COCO's (chair).
        rank_samples: texts drawn and ranked beside the one of greedy search (vqa, dialogue, pope, chair), or of which
            the best is kept (captions), or images drawn of each text (draw); None for none.
        rank_by: source of the model that judges them; None for the evaluated one.

    Raises:
        UsageError: a value that is not allowed.
    """

    samples: int | None = None
    seed: int = 0
    device: str = "auto"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "float32"
    quantize: Bits | None = None
    batch_size: BatchSize | None = None
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
    score_by: Literal["likelihood", "itm", "both"] | None = None
    history: int | None = None
    objects: Sequence[str] | None = None
    rank_samples: int | None = None
    rank_by: str | None = None

    def __post_init__(self) -> None:
        for name, allowed in _CHOICES.items():
            if getattr(self, name) not in allowed:
                raise UsageError(f"{name}={getattr(self, name)!r}: must be {' or '.join(map(str, allowed))}")
        for name in ("labels", "candidates", "objects"):
            refuse_string(name, getattr(self, name))
        if self.history is not None and self.history < 0:
            raise UsageError(f"history={self.history}: must be at least 0")
        if self.rank_samples is not None and not 2 <= self.rank_samples <= 256:
            raise UsageError(f"rank_samples={self.rank_samples}: must be 2 to 256")
        if self.rank_by is not None and self.rank_samples is None:
            raise UsageError(f"rank_by={self.rank_by!r}: goes with rank_samples")
        if isinstance(self.rerank, int):
            raise UsageError(f"rerank={self.rerank}: give a list, rerank=[{self.rerank}]")
        if any(k < 1 for k in self.rerank):
            raise UsageError(f"rerank={list(self.rerank)}: each must be at least 1")

    def as_json(self) -> JsonDict:
        """The options that the numbers depend on, for the header of the predictions: scoring again uses them."""
        machine = ("device", "dtype", "quantize", "batch_size", "workers", "isolate")
        return {
            option.name: getattr(self, option.name) for option in fields(self) if option.name not in machine
        }

    @property
    def template_texts(self) -> tuple[str, ...]:
        """The sentences of `templates`."""
        if isinstance(self.templates, str) and self.templates not in TEMPLATES:
            raise UsageError(
                f"templates={self.templates!r}: give sentences, or one of {', '.join(TEMPLATES)}"
            )
        return TEMPLATES[self.templates] if isinstance(self.templates, str) else tuple(self.templates)


@dataclass(frozen=True, slots=True)
class TaskContext:
    """What a phase works with.

    Attributes:
        dataset: samples and their images.
        records: predictions so far; those of this phase are added while it runs.
        model: the loaded model of the phase.
    """

    dataset: EvalDataset
    records: Records
    model: Model

    def readable(self) -> list[Sample]:
        """The samples whose images no earlier pass failed to read."""
        return self.dataset.readable(self.records)

    def map_images(
        self, samples: Sequence[Sample], predict: Callable[[list[Sample], list[Pixels]], Sequence[JsonDict]]
    ) -> Events:
        """Applies `predict` to the images of samples, batch by batch."""
        return self.dataset.map_images(self.model, samples, lambda _, batch, images: predict(batch, images))


@dataclass(frozen=True, slots=True)
class TaskPhase:
    """One pass over the samples.

    Attributes:
        description: for the progress display: "captioning".
        field: what the phase adds to the record of a sample; a sample that has it is done.
        run: makes the predictions.
        capability: what the evaluated model must be able to do; "" if nothing.
        hint: end of the error message for a model without it, from the space on.
        model: source of the model that runs; None for the evaluated one.
    """

    description: str
    field: str
    run: RunPhase
    capability: str = ""
    hint: str = ""
    model: str | None = None


class EvalTask(Protocol):
    """A task, made of the options and the dataset.

    Attributes:
        settings: what the predictions depend on, as JSON values.
    """

    settings: JsonDict

    def wants(self, sample: Sample) -> bool:
        """Whether the sample has the annotations that the task needs."""
        ...

    def phases(self) -> Sequence[TaskPhase]:
        """The passes that make the predictions, in order; asked for once per model."""
        ...

    def score(self, samples: Sequence[Sample], records: Records) -> TaskScores:
        """The numbers of the predictions of one model for these samples."""
        ...


def over_images(predict: PredictBatch) -> RunPhase:
    """A phase that applies `predict` to batches of images, independent of earlier predictions."""

    def run(work: TaskContext, samples: list[Sample]) -> Events:
        return work.dataset.map_images(work.model, samples, predict)

    return run


def object_labels(sample: Sample) -> list[str]:
    """Labels of what is in an image by its boxes, crowd regions (COCO's `iscrowd`) included."""
    crowd = sample.extra.get("crowd")
    members = crowd if isinstance(crowd, list) else []
    labels = [item.get("label") for item in members if isinstance(item, dict)]
    return [region.label for region in sample.regions] + [label for label in labels if isinstance(label, str)]


def row(key: str, index: int) -> str:
    """Name of one of several texts of a sample, counted from 1: "000001#2"."""
    return f"{key}#{index + 1}"
