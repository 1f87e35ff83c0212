"""Same weights, same images, same texts as the reference implementation: same numbers, same words."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import sightloop
from tests.tiny_checkpoints.clip_and_blip import write_blip, write_clip

TEXTS = [
    "a dog",
    "two cats on the street, standing",
    "what colour is the hat?",
    "a",
    "a photo of a small red car",
]


def pictures(count: int, seed: int = 0) -> list[Image.Image]:
    """Images of odd sizes; noise over a gradient, so that crops and resizes matter."""
    rng = np.random.default_rng(seed)
    out = []
    for _ in range(count):
        height, width = rng.integers(9, 90, size=2)
        ramp = np.linspace(0, 200, width)[None, :, None] * np.linspace(0, 1, height)[:, None, None]
        out.append(Image.fromarray((ramp + rng.integers(0, 55, (height, width, 3))).astype(np.uint8)))
    return out


def reference_inputs(model: Any, images: list[Image.Image], texts: list[str]) -> dict[str, torch.Tensor]:
    """What the reference's own processors make of images and texts."""
    tokens = model.reference_tokenizer(texts, padding=True, return_tensors="pt")
    pixels = model.reference_processor(images, return_tensors="pt")["pixel_values"]
    return {
        "pixel_values": pixels,
        "input_ids": tokens["input_ids"],
        "attention_mask": tokens["attention_mask"],
    }


CLIP_SHAPES: list[dict[str, Any]] = [
    {},
    {"vision": {"hidden_act": "gelu"}, "text": {"hidden_act": "gelu"}, "projection_dim": 7},
    {"vision": {"image_size": 40, "patch_size": 16, "num_hidden_layers": 3, "layer_norm_eps": 1e-3}},
    {
        "text": {
            "num_hidden_layers": 1,
            "hidden_size": 16,
            "num_attention_heads": 1,
            "max_position_embeddings": 60,
        }
    },
    {
        "vision": {"hidden_size": 48, "num_attention_heads": 6, "intermediate_size": 50},
        "text": {"eos_token_id": 2},
    },
]


@pytest.mark.parametrize("shape", range(len(CLIP_SHAPES)))
def test_clip(tmp_path: Path, shape: int) -> None:
    reference = write_clip(tmp_path / "clip", seed=shape, **CLIP_SHAPES[shape])
    model = sightloop.load(tmp_path / "clip", device="cpu")
    images = pictures(9, seed=shape)
    with torch.inference_mode():
        wanted = reference(**reference_inputs(reference, images, TEXTS))
    assert np.abs(model.embed_images(images) - wanted.image_embeds.numpy()).max() < 1e-5
    assert np.abs(model.embed_texts(TEXTS) - wanted.text_embeds.numpy()).max() < 1e-5
    similarity = wanted.image_embeds @ wanted.text_embeds.T
    assert np.abs(model.similarity(images, TEXTS) - similarity.numpy()).max() < 1e-5
    probabilities = wanted.logits_per_image.softmax(dim=-1).numpy()
    assert np.abs(model.classify(images, TEXTS, templates="{}") - probabilities).max() < 1e-5


BLIP_SHAPES: list[dict[str, Any]] = [
    {},
    {
        "vision": {"image_size": 48, "patch_size": 16, "num_hidden_layers": 3},
        "text": {"num_attention_heads": 2},
    },
    {"text": {"intermediate_size": 30, "num_hidden_layers": 1, "tie_word_embeddings": True}},
]


@pytest.mark.parametrize(
    "shape", [*BLIP_SHAPES, {"vision": {"hidden_size": 48}, "image_text_hidden_size": 9}]
)
def test_blip_matching(tmp_path: Path, shape: dict[str, Any]) -> None:
    reference = write_blip(tmp_path / "blip", head="match", **shape)
    model = sightloop.load(tmp_path / "blip", device="cpu")
    images = pictures(5)
    inputs = reference_inputs(reference, images, TEXTS)
    with torch.inference_mode():
        pairs = reference(**inputs).itm_score.softmax(dim=-1)[:, 1].numpy()
        similarity = reference(**inputs, use_itm_head=False).itm_score.numpy()
        grid = torch.stack(
            [
                reference(**{**inputs, "pixel_values": one[None].expand(5, -1, -1, -1)}).itm_score
                for one in inputs["pixel_values"]
            ]
        )
    assert np.abs(model.match(images, TEXTS) - pairs).max() < 1e-5
    assert np.abs(model.similarity(images, TEXTS) - similarity).max() < 1e-5
    one_picture = grid[2].softmax(dim=-1)[:, 1].numpy()
    assert np.abs(model.match(images[2], TEXTS) - one_picture).max() < 1e-5
    assert np.abs(model.match(images, TEXTS[1]) - grid[:, 1].softmax(dim=-1)[:, 1].numpy()).max() < 1e-5
    # Every pair at once, in an order in which each image comes back again and again.
    everything = model.match([*images] * 5, [text for text in TEXTS for _ in images])
    assert np.abs(everything - grid.softmax(dim=-1)[:, :, 1].T.reshape(-1).numpy()).max() < 1e-5

    k = 3
    scores = np.full((5, 5), -100.0)
    for i, row in enumerate(similarity):
        for j in np.argsort(-row)[:k]:
            scores[i, j] = grid[i, j, 1] + row[j]
    assert np.abs(model.rank(images, TEXTS, k=k) - scores).max() < 1e-5


