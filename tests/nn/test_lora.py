"""LoRA adapters: zero before training, trained alone, merged into plain layers; read and written in PEFT's names."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from sightloop.checkpoints.key_map import native_state_dict
from sightloop.errors import CheckpointError, UsageError
from sightloop.nn.attention import Linear
from sightloop.nn.blocks import Block, BlockConfig
from sightloop.nn.lora import adapter_config, adapter_tensors, add_lora, load_adapter, merge_lora
from sightloop.nn.prepack import can_pack, pack, unpack


class Net(nn.Module):
    """Two blocks, one used twice, and a head whose matrix is an embedding's."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(11, 8)
        self.blocks = nn.ModuleList(Block(BlockConfig(8, 2, 16, "gelu", 1e-5)) for _ in range(2))
        self.blocks[1].mlp = self.blocks[0].mlp
        self.head = Linear(8, 11)
        self.head.weight = self.words.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.words(ids)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


@pytest.fixture
def net() -> Net:
    made = Net()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.normal_(0, 0.3, generator=generator)
    return made.eval()


IDS = torch.tensor([[1, 2, 3], [4, 5, 6]])
# Second names of the MLP that both blocks share.
SHARED = {f"blocks.1.mlp.{layer}.{part}" for layer in ("fc1", "fc2") for part in ("weight", "bias")}


def learn(net: nn.Module) -> None:
    """A few steps that change all that can change."""
    trained = [p for p in net.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.05)
    for _ in range(3):
        optimizer.zero_grad()
        net(IDS).logsumexp(-1).sum().backward()
        optimizer.step()


def test_a_new_adapter_changes_nothing_and_learns_alone(net: Net) -> None:
    before, wanted = copy.deepcopy(net.state_dict()), net(IDS)
    names = add_lora(net, ["blocks", "*.attn.qkv"], rank=2, alpha=4)
    assert len(names) == 6  # qkv and out of two blocks, fc1 and fc2 of the one MLP
    assert torch.equal(net(IDS), wanted)
    learn(net)
    assert not torch.allclose(net(IDS), wanted)
    assert all(torch.equal(net.state_dict()[name], value) for name, value in before.items())
    assert all(".lora." in name for name, p in net.named_parameters() if p.requires_grad)


def test_the_formula(net: Net) -> None:
    add_lora(net, ["blocks.0.mlp.fc1"], rank=3, alpha=6)
    learn(net)
    layer, x = net.blocks[0].mlp.fc1, torch.randn(4, 8)
    wanted = x @ (layer.weight + 6 / 3 * layer.lora.b.weight @ layer.lora.a.weight).T + layer.bias
    assert torch.allclose(layer(x), wanted, atol=1e-6)


def test_merging_gives_plain_layers_with_the_same_outputs(net: Net) -> None:
    before = copy.deepcopy(native_state_dict(net))
    add_lora(net, ["blocks"], rank=2, alpha=2)
    learn(net)
    learned, adapters = net(IDS), copy.deepcopy(adapter_tensors(net))
    for _ in range(2):  # a second time changes nothing
        merge_lora(net)
    assert (net(IDS) - learned).abs().max() <= 1e-6 * learned.abs().max()
    merged = native_state_dict(net)
    assert merged.keys() == before.keys() == net.state_dict().keys() - {"head.weight"} - SHARED
    assert not torch.equal(merged["blocks.0.attn.qkv.weight"], before["blocks.0.attn.qkv.weight"])
    saved = adapter_tensors(net)
    assert saved.keys() == adapters.keys()
    assert all(torch.equal(value, adapters[name]) for name, value in saved.items())


@pytest.mark.skipif(not can_pack(), reason="this torch has no oneDNN packed linear layers")
def test_packed_layers_are_unpacked_for_adapters_and_merging(net: Net) -> None:
    pack(net)
    add_lora(net, ["blocks"])
    learn(net)
    with torch.no_grad():
        learned = net(IDS)
        pack(net)
        assert torch.allclose(net(IDS), learned, atol=1e-5)
        merge_lora(net)
        merged = net(IDS)
        pack(net)
        assert torch.allclose(net(IDS), learned, atol=1e-5)
        unpack(net)
        assert torch.equal(net(IDS), merged)


def test_adapters_in_pefts_names(net: Net) -> None:
    other = copy.deepcopy(net)
    add_lora(net, ["blocks.1.attn", "blocks.1.mlp.fc1"], rank=2, alpha=5, dropout=0.1)
    learn(net)
    tensors, config = adapter_tensors(net), adapter_config(net)
    key = "base_model.model.blocks.1.attn.qkv"
    assert tensors[f"{key}.lora_A.weight"].shape == (2, 8)
    assert tensors[f"{key}.lora_B.weight"].shape == (24, 2)
    assert (config["r"], config["lora_alpha"], config["lora_dropout"]) == (2, 5, 0.1)
    names = ["blocks.0.mlp.fc1", "blocks.1.attn.out", "blocks.1.attn.qkv"]
    assert sorted(config["target_modules"]) == names
    assert sorted(load_adapter(other, tensors, config)) == names
    assert torch.equal(other(IDS), net(IDS))
    merge_lora(net)
    assert adapter_config(net) == config


def test_adapters_that_do_not_fit(net: Net) -> None:
    made = copy.deepcopy(net)
    add_lora(made, ["blocks.0.attn"], rank=2)
    tensors, config = adapter_tensors(made), adapter_config(made)
    some = dict([*tensors.items()][1:])
    far = {name.replace("blocks.0", "blocks.7"): value for name, value in tensors.items()}
    for wrong in (some, far, {}, tensors | {"x": torch.zeros(1)}, {n: v[:1] for n, v in tensors.items()}):
        with pytest.raises(CheckpointError, match="does not fit"):
            load_adapter(copy.deepcopy(net), wrong, config)
    with pytest.raises(CheckpointError, match="use_dora"):
        load_adapter(net, tensors, config | {"use_dora": True})
    with pytest.raises(CheckpointError, match="no plain LoRA: IA3"):
        load_adapter(net, tensors, config | {"peft_type": "IA3"})


def test_wrong_choices(net: Net) -> None:
    with pytest.raises(UsageError, match='"vision" fits no linear layer, such as blocks'):
        add_lora(net, ["vision"])
    with pytest.raises(UsageError, match="head shares its matrix"):
        add_lora(net, ["head"])
    assert "head" not in add_lora(copy.deepcopy(net), ["*"])
    with pytest.raises(UsageError, match="rank=0"):
        add_lora(net, ["blocks"], rank=0)
    add_lora(net, ["blocks.0"])
    with pytest.raises(UsageError, match=r"blocks.0.attn.qkv has an adapter already"):
        add_lora(net, ["blocks.0"])
    with pytest.raises(UsageError, match="0 kinds"):
        adapter_config(Net())


def test_the_same_seed_draws_the_same(net: Net) -> None:
    drawn = []
    for seed in (1, 1, 2):
        made = copy.deepcopy(net)
        add_lora(made, ["blocks"], seed=seed)
        drawn.append(torch.cat([value.flatten() for value in adapter_tensors(made).values()]))
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])
