"""`evaluate`: runs a task over a dataset; each number has its protocol, and predictions are never made twice.

For each model: the phases of the task fill predictions.jsonl (`_predict`), the task scores them (`_score`), and the
numbers of two models are compared on the same samples (`_differences`).
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from importlib.metadata import version
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeAlias, get_args

from sightloop.data.atomic import atomic_write, remove_stale_temporaries
from sightloop.data.copies.learned_images import count_learned, read_digests
from sightloop.data.datasets.dataset import Dataset, open_dataset
from sightloop.data.datasets.leakage import Leaks, find_leaks
from sightloop.data.video.reader import check_installed
from sightloop.errors import SightloopError, UnsupportedError, UsageError, from_options
from sightloop.evaluation.captioning import CaptioningTask
from sightloop.evaluation.chair import ChairTask
from sightloop.evaluation.classification import ClassificationTask
from sightloop.evaluation.dataset import DataSource, EvalDataset
from sightloop.evaluation.detection import DetectionTask
from sightloop.evaluation.dialogue import DialogueTask
from sightloop.evaluation.draw import DrawTask
from sightloop.evaluation.matching import MatchingTask
from sightloop.evaluation.pope import PopeTask
from sightloop.evaluation.predictions import (
    MARK,
    PredictionFile,
    Records,
    check_compatible,
    check_finite,
    read_predictions,
)
from sightloop.evaluation.probing import ProbingTask
from sightloop.evaluation.report import as_html, as_json
from sightloop.evaluation.results import EvalRun, Evaluation
from sightloop.evaluation.retrieval import RetrievalTask
from sightloop.evaluation.task import EvalOptions, EvalTask, TaskContext, TaskPhase
from sightloop.evaluation.task_names import TaskName
from sightloop.evaluation.video_annotations import open_video_annotations
from sightloop.evaluation.video_questions import VideoQuestionsTask
from sightloop.evaluation.video_retrieval import VideoRetrievalTask
from sightloop.evaluation.vqa import VqaTask
from sightloop.inference.fingerprint import ModelSource, fingerprint, model_folder, preprocessing_digest
from sightloop.metrics import Difference
from sightloop.types import Done, Event, JsonDict, JsonMapping, Skipped

if TYPE_CHECKING:
    from sightloop.inference.model import Model

# (description of the phase, number of samples, what became of one of them)
OnSample: TypeAlias = "Callable[[str, int, Event[JsonDict]], None]"

# Task -> another one whose predictions it scores too.
_SAME_PREDICTIONS: dict[TaskName, TaskName] = {"chair": "captions", "captions": "chair"}


def evaluate(
    task: TaskName,
    data: DataSource | Dataset,
    *,
    model: ModelSource | Sequence[ModelSource] = (),
    predictions: str | Path | Sequence[str | Path] = (),
    out: str | Path | None = None,
    train_data: DataSource | None = None,
    on_sample: OnSample | None = None,
    **options: object,
) -> Evaluation:
    """Evaluates one model, or two side by side, on a dataset.

    Args:
        task: what is evaluated.
        data: a source for `open_dataset`, or a dataset. Samples without the annotations of the task are ignored; an
            image that cannot be read is left out, named and counted.
        model: one or two models: what `load` takes, or a loaded `Model`.
        predictions: one or two files of predictions to score without a model; options that are not given are those
            that they were made with.
        out: folder for report.json, report.html and predictions.jsonl (predictions-2.jsonl of a second model), from
            which an interrupted run resumes.
        train_data: training data, in which copies of the evaluation's images and captions are searched.
        on_sample: called with (description of the phase, number of samples, event) for every sample of every phase.
        **options: fields of `evaluation.task.EvalOptions`.

    Raises:
        UsageError: a task without suited data, or a file made with another model, data or settings.
        UnsupportedError: a model that cannot do the task.
    """
    if task not in get_args(TaskName):
        raise UsageError(f"task={task!r}: there are {', '.join(get_args(TaskName))}")
    models, files = _list_sources(model, predictions)
    contents = [read_predictions(file) for file in files]
    file_options: JsonDict = contents[0][0].get("options", {}) if contents else {}
    settings = from_options(EvalOptions, {**file_options, **options}, "option of evaluate")
    data = _open_videos(data, task, models) if task in ("videos", "videoqa") else data
    dataset = EvalDataset(
        data, settings.samples, settings.seed, workers=settings.workers, isolate=settings.isolate
    )
    eval_task = _make_task(task, settings, dataset, train_data)
    notes = (*dataset.dataset.notes, *_select_samples(dataset, task, eval_task))
    folder = _output_folder(out)
    about = _about(task, dataset, settings.seed)
    runs: list[EvalRun] = []
    for number, source in enumerate(models, 1):
        file = None if folder is None else folder / f"predictions{f'-{number}' if number > 1 else ''}.jsonl"
        header, records = _predict(source, eval_task, dataset, settings, about, file, on_sample)
        runs.append(_score(eval_task, dataset, header, records, settings.seed))
    for file, (header, records) in zip(files, contents, strict=True):
        made_for = header.get("task")
        same = {"task": made_for} if made_for == _SAME_PREDICTIONS.get(task) else {}
        check_compatible(header, about | {"settings": eval_task.settings} | same, file)
        runs.append(_score(eval_task, dataset, header or {"model": file.name}, records, settings.seed))
    warnings = [text for source in models if (text := _trained_on(source, dataset))]
    leaks = None if train_data is None else _find_leaks(train_data, dataset)
    result = Evaluation(about, tuple(runs), _differences(runs, settings.seed), leaks, notes, tuple(warnings))
    if folder is not None:
        _write_reports(folder, result, dataset)
    return result


def _open_videos(
    data: DataSource | Dataset, task: Literal["videos", "videoqa"], models: Sequence[ModelSource]
) -> Dataset:
    """Videos with captions or questions: a dataset of them, or the file of those and the folder of videos."""
    if models:  # predictions are scored without a look at the videos
        check_installed()
    questions = task == "videoqa"
    if isinstance(data, Dataset):
        return data
    places = [data] if isinstance(data, str | PathLike) else list(data)
    if not 1 <= len(places) <= 2:
        what = "questions" if questions else "captions"
        raise UsageError(f"data: give the file of {what}, and the folder of videos")
    return open_video_annotations(*places, questions=questions)


def _write_reports(folder: Path, result: Evaluation, dataset: EvalDataset) -> None:
    """report.json, report.html, and weights.json where they were fitted."""
    atomic_write(folder / "report.json", as_json(result))
    atomic_write(folder / "report.html", as_html(result, dataset))
    for number, run in enumerate(result.runs, 1):
        if run.scored.weights:
            text = json.dumps(dict(run.scored.weights), indent=2) + "\n"
            atomic_write(folder / f"weights{f'-{number}' if number > 1 else ''}.json", text)


def _output_folder(out: str | Path | None) -> Path | None:
    """The folder, made and without what a killed process left in it; None for none."""
    if out is None:
        return None
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    remove_stale_temporaries(folder)
    return folder


def _list_sources(
    model: ModelSource | Sequence[ModelSource], predictions: str | Path | Sequence[str | Path]
) -> tuple[list[ModelSource], list[Path]]:
    """Models and files of predictions as lists, of which one is empty and the other has one or two."""
    models = list(model) if isinstance(model, Sequence) and not isinstance(model, str) else [model]
    files = [Path(f) for f in ([predictions] if isinstance(predictions, str | PathLike) else predictions)]
    if bool(models) == bool(files) or len(models) + len(files) > 2:
        raise UsageError("evaluate: give one or two models, or one or two files of predictions, not both")
    return models, files


def _select_samples(dataset: EvalDataset, name: TaskName, task: EvalTask) -> Iterator[str]:
    """Keeps the samples that have the annotations of the task; yields a note on the others.

    Raises UsageError if there are none.
    """
    count = len(dataset.samples)
    dataset.samples = [sample for sample in dataset.samples if task.wants(sample)]
    if not dataset.samples or (name == "detect" and not any(sample.regions for sample in dataset.samples)):
        notes = "".join(f" ({note})" for note in dataset.dataset.notes)
        raise UsageError(f"{dataset.name}: no sample has what {name} needs{notes}")
    if (others := count - len(dataset.samples)) > 0:
        yield f"{others:,} of {count:,} samples have no annotations for {name} and are left out"


def _about(task: TaskName, dataset: EvalDataset, seed: int) -> JsonDict:
    return {
        "task": task,
        "data": dataset.name,
        "data_fingerprint": dataset.fingerprint,
        "samples": len(dataset.samples),
        "seed": seed,
        "version": version("sightloop"),
    }


def _make_task(
    name: TaskName, options: EvalOptions, dataset: EvalDataset, train_data: DataSource | None
) -> EvalTask:
    def train_captions() -> Iterator[str]:
        if train_data is not None:
            for sample in open_dataset(train_data).stream(_ignore):
                yield from sample.captions

    makers: dict[TaskName, Callable[[], EvalTask]] = {
        "captions": lambda: CaptioningTask(options, train_captions),
        "retrieval": lambda: RetrievalTask(options),
        "videos": lambda: VideoRetrievalTask(options),
        "classify": lambda: ClassificationTask(options, dataset.samples),
        "vqa": lambda: VqaTask(options, dataset.samples),
        "videoqa": lambda: VideoQuestionsTask(options, dataset.samples),
        "matching": lambda: MatchingTask(options, dataset.samples),
        "features": lambda: ProbingTask(options),
        "detect": lambda: DetectionTask("detect", options),
        "locate": lambda: DetectionTask("locate", options),
        "segment": lambda: DetectionTask("segment", options),
        "dialogue": lambda: DialogueTask(options),
        "pope": lambda: PopeTask(options, dataset.samples),
        "chair": lambda: ChairTask(options, dataset.samples),
        "draw": lambda: DrawTask(options),
    }
    return makers[name]()


def _predict(
    source: ModelSource,
    task: EvalTask,
    dataset: EvalDataset,
    options: EvalOptions,
    about: JsonMapping,
    file: Path | None,
    on_sample: OnSample | None,
) -> tuple[JsonDict, Records]:
    """Makes the predictions that `file` does not have yet; returns its header and all predictions.

    A model is loaded when the first missing prediction needs it.
    """
    loaded: dict[ModelSource, Model] = {}

    def model_of(model_source: ModelSource) -> Model:
        if not isinstance(model_source, str | PathLike):
            return model_source
        if model_source not in loaded:
            from sightloop.inference.load import load  # imports torch, which finished predictions do not need

            quantize = options.quantize if model_source == source else None
            model = load(model_source, device=options.device, dtype=options.dtype, quantize=quantize)
            if options.batch_size is not None:
                model.batch_size = options.batch_size
            loaded[model_source] = model
        return loaded[model_source]

    header = _header(source, task, options, about)
    phases = task.phases()
    with closing(PredictionFile(file, header)) as kept:
        for phase in phases:
            description = f"{phase.description} ({header['model']})"
            samples = dataset.readable(kept.records)
            missing = [s for s in samples if phase.field not in kept.records.get(s.key, {})]
            if on_sample is not None:
                missing_keys = {sample.key for sample in missing}
                for sample in samples:
                    if sample.key not in missing_keys:
                        on_sample(description, len(samples), Skipped(sample.key, "it is predicted already"))
            if not missing:
                continue
            _check_capabilities(model_of(source), phases)
            model = model_of(phase.model or source)
            for event in phase.run(TaskContext(dataset, kept.records, model), missing):
                if isinstance(event, Done):
                    check_finite(event.name, event.value, str(model.dtype).removeprefix("torch."))
                kept.add(event.name, event.value if isinstance(event, Done) else {"failed": event.reason})
                if on_sample is not None:
                    on_sample(description, len(samples), event)
    return header, kept.records


def _header(source: ModelSource, task: EvalTask, options: EvalOptions, about: JsonMapping) -> JsonDict:
    """The first line of predictions.jsonl: what the predictions depend on."""
    return {
        "sightloop": MARK,
        **about,
        "model": str(source) if isinstance(source, str | PathLike) else source.name,
        "weights": fingerprint(source),
        "prepared": preprocessing_digest(source),
        "precision": _precision(source, options),
        "settings": task.settings,
        "options": options.as_json(),
    }


def _precision(source: ModelSource, options: EvalOptions) -> str:
    """Of weights and activations, and of quantized weights."""
    if not isinstance(source, str | PathLike):
        return str(source.dtype).removeprefix("torch.")
    return options.dtype if options.quantize is None else f"{options.dtype}, {options.quantize}"


def _check_capabilities(model: Model, phases: Sequence[TaskPhase]) -> None:
    """Raises UnsupportedError for what a later phase needs too, before the first one runs for hours."""
    for phase in phases:
        if phase.capability and phase.capability not in model.capabilities:
            capabilities = ", ".join(sorted(model.capabilities))
            raise UnsupportedError(
                f"{model.name} cannot {phase.capability} (it can: {capabilities}); "
                f"`sightloop models --capability {phase.capability}` lists models that can.{phase.hint}"
            )


def _score(task: EvalTask, dataset: EvalDataset, header: JsonMapping, records: Records, seed: int) -> EvalRun:
    """Scores the predictions of one model, which must be complete."""
    keys = {sample.key for sample in dataset.samples}
    failed = {**dataset.broken, **{k: str(r["failed"]) for k, r in records.items() if "failed" in r}}
    samples = [sample for sample in dataset.samples if sample.key not in failed]
    if missing := [sample.key for sample in samples if sample.key not in records]:
        raise UsageError(
            f"the predictions lack {len(missing):,} of {len(samples):,} samples, such as {missing[0]}: run the "
            "evaluation to its end with --model"
        )
    if unknown := records.keys() - keys - dataset.broken.keys():
        raise UsageError(f"the predictions have {min(unknown)}, which is not in {dataset.name}")
    if not samples:
        key, reason = next(iter(failed.items()))
        raise SightloopError(
            f"{dataset.name}: none of {len(failed):,} images can be read, such as {key}: {reason}"
        )
    try:
        scores = task.score(samples, records)
    except SightloopError:
        raise
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise UsageError(
            f"the predictions are incomplete, or not of this task ({error!r}); run it to its end with --model"
        ) from error
    numbers = [metric.evaluate(seed) for metric in scores.metrics]
    finite = tuple(number for number in numbers if math.isfinite(number.value))
    missing_numbers = {n.name: "no sample has what it is computed of" for n in numbers if n not in finite}
    return EvalRun(
        header, finite, replace(scores, not_computed={**missing_numbers, **scores.not_computed}), failed
    )


def _differences(runs: Sequence[EvalRun], seed: int) -> Mapping[str, Difference]:
    if len(runs) < 2:
        return {}
    other = {metric.name: metric for metric in runs[1].scored.metrics}
    differences = {
        metric.name: metric.difference(other[metric.name], seed)
        for metric in runs[0].scored.metrics
        if metric.name in other
    }
    return {
        name: difference
        for name, difference in differences.items()
        if difference and math.isfinite(difference.value)
    }


def _find_leaks(train_data: DataSource, dataset: EvalDataset) -> Leaks:
    return find_leaks(open_dataset(train_data).stream(_ignore), dataset.dataset.stream(_ignore))


def _trained_on(source: ModelSource, dataset: EvalDataset) -> str:
    """A warning if a model was trained on the evaluation's images, by its files; "" if they say nothing of it."""
    folder = model_folder(source)
    if folder is None:
        return ""
    name = str(source) if isinstance(source, str | PathLike) else source.name
    known = read_digests(folder)
    says_little = "what it scores here says little about other images"
    if known and (count := count_learned(dataset.dataset.image_digests(), known)):
        return f"{name} was trained on {count:,} of these {len(dataset.dataset):,} images: {says_little}"
    try:
        recipe = json.loads((folder.parent / "recipe.json").read_text("utf-8"))
    except (OSError, ValueError, RecursionError):
        return ""
    if isinstance(recipe, dict) and recipe.get("data") == dataset.source_fingerprint:
        return f"{name} was trained on this data ({folder.parent / 'recipe.json'}): {says_little}"
    return ""


def _ignore(key: str, reason: str) -> None:
    """Skips a broken sample: the evaluation reports its own, and in the training data it can leak nothing."""
