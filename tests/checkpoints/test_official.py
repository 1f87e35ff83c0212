"""The files that the publishers of each checkpoint wrote: same pixels, ids, decoding and outputs as the reference."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    AutoImageProcessor,
    AutoTokenizer,
    BlipForConditionalGeneration,
    BlipForImageTextRetrieval,
    BlipForQuestionAnswering,
    CLIPModel,
    SiglipModel,
)

import sightloop
from sightloop.data.images.preprocess import normalize
from tests.checkpoints.official_files import change_config, copy_files, tensor_shapes, write_weights

TEXTS = [
    "a dog",
    "señor, two cats &amp; a café",
    "what colour is the hat?",
    "犬の写真",
    "A photo of a small RED car.",
]
SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}


def images(count: int = 3) -> list[Image.Image]:
    """Images of odd sizes; noise over a gradient."""
    rng = np.random.default_rng(0)
    shapes = rng.integers(40, 500, (count, 2))
    ramps = [np.add.outer(np.linspace(0, 99, h), np.linspace(0, 99, w))[..., None] for h, w in shapes]
    return [
        Image.fromarray((ramp + rng.integers(0, 55, (*ramp.shape[:2], 3))).astype(np.uint8)) for ramp in ramps
    ]


def same_pixels(model: sightloop.Model, folder: Path) -> torch.Tensor:
    """The reference's pixel values, which are those of the model."""
    processor: Any = AutoImageProcessor.from_pretrained(folder, backend="pil")
    expected = processor(images(), return_tensors="pt")["pixel_values"]
    own = normalize(
        [p for p in model.read(images(), isolate=False) if not isinstance(p, Exception)], model.image_spec
    )
    assert (own - expected).abs().max() < 1e-5
    return expected


def same_ids(model: sightloop.Model, folder: Path, **options: Any) -> Any:
    """The reference's ids and mask, which are those of the model."""
    tokens = AutoTokenizer.from_pretrained(folder)(TEXTS, return_tensors="pt", truncation=True, **options)
    assert model.tokenizer.encode(TEXTS).ids.tolist() == tokens["input_ids"].tolist()
    return tokens


def test_clip_of_openai(tmp_path: Path) -> None:
    folder = copy_files("openai--clip-vit-large-patch14", tmp_path / "clip")
    text = {
        **SMALL,
        "hidden_size": 24,
        "intermediate_size": 48,
        "num_attention_heads": 3,
        "projection_dim": 24,
    }
    parts = {"vision": {**SMALL, "projection_dim": 24}, "text": text}
    change_config(folder, {"projection_dim": 24} | {f"{part}_config": sizes for part, sizes in parts.items()})
    change_config(folder, {f"{part}_config_dict": sizes for part, sizes in parts.items()})
    write_weights(
        folder, tensor_shapes("names_clip_L14_tf4.16"), {1024: 32, 4096: 64, 768: 24, 3072: 48}, layers=2
    )
    model = sightloop.load(folder, device="cpu")
    pixels, tokens = same_pixels(model, folder), same_ids(model, folder, padding=True)
    reference = CLIPModel.from_pretrained(folder).eval()
    with torch.inference_mode():
        expected = reference(pixel_values=pixels, **tokens)
    assert np.abs(model.embed_images(images()) - expected.image_embeds.numpy()).max() < 1e-5
    assert np.abs(model.embed_texts(TEXTS) - expected.text_embeds.numpy()).max() < 1e-5
    assert not model.decoding


def test_siglip_of_google(tmp_path: Path) -> None:
    folder = copy_files("google--siglip-base-patch16-256", tmp_path / "siglip")
    change_config(folder, {"vision_config": SMALL, "text_config": SMALL})
    shapes = tensor_shapes("names_siglip-base_tf4.37.2")
    shapes["vision_model.embeddings.position_embedding.weight"] = [256, 768]  # of 256 x 256 pixels
    write_weights(folder, shapes, {768: 32, 3072: 64, 2304: 96}, layers=2)
    model = sightloop.load(folder, device="cpu")
    pixels, tokens = same_pixels(model, folder), same_ids(model, folder, padding="max_length")
    reference = SiglipModel.from_pretrained(folder).eval()
    with torch.inference_mode():
        expected = reference(pixel_values=pixels, input_ids=tokens["input_ids"])
    assert np.abs(model.embed_images(images()) - expected.image_embeds.numpy()).max() < 1e-5
    assert np.abs(model.embed_texts(TEXTS) - expected.text_embeds.numpy()).max() < 1e-5
    probabilities = expected.logits_per_image.sigmoid().numpy()
    assert np.abs(model.classify(images(), TEXTS, templates="{}") - probabilities).max() < 1e-4


BLIPS = {
    "Salesforce--blip-image-captioning-base": BlipForConditionalGeneration,
    "Salesforce--blip-image-captioning-large--resaved-5.5.4": BlipForConditionalGeneration,
    "Salesforce--blip-vqa-base": BlipForQuestionAnswering,
    "Salesforce--blip-itm-base-coco": BlipForImageTextRetrieval,
}


BLIP_TIED = {
    "text_decoder.cls.predictions.decoder.weight": "text_decoder.bert.embeddings.word_embeddings.weight",
    "text_decoder.cls.predictions.decoder.bias": "text_decoder.cls.predictions.bias",
}


@pytest.mark.parametrize("name", BLIPS)
def test_blip_of_salesforce(tmp_path: Path, name: str) -> None:
    folder = copy_files(name, tmp_path / "blip")
    change_config(folder, {"vision_config": SMALL, "text_config": {**SMALL, "encoder_hidden_size": 32}})
    change_config(folder, {"image_text_hidden_size": 16})
    shapes = tensor_shapes("names_blip_tf4.26", BLIPS[name].__name__)
    write_weights(folder, shapes, {768: 32, 3072: 64, 2304: 96, 256: 16}, layers=2, tied=BLIP_TIED)
    model = sightloop.load(folder, device="cpu")
    pixels, tokens = same_pixels(model, folder), same_ids(model, folder, padding=True)
    reference: Any = BLIPS[name].from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    with torch.inference_mode():
        if name.endswith("coco"):
            expected = reference(
                pixel_values=pixels,
                input_ids=tokens["input_ids"][:3],
                attention_mask=tokens["attention_mask"][:3],
            )
            assert (
                np.abs(model.match(images(), TEXTS[:3]) - expected.itm_score.softmax(-1)[:, 1].numpy()).max()
                < 1e-5
            )
        elif "vqa" in name:
            question = tokenizer(TEXTS[:1], return_tensors="pt")  # alone: the reference's decoder reads padding too
            ids = reference.generate(pixel_values=pixels[:1], **question, max_new_tokens=8)
            expected = tokenizer.batch_decode(ids, skip_special_tokens=True)
            assert model.answer(images()[:1], TEXTS[:1], max_new_tokens=8) == [text.strip() for text in expected]
        else:
            ids = reference.generate(pixel_values=pixels, num_beams=3, max_new_tokens=8)
            expected = tokenizer.batch_decode(ids, skip_special_tokens=True)
            assert model.caption(images(), num_beams=3, max_new_tokens=8) == [
                text.strip() for text in expected
            ]
