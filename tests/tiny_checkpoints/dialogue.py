"""A small BLIP with random weights that writes, answers and judges answers in a dialogue."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

import sightloop
from sightloop.data.datasets.synthetic import synthetic_world, write_synthetic_world
from sightloop.inference.model import Model
from sightloop.training.build import build_model
from sightloop.training.config import ModelSettings
from sightloop.training.recipes import RECIPES


def dialogue_model(folder: Path) -> Model:
    """What the recipe `world_dialogue` starts from, its heads' weights larger so that scores differ; it is mostly safe.

    Args:
        folder: for its vocabulary and its data, `world.tar`, six scenes with dialogues.
    """
    folder.mkdir(parents=True, exist_ok=True)
    write_synthetic_world(folder / "world.tar", synthetic_world("train", 6, seed=0, dialogues=True))
    world = RECIPES["world_dialogue"]
    recipe = replace(world, model=ModelSettings(size="world-dialogue", vocab_size=300))
    built = build_model(recipe, sightloop.open_dataset(folder / "world.tar"), folder)
    network = built.network.eval()
    with torch.no_grad():
        for name, weight in network.named_parameters():
            if name in ("match_head.weight", "attribute_head.weight"):
                weight.mul_(20 if name.startswith("match") else 3)
        network.attribute_head.bias[(built.attributes or ()).index("safe")] = 5.0
    return Model(
        name="tiny-dialogue",
        family=built.family,
        network=network,  # pyright: ignore[reportArgumentType]
        tokenizer=built.tokenizer,
        image_spec=built.image_spec,
        device=torch.device("cpu"),
        dtype=torch.float32,
    )
