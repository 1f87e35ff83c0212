"""Does CapFilt help? The table of the BLIP paper (Li et al. 2022, tables 1, 2 and 4), at a scale of one's own.

    python recipes/capfilt_experiment.py RUNS --jobs 2                 rendered scenes, 3 seeds, an hour on 2 cores
    python recipes/capfilt_experiment.py RUNS --scale photographs --data photos

Pre-train on noisy pairs; fine-tune a captioner (LM) and a filter (ITC + ITM) on a small clean set; bootstrap the noisy
pairs; pre-train again from scratch, as many steps as before; fine-tune; evaluate. Every stage is a folder of its own in
RUNS, and goes on where it was stopped: the same command again. RUNS/table.md and results.json are the result.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import threading
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import torch

import sightloop
from sightloop.data.atomic import atomic_path, atomic_write
from sightloop.data.datasets.caption_noise import Noise, add_caption_noise
from sightloop.data.datasets.convert import encoded_image
from sightloop.data.datasets.synthetic import synthetic_world
from sightloop.data.datasets.synthetic_grammar import Part
from sightloop.data.datasets.writers import ShardWriter
from sightloop.data.rng import generator
from sightloop.training.config import Recipe
from sightloop.training.recipes import find_recipe
from sightloop.training.trainer import train
from sightloop.types import Sample


@dataclass(frozen=True)
class Scale:
    """Images of each set; steps of each training; the recipe to pre-train with; seeds; how many test sets."""

    web: int
    clean: int
    test: int
    pretrain: int
    tools: int  # of captioner and filter
    tune: int  # of what is evaluated
    recipe: str
    seeds: int
    settings: tuple[str, ...] = ()  # of the pre-training
    tuning: tuple[str, ...] = ("data.batch=8",)  # of every fine-tuning
    threshold: float = 0.5  # of the filter
    min_tokens: int = 5  # of a synthetic text
    tests: int = 1


# Crops and RandAugment change what a scene's caption tells: sizes, numbers, colours.
PLAIN = ("data.augment.scale=[0.9,1.0]", "data.augment.randaugment=null")
SCALES = {
    "test": Scale(
        32, 12, 10, 3, 2, 2, "world", 1, ("data.batch=8", "schedule.warmup_steps=1"), threshold=0.0, tests=2
    ),
    "world": Scale(
        2000,
        1000,
        150,
        500,
        500,
        60,
        "world",
        3,
        ("data.batch=64", "teacher.momentum=0", "schedule.warmup_steps=50", "precision=bfloat16"),
        (
            "data.batch=64",
            "model.dropout=0",
            "model.drop_path=0",
            "data.caption_dropout=0",
            "ema=0",
            "optimizer.lr=7e-4",
            "hard_negatives=0.75",  # a synthetic text is nearly right where it is wrong
            "precision=bfloat16",
            "label_smoothing=0",  # a nucleus of smoothed words holds words that fit nothing
            "calibrate=false",
            *PLAIN,
        ),
        min_tokens=2,
        tests=8,
    ),
    "photographs": Scale(
        5000,
        1000,
        1000,
        400,
        100,
        100,
        "nano",
        3,
        # A temperature that learns runs away at first (nano's LOG.md).
        (
            "model.size=blip-nano",
            "model.drop_path=0.05",
            "data.texts=1",
            "data.cache=128",
            "model.image_size=80",
            'model.frozen=["temperature"]',
            "optimizer.lr=1e-3",
            "ema=0.99",
        ),
        ("data.batch=128", "optimizer.lr=3e-4", "label_smoothing=0", "precision=bfloat16"),
    ),
}
# name -> how the noisy pairs become the second pre-training's; None: they stay as they are.
ROWS: dict[str, dict[str, Any] | None] = {
    "none": None,
    "filter": {"mode": "filter-only"},
    "captioner": {"mode": "captioner-only"},
    "both": {},
    "both, beam": {"num_beams": 3},
    "both, shared": {"shared": True},
}
# Of the web's texts: half are of other images, say nothing, or are cut off.
NOISE: dict[Noise, float] = {"mismatched": 0.35, "junk": 0.05, "truncated": 0.05, "generic": 0.05}
# What the paper says of two rows: the first is better than the second.
ORDER = (
    ("filter", "none"),
    ("captioner", "none"),
    ("both", "filter"),
    ("both", "captioner"),
    ("both", "both, beam"),
    ("both", "both, shared"),
)
# Recall is the mean of both ways: by ITC, re-ranked by ITM, the mean of the two; @10 by ITC.
SHOWN = ("recall@1", "recall@1, k=16", "recall@1, all", "recall@10", "CIDEr")
EVERY = {"itc": 1.0, "itm": 1.0, "lm": 1.0}
TOOLS = {"captioner": {"lm": 1.0}, "filter": {"itc": 1.0, "itm": 1.0}, "shared": EVERY}
Work: TypeAlias = tuple[Path, Scale, str | None, int, str]  # folder, scale, data, seed, device
Result: TypeAlias = tuple[dict[str, float], dict[str, Any]]
# Student's t at 95 %, by the number of seeds.
_T95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}


def main(
    runs: Path, scale: Scale, data: str | None = None, device: str = "auto", jobs: int = 1
) -> dict[str, Any]:
    """Does everything that is missing; gives the results by row, number and seed.

    jobs: processes, each with its share of the cores.
    """
    work = [(runs / f"seed-{seed}", scale, data, seed, device) for seed in range(scale.seeds)]
    if jobs == 1:
        found = [arm(row, *each) for each in work for row in ROWS]
    else:
        context, threads = multiprocessing.get_context("spawn"), max(1, (os.cpu_count() or 1) // jobs)
        pool = ProcessPoolExecutor(jobs, context, _begin, (threads,))
        with pool, ThreadPoolExecutor(len(work)) as flows:
            try:
                found = [each for seed in flows.map(partial(_at_once, pool), work) for each in seed]
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
    results: dict[str, dict[str, list[float]]] = {}
    about: dict[str, Any] = {}
    rows = [(row, seed) for seed in range(scale.seeds) for row in ROWS]
    for (row, seed), (numbers, texts) in zip(rows, found, strict=True):
        about[f"{row}, seed {seed}"] = texts
        for number, value in numbers.items():
            results.setdefault(row, {}).setdefault(number, []).append(value)
    whole = {"results": results, "about": about}
    atomic_write(runs / "results.json", json.dumps(whole, indent=1) + "\n")
    atomic_write(runs / "table.md", table(results))
    return whole


def _begin(threads: int) -> None:
    """A process that ends with the one that started it, so that two never work at the same stage."""
    torch.set_num_threads(threads)
    parent = multiprocessing.parent_process()

    def watch() -> None:
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _at_once(pool: ProcessPoolExecutor, seed: Work) -> list[Result]:
    """A seed's rows, each stage in whatever process is free."""
    pool.submit(beginning, *seed).result()
    for each in [pool.submit(tool, name, *seed) for name in reversed(TOOLS)]:  # the longest first
        each.result()
    return [each.result() for each in [pool.submit(arm, row, *seed) for row in ROWS]]


