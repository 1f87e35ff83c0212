"""Settings of the optimizer. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from sightloop.training.config_parser import check_option


@dataclass(frozen=True, slots=True)
class OptimizerConfig:
    """AdamW (Loshchilov and Hutter 2019).

    Args:
        name: "adamw".
        lr: peak learning rate, above 0.
        betas: decay of the first and second moments, in [0, 1).
        eps: added to the root of the second moment, above 0.
        weight_decay: decoupled, at least 0.
        decay_on: "matrices": no decay on biases, norms, class tokens, positions and temperatures (CLIP, ViT); "all":
            decay on all parameters, as in BLIP's code.
        layer_decay: learning rate of a block relative to the one above it, in (0, 1].
        clip_norm: largest norm of the gradient of all parameters, above 0; None for no limit.
        multipliers: pattern -> factor of the learning rate, at least 0; the last pattern that matches counts.
    """

    name: Literal["adamw"] = "adamw"
    lr: float = 3e-4
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.05
    decay_on: Literal["matrices", "all"] = "matrices"
    layer_decay: float = 1.0
    clip_norm: float | None = None
    multipliers: Mapping[str, float] = field(default_factory=dict[str, float])

    def __post_init__(self) -> None:
        check_option("name", self.name, self.name == "adamw", '"adamw"')
        check_option("lr", self.lr, self.lr > 0, "more than 0")
        check_option(
            "betas", self.betas, len(self.betas) == 2 and all(0 <= b < 1 for b in self.betas), "two in [0, 1)"
        )
        check_option("eps", self.eps, self.eps > 0, "more than 0")
        check_option("weight_decay", self.weight_decay, self.weight_decay >= 0, "0 or more")
        check_option("decay_on", self.decay_on, self.decay_on in ("matrices", "all"), '"matrices" or "all"')
        check_option("layer_decay", self.layer_decay, 0 < self.layer_decay <= 1, "in (0, 1]")
        check_option(
            "clip_norm", self.clip_norm, self.clip_norm is None or self.clip_norm > 0, "more than 0, or None"
        )
        for pattern, factor in self.multipliers.items():
            check_option(f"multipliers[{pattern!r}]", factor, factor >= 0, "0 or more")
