"""A tiny painter with random weights, whose drawings depend on text and noise."""

from __future__ import annotations

from pathlib import Path

import torch

from sightloop.data.text.load import load_tokenizer_of_kind
from sightloop.data.text.train_tokenizer import train_wordpiece
from sightloop.inference.model import Model
from sightloop.models.painter import Painter, PainterConfig
from sightloop.nn.init import initialize
from sightloop.towers.dit import DitConfig
from sightloop.towers.text import TextConfig
from sightloop.types import ImageSpec

TEXTS = ("a red circle", "two blue squares above a green star", "three white rings")


def painter_model(folder: Path, seed: int = 0) -> Model:
    """A painter of 16 pixels. folder: for its vocabulary."""
    folder.mkdir(parents=True, exist_ok=True)
    train_wordpiece(iter(TEXTS * 8), 200, folder / "vocab.txt")
    tokenizer = load_tokenizer_of_kind(folder, "bert", max_length=24)
    text = TextConfig(
        vocab=tokenizer.vocab_size,
        positions=24,
        dim=16,
        layers=1,
        heads=2,
        mlp_dim=32,
        activation="gelu",
        eps=1e-6,
        post_norm=False,
    )
    vision = DitConfig(16, 4, 3, dim=32, layers=2, heads=2, mlp_dim=64, memory_dim=16)
    network = Painter(PainterConfig(vision, text, steps=3))
    initialize(network, seed)
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in network.named_parameters():
            if name.startswith(("vision.modulations", "vision.last")):  # zero at the start of training
                weight.copy_(0.2 * torch.randn(weight.shape, generator=random))
            elif name.startswith("text.word"):
                weight.mul_(20)
    return Model(
        name="tiny-painter",
        family="painter",
        network=network.eval(),
        tokenizer=tokenizer,
        image_spec=ImageSpec(resize=(16, 16), mean=(0.5,) * 3, std=(0.5,) * 3),
        device=torch.device("cpu"),
        dtype=torch.float32,
    )