def beginning(
    folder: Path, scale: Scale, data: str | None, seed: int, device: str
) -> tuple[dict[str, Path], Path]:
    """What all of a seed stands on: its data, and the first pre-training."""
    sets = make_data(folder / "data", scale, data, seed)
    return sets, pretrained(folder / "pretrain-none", sets["web"], scale, seed, device)


def tool(name: str, folder: Path, scale: Scale, data: str | None, seed: int, device: str) -> Path:
    """A captioner, a filter, or a model that is both, made from the first pre-training on the clean pairs."""
    sets, first = beginning(folder, scale, data, seed, device)
    return tuned(folder / name, first, sets["clean"], TOOLS[name], scale.tools, (scale, seed, device))


def arm(row: str, folder: Path, scale: Scale, data: str | None, seed: int, device: str) -> Result:
    """One row for one seed: bootstrap, pre-train from scratch, fine-tune, evaluate: numbers; what became of texts."""
    sets, model = beginning(folder, scale, data, seed, device)
    name, how, texts = row.replace(", ", "-"), ROWS[row], dict[str, Any]()
    if how is not None:
        options = dict(how)
        names = ("shared", "shared") if options.pop("shared", False) else ("captioner", "filter")
        captioner, judge = (tool(each, folder, scale, data, seed, device) for each in names)
        out = folder / f"bootstrap-{name}"
        options |= {"seed": seed, "threshold": scale.threshold, "min_tokens": scale.min_tokens}
        options |= {"block": 250, "isolate": False, "device": device}
        done = sightloop.bootstrap(sets["web"], captioner=captioner, filter=judge, out=out, **options)
        scenes = small_scenes("train", scale.web + scale.clean, seed) if data is None else []
        texts = dict(done.texts) | quality(sets["web"], out, {s.key: s.captions for s in scenes})
        model = pretrained(folder / f"pretrain-{name}", out, scale, seed, device)
    final = tuned(folder / f"final-{name}", model, sets["clean"], EVERY, scale.tune, (scale, seed, device))
    tests = [sets[f"test-{number}"] for number in range(scale.tests)]
    found = [evaluated(folder / f"evaluation-{name}" / path.stem, final, path, device) for path in tests]
    return {number: statistics.mean(each[number] for each in found) for number in found[0]}, texts


