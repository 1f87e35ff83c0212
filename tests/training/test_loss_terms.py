"""What the objectives make of a batch, against slow loops."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import sightloop
from sightloop.data.datasets.synthetic import synthetic_world, write_synthetic_world
from sightloop.training.build import build_model
from sightloop.training.config import ModelSettings
from sightloop.training.dataloader import BatchLoader, on_device
from sightloop.training.grad_cache import GradCache
from sightloop.training.loss_context import LossContext
from sightloop.training.loss_terms import LOSS_TERMS
from sightloop.training.recipes import RECIPES


@pytest.mark.parametrize("chunk", [0, 3])
def test_every_caption_of_an_image_is_used(chunk: int, tmp_path: Path) -> None:
    """A row is an image with one of its captions; its positives are its captions, and equal ones of other images."""
    shard = tmp_path / "train.tar"
    scenes = list(synthetic_world("train", 8, seed=0))
    told = [replace(s, captions=(*s.captions[:1], *(f"{n} {s.captions[0]}" for n in "ab"))) for s in scenes]
    told[5] = replace(told[5], captions=told[2].captions)  # the same texts, so no negatives
    write_synthetic_world(shard, told)
    world_ = RECIPES["world"]
    data = replace(world_.data, batch=8, texts=3, augment=None)
    recipe = replace(world_, data=data, model=ModelSettings(size="world", vocab_size=300))
    dataset = sightloop.open_dataset(shard)
    trainee = build_model(recipe, dataset, tmp_path)
    feed = BatchLoader(dataset, data, trainee.tokenizer, trainee.image_spec, 0, {})
    (batch,) = feed.batches(0, 1)
    twins = {dataset.key(2), dataset.key(5)}
    moved, pixels = on_device(batch, trainee.image_spec, torch.device("cpu"))
    network, features = trainee.network.eval(), GradCache(chunk)
    context = LossContext(network, None, trainee.heads, recipe, moved, pixels, {}, 0.0, features)
    LOSS_TERMS["itc"](context)

    texts = batch.captions
    assert texts is not None
    assert len(texts.ids) == 24
    with torch.no_grad():
        image = network.embed_image(network.encode_image(pixels))
        text = network.embed_text(texts.input_ids, texts.lengths)
        owner = [int(p) for p in texts.image_rows for _ in range(3)]
        said = [tuple(ids[:n].tolist()) for ids, n in zip(texts.ids, texts.lengths, strict=True)]
        whole = 0.0
        for row in range(24):
            mine = [
                other
                for other in range(24)
                if batch.sample_indices[owner[other]] == batch.sample_indices[owner[row]]
                or {batch.keys[owner[other]], batch.keys[owner[row]]} == twins
            ]
            for here, there in ((image[owner[row]], text), (text[row], image[owner])):
                likely = (there @ here / network.temperature).log_softmax(0)
                whole -= float(likely[mine].mean()) / 48
    assert len(set(said)) == 21
    assert float(context.values["itc"]) == pytest.approx(whole, abs=1e-4)


def test_equal_captions_of_different_images_are_no_negatives(tmp_path: Path) -> None:
    """ITM judges no true pair as false, and ITC has no true pair among its negatives, also behind a queue."""
    for index in range(12):
        Image.fromarray(np.full((64, 64, 3), index * 20, np.uint8)).save(tmp_path / f"{index:02}.png")
        own = f"number {index}" if index % 3 else f"A  shade of gray, {index % 2}"
        (tmp_path / f"{index:02}.json").write_text(
            json.dumps({"captions": [own, f"a shade of gray, {index % 2}"]})
        )
    world = RECIPES["world"]
    data = replace(world.data, batch=12, texts=1, augment=None)
    recipe = replace(world, data=data, model=ModelSettings(size="world", vocab_size=300), hard_negatives=1.0)
    dataset = sightloop.open_dataset(tmp_path)
    trainee = build_model(recipe, dataset, tmp_path)
    feed = BatchLoader(dataset, data, trainee.tokenizer, trainee.image_spec, 0, {})
    (batch,) = feed.batches(0, 1)
    moved, pixels = on_device(batch, trainee.image_spec, torch.device("cpu"))
    network = trainee.network.eval()
    context = LossContext(network, None, trainee.heads, recipe, moved, pixels, {}, 0.0, GradCache(0))
    assert batch.captions is not None
    tokens = [
        tuple(ids[:n].tolist()) for ids, n in zip(batch.captions.ids, batch.captions.lengths, strict=True)
    ]
    samples = [dataset[int(i)] for i in batch.sample_indices]
    drawn = [
        next(text for text in sample.captions if tuple(trainee.tokenizer.encode([text]).ids[0]) == ids)
        for sample, ids in zip(samples, tokens, strict=True)
    ]
    said = [" ".join(text.lower().split()) for text in drawn]
    known = [{" ".join(text.lower().split()) for text in sample.captions} for sample in samples]
    expected = torch.tensor([[text in captions for text in said] for captions in known])
    rows = torch.arange(12)
    assert expected.sum() > 12
    assert torch.equal(context.positives.of_images(rows), expected)
    assert torch.equal(context.positives.of_texts(rows), expected.T)
    judged: list[tuple[int, int, int]] = []
    match_logits = network.match_logits

    def spy(encoded: Any, ids: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        images = encoded.tokens.repeat_interleave(len(ids) // len(encoded.tokens), 0)
        for image, row, length in zip(images, ids, lengths, strict=True):
            at = next(i for i in range(12) if torch.equal(image, context.tokens[i]))
            judged.append((at, tokens.index(tuple(row[:length].tolist())), len(judged)))
        return match_logits(encoded, ids, lengths)

    network.match_logits = spy
    LOSS_TERMS["itm"](context)
    false = [(i, t) for i, t, n in judged if not (n < 24 and n % 2 == 0)]
    assert len(false) == 24
    assert not any(expected[i, t] for i, t in false)
