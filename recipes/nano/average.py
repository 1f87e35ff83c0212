"""The mean of several models' weights: python recipes/nano/average.py OUT WEIGHT MODEL WEIGHT MODEL ...

Runs that began at the same weights lie in one valley, and their mean generalises better than each (Wortsman et al.
2022, model soups). Each MODEL is the `model` folder of a run; the last one's other files are taken.
"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor

import sightloop
from sightloop.nn.prepack import unpack


def main(out: str, shares: list[float], folders: list[str]) -> None:
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
    models[-1].save(out)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out")
    parser.add_argument("parts", nargs="+", metavar="WEIGHT MODEL")
    given = parser.parse_args()
    main(given.out, [float(share) for share in given.parts[::2]], given.parts[1::2])
