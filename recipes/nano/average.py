"""The mean of several models' weights: python recipes/nano/average.py OUT [--count DATA] WEIGHT MODEL WEIGHT MODEL ...

Runs that began at the same weights lie in one valley, and their mean generalises better than each (Wortsman et al.
2022, model soups). Each MODEL is the `model` folder of a run; the last one's other files are taken. DATA: images of
the training, on which the statistics of batch norms are counted anew, as those of a mean are not the mean of theirs.
"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor, nn

import sightloop
from sightloop.data.images.preprocess import normalize, preprocess
from sightloop.inference.model import Model
from sightloop.nn.prepack import unpack

COUNTED = 1500  # images, a hundred at a time


def main(out: str, shares: list[float], folders: list[str], data: str | None = None) -> None:
    """Write OUT, a folder that `load` reads."""
    models = [sightloop.load(folder, device="cpu") for folder in folders]
    states: list[dict[str, Tensor]] = []
    for model in models:
        unpack(model.network)
        states.append(model.network.state_dict())
    parts = list(zip(shares, states, strict=True))
    mean = {
        name: torch.stack([share * state[name] for share, state in parts]).sum(0)
        for name, value in states[-1].items()
        if value.is_floating_point()
    }
    models[-1].network.load_state_dict(states[-1] | mean)
    if data is not None:
        count_anew(models[-1], data)
    models[-1].save(out)


@torch.no_grad()
def count_anew(model: Model, data: str) -> None:
    """The means and variances that batch norms meet on images of this data, drawn evenly."""
    norms = [part for part in model.network.modules() if isinstance(part, nn.BatchNorm2d)]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # every batch counts the same
    whole, spec = sightloop.open_dataset(data), model.image_spec
    order = torch.randperm(len(whole), generator=torch.Generator().manual_seed(0))[:COUNTED].tolist()
    model.network.train()
    for start in range(0, len(order) - 99, 100):  # none smaller, which would count too much
        pictures = [preprocess(whole[index].image, spec) for index in order[start : start + 100]]
        model.network.encode_image(normalize(pictures, spec))
    model.network.eval()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out")
    parser.add_argument("parts", nargs="+", metavar="WEIGHT MODEL")
    parser.add_argument("--count", metavar="DATA")
    given = parser.parse_args()
    main(given.out, [float(share) for share in given.parts[::2]], given.parts[1::2], given.count)
