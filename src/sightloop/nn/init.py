"""Weights to start a training from."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from sightloop.nn.attention import Linear
from sightloop.nn.blocks import Block, RmsNorm

_STD = 0.02  # of embeddings: BERT, ViT, CLIP
_TEMPERATURE = 0.07  # CLIP, section 2.5; ALBEF and BLIP
# Scalars by name. A bias makes it SigLIP, whose two are those of its section 3.1 (Zhai et al. 2023).
_SCALARS = {"temperature": _TEMPERATURE, "logit_scale": math.log(1 / _TEMPERATURE), "logit_bias": -10.0}
_SIGMOID_SCALE = math.log(10)

# Judges start without a verdict: their first loss is that of chance.
_HEADS = {"match_head": 0.1, "classes": 0.1}


@torch.no_grad()
def initialize(network: nn.Module, seed: int) -> None:
    """Set every parameter of a network in place, from the seed alone (not the device, not the global generator).

    All that is drawn is normal, cut at two deviations. Embeddings and lone vectors (class token, positions): deviation
    0.02. Linear layers: sqrt(2 / (5 fan in)) (Nguyen and Salazar 2019, section 3.2), which is BERT's 0.02 at its width
    and keeps narrow networks from starting as all but constant. Convolutions: 1/sqrt(fan in). Norms: one and zero.
    Biases: zero. What the blocks of a tower add to their residual is scaled by 1/sqrt(additions) (Radford et al. 2019,
    section 2.3), in pre-norm towers only: post-norm blocks rescale the sum themselves. Temperatures: 0.07, SigLIP's
    0.1.

    Raises ValueError for a parameter without memory (built on the "meta" device).
    """
    generator = torch.Generator().manual_seed(seed)
    scales = _residual_scales(network)
    done: set[int] = set()
    for where, module in network.named_modules():
        head = _HEADS.get(where.rpartition(".")[2], 1.0)
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.is_meta:
                raise ValueError(f"{name}: has no memory to set; build the network on a real device")
            if id(parameter) not in done:  # tied matrices, shared modules
                done.add(id(parameter))
                _set(module, name, parameter, head * scales.get(id(parameter), 1.0), generator)


def _set(module: nn.Module, name: str, parameter: Tensor, scale: float, generator: torch.Generator) -> None:
    if name in _SCALARS:
        sigmoid = name == "logit_scale" and hasattr(module, "logit_bias")
        parameter.fill_(_SIGMOID_SCALE if sigmoid else _SCALARS[name])
    elif name == "bias":
        parameter.zero_()
    elif isinstance(module, (nn.LayerNorm, nn.GroupNorm, nn.BatchNorm2d)):
        parameter.fill_(1.0)
    elif isinstance(module, RmsNorm):
        parameter.fill_(1.0 - module.offset)
    else:
        std = _STD
        if isinstance(module, (Linear, nn.Conv2d)) and name == "weight":
            gain = 0.4 if isinstance(module, Linear) else 1.0
            std = (gain / parameter[0].numel()) ** 0.5
        drawn = torch.empty(parameter.shape)
        nn.init.trunc_normal_(
            drawn, std=std * scale, a=-2 * std * scale, b=2 * std * scale, generator=generator
        )
        parameter.copy_(drawn)


def _residual_scales(network: nn.Module) -> dict[int, float]:
    """id of each matrix that writes into a pre-norm tower's residual -> its factor."""
    scales: dict[int, float] = {}
    for tower in network.modules():
        blocks = [block for block in tower.children() if isinstance(block, Block) and not block.post_norm]
        writers = [
            part.weight
            for block in blocks
            for part in (
                block.attn.out,
                block.mlp.fc2,
                *((block.cross.out,) if hasattr(block, "cross") else ()),
            )
        ]
        scales |= {id(weight): len(writers) ** -0.5 for weight in writers}
    return scales
