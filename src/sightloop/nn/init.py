"""Random initialization of a network's parameters, for training from scratch."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from sightloop.nn.attention import Linear
from sightloop.nn.blocks import Block, RmsNorm

_EMBEDDING_STD = 0.02  # BERT, ViT, CLIP
_TEMPERATURE = 0.07  # CLIP, section 2.5; ALBEF and BLIP
_SCALARS = {"temperature": _TEMPERATURE, "logit_scale": math.log(1 / _TEMPERATURE), "logit_bias": -10.0}
# SigLIP, the modules with `logit_bias`: ln of a scale of 10; it and the bias are from Zhai et al. 2023, section 3.1.
_SIGMOID_SCALE = math.log(10)

# Factors of the deviation of classification heads: small logits, so that the first loss is near chance.
# Zero for the modulation of a diffusion transformer's blocks and its last layer (adaLN-Zero, Peebles and Xie 2023).
_HEAD_SCALES = {"match_head": 0.1, "classes": 0.1, "modulations": 0.0, "last": 0.0}


@torch.no_grad()
def initialize(network: nn.Module, seed: int) -> None:
    """Initialize every parameter in place; depends on the seed only, not on the device or the global generator.

    Values are drawn from normal distributions truncated at two deviations:

    * embeddings, class tokens, position tables: deviation 0.02;
    * `Linear`: sqrt(2 / (5 fan_in)) (Nguyen and Salazar 2019, section 3.2). About 0.02 at BERT's width; larger in
      narrow networks, whose outputs would otherwise start nearly constant;
    * convolutions: 1 / sqrt(fan_in);
    * layers that write into the residual stream of a pre-norm tower: further scaled by 1 / sqrt(number of such layers)
      (Radford et al. 2019, section 2.3). Post-norm blocks normalize the sum themselves.

    Norms start at weight one and bias zero, all other biases at zero, temperatures at 0.07 (SigLIP's at 0.1).

    Raises:
        ValueError: a parameter has no memory (the network was built on the "meta" device).
    """
    generator = torch.Generator().manual_seed(seed)
    scales = _residual_scales(network)
    initialized: set[int] = set()  # ids of parameters: tied matrices and shared modules are visited twice
    for path, module in network.named_modules():
        name_of_part = next((part for part in reversed(path.split(".")) if not part.isdigit()), "")
        head_scale = _HEAD_SCALES.get(name_of_part, 1.0)
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.is_meta:
                raise ValueError(f"{name}: has no memory to set; build the network on a real device")
            if id(parameter) not in initialized:
                initialized.add(id(parameter))
                scale = head_scale * scales.get(id(parameter), 1.0)
                _initialize_parameter(module, name, parameter, scale, generator)


def _initialize_parameter(
    module: nn.Module, name: str, parameter: Tensor, scale: float, generator: torch.Generator
) -> None:
    if name in _SCALARS:
        sigmoid = name == "logit_scale" and hasattr(module, "logit_bias")
        parameter.fill_(_SIGMOID_SCALE if sigmoid else _SCALARS[name])
    elif name == "bias" or scale == 0:
        parameter.zero_()
    elif isinstance(module, (nn.LayerNorm, nn.GroupNorm, nn.BatchNorm2d)):
        parameter.fill_(1.0)
    elif isinstance(module, RmsNorm):
        parameter.fill_(1.0 - module.offset)
    else:
        std = _EMBEDDING_STD
        if isinstance(module, (Linear, nn.Conv2d)) and name == "weight":
            gain = 0.4 if isinstance(module, Linear) else 1.0
            fan_in = parameter[0].numel()
            std = (gain / fan_in) ** 0.5
        # Drawn on the CPU, whatever the parameter's device, so that a seed gives the same values everywhere.
        values = torch.empty(parameter.shape)
        nn.init.trunc_normal_(
            values, std=std * scale, a=-2 * std * scale, b=2 * std * scale, generator=generator
        )
        parameter.copy_(values)


def _residual_scales(network: nn.Module) -> dict[int, float]:
    """id of each weight that writes into a pre-norm tower's residual stream -> 1 / sqrt(such weights in the tower)."""
    scales: dict[int, float] = {}
    for tower in network.modules():
        blocks = [block for block in tower.children() if isinstance(block, Block) and not block.post_norm]
        output_weights = [
            layer.weight
            for block in blocks
            for layer in (
                block.attn.out,
                block.mlp.fc2,
                *((block.cross.out,) if hasattr(block, "cross") else ()),
            )
        ]
        scales |= {id(weight): len(output_weights) ** -0.5 for weight in output_weights}
    return scales
