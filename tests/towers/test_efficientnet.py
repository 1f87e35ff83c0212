"""EfficientNet-Lite0: equal to a reference whose batch norms are not folded, on weights in the public form."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from sightloop.checkpoints.efficientnet import read_efficientnet
from sightloop.errors import CheckpointError
from sightloop.towers.efficientnet import EfficientNet, EfficientNetConfig

CONFIG = EfficientNetConfig(64, dim=16, layers=1, heads=2, mlp_dim=32, activation="gelu", eps=1e-6)
# Kernel, stride, expansion, channels of the 16 blocks (Tan and Le 2019, table 1).
BLOCKS = [
    *[(3, 1, 1, 16)],
    *[(3, 2, 6, 24), (3, 1, 6, 24)],
    *[(5, 2, 6, 40), (5, 1, 6, 40)],
    *[(3, 2, 6, 80), (3, 1, 6, 80), (3, 1, 6, 80)],
    *[(5, 1, 6, 112)] * 3,
    *[(5, 2, 6, 192), (5, 1, 6, 192), (5, 1, 6, 192), (5, 1, 6, 192)],
    *[(3, 1, 6, 320)],
]


def public_weights() -> dict[str, Tensor]:
    """Random tensors under the names of the public file."""
    random = torch.Generator().manual_seed(0)
    found: dict[str, Tensor] = {}

    def add(conv: str, norm: str, shape: tuple[int, int, int, int]) -> None:
        fan_in = shape[1] * shape[2] * shape[3]
        found[f"{conv}.weight"] = torch.randn(shape, generator=random) * (2 / fan_in) ** 0.5
        for name in ("weight", "bias", "running_mean", "running_var"):
            found[f"{norm}.{name}"] = 0.5 + torch.rand(shape[0], generator=random)

    add("_conv_stem", "_bn0", (32, 3, 3, 3))
    channels = 32
    for number, (size, _, expansion, width) in enumerate(BLOCKS):
        inner, block = channels * expansion, f"_blocks.{number}"
        if expansion > 1:
            add(f"{block}._expand_conv", f"{block}._bn0", (inner, channels, 1, 1))
        add(f"{block}._depthwise_conv", f"{block}._bn1", (inner, 1, size, size))
        add(f"{block}._project_conv", f"{block}._bn2", (width, inner, 1, 1))
        channels = width
    add("_conv_head", "_bn1", (1280, 320, 1, 1))
    return found


def same(x: Tensor, weight: Tensor, stride: int, groups: int = 1) -> Tensor:
    """TensorFlow's "SAME": output ceil(n / stride), the odd pixel of padding at the right and the bottom."""
    pads: list[int] = []
    for n in (x.shape[3], x.shape[2]):
        total = max((-(-n // stride) - 1) * stride + weight.shape[-1] - n, 0)
        pads += [total // 2, total - total // 2]
    return F.conv2d(F.pad(x, pads), weight, stride=stride, groups=groups)


def reference(w: dict[str, Tensor], x: Tensor) -> Tensor:
    """Features of the head, with batch norms as they are."""

    def norm(x: Tensor, name: str) -> Tensor:
        mean, var = w[f"{name}.running_mean"], w[f"{name}.running_var"]
        return F.batch_norm(x, mean, var, w[f"{name}.weight"], w[f"{name}.bias"], eps=1e-3)

    x = F.relu6(norm(same(x, w["_conv_stem.weight"], 2), "_bn0"))
    for number, (_, stride, _, _) in enumerate(BLOCKS):
        block, before = f"_blocks.{number}", x
        if f"{block}._expand_conv.weight" in w:
            x = F.relu6(norm(same(x, w[f"{block}._expand_conv.weight"], 1), f"{block}._bn0"))
        x = F.relu6(norm(same(x, w[f"{block}._depthwise_conv.weight"], stride, x.shape[1]), f"{block}._bn1"))
        x = norm(same(x, w[f"{block}._project_conv.weight"], 1), f"{block}._bn2")
        x = x + before if x.shape == before.shape else x
    return F.relu6(norm(same(x, w["_conv_head.weight"], 1), "_bn1"))


def loaded(path: Path, weights: dict[str, Tensor]) -> EfficientNet:
    torch.save(weights, path)
    torch.manual_seed(1)
    tower = CONFIG.build().double().eval()
    for weight in tower.parameters():  # those that the file lacks
        torch.nn.init.normal_(weight, std=0.1)
    tower.load_state_dict(tower.state_dict() | read_efficientnet(path))
    return tower


@pytest.mark.parametrize("side", [64, 75])
@torch.no_grad()
def test_is_the_public_network(tmp_path: Path, side: int) -> None:
    weights = public_weights()
    tower = loaded(tmp_path / "lite0.pth", weights).float()
    pixels = torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(
        F.relu6(tower.head(tower.trunk(pixels))), reference(weights, pixels), atol=2e-4, rtol=1e-4
    )


@torch.no_grad()
def test_tokens_of_features_are_those_of_pixels(tmp_path: Path) -> None:
    tower = loaded(tmp_path / "lite0.pth", public_weights()).float()
    pixels = torch.randn(2, 3, 64, 64)
    out, again = tower(pixels), tower(tower.trunk(pixels))
    assert out.tokens.shape == (2, 5, 16)
    torch.testing.assert_close(out.tokens, again.tokens)
    torch.testing.assert_close(out.pooled, out.tokens[:, 0])


def test_a_file_without_a_layer_is_refused(tmp_path: Path) -> None:
    weights = public_weights()
    del weights["_blocks.3._bn1.running_var"]
    torch.save(weights, tmp_path / "part.pth")
    with pytest.raises(CheckpointError, match=r"part\.pth: lacks the tensor '_blocks\.3\._bn1\.running_var'"):
        read_efficientnet(tmp_path / "part.pth")
