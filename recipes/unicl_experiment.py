"""Do labels and captions together teach more than either alone? UniCL's question, on rendered scenes.

    nice -n 10 python recipes/unicl_experiment.py RUNS                     3 kinds of data x 3 seeds
    python recipes/unicl_experiment.py RUNS --steps 10 --seeds 1           a look at the machinery

Labels: images of one thing in 48 class folders ("red circle"), ten a class. Captions: scenes of two things, one above
or left of the other. Three runs a seed by the recipe `unicl_pretrain`, of as many steps: on the labels, on the
captions, on both in the same batches. Judged by zero-shot accuracy on new images of the 48 classes, and by recall among
300 captions of combinations that no training scene has. Both sets are small, so that neither is learned to the end.
RUNS/table.md and results.json are the result; a finished run is not run again.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch

import sightloop
from sightloop.data.atomic import atomic_write
from sightloop.data.datasets.synthetic import SyntheticWorld, write_synthetic_world
from sightloop.data.datasets.synthetic_grammar import COLORS, SHAPES, Combination, Group, Part, combinations
from sightloop.data.rng import generator
from sightloop.training.config import apply_settings
from sightloop.training.recipes import find_recipe
from sightloop.training.trainer import train

A_CLASS, CAPTIONS, TEST_CLASS, TEST_CAPTIONS, SIDE = 10, 120, 10, 300, 32
CLASSES = [f"{color} {shape}" for color, shape in product(COLORS, SHAPES)]
ARMS = {"labels": ("labels",), "captions": ("captions.tar",), "both": ("labels", "captions.tar")}
SETTINGS = (
    "model.size=world-clip",
    f"model.image_size={SIDE}",
    "model.vocab_size=400",
    "data.batch=64",
    "data.workers=1",
    "data.augment=null",
    "optimizer.lr=1e-3",
    "optimizer.clip_norm=1",
    "schedule.warmup_steps=15",
    "precision=bfloat16",
)
# Student's t at 95 %, by the number of seeds.
_T95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}
Results = dict[str, dict[str, list[float]]]


def main(runs: Path, seeds: int, steps: int) -> Results:
    """Does every run that is missing; gives the results by arm and number, one value a seed."""
    results: Results = {}
    for seed in range(seeds):
        for arm in ARMS:
            for name, value in run(runs, arm, seed, steps).items():
                results.setdefault(arm, {}).setdefault(name, []).append(value)
        atomic_write(runs / "results.json", json.dumps(results, indent=1) + "\n")
        atomic_write(runs / "table.md", table(results))
    return results


def run(runs: Path, arm: str, seed: int, steps: int) -> dict[str, float]:
    """One arm of one seed: trained, judged."""
    folder, data = runs / f"{arm}-{seed}", runs / f"data-{seed}"
    done = folder / "numbers.json"
    if done.exists():
        return json.loads(done.read_text("utf-8"))
    folder.mkdir(parents=True, exist_ok=True)
    if not (data / "captions.tar").exists():
        write_data(data, seed)
    recipe = replace(apply_settings(find_recipe("unicl_pretrain"), SETTINGS), seed=seed, steps=steps)
    sources = [str(data / source) for source in ARMS[arm]]
    for event in train(recipe, sources, folder / "run", device="cpu"):
        if type(event).__name__ == "RunEnded":
            print(f"{folder.name}: {event}", flush=True)
    numbers = judged(sightloop.load(folder / "run" / "model", device="cpu"), seed)
    atomic_write(done, json.dumps(numbers, indent=1) + "\n")
    print(folder.name, {name: round(value, 4) for name, value in numbers.items()}, flush=True)
    return numbers


def one_thing(each: int, part: str, seed: int) -> SyntheticWorld:
    """Images of the 48 classes in turn, of any size, `each` of a class."""
    shown = [Combination(Group(1, color, shape)) for color, shape in product(COLORS, SHAPES)] * each
    return SyntheticWorld(f"{part}-labels", seed, SIDE, shown, range(len(shown)))


def two_things(count: int, part: Part, seed: int) -> SyntheticWorld:
    """Scenes of two different things, one above or left of the other; no caption twice."""
    pairs = [c for kind in ("above", "left of") for c in combinations(part)[kind]]
    fit = [c for c in pairs if all(group.count == 1 for group in c.groups)]
    chosen = generator("unicl", part, seed).permutation(len(fit))[:count].tolist()
    return SyntheticWorld(part, seed, SIDE, [fit[i] for i in chosen], range(len(chosen)))


def write_data(folder: Path, seed: int) -> None:
    """labels/CLASS/*.png, and captions.tar."""
    for number, sample in enumerate(one_thing(A_CLASS, "train", seed)):
        path = folder / "labels" / CLASSES[number % len(CLASSES)] / f"{sample.key}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(
            bytes(sample.image) if isinstance(sample.image, bytes) else sample.image.read_bytes()
        )
    scenes = [replace(s, questions=(), regions=()) for s in two_things(CAPTIONS, "train", seed)]
    write_synthetic_world(folder / "captions.tar", scenes)


def judged(model: Any, seed: int) -> dict[str, float]:
    """Zero-shot accuracy on the classes, recall at 1 and at 10 on the captions (means of both directions)."""
    things, scenes = one_thing(TEST_CLASS, "test", seed), two_things(TEST_CAPTIONS, "unseen", seed)
    found = model.classify([s.image for s in things], CLASSES, "a photo of a {}.").argmax(1)
    scores = model.similarity([s.image for s in scenes], [s.captions[0] for s in scenes])
    own = np.arange(len(scenes))
    ranks = [(s > s[own, own][:, None]).sum(1) for s in (scores, scores.T)]
    return {
        "zero-shot accuracy": float(np.mean(found == np.arange(len(things)) % len(CLASSES))),
        "R@1": float(np.mean([(rank < 1).mean() for rank in ranks])),
        "R@10": float(np.mean([(rank < 10).mean() for rank in ranks])),
    }


def table(results: Results) -> str:
    """Markdown: a row an arm; mean and half of the 95 % interval over the seeds, then the paired gains of "both"."""
    names = list(results["labels"])
    lines = ["| data | " + " | ".join(names) + " |", "|---|" + "---|" * len(names)]
    for arm, numbers in results.items():
        lines.append(f"| {arm} | " + " | ".join(_cell(numbers[name]) for name in names) + " |")
    for other in ("labels", "captions"):
        gains = [_cell(_differences(results["both"][name], results[other][name]), "+") for name in names]
        lines.append(f"| both less {other}, paired | " + " | ".join(gains) + " |")
    return "\n".join(lines) + "\n"


def _differences(ones: Sequence[float], others: Sequence[float]) -> list[float]:
    return [a - b for a, b in zip(ones, others, strict=True)]


def _cell(values: Sequence[float], sign: str = "") -> str:
    mean = f"{statistics.mean(values):{sign}.3f}"
    if len(values) not in _T95:
        return mean
    return f"{mean} ± {_T95[len(values)] * statistics.stdev(values) / len(values) ** 0.5:.3f}"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", type=Path, help="folder of the runs")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=80, help="of each run")
    options = parser.parse_args()
    torch.set_num_threads(1)
    options.runs.mkdir(parents=True, exist_ok=True)
    main(options.runs, options.seeds, options.steps)
    print((options.runs / "table.md").read_text("utf-8"))
