"""Adapters through files: the same outputs after writing and reading; what is broken is named."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import nn

from sightloop.checkpoints.lora import load_lora, save_lora
from sightloop.errors import CheckpointError
from sightloop.nn.attention import Linear
from sightloop.nn.lora import add_lora


@pytest.fixture
def net() -> nn.Module:
    made = nn.Sequential(Linear(6, 5), Linear(5, 4))
    for parameter in made.parameters():
        nn.init.normal_(parameter)
    return made


def test_written_and_read(tmp_path: Path, net: nn.Module) -> None:
    other, x = copy.deepcopy(net), torch.randn(3, 6)
    add_lora(net, ["*"], rank=2, alpha=3)
    for parameter in net.parameters():
        nn.init.normal_(parameter) if parameter.requires_grad else None
    save_lora(net, tmp_path / "adapter")
    with safe_open(tmp_path / "adapter" / "adapter_model.safetensors", "pt") as file:
        assert sorted(file.keys()) == [f"base_model.model.{i}.lora_{p}.weight" for i in (0, 1) for p in "AB"]
    assert load_lora(other, tmp_path / "adapter") == ["0", "1"]
    assert torch.equal(other(x), net(x))


def test_what_is_broken_is_named(tmp_path: Path, net: nn.Module) -> None:
    with pytest.raises(CheckpointError, match=r"adapter_config\.json: cannot be read"):
        load_lora(net, tmp_path)
    (tmp_path / "adapter_config.json").write_text("[]")
    with pytest.raises(CheckpointError, match=r"needs adapter_config\.json"):
        load_lora(net, tmp_path)
    made = copy.deepcopy(net)
    add_lora(made, ["0"])
    save_lora(made, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | {"r": 3}))
    with pytest.raises(CheckpointError, match=f"{tmp_path}: the adapter does not fit"):
        load_lora(net, tmp_path)
    del config["r"]
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="config lacks r"):
        load_lora(net, tmp_path)
