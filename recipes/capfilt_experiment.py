"""Does CapFilt help? The table of the BLIP paper (Li et al. 2022, tables 1, 2 and 4), at a scale of one's own.

    python recipes/capfilt_experiment.py RUNS                          rendered scenes
    python recipes/capfilt_experiment.py RUNS --scale photographs --data photos

Pre-train on noisy pairs; fine-tune a captioner (LM) and a filter (ITC + ITM) on a small clean set; bootstrap the noisy
pairs; pre-train again from scratch, as many steps as before; fine-tune; evaluate. Every stage is a folder of its own in
RUNS, and goes on where it was stopped: the same command again. RUNS/table.md and results.json are the result.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import sightread
from sightread.data.atomic import atomic_path, atomic_write
from sightread.data.noise import Noise, noisy
from sightread.data.world import Part, world
from sightread.pipelines.convert import encoded_picture
from sightread.pipelines.recipes import Recipe, find
from sightread.pipelines.train import train
from sightread.pipelines.writers import Shards
from sightread.types import Sample


@dataclass(frozen=True)
class Scale:
    """Pictures of each set; steps of each training; the recipe to pre-train with; seeds."""

    web: int
    clean: int
    test: int
    pretrain: int
    tune: int
    recipe: str
    seeds: int
    settings: tuple[str, ...] = ()  # of the pre-training
    tuning: tuple[str, ...] = ("data.batch=8",)  # of every fine-tuning
    threshold: float = 0.5  # of the filter
    min_tokens: int = 5  # of a synthetic text


SCALES = {
    "test": Scale(32, 12, 10, 3, 2, "world", 1, ("data.batch=8", "schedule.warmup_steps=1"), threshold=0.0),
    "world": Scale(
        3000,
        400,
        150,
        600,
        200,
        "world",
        3,
        ("data.batch=32", "teacher.momentum=0", "schedule.warmup_steps=50"),
        ("data.batch=16", "teacher.momentum=0", "teacher.queue=0", "optimiser.lr=3e-4"),
        min_tokens=3,
    ),
    "photographs": Scale(
        5000, 1000, 1000, 4000, 600, "blip_pretrain", 3, ("model.size=blip-nano", "data.batch=64")
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
# Of the web's texts: more than half are of other pictures, or say nothing.
NOISE: dict[Noise, float] = {"mismatched": 0.4, "junk": 0.1, "truncated": 0.05, "generic": 0.1}
SHOWN = ("image-to-text recall@1, k=16", "text-to-image recall@1, k=16", "CIDEr")
_T95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}  # Student's t at 95 %, by the number of seeds


def main(runs: Path, scale: Scale, data: str | None = None, device: str = "auto") -> dict[str, Any]:
    """Everything that is missing; the results by row, number and seed."""
    results: dict[str, dict[str, list[float]]] = {}
    about: dict[str, Any] = {}
    for seed in range(scale.seeds):
        folder = runs / f"seed-{seed}"
        sets = make_data(folder / "data", scale, data, seed)
        first = pretrained(folder / "pretrain-none", sets["web"], scale, seed, device)
        models = {
            "captioner": tuned(folder / "captioner", first, sets["clean"], {"lm": 1.0}, scale, seed, device),
            "filter": tuned(
                folder / "filter", first, sets["clean"], {"itc": 1.0, "itm": 1.0}, scale, seed, device
            ),
        }
        every = {"itc": 1.0, "itm": 1.0, "lm": 1.0}
        for row, how in ROWS.items():
            name = row.replace(", ", "-")
            model = first
            if how is not None:
                options = dict(how)
                pair = models
                if options.pop("shared", False):
                    shared = tuned(folder / "shared", first, sets["clean"], every, scale, seed, device)
                    pair = {"captioner": shared, "filter": shared}
                out = folder / f"bootstrap-{name}"
                options |= {
                    "seed": seed,
                    "threshold": scale.threshold,
                    "block": 250,
                    "min_tokens": scale.min_tokens,
                    "isolate": False,
                    "device": device,
                }
                done = sightread.bootstrap(sets["web"], out=out, **pair, **options)
                about[f"{row}, seed {seed}"] = dict(done.texts) | filter_quality(sets["web"], out)
                model = pretrained(folder / f"pretrain-{name}", out, scale, seed, device)
            final = tuned(folder / f"final-{name}", model, sets["clean"], every, scale, seed, device)
            for number, value in evaluated(
                folder / f"evaluation-{name}", final, sets["test"], device
            ).items():
                results.setdefault(row, {}).setdefault(number, []).append(value)
    whole = {"results": results, "about": about}
    atomic_write(runs / "results.json", json.dumps(whole, indent=1) + "\n")
    atomic_write(runs / "table.md", table(results))
    return whole


def make_data(folder: Path, scale: Scale, data: str | None, seed: int) -> dict[str, Path]:
    """web.tar (noisy), clean.tar and test.tar (other pictures; of scenes, other combinations)."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = {name: folder / f"{name}.tar" for name in ("web", "clean", "test")}
    if all(path.exists() for path in paths.values()):
        return paths
    if data is None:
        scenes = small_scenes("train", scale.web + scale.clean, seed)
        test = small_scenes("unseen", scale.test, seed, different=True)
    else:
        whole = sightread.open_dataset(data)
        scenes = [whole[i] for i in range(scale.web + scale.clean + scale.test)]
        test = scenes[scale.web + scale.clean :]
    write(paths["web"], noisy(scenes[: scale.web], seed, NOISE))
    write(paths["clean"], (replace(s, questions=(), regions=()) for s in scenes[scale.web :][: scale.clean]))
    write(paths["test"], test)
    return paths


