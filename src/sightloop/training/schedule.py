"""Learning rate schedules."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from sightloop.training.config_parser import check_option


@dataclass(frozen=True, slots=True)
class ScheduleConfig:
    """Learning rate schedule: a linear warm-up, then a decay.

    BLIP's pre-training: ScheduleConfig("blip", warmup_steps=3000, start=1e-6, floor=1e-6).

    Args:
        kind: "cosine" or "linear": from the peak to final * peak at the last step; "constant": the peak; "blip":
            peak * decay^epoch, for each complete epoch.
        warmup_steps: at least 0.
        final: final learning rate / peak, 0..1.
        start: learning rate at the start of the warm-up, at least 0.
        floor: least learning rate after the warm-up, at least 0.
        decay: factor an epoch of "blip", in (0, 1].
    """

    kind: Literal["cosine", "linear", "constant", "blip"] = "cosine"
    warmup_steps: int = 0
    final: float = 0.0
    start: float = 0.0
    floor: float = 0.0
    decay: float = 0.9

    def __post_init__(self) -> None:
        kinds = ("cosine", "linear", "constant", "blip")
        check_option("kind", self.kind, self.kind in kinds, ", ".join(kinds))
        check_option("warmup_steps", self.warmup_steps, self.warmup_steps >= 0, "0 or more")
        check_option("final", self.final, 0 <= self.final <= 1, "in [0, 1]")
        check_option("start", self.start, self.start >= 0, "0 or more")
        check_option("floor", self.floor, self.floor >= 0, "0 or more")
        check_option("decay", self.decay, 0 < self.decay <= 1, "in (0, 1]")


def lr_at(schedule: ScheduleConfig, step: int, steps_total: int, steps_per_epoch: int, peak: float) -> float:
    """The learning rate of a step.

    The warm-up reaches the peak at step `warmup_steps - 1` ("blip", as its code: at step `warmup_steps`).

    Args:
        schedule: kind and bounds.
        step: 0 to steps_total - 1.
        steps_total: of the run.
        steps_per_epoch: batches in a pass over the data.
        peak: largest learning rate.
    """
    warm, reached = schedule.warmup_steps, step if schedule.kind == "blip" else step + 1
    if schedule.kind == "blip":
        after = peak * schedule.decay ** (step // max(steps_per_epoch, 1))
    elif schedule.kind == "constant":
        after = peak
    else:
        done = min(max((step - warm) / max(steps_total - warm, 1), 0.0), 1.0)
        left = 1 - done if schedule.kind == "linear" else (1 + math.cos(math.pi * done)) / 2
        after = peak * (schedule.final + (1 - schedule.final) * left)
    after = max(after, schedule.floor)
    if reached >= warm:
        return after
    return min(schedule.start + (peak - schedule.start) * reached / warm, after)
