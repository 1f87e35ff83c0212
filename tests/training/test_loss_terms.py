"""What the objectives make of a batch, against slow loops."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

import sightloop
from sightloop.data.datasets.synthetic import synthetic_world, write_synthetic_world
from sightloop.training.build import build_model
from sightloop.training.config import ModelSettings
from sightloop.training.dataloader import BatchLoader, on_device
from sightloop.training.grad_cache import GradCache
from sightloop.training.loss_terms import LOSS_TERMS, LossContext
from sightloop.training.recipes import RECIPES


@pytest.mark.parametrize("chunk", [0, 3])
def test_every_caption_of_an_image_is_used(chunk: int, tmp_path: Path) -> None:
    """A row is an image with one of its captions; what it must find is any row of the same image."""
    shard = tmp_path / "train.tar"
    scenes = list(synthetic_world("train", 8, seed=0))
    told = [replace(s, captions=(*s.captions[:1], *(f"{n} {s.captions[0]}" for n in "ab"))) for s in scenes]
    told[5] = replace(told[5], captions=told[2].captions)  # the same texts, which are then no negatives
    write_synthetic_world(shard, told)
    world_ = RECIPES["world"]
    data = replace(world_.data, batch=8, texts=3, augment=None)
    recipe = replace(world_, data=data, model=ModelSettings(size="world", vocab_size=300))
    dataset = sightloop.open_dataset(shard)
    trainee = build_model(recipe, dataset, tmp_path)
    feed = BatchLoader(dataset, data, trainee.tokenizer, trainee.image_spec, 0, {})
    (batch,) = feed.batches(0, 1)
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
            ]
            for here, there in ((image[owner[row]], text), (text[row], image[owner])):
                likely = (there @ here / network.temperature).log_softmax(0)
                whole -= float(likely[mine].mean()) / 48
    assert len(set(said)) == 21
    assert float(context.values["itc"]) == pytest.approx(whole, abs=1e-4)
