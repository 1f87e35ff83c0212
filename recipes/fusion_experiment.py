"""Where should image and text meet? Late, cross, both ways or early, at equal weights and steps, on rendered scenes.

    nice -n 10 python recipes/fusion_experiment.py RUNS                    4 fusions x 3 seeds
    python recipes/fusion_experiment.py RUNS --steps 20 --seeds 1          a look at the machinery

Scenes show two things, one above or left of the other. Each model is trained from random weights by ITC, ITM and VQA
and judged on combinations that no training scene shows. The hard pairs are exact: a wrong text has the same words as
the true one, with the colors or the two things exchanged. Each run is a folder of its own in RUNS and goes on where it
was stopped: the same command again. RUNS/table.md and results.json are the result.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

import sightloop
from sightloop.data.atomic import atomic_write
from sightloop.data.datasets.synthetic import SyntheticWorld, write_synthetic_world
from sightloop.data.datasets.synthetic_grammar import Combination, Part, combinations
from sightloop.data.rng import generator
from sightloop.training.recipes import find_recipe
from sightloop.training.trainer import train
from sightloop.types import Sample

FUSIONS = ("late", "cross", "both", "early")
TRAIN, TEST = 3000, 200
SHAPES = ("circle", "square", "triangle", "cross")
SETTINGS = (
    "model.size=world-32",
    "model.vocab_size=200",
    "terms.lm=0",
    "teacher.momentum=0",
    "data.augment=null",
    "data.batch=32",
    "data.questions=1",
    "data.workers=1",
    "precision=bfloat16",
    "label_smoothing=0",
    "schedule.warmup_steps=50",
    "optimizer.lr=2e-3",
)
# Student's t at 95 %, by the number of seeds.
_T95 = {3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571}
Results = dict[str, dict[str, list[list[float]]]]


def main(runs: Path, seeds: int, steps: int, fusions: Sequence[str] = FUSIONS) -> Results:
    """Does every run that is missing; gives the results by fusion and number: of each seed the values of its scenes."""
    results: Results = {fusion: {} for fusion in fusions}
    for seed in range(seeds):
        for fusion in fusions:
            for name, values in run(runs / f"{fusion}-{seed}", fusion, seed, steps).items():
                results[fusion].setdefault(name, []).append(values)
            atomic_write(runs / "results.json", json.dumps(results) + "\n")
            atomic_write(runs / "table.md", table(results))
    return results


def run(folder: Path, fusion: str, seed: int, steps: int) -> dict[str, list[float]]:
    """One model: trained, judged; a finished one is read."""
    done = folder / "numbers.json"
    if done.exists():
        return json.loads(done.read_text("utf-8"))
    folder.mkdir(parents=True, exist_ok=True)
    data = folder.parent / f"train-{seed}.tar"
    if not data.exists():
        write_synthetic_world(data, scenes("train", TRAIN, seed)[0])
    recipe = replace(find_recipe("world"), steps=steps, seed=seed)
    settings = (*SETTINGS, f"model.fusion={fusion}")
    times: list[float] = []  # CPU time at the end of each step
    for event in train(recipe, str(data), folder / "run", settings=settings, device="cpu"):
        if type(event).__name__ == "StepDone":
            times.append(time.process_time())
        if type(event).__name__ in ("WarningRaised", "RunEnded"):
            print(f"{folder.name}: {event}", flush=True)
    per_step = (times[-1] - times[0]) / max(1, len(times) - 1) if times else math.nan
    model = sightloop.load(folder / "run" / "model", device="cpu")
    tests, shown = scenes("unseen", TEST, seed)
    weights = sum(weight.numel() for weight in model.module.parameters())
    single = {"training, ms an image": 1000 * per_step / 32, "weights": float(weights)} | costs(model, tests)
    numbers = judged(model, tests, shown) | {name: [value] for name, value in single.items()}
    atomic_write(done, json.dumps(numbers) + "\n")
    print(
        folder.name, {name: round(statistics.mean(values), 4) for name, values in numbers.items()}, flush=True
    )
    return numbers


def scenes(part: Part, count: int, seed: int) -> tuple[Sequence[Sample], list[Combination]]:
    """Scenes of two different things of different colors, and what they show; no caption of a test occurs twice."""
    known = [shown for kind in combinations(part).values() for shown in kind if _fits(shown)]
    random = generator("fusion", part, seed)
    drawn = [known[i] for i in random.choice(len(known), count, replace=part == "train").tolist()]
    return SyntheticWorld(part, seed, 32, drawn, range(count)), drawn


def _fits(shown: Combination) -> bool:
    groups = shown.groups
    one, other = groups[0], groups[-1]
    return (
        shown.relation in ("above", "left of")
        and len(groups) == 2
        and all(g.count == 1 and g.shape in SHAPES for g in groups)
        and one.color != other.color
        and one.shape != other.shape
    )


def swapped(shown: Combination) -> tuple[str, str]:
    """Two wrong texts of the same words: the colors exchanged, the two things exchanged."""
    one, other = shown.groups
    colors = replace(shown, first=replace(one, color=other.color), second=replace(other, color=one.color))
    return str(colors), str(replace(shown, first=other, second=one))


def judged(model: Any, tests: Sequence[Sample], shown: Sequence[Combination]) -> dict[str, list[float]]:
    """A value a scene: ITM on three kinds of wrong texts (the true one must score higher), answers, both directions of
    recall at 1: by ITC, and with the 16 best re-ranked by ITM."""
    images, texts = [sample.image for sample in tests], [str(c) for c in shown]
    true = model.match(images, texts)
    wrong = {
        "ITM, other scene": texts[1:] + texts[:1],
        "ITM, swapped colors": [swapped(c)[0] for c in shown],
        "ITM, swapped relation": [swapped(c)[1] for c in shown],
    }
    numbers = {name: _better(true, model.match(images, other)) for name, other in wrong.items()}
    asked = [(n, q.question, q.answers[0]) for n, s in enumerate(tests) for q in s.questions]
    answers = model.answer([images[n] for n, _, _ in asked], [question for _, question, _ in asked])
    right: list[list[bool]] = [[] for _ in tests]
    for (n, _, true_answer), answer in zip(asked, answers, strict=True):
        right[n].append(answer == true_answer)
    numbers["VQA"] = [statistics.mean(each) for each in right]
    numbers["R@1, ITC"] = _recall(model.similarity(images, texts))
    numbers["R@1, re-ranked"] = _recall(model.rank(images, texts, k=16))
    return numbers


def _better(true: Any, wrong: Any) -> list[float]:
    return ((true > wrong) + 0.5 * (true == wrong)).tolist()


def _recall(scores: Any) -> list[float]:
    own = np.arange(len(scores))
    return (((scores.argmax(1) == own) + 1.0 * (scores.argmax(0) == own)) / 2).tolist()


def costs(model: Any, tests: Sequence[Sample]) -> dict[str, float]:
    """CPU milliseconds of an image that is encoded once, of a text, and of a pair that the ITM head judges."""
    few = [tests[n] for n in range(min(64, len(tests)))]
    pixels = list(model.read([sample.image for sample in few], isolate=False))
    captions, count = [sample.captions[0] for sample in few], len(few)
    texts = model.tokenize(captions)
    encoded, network = model.encode(pixels), model.network
    rows = [np.arange(count)] * count
    with torch.inference_mode():
        times = {
            "ms an image": _seconds(lambda: network.embed_image(model.encode(pixels))) / count,
            "ms a text": _seconds(lambda: model.tokenize(captions).embed(network)) / count,
            "ms a pair": _seconds(lambda: model.match_scores(encoded, texts, rows)) / count**2,
        }
    return {name: 1000 * value for name, value in times.items()}


def _seconds(work: Callable[[], object]) -> float:
    """The best of three, in CPU time."""
    found: list[float] = []
    for _ in range(3):
        start = time.process_time()
        work()
        found.append(time.process_time() - start)
    return min(found)


def table(results: Results) -> str:
    """Markdown: a row a number, a column a fusion: the mean with its 95 % interval over the seeds, or over the scenes
    of fewer than three."""
    shown = {fusion: numbers for fusion, numbers in results.items() if numbers}
    lines = ["| | " + " | ".join(shown) + " |", "|---|" + "---|" * len(shown)]
    for name in next(iter(shown.values())):
        lines.append(f"| {name} | " + " | ".join(_cell(numbers[name]) for numbers in shown.values()) + " |")
    return "\n".join(lines) + "\n"


def _cell(seeds: Sequence[Sequence[float]]) -> str:
    values = [statistics.mean(scenes) for scenes in seeds]
    mean, digits = statistics.mean(values), 0 if values[0] > 100 else 3
    if len(values) < 3 and len(seeds[0]) == 1:
        return f"{mean:,.{digits}f}"
    if len(values) < 3:
        scenes = [value for own in seeds for value in own]
        half = 1.96 * statistics.stdev(scenes) / len(scenes) ** 0.5
    else:
        half = _T95[len(values)] * statistics.stdev(values) / len(values) ** 0.5
    return f"{mean:,.{digits}f} ± {half:,.{digits}f}"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", type=Path, help="folder of the runs")
    parser.add_argument("--seeds", type=int, default=3, choices=range(1, 7))
    parser.add_argument("--steps", type=int, default=450)
    parser.add_argument("--fusions", nargs="+", choices=FUSIONS, default=FUSIONS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    os.makedirs(options.runs, exist_ok=True)
    main(options.runs, options.seeds, options.steps, options.fusions)
    print((options.runs / "table.md").read_text("utf-8"))
