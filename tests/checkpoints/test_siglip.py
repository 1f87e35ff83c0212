"""SigLIP, SigLIP 2 and NaFlex against the reference: same weights, images and texts give the same numbers."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModel, AutoTokenizer
from transformers.models.siglip2.image_processing_pil_siglip2 import Siglip2ImageProcessorPil

import sightloop
from sightloop.data.images.preprocess import normalize, preprocess
from sightloop.data.images.processor_config import spec_from_transformers, spec_to_transformers
from sightloop.errors import CheckpointError, UsageError
from sightloop.models import siglip
from sightloop.nn.init import initialize
from sightloop.objectives.contrastive import siglip_loss
from sightloop.training.model_sizes import SIZES
from tests.checkpoints.test_against_reference import TEXTS, pictures
from tests.tiny_checkpoints.clip_and_blip import write_clip
from tests.tiny_checkpoints.siglip import gemma_tokenizer, write_siglip

SHAPES: list[dict[str, Any]] = [
    {},
    {"vision": {"image_size": 41, "patch_size": 10, "num_hidden_layers": 3, "layer_norm_eps": 1e-3}},
    {
        "vision": {"hidden_act": "gelu", "hidden_size": 48, "num_attention_heads": 6},
        "text": {"projection_size": 48},
    },
    {"text": {"max_position_embeddings": 9, "num_attention_heads": 4, "num_hidden_layers": 1}},
    {"tokenizer": gemma_tokenizer(padding_side="left", add_bos_token=True, add_eos_token=False)},
    {"kind": "naflex"},
    {"kind": "naflex", "vision": {"num_patches": 25, "patch_size": 4, "num_hidden_layers": 3}, "most": 60},
]


def reference_inputs(reference: Any, images: list[Any], texts: list[str]) -> dict[str, Any]:
    length = reference.config.text_config.max_position_embeddings
    ids = reference.reference_tokenizer(
        texts, padding="max_length", max_length=length, truncation=True, return_tensors="pt"
    )["input_ids"]
    return {"input_ids": ids, **reference.reference_processor(images, return_tensors="pt")}


@pytest.mark.filterwarnings("ignore:.*were cut:UserWarning")
@pytest.mark.parametrize("shape", range(len(SHAPES)))
def test_as_the_reference(tmp_path: Path, shape: int) -> None:
    reference = write_siglip(tmp_path / "siglip", seed=shape, **SHAPES[shape])
    model = sightloop.load(tmp_path / "siglip", device="cpu")
    images = pictures(9, seed=shape)
    inputs = reference_inputs(reference, images, TEXTS)
    assert np.array_equal(model.tokenizer.encode(TEXTS).ids, inputs["input_ids"])
    with torch.inference_mode():
        wanted = reference(**inputs)
    assert np.abs(model.embed_images(images) - wanted.image_embeds.numpy()).max() < 1e-5
    assert np.abs(model.embed_texts(TEXTS) - wanted.text_embeds.numpy()).max() < 1e-5
    assert np.abs(model.embed_texts(TEXTS[1]) - wanted.text_embeds[1].numpy()).max() < 1e-5
    logits = wanted.logits_per_image
    found = model.classify(images, TEXTS, templates="{}")
    assert np.abs(found - logits.sigmoid().numpy()).max() < 1e-5
    with torch.inference_mode():
        rows = model.network.class_logits(torch.from_numpy(model.similarity(images, TEXTS)))
    assert np.abs((rows - logits).numpy()).max() < 1e-4


def test_readings(tmp_path: Path) -> None:
    reference = write_siglip(tmp_path / "siglip")
    model = sightloop.load(tmp_path / "siglip", device="cpu")
    images = pictures(3)
    with torch.inference_mode():
        logits = reference(**reference_inputs(reference, images, TEXTS)).logits_per_image
    usual, chosen = (model.classify(images, TEXTS, "{}", **how) for how in ({}, {"activation": "softmax"}))
    assert (usual.activation, chosen.activation, usual[:2].activation) == ("sigmoid", "softmax", "sigmoid")
    assert np.abs(chosen - logits.softmax(dim=-1).numpy()).max() < 1e-5
    assert np.abs(usual - logits.sigmoid().numpy()).max() < 1e-5
    write_clip(tmp_path / "clip")
    clip = sightloop.load(tmp_path / "clip", device="cpu")
    assert clip.classify(images, TEXTS).activation == "softmax"
    with pytest.raises(UsageError, match="trained to choose"):
        clip.classify(images, TEXTS, activation="sigmoid")
    with pytest.raises(UsageError, match="must be"):
        model.classify(images, TEXTS, activation="raw")  # pyright: ignore[reportArgumentType]


def patches(picture: np.ndarray[Any, Any], side: int) -> np.ndarray[Any, Any]:
    """NaFlex's pixels as the reference hands them to its network: [3, H, W] -> [N, side * side * 3]."""
    _, height, width = picture.shape
    rows = [
        picture[:, y : y + side, x : x + side].transpose(1, 2, 0).ravel()
        for y in range(0, height, side)
        for x in range(0, width, side)
    ]
    return np.stack(rows)