DECODING: list[dict[str, Any]] = [
    {},
    {"max_new_tokens": 1},
    {"max_new_tokens": 15, "min_new_tokens": 12},
    {"repetition_penalty": 1.7, "max_new_tokens": 12},
    {"num_beams": 2, "length_penalty": 0.0},
    {"num_beams": 3, "max_new_tokens": 10},
    {"num_beams": 3, "length_penalty": -1.5, "min_new_tokens": 4},
    {"num_beams": 5, "length_penalty": 2.0, "repetition_penalty": 1.3},
    {"num_beams": 5, "num_return": 3, "max_new_tokens": 7},
]


@pytest.mark.parametrize("shape", BLIP_SHAPES)
def test_blip_captions(tmp_path: Path, shape: dict[str, Any]) -> None:
    reference = write_blip(tmp_path / "blip", head="caption", seed=3, **shape)
    model = sightloop.load(tmp_path / "blip", device="cpu")
    images = pictures(11, seed=5)
    prompts = [None, "a photo of", "the small red"]
    for options in DECODING:
        for prompt in prompts:
            inputs = reference_inputs(reference, images, [prompt or ""] * len(images))
            if prompt is None:
                del inputs["input_ids"], inputs["attention_mask"]
            asked = {"max_new_tokens": 20, **options}
            returned = asked.pop("num_return", 1)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # what the reference says of its own settings
                ids = reference.generate(**inputs, **asked, num_return_sequences=returned, do_sample=False)
            wanted = [text.strip() for text in reference.reference_tokenizer.batch_decode(ids, True)]
            assert model.caption(images, prompt, **options) == wanted, (options, prompt)
            alone = model.caption(images[4], prompt, **options)
            assert alone == wanted[4 * returned : 5 * returned], (options, prompt)


@pytest.mark.parametrize("shape", BLIP_SHAPES)
def test_blip_answers(tmp_path: Path, shape: dict[str, Any]) -> None:
    reference = write_blip(tmp_path / "blip", head="answer", seed=4, **shape)
    model = sightloop.load(tmp_path / "blip", device="cpu")
    images = pictures(5, seed=6)
    for options in DECODING:
        wanted: list[str] = []
        asked = {"max_new_tokens": 20, **options}
        returned = asked.pop("num_return", 1)
        for image, text in zip(images, TEXTS, strict=True):
            inputs = reference_inputs(reference, [image], [text])
            ids = reference.generate(**inputs, **asked, num_return_sequences=returned, do_sample=False)
            wanted += [t.strip() for t in reference.reference_tokenizer.batch_decode(ids, True)]
        assert model.answer(images, TEXTS, **options) == wanted, options


def test_blip_answers_among_candidates(tmp_path: Path) -> None:
    """Against the ranking of the BLIP paper, written out one candidate at a time over the reference's decoder."""
    reference = write_blip(tmp_path / "blip", head="answer", seed=8)
    model = sightloop.load(tmp_path / "blip", device="cpu")
    images, top = pictures(5, seed=9), 4
    candidates = [
        "dog",
        "a red car",
        "two",
        "the cat",
        "white",
        "a red ball",
        "standing on the street",
        "two dogs",
    ]
    start = reference.config.text_config.bos_token_id
    wanted = []
    for image, text in zip(images, TEXTS, strict=True):
        inputs = reference_inputs(reference, [image], [text])
        scores = {}
        for candidate in candidates:
            ids = reference.reference_tokenizer(candidate, return_tensors="pt").input_ids
            ids[:, 0] = start
            with torch.inference_mode():
                # The decoder's logits, over the states of the question.
                seen = reference.vision_model(inputs["pixel_values"]).last_hidden_state
                question = reference.text_encoder(
                    inputs["input_ids"], attention_mask=inputs["attention_mask"], encoder_hidden_states=seen
                ).last_hidden_state
                logits = reference.text_decoder(ids, encoder_hidden_states=question).logits.log_softmax(
                    dim=-1
                )
            steps = logits[0, :-1].gather(1, ids[0, 1:, None]).squeeze(1)
            scores[candidate] = (float(steps[0]), float(steps.sum()))
        best = sorted(candidates, key=lambda c: -scores[c][0])[:top]
        wanted.append(max(best, key=lambda c: scores[c][1]))
    assert model.answer(images, TEXTS, candidates, top_candidates=top) == wanted


def test_templates_are_averaged_in_embedding_space(tmp_path: Path) -> None:
    reference = write_clip(tmp_path / "clip")
    model = sightloop.load(tmp_path / "clip", device="cpu")
    labels, templates = ["dog", "red car", "cat"], ["a photo of a {}.", "the {}", "{} on the street, a {}"]
    embedded = torch.from_numpy(
        np.stack([model.embed_texts([t.replace("{}", label) for t in templates]) for label in labels])
    )
    classes = torch.nn.functional.normalize(embedded.mean(dim=1), dim=-1)
    images = pictures(3)
    logits = reference.logit_scale.exp() * torch.from_numpy(model.embed_images(images)) @ classes.T
    wanted = logits.softmax(dim=-1).detach().numpy()
    got = model.classify(images, labels, templates)
    assert np.abs(got - wanted).max() < 1e-5
    assert np.abs(got.sum(axis=1) - 1).max() < 1e-6
