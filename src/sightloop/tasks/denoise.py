"""Drawing from noise: the sampling loop with classifier-free guidance, and the samplers of rectified flow."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from sightloop.errors import UsageError
from sightloop.protocols import DrawNetwork, FlowNetwork, Sampler, ScheduledNetwork, require
from sightloop.tasks.finite import require_finite
from sightloop.types import DrawSettings, Encoded


def flow_times(steps: int, shift: float, strength: float = 1.0) -> Tensor:
    """Times of a rectified flow's steps, float32 `[steps + 1]`, from `strength` (1: noise) down to 0 (the image).

    Evenly spaced, then shifted toward noise, t' = s t / (1 + (s - 1) t) (Esser et al. 2024, equation 23).
    """
    times = torch.linspace(1.0, 0.0, steps + 1, dtype=torch.float64)
    times = shift * times / (1 + (shift - 1) * times)
    if strength < 1:  # the last of these steps, the first of which begins at the strength
        times = torch.cat([times.new_tensor([strength]), times[times < strength - 1e-6]])
    return times.float()


class EulerSampler:
    """Euler's method on a rectified flow: x moves along the flow from one time to the next."""

    def __init__(self, times: Tensor) -> None:
        """times: float32 `[n + 1]`, decreasing to 0."""
        self._all_times = times

    @property
    def times(self) -> Tensor:
        """Time of each evaluation, `[n]`."""
        return self._all_times[:-1]

    def begin(self, noise: Tensor, clean: Tensor | None) -> Tensor:
        """Noise `[B, C, h, w]`, or an image taken as far toward it as the first time says."""
        return noise if clean is None else torch.lerp(clean, noise, float(self._all_times[0]))

    def scale(self, latents: Tensor, index: int) -> Tensor:
        """The latents `[B, C, h, w]` themselves."""
        return latents

    def step(
        self, latents: Tensor, prediction: Tensor, index: int, draw_noise: Callable[[], Tensor]
    ) -> Tensor:
        """Latents `[B, C, h, w]` at the next time."""
        return latents + prediction * float(self._all_times[index + 1] - self._all_times[index])


class HeunSampler:
    """Heun's method on a rectified flow: each step is taken again with the mean of the flow at its ends.

    Two evaluations a step, but one for the last, at whose end there is no noise (Karras et al. 2022, algorithm 1).
    """

    def __init__(self, times: Tensor) -> None:
        """times: float32 `[n + 1]`, decreasing to 0."""
        self._ends = times
        self._start: tuple[Tensor, Tensor] | None = None  # latents and flow at the start of the step

    @property
    def times(self) -> Tensor:
        """Time of each evaluation, `[2 n - 1]`: each inner time twice."""
        return self._ends.repeat_interleave(2)[1:-2]

    def begin(self, noise: Tensor, clean: Tensor | None) -> Tensor:
        """Noise `[B, C, h, w]`, or an image taken as far toward it as the first time says."""
        self._start = None
        return noise if clean is None else torch.lerp(clean, noise, float(self._ends[0]))

    def scale(self, latents: Tensor, index: int) -> Tensor:
        """The latents `[B, C, h, w]` themselves."""
        return latents

    def step(
        self, latents: Tensor, prediction: Tensor, index: int, draw_noise: Callable[[], Tensor]
    ) -> Tensor:
        """Latents `[B, C, h, w]` at the end of a step, first as Euler has it, then corrected."""
        step = index // 2
        span = float(self._ends[step + 1] - self._ends[step])
        if self._start is not None:
            start, flow = self._start
            self._start = None
            return start + span * (flow + prediction) / 2
        if step < len(self._ends) - 2:
            self._start = (latents, prediction)
        return latents + span * prediction


FLOW_SAMPLERS: dict[str, Callable[[Tensor], Sampler]] = {"euler": EulerSampler, "heun": HeunSampler}


def build_sampler(network: DrawNetwork, settings: DrawSettings) -> Sampler:
    """A new sampler: the network's own, or one of rectified flow.

    Raises:
        UsageError: the network has no sampler of this name.
    """
    if settings.sampler not in network.samplers:
        raise UsageError(f'sampler="{settings.sampler}": must be one of {", ".join(network.samplers)}')
    if isinstance(network, ScheduledNetwork):
        return network.build_sampler(settings)
    shift = require(network, FlowNetwork).time_shift(settings.size)
    return FLOW_SAMPLERS[settings.sampler](flow_times(settings.steps, shift, settings.strength))


@dataclass(frozen=True, slots=True)
class DrawInputs:
    """What a batch of drawings starts from.

    Args:
        noise: draws noise `[B, C, h, w]`, each image from its own generator; called again by samplers that add noise.
        prompts: B encoded prompts.
        negative: B encoded texts that guidance leads away from, padded as the prompts are.
        clean: latents `[B, C, h, w]` of images to start from, or None.
    """

    noise: Callable[[], Tensor]
    prompts: Encoded
    negative: Encoded
    clean: Tensor | None = None


@torch.inference_mode()
def denoise(
    network: DrawNetwork,
    settings: DrawSettings,
    inputs: DrawInputs,
    on_step: Callable[[int, int], None] = lambda done, total: None,
) -> Tensor:
    """Draws latents, float32 `[B, C, h, w]`.

    Args:
        network: predicts.
        settings: steps, guidance and sampler. Guidance: p_negative + scale * (p_prompt - p_negative), both predictions
            in one batch (Ho and Salimans 2022, equation 6).
        inputs: noise and prompts.
        on_step: called with evaluations done and their number.

    Raises:
        CheckpointError: the latents are NaN or infinite.
    """
    sampler, prompts = build_sampler(network, settings), inputs.prompts
    both = _stack(inputs.negative, prompts)
    latents = sampler.begin(inputs.noise(), inputs.clean)
    total = len(sampler.times)
    for index in range(total):
        seen = sampler.scale(latents, index).to(prompts.tokens.dtype)
        guided = settings.guidance != 1 and _acts(settings.interval, index, total)
        if guided:
            seen = torch.cat([seen, seen])
        times = sampler.times[index].to(latents.device).expand(len(seen))
        prediction = network.denoise(seen, times, both if guided else prompts).float()
        if guided:
            away, toward = prediction.chunk(2)
            prediction = away + settings.guidance * (toward - away)
        latents = sampler.step(latents, prediction, index, inputs.noise)
        on_step(index + 1, total)
    return require_finite(latents, "latents", prompts.tokens.dtype)


def _acts(interval: tuple[float, float], index: int, total: int) -> bool:
    return interval[0] * total <= index < interval[1] * total


def _stack(first: Encoded, second: Encoded) -> Encoded:
    """The rows of two encoded batches: B and B -> 2 B."""
    pooled, mask = None, None
    if first.pooled is not None and second.pooled is not None:
        pooled = torch.cat([first.pooled, second.pooled])
    if first.mask is not None and second.mask is not None:
        mask = torch.cat([first.mask, second.mask])
    return Encoded(torch.cat([first.tokens, second.tokens]), pooled, mask)
