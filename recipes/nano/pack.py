"""Put a finished model into the package at half precision: python recipes/nano/pack.py RUN/model src/sightread/nano

A third value are captioned pictures that were not learned from: the judge's verdict is set on them (`calibration`).
"""

from __future__ import annotations

import shutil
import sys
from dataclasses import replace
from pathlib import Path

from torch import nn

import sightread
from sightread.models.blip import Blip
from sightread.nn.packing import unpack
from sightread.pipelines.calibration import calibrate

KEPT = (
    "config.json",
    "model.safetensors",
    "vocab.txt",
    "tokenizer_config.json",
)  # others can be made of these


def main(source: str, target: str, data: str | None = None) -> None:
    """Write the four files that `load` needs, and say how large they are."""
    whole, folder = Path(target + ".whole"), Path(target)
    shutil.rmtree(whole, ignore_errors=True)
    model = sightread.load(source, device="cpu")
    model.decoding = {"num_beams": 3, "length_penalty": 0.5}  # the best of five ways on dev
    model.name = "nano"
    unpack(model.network)
    if data is not None:
        unseen = sightread.open_dataset(data)
        told = calibrate(model, unseen, len(unseen), (0, data))
        print(told.told() if told else "too few pictures to set the verdict on")
    model.network = fixed(model.network).half()
    model.save(whole)
    folder.mkdir(parents=True, exist_ok=True)
    for name in KEPT:
        shutil.copyfile(whole / name, folder / name)
    shutil.rmtree(whole)
    print(f"{sum((folder / name).stat().st_size for name in KEPT):,} bytes")


def fixed(network: Blip) -> Blip:
    """The same function of a picture, with the scale and shift that each batch norm of the stem has come to."""
    state = network.state_dict()
    for name, norm in network.named_modules():
        if isinstance(norm, nn.BatchNorm2d):
            for part in norm.state_dict():
                del state[f"{name}.{part}"]
            assert norm.running_mean is not None
            assert norm.running_var is not None
            scale = norm.weight / (norm.running_var + norm.eps).sqrt()
            state[f"{name}.weight"] = scale.view(-1, 1, 1, 1)
            state[f"{name}.bias"] = norm.bias - norm.running_mean * scale
    vision = replace(network.config.vision, stem_norm="fixed")
    result = Blip(replace(network.config, vision=vision))
    result.load_state_dict(state)
    return result.eval().requires_grad_(False)


if __name__ == "__main__":
    main(*sys.argv[1:])
