"""Put a finished model into the package: python recipes/nano/pack.py RUN/model src/sightloop/nano

At half precision. --unseen: captioned images that it did not learn from, on which the judge's verdict is set.
--learned: those that it did learn from, whose digests go with it, so that nothing is set on them again.
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Sequence
from pathlib import Path

import sightloop
from sightloop.data.copies.learned_images import write_digests
from sightloop.models.blip import Blip
from sightloop.nn.prepack import unpack
from sightloop.protocols import require
from sightloop.training.calibration import calibrate

KEPT = (
    "config.json",
    "model.safetensors",
    "vocab.txt",
    "tokenizer_config.json",
)  # others can be made of these


def main(
    source: str, target: str, unseen: str | None = None, learned: str | Sequence[str] | None = None
) -> None:
    """Write the files that `load` and `train` need, and say how large they are."""
    whole, folder = Path(target + ".whole"), Path(target)
    shutil.rmtree(whole, ignore_errors=True)
    model = sightloop.load(source, device="cpu")
    model.decoding = {"num_beams": 3, "length_penalty": 0.5}  # the best of five ways on dev
    model.name = "nano"
    unpack(model.network)
    if unseen is not None:
        pairs = sightloop.open_dataset(unseen)
        calibration = calibrate(model, pairs, len(pairs), (0, unseen))
        print(calibration.summary() if calibration else f"{unseen}: too few images to calibrate on")
    require(model.network, Blip).half()
    model.save(whole)
    folder.mkdir(parents=True, exist_ok=True)
    for name in KEPT:
        shutil.copyfile(whole / name, folder / name)
    shutil.rmtree(whole)
    if learned is not None:
        write_digests(folder, {*sightloop.open_dataset(learned).image_digests()})
    print(f"{sum(file.stat().st_size for file in folder.iterdir()):,} bytes")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source")
    parser.add_argument("target")
    parser.add_argument("--unseen", metavar="DATA")
    parser.add_argument("--learned", metavar="DATA", nargs="+")
    main(**vars(parser.parse_args()))
