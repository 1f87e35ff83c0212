"""DaViT while it trains: drop path over all its layers, and layers that are computed again."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sightloop.nn.regularization import set_activation_checkpointing, set_regularization
from sightloop.towers.davit import Davit, DavitConfig

CONFIG = DavitConfig(
    (7, 3), (4, 2), (3, 1), (False, True), (6, 8), (1, 2), (2, 2), (3, 4), 3, 2.0, "gelu", True
)  # fmt: skip


def tower() -> Davit:
    network, generator = Davit(CONFIG), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.normal_(0, 0.3, generator=generator)
    return network.train()


def test_drop_path_rises_over_all_layers_in_turn() -> None:
    network, pixels = tower(), torch.randn(3, 3, 32, 24)
    wanted = network(pixels).tokens
    set_regularization(network, drop_path=0.5)
    first, second = network.stages
    order = [first.spatial[0], first.channel[0], second.spatial[0], second.channel[0]]
    order += [second.spatial[1], second.channel[1]]
    assert [layer.drop_path for layer in order] == pytest.approx([0.1 * i for i in range(6)])
    assert not torch.equal(network(pixels).tokens, wanted)
    assert torch.equal(network.eval()(pixels).tokens, wanted)
    set_regularization(network.train())
    assert torch.equal(network(pixels).tokens, wanted)


@pytest.mark.parametrize("random", [False, True])
def test_recomputed_layers_train_the_same_and_keep_less(random: bool) -> None:
    network, pixels = tower(), torch.randn(2, 3, 32, 32)
    if random:
        set_regularization(network, dropout=0.2, drop_path=0.3)
    found: list[list[Tensor]] = []
    kept: list[int] = []
    for on in (False, True):
        set_activation_checkpointing(network, on)
        torch.manual_seed(1)
        sizes: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x: (sizes.append(x.numel()), x)[1], lambda x: x):  # noqa: B023
            out = network(pixels).tokens
        kept.append(sum(sizes))
        gradients = torch.autograd.grad(out.square().sum(), [*network.parameters()])
        found.append([out.detach(), *gradients])
    assert kept[1] < 0.5 * kept[0]
    for plain, recomputed in zip(*found, strict=True):
        assert torch.equal(plain, recomputed)
