"""Florence-2 in the one training loop: the reference's loss, which falls, and frozen parts that stay."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import sightloop
from sightloop.data.datasets.synthetic import synthetic_world, write_synthetic_world
from sightloop.nn.prepack import unpack
from sightloop.training.build import build_model
from sightloop.training.config import DataSettings, ModelSettings
from sightloop.training.dataloader import BatchLoader, on_device
from sightloop.training.events import StepDone
from sightloop.training.grad_cache import GradCache
from sightloop.training.loss_context import LossContext
from sightloop.training.loss_terms import LOSS_TERMS
from sightloop.training.optimizer_config import OptimizerConfig
from sightloop.training.recipes import RECIPES
from sightloop.training.trainer import train
from tests.tiny_checkpoints.florence import write_florence


@pytest.fixture(scope="module")
def shard(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("world") / "train.tar"
    write_synthetic_world(path, synthetic_world("train", 24, seed=0))
    return path


def test_the_loss_is_the_references(tmp_path: Path, shard: Path) -> None:
    theirs = write_florence(tmp_path / "hub", seed=1)
    settings = DataSettings(batch=6, max_tokens=40, augment=None)
    recipe = replace(RECIPES["florence"], model=ModelSettings(init_from=str(tmp_path / "hub")), data=settings)
    dataset = sightloop.open_dataset(shard)
    trainee = build_model(recipe, dataset, tmp_path)
    feed = BatchLoader(
        dataset, settings, trainee.tokenizer, trainee.image_spec, 0, {}, prompts=trainee.prompts
    )
    (batch,) = feed.batches(0, 1)
    rows, network = batch.prompted, trainee.network.train()
    assert rows is not None
    found: list[torch.Tensor] = []
    for chunk in (0, 4):
        network.zero_grad()
        features = GradCache(chunk)
        moved, pixels = on_device(batch, trainee.image_spec, torch.device("cpu"))
        context = LossContext(network, None, trainee.heads, recipe, moved, pixels, {}, 0.0, features)
        LOSS_TERMS["prompted"](context)
        features.finish()
        found += [context.values["prompted"], network.projection.weight.grad.clone()]
    theirs.zero_grad()
    image_id, whole = network.config.image_id, torch.zeros(())
    count = int((rows.lengths - rows.prompt_lengths).sum())
    for ids, length, prompt, owner in zip(
        rows.ids, rows.lengths, rows.prompt_lengths, rows.image_rows, strict=True
    ):
        asked = [i for one in ids[:prompt].tolist() for i in [one] * (5 if one == image_id else 1)]
        labels = ids[None, prompt:length]
        assert (int(labels[0, 0]), int(labels[0, -1])) == (0, 2)  # <s> and </s>
        made: Any = theirs(input_ids=torch.tensor([asked]), pixel_values=pixels[owner][None], labels=labels)
        whole = whole + made.loss * labels.numel() / count
    whole.backward()
    wanted = theirs.model.multi_modal_projector.image_projection.weight.grad
    assert torch.allclose(found[0], whole.detach(), atol=1e-4)
    assert torch.allclose(found[2], found[0], atol=1e-5)
    for mine in (found[1], found[3]):
        assert (mine - wanted).abs().max() <= 1e-3 * float(wanted.abs().max())


def test_it_learns_and_frozen_parts_stay(tmp_path: Path, shard: Path) -> None:
    write_florence(tmp_path / "hub", seed=2)
    recipe = replace(
        RECIPES["florence"],
        model=ModelSettings(init_from=str(tmp_path / "hub"), frozen=("vision.*",)),
        data=DataSettings(batch=8, max_tokens=40, augment=None),
        optimizer=OptimizerConfig(lr=3e-3, clip_norm=1.0),
        epochs=0,
        steps=12,
    )
    losses = [
        event.loss
        for event in train(recipe, shard, tmp_path / "run", device="cpu")
        if isinstance(event, StepDone)
    ]
    assert sum(losses[-3:]) < 0.85 * sum(losses[:3])
    before, after = (
        sightloop.load(tmp_path / name, device="cpu").network for name in ("hub", Path("run") / "model")
    )
    for network in (before, after):
        unpack(network)
    learned = after.state_dict()
    for name, value in before.state_dict().items():
        stays = name.startswith("vision.") or name == "times"
        assert stays == torch.equal(value, learned[name]), name
