"""The mean of several models' weights: python recipes/nano/average.py OUT WEIGHT MODEL WEIGHT MODEL ...

Runs that began at the same weights lie in one valley, and their mean generalises better than each (Wortsman et al.
2022, model soups). Each MODEL is the `model` folder of a run; the last one's other files are taken.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from safetensors.torch import load_file, save_file


def main(out: str, *parts: str) -> None:
    """Write OUT, a folder that `load` reads."""
    shares, folders = [float(part) for part in parts[::2]], parts[1::2]
    models = [load_file(Path(folder) / "model.safetensors") for folder in folders]
    mean = {
        name: sum(share * model[name] for share, model in zip(shares, models, strict=True))
        for name in models[0]
    }
    shutil.copytree(folders[-1], out)
    save_file(mean, Path(out) / "model.safetensors")


if __name__ == "__main__":
    main(*sys.argv[1:])