def make_data(folder: Path, scale: Scale, data: str | None, seed: int) -> dict[str, Path]:
    """web.tar (noisy, one text an image), clean.tar and test-N.tar (other images; of scenes, other combinations).

    Where a text of the web is true, it says what its writer cared for: any caption of a photograph; of a scene its
    whole caption, or a part. People who were asked for the clean pairs say the whole.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tests = [f"test-{number}" for number in range(scale.tests)]
    paths = {name: folder / f"{name}.tar" for name in ("web", "clean", *tests)}
    if all(path.exists() for path in paths.values()):
        return paths
    rest = scale.web + scale.clean
    if data is None:
        scenes = small_scenes("train", rest, seed)
        drawn = [
            small_scenes("unseen", scale.test, seed + 1000 * n, different=True) for n in range(scale.tests)
        ]
    else:
        whole = sightloop.open_dataset(data)
        scenes = [whole[i] for i in range(rest + scale.test * scale.tests)]
        drawn = [scenes[rest + scale.test * n :][: scale.test] for n in range(scale.tests)]
    random = generator("experiment", "told", seed)
    web = [replace(s, captions=(str(random.choice(s.captions)),)) for s in scenes[: scale.web]]
    clean = [complete(s, data) for s in scenes[scale.web :][: scale.clean]]
    write(paths["web"], add_caption_noise(web, seed, NOISE))
    write(paths["clean"], clean)
    for name, pool in zip(tests, drawn, strict=True):
        write(paths[name], [complete(s, data) for s in pool])
    return paths


def complete(sample: Sample, data: str | None) -> Sample:
    """What people who are asked say: of a scene, all that is to be seen; of a photograph, every caption it has."""
    captions = sample.captions[:1] if data is None else sample.captions
    return replace(sample, captions=captions, questions=(), regions=())


def small_scenes(part: Part, count: int, seed: int, different: bool = False) -> list[Sample]:
    """One thing, some alike, one inside another: what is learned in few steps. The first `count` of that kind."""
    drawn = synthetic_world(part, 8 * count, seed, different=different)
    shown = drawn.combinations
    fit = [i for i, c in enumerate(shown) if c.relation in ("", "inside") and not c.word][:count]
    return [replace(drawn[i], captions=(str(shown[i]), *shown[i].partial_captions())) for i in fit]


def write(path: Path, samples: Iterable[Sample]) -> None:
    """One shard, whole or not at all."""
    with atomic_path(path) as temporary:
        temporary.unlink()
        shard = ShardWriter(path.parent, lambda _: temporary.name, 0)
        for sample in samples:
            data, ending = encoded_image(sample, read_all=True)
            shard.add(sample, data, ending)
        shard.close()


def pretrained(run: Path, data: Path, scale: Scale, seed: int, device: str) -> Path:
    """From random weights, with all three objectives."""
    recipe = replace(find_recipe(scale.recipe), terms=EVERY, steps=scale.pretrain, seed=seed)
    return trained(recipe, data, run, device, scale.settings)


def tuned(
    run: Path, start: Path, data: Path, terms: dict[str, float], steps: int, how: tuple[Scale, int, str]
) -> Path:
    """From a pre-trained model, on clean pairs. how: scale, seed, device."""
    scale, seed, device = how
    base = find_recipe("captioner" if set(terms) == {"lm"} else "filter")
    recipe = replace(base, terms=terms, steps=steps, seed=seed)
    recipe = replace(recipe, model=replace(recipe.model, init_from=str(start)))
    return trained(recipe, data, run, device, scale.tuning)


def trained(recipe: Recipe, data: Path, run: Path, device: str, settings: Sequence[str] = ()) -> Path:
    """The model that a run ends with; a finished run is not run again."""
    if not (run / "model").exists():
        for event in train(recipe, str(data), run, settings=settings, device=device):
            if type(event).__name__ in ("WarningRaised", "RunEnded"):
                print(f"{run.name}: {event}", flush=True)
    return run / "model"


def evaluated(out: Path, model: Path, data: Path, device: str) -> dict[str, float]:
    """Retrieval, re-ranked by ITM, and captions by 3 beams."""
    common: dict[str, Any] = {"model": str(model), "isolate": False, "device": device}
    found = dict(sightloop.evaluate("retrieval", data, out=out / "retrieval", rerank=[16], **common))
    written = sightloop.evaluate("captions", data, out=out / "captions", decoding={"num_beams": 3}, **common)
    means = {
        name: (found[f"image-to-text {name}"] + found[f"text-to-image {name}"]) / 2
        for name in ("recall@1", "recall@1, k=16", "recall@10")
    }
    means["recall@1, all"] = (means["recall@1"] + means["recall@1, k=16"]) / 2
    return means | found | dict(written)


def quality(web: Path, out: Path, told: Mapping[str, Sequence[str]]) -> dict[str, float]:
    """The share that was kept of the web's texts, by the noise that was put in, and of the captioner's, where it is
    known what is true of an image (told), by right and wrong; and how many of the captioner's are right."""
    noise = {sample.key: sample.extra["noise"] or "true" for sample in sightloop.open_dataset(web)}
    kept: dict[str, list[bool]] = {}
    right: list[bool] = []
    for file in sorted((out / "evidence").glob("*.jsonl")):
        for line in map(json.loads, file.read_text("utf-8").splitlines()):
            kind = noise[line["key"]]
            if line.get("source") == "synthetic" and line["key"] in told:
                right.append(line["text"] in told[line["key"]])
                kind = "right" if right[-1] else "wrong"
            elif line.get("source") != "web":
                continue
            if line["reason"] != "duplicate":  # of a web text, which is judged in its stead
                kept.setdefault(kind, []).append(line["verdict"] == "kept")
    found = {f"kept of {kind}": each for kind, each in sorted(kept.items())}
    found |= {"right of synthetic": right} if right else {}
    return {name: round(statistics.mean(each), 4) for name, each in found.items()}