def small_scenes(part: Part, count: int, seed: int, different: bool = False) -> list[Sample]:
    """One thing, some alike, one inside another: what is learned in few steps. The first `count` of that kind."""
    drawn = world(part, 6 * count, seed, different=different)
    fit = [i for i, c in enumerate(drawn.shown) if c.relation in ("", "inside") and not c.word]
    return [drawn[i] for i in fit[:count]]


def write(path: Path, samples: Iterable[Sample]) -> None:
    """One shard, whole or not at all."""
    with atomic_path(path) as temporary:
        temporary.unlink()
        shard = Shards(path.parent, lambda _: temporary.name, 0)
        for sample in samples:
            data, ending = encoded_picture(sample, whole=True)
            shard.add(sample, data, ending)
        shard.close()


def pretrained(run: Path, data: Path, scale: Scale, seed: int, device: str) -> Path:
    """From random weights, with all three objectives."""
    recipe = replace(
        find(scale.recipe), terms={"itc": 1.0, "itm": 1.0, "lm": 1.0}, steps=scale.pretrain, seed=seed
    )
    return trained(recipe, data, run, device, scale.settings)


def tuned(
    run: Path, start: Path, data: Path, terms: dict[str, float], scale: Scale, seed: int, device: str
) -> Path:
    """From a pre-trained model, on clean pairs."""
    base = find("captioner" if set(terms) == {"lm"} else "filter")
    recipe = replace(base, terms=terms, steps=scale.tune, seed=seed)
    recipe = replace(recipe, model=replace(recipe.model, start=str(start)))
    return trained(recipe, data, run, device, scale.tuning)


def trained(recipe: Recipe, data: Path, run: Path, device: str, settings: Sequence[str] = ()) -> Path:
    """The model that a run ends with; a finished run is not run again."""
    if not (run / "model").exists():
        for event in train(recipe, str(data), run, settings=settings, device=device):
            if type(event).__name__ in ("Warned", "Ended"):
                print(f"{run.name}: {event}", flush=True)
    return run / "model"


def evaluated(out: Path, model: Path, data: Path, device: str) -> dict[str, float]:
    """Retrieval, re-ranked by ITM, and captions by 3 beams."""
    common: dict[str, Any] = {"model": str(model), "isolate": False, "device": device}
    found = dict(sightread.evaluate("retrieval", data, out=out / "retrieval", rerank=[16], **common))
    written = sightread.evaluate("captions", data, out=out / "captions", decoding={"num_beams": 3}, **common)
    return found | dict(written)


def filter_quality(web: Path, out: Path) -> dict[str, float]:
    """Of the web's texts, by the noise that was put in: the share that was kept."""
    noise = {sample.key: sample.extra["noise"] or "true" for sample in sightread.open_dataset(web)}
    kept: dict[str, list[bool]] = {}
    for file in sorted((out / "evidence").glob("*.jsonl")):
        for line in map(json.loads, file.read_text("utf-8").splitlines()):
            if line.get("source") == "web":
                kept.setdefault(noise[line["key"]], []).append(line["verdict"] == "kept")
    return {f"kept of {kind}": round(statistics.mean(found), 4) for kind, found in sorted(kept.items())}


def table(results: dict[str, dict[str, list[float]]]) -> str:
    """Means over the seeds, with 95 % intervals of the mean (Student's t) where there are several."""
    names = [name for row in results.values() for name in row if name in SHOWN]
    names = list(dict.fromkeys(names))
    lines = ["| CapFilt | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
    for row, numbers in results.items():
        cells = [_cell(numbers[name]) for name in names]
        lines.append(f"| {row} | " + " | ".join(cells) + " |")
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
    given = parser.parse_args()
    size = SCALES[given.scale] if given.seeds is None else replace(SCALES[given.scale], seeds=given.seeds)
    if given.scale == "photographs" and given.data is None:
        parser.error("--scale photographs needs --data")
    main(given.runs, size, given.data, given.device)
    print((given.runs / "table.md").read_text("utf-8"))
