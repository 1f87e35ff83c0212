"""A new image tower under a finished model's text side: python recipes/nano/graft.py MODEL OUT

The tower is that of the size `blip-nano`, from random weights; text encoder, decoder and judge are MODEL's.
"""

from __future__ import annotations

import sys
from dataclasses import replace

import sightloop
from sightloop.models.blip import Blip
from sightloop.nn.init import initialize
from sightloop.nn.prepack import unpack
from sightloop.training.model_sizes import SIZES

NEW = ("vision.", "image_projection.")


def main(source: str, target: str) -> None:
    """Write the folder `target`, which a training starts from."""
    model = sightloop.load(source, device="cpu", dtype="float32")
    unpack(model.network)
    vision = replace(SIZES["blip-nano"][1].vision, image_size=model.network.config.vision.image_size)
    network = Blip(replace(model.network.config, vision=vision))
    initialize(network, seed=0)
    kept = {name: x for name, x in model.network.state_dict().items() if not name.startswith(NEW)}
    network.load_state_dict(network.state_dict() | kept)
    model.network, model.decoding = network, {}
    model.save(target)


if __name__ == "__main__":
    main(*sys.argv[1:])
