"""What the objectives make of a batch, against slow loops."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from sightloop.training.config import ModelSettings

import sightloop
from sightloop.data.datasets.synthetic import world, write_world
from sightloop.training.build import prepare
from sightloop.training.dataloader import Feed, on_device
from sightloop.training.grad_cache import Features
from sightloop.training.loss_terms import TERMS, Context
from sightloop.training.recipes import RECIPES


@pytest.mark.parametrize("chunk", [0, 3])
def test_every_caption_of_a_picture_is_read(chunk: int, tmp_path: Path) -> None:
    """A row is a picture with one of its captions; what it must find is any row of the same picture."""
    shard = tmp_path / "train.tar"
    scenes = list(world("train", 8, seed=0))
    told = [replace(s, captions=(*s.captions[:1], *(f"{n} {s.captions[0]}" for n in "ab"))) for s in scenes]
    told[5] = replace(told[5], captions=told[2].captions)  # the same texts, which are then no negatives
    write_world(shard, told)
    world_ = RECIPES["world"]
    data = replace(world_.data, batch=8, texts=3, augment=None)
    recipe = replace(world_, data=data, model=ModelSettings(size="world", words=300))
    dataset = sightloop.open_dataset(shard)
    trainee = prepare(recipe, dataset, tmp_path)
    feed = Feed(dataset, data, trainee.tokenizer, trainee.image_spec, 0, {})
    (batch,) = feed.batches(0, 1)
    moved, pixels = on_device(batch, trainee.image_spec, torch.device("cpu"))
    network, features = trainee.network.eval(), Features(chunk)
    context = Context(network, None, trainee.heads, recipe, moved, pixels, {}, 0.0, features)
    TERMS["itc"](context)

    texts = batch.captions
    assert texts is not None
    assert len(texts.ids) == 24
    with torch.no_grad():
        image = network.embed_image(network.encode_image(pixels))
        text = network.embed_text(texts.read, texts.lengths)
        owner = [int(p) for p in texts.pictures for _ in range(3)]
        said = [tuple(ids[:n].tolist()) for ids, n in zip(texts.ids, texts.lengths, strict=True)]
        whole = 0.0
        for row in range(24):
            mine = [
                other for other in range(24) if batch.identities[owner[other]] == batch.identities[owner[row]]
            ]
            for here, there in ((image[owner[row]], text), (text[row], image[owner])):
                likely = (there @ here / network.temperature).log_softmax(0)
                whole -= float(likely[mine].mean()) / 48
    assert len(set(said)) == 21
    assert float(context.values["itc"]) == pytest.approx(whole, abs=1e-4)
