"""Learn the small world from nothing, show on unseen combinations what was learned; then with shuffled pairs.

python -m benchmarks.world                  # about ten minutes on two cores, and as long again for the control
python -m benchmarks.world --only true      # without the control
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

from sightloop.data.datasets.synthetic import synthetic_world, write_synthetic_world
from sightloop.training.events import Evaluated, StepDone, WarningRaised
from sightloop.training.trainer import train

GOALS = {
    "text-to-image recall@1": 0.8,
    "image-to-text recall@1": 0.8,
    "ITM accuracy (hard)": 0.9,
    "exact match": 0.8,
    "VQA exact match": 0.85,
}


def learn(
    folder: Path, scenes: int, settings: list[str], *, shuffled: bool
) -> tuple[dict[str, float], list[str], float]:
    """Train on `scenes` rendered scenes and measure on 100 unseen ones: values, warnings, seconds."""
    data, unseen = folder / "train.tar", folder / "unseen.tar"
    write_synthetic_world(data, synthetic_world("train", scenes, seed=1, shuffled=shuffled))
    write_synthetic_world(unseen, synthetic_world("unseen", 100, seed=2, different=True))
    values: dict[str, float] = {}
    warnings: list[str] = []
    began = time.monotonic()
    settings = [f"evaluation.data={unseen}", "evaluation.samples=100", *settings]
    for event in train("world", str(data), folder / "run", settings=settings, device="cpu"):
        match event:
            case StepDone() if event.step % 100 == 0:
                terms = "  ".join(f"{name} {event.values[name]:.3f}" for name in event.chances)
                print(f"  step {event.step}  {terms}  {time.monotonic() - began:.0f} s", flush=True)
            case WarningRaised():
                warnings.append(event.text)
                print(f"  step {event.step}: {event.text}", flush=True)
            case Evaluated():
                values = event.values
            case _:
                pass
    return values, warnings, time.monotonic() - began


def main() -> None:
    """Print what was reached beside what is wanted."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", choices=["true", "shuffled"])
    parser.add_argument("--scenes", type=int, default=5000)
    parser.add_argument("--set", nargs="*", default=[], help="settings of the recipe, such as epochs=2")
    options = parser.parse_args()
    for name in ("true", "shuffled"):
        if options.only in (None, name):
            print(f"{name} pairs", flush=True)
            with tempfile.TemporaryDirectory() as folder:
                values, warnings, seconds = learn(
                    Path(folder), options.scenes, options.set, shuffled=name == "shuffled"
                )
            for key, value in values.items():
                goal = f"  (goal {GOALS[key]})" if key in GOALS and name == "true" else ""
                print(f"  {key:20} {value:.3f}{goal}")
            print(f"  {seconds:.0f} s, {len(warnings)} warnings\n", flush=True)


if __name__ == "__main__":
    main()
