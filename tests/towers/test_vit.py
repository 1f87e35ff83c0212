"""The image tower: its convolutional stem."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import pytest
import torch

from sightloop.nn.init import initialize
from sightloop.towers.vit import ChannelNorm, Vit, VitConfig
from sightloop.training.model_sizes import SIZES

PLAIN = replace(SIZES["world"][1].vision, image_size=32, patch=8, stem=(), layers=1)


def tower(config: VitConfig) -> Vit:
    net = Vit(config)
    initialize(net, 0)
    return net.eval()


@pytest.mark.parametrize("stem", [(), (8,), (8, 12), (8, 12, 16)])
def test_a_stem_leaves_the_grid_of_the_patches(stem: tuple[int, ...]) -> None:
    pixels = torch.randn(2, 3, 32, 32)
    assert tower(replace(PLAIN, stem=stem))(pixels).tokens.shape == (2, 17, 128)


@pytest.mark.parametrize("norm", ["channel", "batch", "fixed"])
def test_a_stem_looks_at_each_picture_alone(norm: Literal["channel", "batch", "fixed"]) -> None:
    config = replace(PLAIN, stem=(8, 16), stem_blocks=2, stem_norm=norm)
    net, pixels = tower(config), torch.randn(3, 3, 32, 32)
    together = net(pixels).tokens
    for i in range(3):
        torch.testing.assert_close(net(pixels[i : i + 1]).tokens, together[i : i + 1])


def test_the_class_token_may_start_as_the_mean_of_the_patches() -> None:
    embed, pixels = tower(replace(PLAIN, pooling="mean")).embed, torch.randn(2, 3, 32, 32)
    assert embed.class_token is not None
    patches = embed.proj(pixels).flatten(2)
    torch.testing.assert_close(embed(pixels)[:, 0], patches.mean(2) + embed.class_token + embed.position[0])


def test_a_stem_that_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="4 stages does not fit patches of 8"):
        Vit(replace(PLAIN, stem=(8, 8, 8, 8)))
    with pytest.raises(ValueError, match="does not fit patches of 12"):
        Vit(replace(PLAIN, patch=12, stem=(8, 8, 8)))


def test_channel_norm_is_layer_norm_of_each_position() -> None:
    norm, x = ChannelNorm(5), torch.randn(2, 5, 3, 4)
    expected = (x - x.mean(1, keepdim=True)) / (x.var(1, unbiased=False, keepdim=True) + 1e-5).sqrt()
    torch.testing.assert_close(norm(x), expected)


def test_a_stem_has_the_epsilon_of_its_config() -> None:
    net = Vit(replace(PLAIN, stem=(8, 16), eps=1e-3))
    assert {module.eps for module in net.embed.stem.modules() if isinstance(module, ChannelNorm)} == {1e-3}


@pytest.mark.parametrize(("size", "patch"), [(32, 8), (35, 8), (30, 7)])
@pytest.mark.parametrize("stem", [(), (8,)])
def test_without_gradients_the_patches_are_projected_alike(
    size: int, patch: int, stem: tuple[int, ...]
) -> None:
    if stem and patch % 2:
        pytest.skip("the stem does not divide the patch")
    embed = tower(replace(PLAIN, image_size=size, patch=patch, stem=stem)).embed
    pixels = torch.randn(2, 3, size, size)
    with torch.inference_mode():
        quick = embed(pixels)
    torch.testing.assert_close(quick, embed(pixels).detach(), rtol=1e-5, atol=1e-5)
