"""Checks of a training run before a model is loaded: the data, the length of the run, its folder. Imports no torch."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from sightloop.data.datasets.dataset import Dataset, open_dataset
from sightloop.errors import ImageError, UsageError
from sightloop.training.config import DataSettings, Recipe, apply_settings, from_json, to_json
from sightloop.training.label_texts import LabelTexts
from sightloop.training.recipes import find_recipe
from sightloop.types import JsonDict, JsonMapping, Sample

RECIPE_FILE = "recipe.json"
_LEAST_BATCH = 2  # as a contrast needs negatives
_COUNTED = 2000  # samples whose annotations are counted; in larger data evenly spaced ones

CAPTION, QUESTION, REGION, LABEL = "caption", "question", "labeled region", "label"
ROUND, ATTRIBUTE = "dialogue round", "labeled dialogue round"  # with candidates and truth; with attributes
_NEEDS = {
    **dict.fromkeys(("itc", "itm", "clip", "siglip", "lm", "mlm", "flow"), CAPTION),
    "vqa": QUESTION,
    "classes": LABEL,
    "dialogue": ROUND,
    "reply": ROUND,
    "attributes": ATTRIBUTE,
}
_CONTRASTS = ("itc", "itm", "clip", "siglip")
# Settings that may differ when a run is resumed: of evaluation, checkpoints, and memory.
_FREE = (
    "evaluation",
    "save_every",
    "keep_last",
    "shard",
    "activation_checkpointing",
    "data.micro_batch",
    "data.workers",
)


@dataclass
class AnnotationCounts:
    """Annotations of a dataset, of all samples or of evenly spaced ones.

    Args:
        total: samples of the dataset.
        samples: samples that were counted.
        unreadable: of them, those whose record cannot be read.
        by_kind: kind of annotation -> samples that have one.
        captions: different captions, at most two of them.
        labels: different labels, at most two of them.
    """

    total: int
    samples: int = 0
    unreadable: int = 0
    by_kind: dict[str, int] = field(
        default_factory=lambda: dict.fromkeys((CAPTION, QUESTION, REGION, LABEL, ROUND, ATTRIBUTE), 0)
    )
    captions: set[str] = field(default_factory=set[str])
    labels: set[str] = field(default_factory=set[str])

    def add(self, sample: Sample | None, data: DataSettings) -> None:
        """Counts a sample; None for a record that cannot be read."""
        self.samples += 1
        if sample is None:
            self.unreadable += 1
            return
        captions = LabelTexts(data.label_texts).texts(sample)
        regions = [r for r in sample.regions if r.label and (not data.classes or r.label in data.classes)]
        rounds = [one for dialogue in sample.dialogues for one in dialogue.rounds]
        present = {
            CAPTION: captions,
            QUESTION: sample.questions,
            REGION: regions,
            LABEL: sample.label is not None,
            ROUND: any(one.truth is not None and len({*one.candidates}) > 1 for one in rounds),
            ATTRIBUTE: any(one.attributes for one in rounds),
        }
        for kind, value in present.items():
            self.by_kind[kind] += bool(value)
        if len(self.captions) < 2:
            self.captions.update(captions[:2])
        if len(self.labels) < 2 and sample.label is not None:
            self.labels.add(sample.label)

    def summary(self) -> str:
        """ "found 5 samples: 5 with a caption, 0 with a question, ..." """
        shown = [kind for kind, count in self.by_kind.items() if count or kind not in (ROUND, ATTRIBUTE)]
        kinds = ", ".join(f"{self.by_kind[kind]:,} with a {kind}" for kind in shown)
        unreadable = f", {self.unreadable:,} unreadable" if self.unreadable else ""
        return f"found {self.samples:,} samples: {kinds}{unreadable}"


def check_training(
    recipe: Recipe | str, data: str | Sequence[str], folder: Path, settings: Sequence[str] = ()
) -> None:
    """Checks all of a run that can be checked without a model.

    Args:
        recipe: a name, a JSON file or a `Recipe`.
        data: dataset or datasets as `open_dataset` reads them.
        folder: of the run.
        settings: changes of the recipe.

    Raises:
        UsageError: recipe, settings, data and folder do not fit each other.
    """
    recipe = apply_settings(find_recipe(recipe) if isinstance(recipe, str) else recipe, settings)
    dataset = open_training_data(data)
    if recipe.evaluation.data:
        open_dataset(recipe.evaluation.data)
    check_folder(folder, recipe, dataset)
    check_data(recipe, dataset, data)


def open_training_data(data: str | Sequence[str]) -> Dataset:
    """Opens training data.

    Raises:
        UsageError: it cannot be opened, is a stream, or has fewer than two samples.
    """
    dataset = open_dataset(data)
    if dataset.is_stream:
        raise UsageError(
            f"{_names(data)}: a stream cannot be shuffled; turn it into shards or a table with `sightloop convert`"
        )
    if len(dataset) < 2:
        raise UsageError(f"{_names(data)}: {len(dataset)} sample; training needs at least 2")
    return dataset


def count_steps(recipe: Recipe, samples: int) -> int:
    """Optimizer steps of a run on so many samples."""
    return recipe.steps or max(1, math.ceil(recipe.epochs * samples / recipe.data.batch))


def check_data(recipe: Recipe, dataset: Dataset, data: str | Sequence[str]) -> list[str]:
    """Checks that a recipe has something to learn from, and that the run outlasts its warm-up.

    Args:
        recipe: settings.
        dataset: training data.
        data: its name, for messages.

    Returns:
        Warnings: objectives that find nothing, samples without what an objective needs, a run that ends within its
            warm-up.

    Raises:
        UsageError: no objective finds anything, or a run whose length follows from `epochs` ends within its warm-up.
    """
    needs = _needs(recipe)
    counts = _count(dataset, needs, recipe.data)
    if counts.unreadable == counts.samples:
        raise UsageError(
            f"{_names(data)}: none of its {counts.samples:,} samples can be read; {_first_error(dataset)}"
        )
    lacks = {
        term: _lack(term, kinds, counts, _names(data))
        for term, kinds in needs.items()
        if not _has_enough(term, kinds, counts)
    }
    trained = [term for term, weight in recipe.terms.items() if weight > 0]
    if "classes" in lacks or len(lacks) == len(trained):
        raise UsageError(
            f"{lacks.get('classes') or next(iter(lacks.values()))}; add them, or choose another recipe"
        )
    warnings = [f"{text}; add them, or set terms.{term}=0" for term, text in lacks.items()]
    return [*warnings, *_missing(needs, counts), *_check_length(recipe, len(dataset))]


def _needs(recipe: Recipe) -> dict[str, tuple[str, ...]]:
    """Objective -> kinds of annotations, of which a sample needs one."""
    needs: dict[str, tuple[str, ...]] = {
        term: (_NEEDS[term],) for term, weight in recipe.terms.items() if weight > 0 and term in _NEEDS
    }
    if recipe.terms.get("prompted", 0) > 0 and not (recipe.data.regions and recipe.data.classes):
        counts = {CAPTION: recipe.data.texts, QUESTION: recipe.data.questions, REGION: recipe.data.regions}
        needs["prompted"] = tuple(kind for kind, count in counts.items() if count)
    return needs


def _count(dataset: Dataset, needs: Mapping[str, Sequence[str]], data: DataSettings) -> AnnotationCounts:
    """Counts of at most `_COUNTED` samples; of all samples while an objective has not found what it needs."""
    counts = AnnotationCounts(len(dataset))
    step = max(1, len(dataset) // _COUNTED)
    for index in range(0, len(dataset), step):
        counts.add(_read(dataset, index), data)
    if step == 1 or all(_has_enough(term, kinds, counts) for term, kinds in needs.items()):
        return counts
    every = AnnotationCounts(len(dataset))
    for index in range(len(dataset)):
        every.add(_read(dataset, index), data)
    return every


def _read(dataset: Dataset, index: int) -> Sample | None:
    try:
        return dataset[index]
    except ImageError:
        return None  # reported when a batch needs it


def _first_error(dataset: Dataset) -> str:
    try:
        dataset[0]
    except ImageError as error:
        return f"the first: {error}"
    return ""


def _has_enough(term: str, kinds: Sequence[str], counts: AnnotationCounts) -> bool:
    if term == "classes" and len(counts.labels) < 2:
        return False
    if term in _CONTRASTS and len(counts.captions) < 2:
        return False
    return any(counts.by_kind[kind] for kind in kinds)


def _lack(term: str, kinds: Sequence[str], counts: AnnotationCounts, data: str) -> str:
    """The setting, what it needs, and what was found."""
    need = " or ".join(f"{kind}s" for kind in kinds)
    if term == "classes":
        need = "labels of at least two classes (a folder for each class)"
    elif term in _CONTRASTS and counts.by_kind[CAPTION]:
        need = "at least two different captions, as a contrast needs negatives"
    return f"terms.{term}: it learns from {need}, but {data} has none; {counts.summary()}"


def _missing(needs: Mapping[str, Sequence[str]], counts: AnnotationCounts) -> Iterator[str]:
    """A warning for each kind of annotation that some samples lack."""
    terms: dict[str, list[str]] = {}
    for term, kinds in needs.items():
        if len(kinds) == 1 and _has_enough(term, kinds, counts):
            terms.setdefault(kinds[0], []).append(term)
    readable = counts.samples - counts.unreadable
    counted = "" if counts.samples == counts.total else f" that were counted (of {counts.total:,})"
    for kind, names in terms.items():
        if lacking := readable - counts.by_kind[kind]:
            yield (
                f"{lacking:,} of {readable:,} samples{counted} have no {kind}: {', '.join(names)} "
                f"{'learn' if len(names) > 1 else 'learns'} nothing from them"
            )


def _check_length(recipe: Recipe, samples: int) -> Iterator[str]:
    steps, warmup = count_steps(recipe, samples), recipe.schedule.warmup_steps
    if not warmup or steps > warmup:
        return
    text = (
        f"schedule.warmup_steps={warmup:,}: the run has {steps:,} {'step' if steps == 1 else 'steps'} and ends within "
        f"its warm-up, before the full learning rate"
    )
    if not recipe.steps:
        raise UsageError(
            f"{text} ({samples:,} samples, data.batch={recipe.data.batch}, epochs={recipe.epochs:g}); set a smaller "
            f"data.batch, more epochs, or a shorter schedule.warmup_steps, such as {_longer(recipe, samples)}"
        )
    yield f"{text}; set a shorter schedule.warmup_steps, or more steps"


def _longer(recipe: Recipe, samples: int) -> str:
    """A change of settings with which a run outlasts its warm-up."""
    batch = math.ceil(recipe.epochs * samples / recipe.schedule.warmup_steps) - 1
    if batch >= _LEAST_BATCH:
        return f"--set data.batch={batch}"
    return f"--set schedule.warmup_steps={(count_steps(recipe, samples) - 1) // 2}"


def check_folder(folder: Path, recipe: Recipe, dataset: Dataset) -> None:
    """Checks that a folder is new, empty or holds this run. Settings of evaluation and checkpoints may differ.

    Raises:
        UsageError: it holds something else; the message names the settings that differ.
    """
    path = folder / RECIPE_FILE
    if not path.exists():
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise UsageError(f"{folder} is not an empty folder and holds no run; choose another --out")
        return
    stored, fingerprint = read_run(path)
    changes = _differences(_fixed_settings(stored), _fixed_settings(recipe))
    differs = [f"with other settings ({'; '.join(changes)})"] if changes else []
    if fingerprint != dataset.fingerprint:
        differs.append("on other data")
    if differs:
        raise UsageError(
            f"{folder} holds a run {' and '.join(differs)}; choose another --out, or use the same again"
        )


def read_run(path: Path) -> tuple[Recipe, str]:
    """Recipe and fingerprint of the data from a run's recipe.json; settings newer than the run get their defaults.

    Raises:
        UsageError: the file is damaged.
    """
    remedy = "choose another --out, or restore the file"
    try:
        record = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UsageError(f"{path}: cannot be read ({str(error).splitlines()[0]}); {remedy}") from error
    recipe = record.get("recipe") if isinstance(record, dict) else None
    if not isinstance(recipe, dict) or not isinstance(record.get("data"), str):
        raise UsageError(f"{path}: holds no recipe of a run; {remedy}")
    try:
        return from_json(recipe), record["data"]
    except UsageError as error:
        raise UsageError(f"{path}: {error}; {remedy}") from error


def calibrates(recipe: Recipe) -> bool:
    """Whether the ITM threshold is set at the end of the run."""
    return recipe.calibrate and recipe.terms.get("itm", 0) > 0


def holds_out(recipe: Recipe) -> bool:
    """Whether training images are held out for the calibration."""
    return calibrates(recipe) and not recipe.evaluation.data


def _fixed_settings(recipe: Recipe) -> JsonDict:
    """The settings that must not change when a run is resumed, flat: "data.batch" -> 32."""
    settings = {
        n: v for n, v in _flat(to_json(recipe)) if n not in _FREE and n.partition(".")[0] not in _FREE
    }
    return settings | {"evaluation.data (images held out)": holds_out(recipe)}


def _flat(values: JsonMapping, prefix: str = "") -> Iterator[tuple[str, object]]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def _differences(stored: JsonMapping, now: JsonMapping) -> list[str]:
    return [
        f"{name}: {json.dumps(stored.get(name))}, now {json.dumps(now.get(name))}"
        for name in dict.fromkeys((*stored, *now))
        if stored.get(name) != now.get(name)
    ]


def _names(data: str | Sequence[str]) -> str:
    return data if isinstance(data, str) else " ".join(map(str, data))
