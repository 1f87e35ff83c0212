"""nano's recipes: what ships is the network that was trained."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from sightread.data.world import world, write_world
from sightread.errors import UsageError
from sightread.models.blip import Blip
from sightread.models.sizes import SIZES
from sightread.nn.initial import initialise
from sightread.pipelines.train import train
from tests.rules import REPOSITORY


def test_fixed_norms_compute_what_batch_norms_did() -> None:
    fixed: Any = runpy.run_path(str(REPOSITORY / "recipes" / "nano" / "pack.py"))["fixed"]
    config: Any = SIZES["blip-nano"][1]
    network = Blip(config)
    initialise(network, 0)
    pixels = torch.randn(4, 3, config.vision.image_size, config.vision.image_size)
    with torch.no_grad():
        for _ in range(3):
            network.train().encode_image(
                pixels + 1
            )  # statistics far from the mean 0, deviation 1 of the start
        wanted = network.eval().encode_image(pixels).tokens
        shipped = fixed(network)
        found = shipped.encode_image(pixels).tokens
    assert not any(isinstance(part, nn.BatchNorm2d) for part in shipped.modules())
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


def test_chunks_are_refused_where_batch_norm_would_see_them(tmp_path: Path) -> None:
    write_world(tmp_path / "train.tar", world("train", 8, seed=0))
    with pytest.raises(UsageError, match=r"data\.chunk: blip-nano has batch norm"):
        list(
            train(
                "nano",
                str(tmp_path / "train.tar"),
                tmp_path / "out",
                settings=["data.chunk=2", "data.batch=4", "model.words=300"],
                device="cpu",
            )
        )
