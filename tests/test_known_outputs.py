"""Published outputs of the official checkpoints, for machines that have them in the hub cache; skipped elsewhere."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import sightloop


@pytest.fixture
def known(shared_data: Path) -> Path:
    return shared_data / "known_images"


def official(name: str) -> sightloop.Model:
    try:
        return sightloop.load(name, device="cpu")
    except sightloop.CheckpointError as error:
        pytest.skip(f"the official checkpoint is not on this machine: {error}")


def test_clip_readme_of_openai(known: Path) -> None:
    model = official("openai/clip-vit-base-patch32")
    # Published with the alpha channel dropped, which leaves black where the drawing is transparent.
    with Image.open(known / "CLIP.png") as opened:
        drawing = opened.convert("RGB")
    got = model.classify(drawing, ["a diagram", "a dog", "a cat"], templates="{}")
    assert np.abs(got[0] - [0.9927937, 0.0042107, 0.0029957]).max() < 1e-4


def test_clip_cats_logits(known: Path) -> None:
    model = official("openai/clip-vit-base-patch32")
    cosines = model.similarity(known / "000000039769.png", ["a photo of a cat", "a photo of a dog"])
    logits = cosines[0] * math.exp(float(model.network.logit_scale))
    assert np.abs(logits - [24.5701, 19.3049]).max() < 1e-3


def test_blip_merlion_caption(known: Path) -> None:
    model = official("Salesforce/blip-image-captioning-base")
    caption = model.caption(known / "merlion.png", num_beams=3, min_new_tokens=5)[0]
    assert caption == "a large fountain spewing water into the air"
