"""Training is exact: losses and gradients of every weight are those of the reference, for the same batch."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sightloop
from sightloop.checkpoints.key_map import export_state_dict
from sightloop.checkpoints.registry import FAMILIES
from sightloop.nn.prepack import unpack
from sightloop.nn.regularization import set_activation_checkpointing
from sightloop.objectives.contrastive import clip_loss
from sightloop.objectives.language import lm_loss, next_token_targets
from tests.tiny_checkpoints.clip_and_blip import write_blip, write_clip


def trainable(folder: Path) -> tuple[Any, str]:
    """The network of a checkpoint as a training has it."""
    model = sightloop.load(folder, device="cpu")
    unpack(model.network)
    return model.network.requires_grad_(True).train(), model.family


def gradients(network: nn.Module, family: str) -> dict[str, Tensor]:
    """The gradient of every tensor by its name in the reference."""
    shapes = copy.deepcopy(network)
    for parameter, ours in zip(shapes.parameters(), network.parameters(), strict=True):
        parameter.data = torch.zeros_like(ours) if ours.grad is None else ours.grad
    return export_state_dict(shapes, FAMILIES[family].layouts["transformers"].keys)


def check(ours: dict[str, Tensor], reference: nn.Module) -> None:
    theirs = {
        name: p.grad for name, p in reference.named_parameters(remove_duplicate=False) if p.grad is not None
    }
    tied = {"text_decoder.cls.predictions.decoder.weight"}  # the word embedding's
    assert theirs.keys() - tied <= ours.keys()
    for name, value in ours.items():
        wanted = theirs.get(name, torch.zeros_like(value))
        # The absolute part is for the biases of keys, whose true gradient is zero.
        assert float((value - wanted).abs().max()) <= 2e-5 * float(wanted.abs().max()) + 2e-6, name


@pytest.mark.parametrize("recompute", [False, True])
def test_clip(tmp_path: Path, recompute: bool) -> None:
    reference = write_clip(tmp_path).train()
    network, family = trainable(tmp_path)
    set_activation_checkpointing(network, recompute)
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randn(5, 3, 32, 32, generator=generator)
    end = network.config.end_id
    ids = torch.randint(0, end - 1, (5, 9), generator=generator)
    lengths = torch.tensor([9, 4, 6, 3, 8])
    for row, length in enumerate(lengths.tolist()):
        ids[row, length - 1 :] = end
    mask = (torch.arange(9) < lengths[:, None]).long()

    theirs = reference(pixel_values=pixels, input_ids=ids, attention_mask=mask, return_loss=True).loss
    theirs.backward()
    image, text = network.embed_image(network.encode_image(pixels)), network.embed_text(ids, lengths)
    loss = clip_loss(image, text, network.logit_scale.exp()).value
    loss.backward()
    assert torch.allclose(loss, theirs, rtol=1e-5)
    check(gradients(network, family), reference)


@pytest.mark.parametrize("recompute", [False, True])
def test_blips_captioner(tmp_path: Path, recompute: bool) -> None:
    reference = write_blip(tmp_path).train()
    network, family = trainable(tmp_path)
    set_activation_checkpointing(network, recompute)
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randn(3, 3, 32, 32, generator=generator)
    ids, lengths = torch.randint(5, 60, (3, 8), generator=generator), torch.tensor([8, 3, 5])
    ids[:, 0] = network.config.start_id
    mask = (torch.arange(8) < lengths[:, None]).long()

    labels = ids.masked_fill(mask == 0, -100)
    theirs = reference(pixel_values=pixels, input_ids=ids, attention_mask=mask, labels=labels).loss
    theirs.backward()
    tower, kept = network.decoder.text, next_token_targets(ids, lengths)
    states = tower(ids, causal=True, memory=tower.memory(network.encode_image(pixels).tokens)).tokens
    logits = network.decoder.head(states.flatten(0, 1)[kept.positions])
    smoothing = reference.config.text_config.label_smoothing
    loss = lm_loss(logits, kept.targets, len(kept.positions), smoothing=smoothing).value
    loss.backward()
    assert torch.allclose(loss, theirs, rtol=1e-5)
    check(gradients(network, family), reference)
