"""Put a finished model into the package at half precision: python recipes/nano/pack.py RUN/model src/sightread/nano

A third value is the ITM threshold that `sightread evaluate matching` recommends: the judge's bias is moved so that it
becomes 0.5.
"""

from __future__ import annotations

import math
import shutil
import sys
from pathlib import Path

import sightread
from sightread.nn.packing import unpack
from sightread.pipelines.calibration import move_threshold

KEPT = (
    "config.json",
    "model.safetensors",
    "vocab.txt",
    "tokenizer_config.json",
)  # others can be made of these


def main(source: str, target: str, threshold: str = "0.5") -> None:
    """Write the four files that `load` needs, and say how large they are."""
    whole, folder = Path(target + ".whole"), Path(target)
    shutil.rmtree(whole, ignore_errors=True)
    model = sightread.load(source, device="cpu", dtype="float16")
    model.decoding = {"num_beams": 3, "length_penalty": 0.5}  # the best of five ways on dev
    model.name = "nano"
    unpack(model.network)
    move_threshold(model.network, math.log(float(threshold) / (1 - float(threshold))))
    model.save(whole)
    folder.mkdir(parents=True, exist_ok=True)
    for name in KEPT:
        shutil.copyfile(whole / name, folder / name)
    shutil.rmtree(whole)
    print(f"{sum((folder / name).stat().st_size for name in KEPT):,} bytes")


if __name__ == "__main__":
    main(*sys.argv[1:])