def table(results: dict[str, dict[str, list[float]]]) -> str:
    """Means over the seeds, with 95 % intervals of the mean (Student's t) where there are several; then the paper's
    order: by how much one row is above another, seed by seed."""
    rows = {row: [numbers[name] for name in SHOWN] for row, numbers in results.items()}
    for better, worse in ORDER:
        if better in rows and worse in rows:
            pairs = zip(rows[better], rows[worse], strict=True)
            rows[f"{better} - {worse}"] = [[a - b for a, b in zip(*pair, strict=True)] for pair in pairs]
    lines = ["| CapFilt | " + " | ".join(SHOWN) + " |", "|---" * (len(SHOWN) + 1) + "|"]
    lines += [f"| {row} | " + " | ".join(map(_cell, values)) + " |" for row, values in rows.items()]
    return "\n".join(lines) + "\n"


def _cell(values: list[float]) -> str:
    mean = statistics.mean(values)
    if len(values) not in _T95:
        return f"{mean:.4f}"
    return f"{mean:.4f} ± {_T95[len(values)] * statistics.stdev(values) / len(values) ** 0.5:.4f}"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", type=Path, help="the folder of all stages")
    parser.add_argument("--scale", choices=SCALES, default="world")
    parser.add_argument("--data", help="photographs with captions: what open_dataset reads")
    parser.add_argument("--seeds", type=int, help="how many")
    parser.add_argument("--device", default="auto")
    parser.add_argument(
        "--jobs", type=int, default=1, help="processes; one a core is fastest for small scenes"
    )
    given = parser.parse_args()
    size = SCALES[given.scale] if given.seeds is None else replace(SCALES[given.scale], seeds=given.seeds)
    if given.scale == "photographs" and given.data is None:
        parser.error("--scale photographs needs --data")
    main(given.runs, size, given.data, given.device, given.jobs)
    print((given.runs / "table.md").read_text("utf-8"))