@pytest.mark.parametrize(("side", "most"), [(16, 256), (8, 16), (5, 7), (4, 1)])
def test_naflex_pixels(side: int, most: int) -> None:
    images = [*pictures(12, seed=side), Image.new("RGB", (3000, 2), "red"), Image.new("RGB", (1, 1), "blue")]
    processor = Siglip2ImageProcessorPil(patch_size=side, max_num_patches=most)
    spec = spec_from_transformers(processor.to_dict())
    assert spec_from_transformers(spec_to_transformers(spec, "SiglipImageProcessor")) == spec
    for image in images:
        wanted = processor([image], return_tensors="np")
        height, width = wanted["spatial_shapes"][0]
        picture = normalize([preprocess(image, spec)], spec)[0].numpy()
        assert picture.shape == (3, height * side, width * side)
        assert np.array_equal(patches(picture, side), wanted["pixel_values"][0, : height * width])
        assert wanted["pixel_attention_mask"][0].sum() == height * width <= most


@pytest.mark.parametrize("kind", ["fixed", "naflex"])
def test_saved_and_read_back(tmp_path: Path, kind: Any) -> None:
    reference = write_siglip(tmp_path / "siglip", kind=kind)
    model = sightloop.load(tmp_path / "siglip", device="cpu")
    images = pictures(4, seed=7)
    model.save(tmp_path / "ours")
    model.save(tmp_path / "theirs", layout="transformers")
    for folder in ("ours", "theirs"):
        again = sightloop.load(tmp_path / folder, device="cpu")
        assert again.image_spec == model.image_spec
        assert np.array_equal(again.embed_images(images), model.embed_images(images))
        assert np.array_equal(again.embed_texts(TEXTS), model.embed_texts(TEXTS))
    theirs = AutoModel.from_pretrained(tmp_path / "theirs").eval()
    assert type(theirs) is type(reference)
    for name, value in reference.state_dict().items():
        assert torch.equal(theirs.state_dict()[name], value), name
    theirs.reference_processor = AutoImageProcessor.from_pretrained(tmp_path / "theirs")
    theirs.reference_tokenizer = AutoTokenizer.from_pretrained(tmp_path / "theirs")
    wanted, found = (reference_inputs(m, images, TEXTS) for m in (reference, theirs))
    assert all(torch.equal(wanted[name], found[name]) for name in wanted)


def test_sizes_that_do_not_fit_are_named(tmp_path: Path) -> None:
    write_siglip(tmp_path / "siglip", kind="naflex")
    config = tmp_path / "siglip" / "preprocessor_config.json"
    config.write_text(config.read_text().replace('"patch_size": 8', '"patch_size": 16'))
    with pytest.raises(CheckpointError, match="patches of another"):
        sightloop.load(tmp_path / "siglip", device="cpu")


def test_learns() -> None:
    """Twelve pairs, learned by heart: the loss ends well below that of knowing only how many pairs of a batch fit."""
    torch.manual_seed(0)
    contrast = torch.rand(12, 3, 1, 1)
    pixels = torch.rand(12, 3, 64, 64) * contrast * 2 - 0.5 + 0.5 * torch.randn(12, 3, 1, 1)
    ids = torch.nn.functional.pad(torch.randint(5, 99, (12, 8)), (0, 4))
    config = cast(siglip.SiglipConfig, SIZES["world-siglip"][1])
    net = siglip.Siglip(replace(config, text=replace(config.text, vocab=99, positions=12)))
    initialize(net, 0)
    net.logit_bias.data.fill_(-math.log(12))
    optimizer = torch.optim.AdamW(net.parameters(), betas=(0.9, 0.95), weight_decay=1e-4)
    losses: list[float] = []
    for step in range(60):
        optimizer.param_groups[0]["lr"] = 5e-4 * min(1, (step + 1) / 10)
        image, text = net.embed_image(net.encode_image(pixels)), net.embed_text(ids, torch.full((12,), 12))
        loss = siglip_loss(image, text, net.logit_scale.exp(), net.logit_bias).value
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    blind = math.log(12) + 11 * math.log(12 / 11)
    assert losses[-1] < 0.7 * blind < losses[0]
