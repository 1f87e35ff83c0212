"""`evaluate`: a task over a dataset, every number with its protocol; predictions are kept and never made twice."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from importlib.metadata import version
from os import PathLike
from pathlib import Path
from typing import Any, TypeAlias, get_args

from sightloop.data.atomic import atomic_write, remove_stale_temporaries
from sightloop.data.datasets.dataset import Dataset, open_dataset
from sightloop.data.datasets.leakage import Leaks, find_leaks
from sightloop.errors import SightloopError, UnsupportedError, UsageError, from_options
from sightloop.evaluation.captioning import CaptioningTask
from sightloop.evaluation.classification import ClassificationTask
from sightloop.evaluation.dataset import EvalDataset, Reading
from sightloop.evaluation.detection import DetectionTask
from sightloop.evaluation.matching import MatchingTask
from sightloop.evaluation.predictions import MARK, PredictionFile, Records, check_compatible, read_predictions
from sightloop.evaluation.probing import ProbingTask
from sightloop.evaluation.report import as_html, as_json
from sightloop.evaluation.results import EvalRun, Evaluation
from sightloop.evaluation.retrieval import RetrievalTask
from sightloop.evaluation.task import EvalOptions, EvalTask, TaskContext, TaskPhase
from sightloop.evaluation.task_names import TaskName
from sightloop.evaluation.vqa import VqaTask
from sightloop.inference.fingerprint import ModelSource, fingerprint, preprocessing_digest
from sightloop.inference.load import load
from sightloop.inference.model import Model
from sightloop.metrics import Difference
from sightloop.types import Done, Event, JsonDict, JsonMapping, Skipped

# (what is being done, of how many, what became of one)
OnSample: TypeAlias = "Callable[[str, int, Event[Any]], None]"


def evaluate(
    task: TaskName,
    data: str | Path | Sequence[str | Path] | Dataset,
    *,
    model: ModelSource | Sequence[ModelSource] = (),
    predictions: str | Path | Sequence[str | Path] = (),
    out: str | Path | None = None,
    train_data: str | Path | Sequence[str | Path] | None = None,
    on_sample: OnSample | None = None,
    **options: Any,
) -> Evaluation:
    """Measure a model, or two side by side, on your data.

    model: what `load` takes, or a loaded `Model`. predictions: files to score instead, without the model;
    options that are not given are then those that they were made with.
    out: a folder for report.json, report.html and predictions.jsonl (of a second model predictions-2.jsonl), from which
    an interrupted run goes on. train_data: looked through for copies of the evaluation's images and captions.
    options: the fields of `evaluation.tasks.Options`. An image that cannot be read is left out, named and counted.

    Raises UsageError for what does not fit together: a task and its data, a file and another model, data or settings.
    """
    if task not in get_args(TaskName):
        raise UsageError(f"task={task!r}: there are {', '.join(get_args(TaskName))}")
    models, files = _several(model), [Path(file) for file in _several(predictions)]
    if bool(models) == bool(files) or len(models) + len(files) > 2:
        raise UsageError("evaluate: give one or two models, or one or two files of predictions, not both")
    found = [read_predictions(file) for file in files]
    told = found[0][0].get("options", {}) if found else {}
    given = from_options(EvalOptions, {**told, **options}, "option of evaluate")
    material = EvalDataset(data, given.samples, given.seed)
    made = _task(task, given, material, train_data)
    material.samples = [sample for sample in material.samples if made.wants(sample)]
    if not material.samples:
        raise UsageError(f"{material.name}: no sample has what {task} needs")
    folder = None if out is None else Path(out)
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        remove_stale_temporaries(folder)
    about = {
        "task": task,
        "data": material.name,
        "data_fingerprint": material.fingerprint,
        "samples": len(material.samples),
        "seed": given.seed,
        "version": version("sightloop"),
    }
    runs: list[EvalRun] = []
    for place, source in enumerate(models):
        file = None if folder is None else folder / f"predictions{f'-{place + 1}' if place else ''}.jsonl"
        header, records = _predict(source, made, material, (given, about, file), on_sample)
        runs.append(_scored(made, material, header, records, given.seed))
    for file, (header, records) in zip(files, found, strict=True):
        check_compatible(header, about | {"settings": made.settings}, file)
        runs.append(_scored(made, material, header or {"model": file.name}, records, given.seed))
    leaks = None if train_data is None else _leaks(train_data, material)
    result = Evaluation(about, tuple(runs), _differences(runs, given.seed), leaks)
    if folder is not None:
        atomic_write(folder / "report.json", as_json(result))
        atomic_write(folder / "report.html", as_html(result, material))
    return result


def _several(given: Any) -> list[Any]:
    return [given] if isinstance(given, str | PathLike | Model) else list(given)


def _task(name: TaskName, options: EvalOptions, material: EvalDataset, train_data: Any) -> EvalTask:
    def training() -> Iterator[str]:
        if train_data is not None:
            for sample in open_dataset(train_data).stream(lambda key, reason: None):
                yield from sample.captions

    makers: dict[TaskName, Callable[[], EvalTask]] = {
        "captions": lambda: CaptioningTask(options, training),
        "retrieval": lambda: RetrievalTask(options),
        "classify": lambda: ClassificationTask(options, material.samples),
        "vqa": lambda: VqaTask(options, material.samples),
        "matching": lambda: MatchingTask(options, material.samples),
        "features": lambda: ProbingTask(options),
        "detect": lambda: DetectionTask("detect", options),
        "locate": lambda: DetectionTask("locate", options),
        "segment": lambda: DetectionTask("segment", options),
    }
    return makers[name]()


def _predict(
    source: ModelSource,
    task: EvalTask,
    material: EvalDataset,
    how: tuple[EvalOptions, JsonMapping, Path | None],
    watch: OnSample | None,
) -> tuple[JsonDict, Records]:
    """What the model gives for every sample, as much of it new as is missing: (about, predictions)."""
    options, about, file = how
    phases = task.phases()
    loaded: dict[Any, Model] = {}

    def model_of(which: ModelSource) -> Model:
        if isinstance(which, Model):
            return which
        if which not in loaded:
            loaded[which] = load(which, device=options.device, dtype=options.dtype)
            if options.batch_size is not None:
                loaded[which].batch_size = options.batch_size
        return loaded[which]

    header = {
        "sightloop": MARK,
        **about,
        "model": source.name if isinstance(source, Model) else str(source),
        "weights": fingerprint(source),
        "prepared": preprocessing_digest(source),
        "precision": str(source.dtype).removeprefix("torch.") if isinstance(source, Model) else options.dtype,
        "settings": task.settings,
        "options": options.told(),
    }
    reading = Reading(options.workers, options.isolate)
    with closing(PredictionFile(file, header)) as kept:
        work = TaskContext(lambda: model_of(source), model_of, material, kept.records, reading)
        for phase in phases:
            what = f"{phase.what} ({header['model']})"
            samples = work.good()
            missing = [s for s in samples if phase.gives not in kept.records.get(s.key, {})]
            if watch is not None:
                waiting = {sample.key for sample in missing}
                for sample in samples:
                    if sample.key not in waiting:
                        watch(what, len(samples), Skipped(sample.key, "it is predicted already"))
            if missing:
                _check(work.model(), phases)
            for event in phase.run(work, missing) if missing else ():
                kept.add(event.name, event.value if isinstance(event, Done) else {"failed": event.reason})
                if watch is not None:
                    watch(what, len(samples), event)
    return header, kept.records


def _check(model: Model, phases: Sequence[TaskPhase]) -> None:
    """Before anything is done, so that no long run ends in this."""
    for phase in phases:
        if phase.needs and phase.needs not in model.capabilities:
            able = ", ".join(sorted(model.capabilities))
            raise UnsupportedError(
                f"{model.name} cannot {phase.needs} (it can: {able}); `sightloop models --capability {phase.needs}` "
                f"lists models that can.{phase.without}"
            )


def _scored(
    task: EvalTask, material: EvalDataset, about: JsonMapping, records: Records, seed: int
) -> EvalRun:
    keys = {sample.key for sample in material.samples}
    failed = {**material.broken, **{k: str(r["failed"]) for k, r in records.items() if "failed" in r}}
    samples = [sample for sample in material.samples if sample.key not in failed]
    if lacking := [sample.key for sample in samples if sample.key not in records]:
        raise UsageError(
            f"the predictions lack {len(lacking):,} of {len(samples):,} samples, such as {lacking[0]}: run the "
            "evaluation to its end with --model"
        )
    if strange := records.keys() - keys - material.broken.keys():
        raise UsageError(f"the predictions have {min(strange)}, which is not in {material.name}")
    if not samples:
        raise UsageError(f"{material.name}: no image could be read, such as {next(iter(failed.items()))}")
    try:
        scored = task.score(samples, records)
    except SightloopError:
        raise
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise UsageError(
            f"the predictions are incomplete, or not of this task ({error!r}); run it to its end with --model"
        ) from error
    numbers = (*(measure.number(seed) for measure in scored.measures), *scored.facts)
    return EvalRun(about, numbers, scored, failed)


def _differences(runs: Sequence[EvalRun], seed: int) -> dict[str, Difference]:
    if len(runs) < 2:
        return {}
    other = {measure.name: measure for measure in runs[1].scored.measures}
    return {
        measure.name: measure.less(other[measure.name], seed)
        for measure in runs[0].scored.measures
        if measure.name in other
    }


def _leaks(train_data: Any, material: EvalDataset) -> Leaks:
    def ignore(key: str, reason: str) -> None:
        """The evaluation names its own; a broken training image leaks nothing."""

    return find_leaks(open_dataset(train_data).stream(ignore), material.dataset.stream(ignore))
