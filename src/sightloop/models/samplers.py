"""Noise schedule of diffusion models in discrete time, and the samplers that walk back along it.

The settings and the order of the sums are those of `diffusers`' schedulers, whose configs the checkpoints carry.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from sightloop.errors import UsageError
from sightloop.types import DrawSettings

Spacing = Literal["leading", "linspace", "trailing"]


@dataclass(frozen=True, slots=True)
class NoiseSchedule:
    """Noise of each of the times that a model was trained at (Ho et al. 2020, section 2), and how steps are chosen.

    Args:
        sampler: the checkpoint's own, a key of `SAMPLERS`.
        times: number of times.
        beta_start: variance of the noise added at the first time.
        beta_end: and at the last.
        curve: between them linear, or linear in its root (Stable Diffusion).
        prediction: the noise, or the velocity (Salimans and Ho 2022, section 4).
        spacing: how the steps' times are chosen (Lin et al. 2023, table 2); None for the sampler's usual way.
        offset: added to the times of "leading".
        ends_clean: whether DDIM and PNDM end at an image without noise, or at the first time; None for the usual way.
        clips: whether DDIM clips the predicted latents to -1 to 1; None for its usual way, which is to clip.
    """

    sampler: str
    times: int = 1000
    beta_start: float = 0.0001
    beta_end: float = 0.02
    curve: Literal["linear", "scaled_linear"] = "linear"
    prediction: Literal["epsilon", "v_prediction"] = "epsilon"
    spacing: Spacing | None = None
    offset: int = 0
    ends_clean: bool | None = None
    clips: bool | None = None

    def alphas(self) -> Tensor:
        """Share of the image in the variance at each time, float32 `[times]` (alpha bar of Ho et al. 2020)."""
        if self.curve == "linear":
            betas = torch.linspace(self.beta_start, self.beta_end, self.times)
        else:
            betas = torch.linspace(self.beta_start**0.5, self.beta_end**0.5, self.times) ** 2
        return (1 - betas).cumprod(0)

    def spaced(self, steps: int, usual: Spacing, *, whole: bool) -> Tensor:
        """Times of the steps, decreasing, float64 `[steps]`; `whole`: rounded to whole numbers."""
        spacing, index = self.spacing or usual, torch.arange(steps, dtype=torch.float64)
        if spacing == "linspace":
            times = (index * ((self.times - 1) / max(1, steps - 1))).flip(0)
            return times.round() if whole else times
        if spacing == "leading":
            return (index * (self.times // steps)).flip(0) + self.offset
        return (self.times - index * (self.times / steps)).round() - 1


class _Walk:
    """What the samplers share: the times, and the first latents."""

    is_clean = True

    def __init__(self, schedule: NoiseSchedule, times: Tensor, first: int) -> None:
        self.schedule = schedule
        self.first = first  # of `all_times`, with an image to start from
        self.all_times = times
        self.alphas = schedule.alphas()
        sigmas = ((1 - self.alphas) / self.alphas).sqrt().double()  # noise over image (Karras et al. 2022)
        below = times.long().clamp(max=len(sigmas) - 2)
        spaced = torch.lerp(sigmas[below], sigmas[below + 1], times - below)
        self.sigmas: list[float] = [*spaced.tolist(), 0.0]

    @property
    def times(self) -> Tensor:
        """Time of each evaluation, float32 `[n]`."""
        return self.all_times[self.first :].float()

    def alpha(self, time: float) -> float:
        """Share of the image in the variance at a time; before the first time that of its end."""
        if time < 0:
            clean = self.schedule.ends_clean
            return 1.0 if clean or (clean is None and self.is_clean) else float(self.alphas[0])
        return float(self.alphas[int(time)])

    def sigma_at(self, index: int) -> float:
        """Sigma of an evaluation; behind the last one 0."""
        return self.sigmas[self.first + index]

    def begin(self, noise: Tensor, clean: Tensor | None) -> Tensor:
        """Noise `[B, C, h, w]`, or latents of images with as much noise as the first time has."""
        if clean is None:
            return noise
        alpha = self.alpha(float(self.all_times[self.first]))
        return alpha**0.5 * clean + (1 - alpha) ** 0.5 * noise

    def scale(self, latents: Tensor, index: int) -> Tensor:
        """The latents `[B, C, h, w]` themselves."""
        return latents

    def split(self, latents: Tensor, prediction: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
        """Image and noise that a prediction says the latents are made of, `[B, C, h, w]` each."""
        signal, sigma = alpha**0.5, (1 - alpha) ** 0.5
        if self.schedule.prediction == "epsilon":
            return (latents - sigma * prediction) / signal, prediction
        return signal * latents - sigma * prediction, signal * prediction + sigma * latents


class DdimSampler(_Walk):
    """DDIM without added noise (Song et al. 2021, equation 12)."""

    def __init__(self, schedule: NoiseSchedule, steps: int, first: int) -> None:
        super().__init__(schedule, schedule.spaced(steps, "leading", whole=True), first)
        self.span = schedule.times // steps

    def step(
        self, latents: Tensor, prediction: Tensor, index: int, draw_noise: Callable[[], Tensor]
    ) -> Tensor:
        """Latents `[B, C, h, w]` at the next time."""
        time = float(self.all_times[self.first + index])
        before = self.alpha(time - self.span)
        image, noise = self.split(latents, prediction, self.alpha(time))
        if self.schedule.clips is not False:
            image = image.clamp(-1, 1)
        return before**0.5 * image + (1 - before) ** 0.5 * noise


class PndmSampler(_Walk):
    """PNDM, linear multistep (Liu et al. 2022, arXiv 2202.09778, equations 9 and 12), without Runge-Kutta steps.

    The second step's time comes twice: the first step is taken again with the mean of the predictions at its ends.
    """

    is_clean = False

    def __init__(self, schedule: NoiseSchedule, steps: int, first: int) -> None:
        times = schedule.spaced(steps, "leading", whole=True)
        super().__init__(schedule, torch.cat([times[:2], times[1:]]), first)
        self.span = schedule.times // steps
        self.noises: list[Tensor] = []  # the last predictions, the newest last
        self.start: Tensor | None = None

    def begin(self, noise: Tensor, clean: Tensor | None) -> Tensor:
        """Noise `[B, C, h, w]`, or latents of images with as much noise as the first time has."""
        self.noises, self.start = [], None
        return super().begin(noise, clean)

    def step(
        self, latents: Tensor, prediction: Tensor, index: int, draw_noise: Callable[[], Tensor]
    ) -> Tensor:
        """Latents `[B, C, h, w]` at the next time."""
        time = float(self.all_times[self.first + index])
        before = time - self.span
        if index == 1 and self.start is not None:
            time, before, latents = time + self.span, time, self.start
            prediction = (prediction + self.noises[-1]) / 2
        else:
            self.start = latents if index == 0 else None
            self.noises = [*self.noises[-3:], prediction]
            e = self.noises[::-1]
            if len(e) == 2:
                prediction = (3 * e[0] - e[1]) / 2
            elif len(e) == 3:
                prediction = (23 * e[0] - 16 * e[1] + 5 * e[2]) / 12
            elif len(e) == 4:
                prediction = (55 * e[0] - 59 * e[1] + 37 * e[2] - 9 * e[3]) / 24
        alpha, target = self.alpha(time), self.alpha(before)
        _, noise = self.split(latents, prediction, alpha)
        scale = alpha * (1 - target) ** 0.5 + (alpha * (1 - alpha) * target) ** 0.5
        return (target / alpha) ** 0.5 * latents - (target - alpha) / scale * noise


class SigmaEulerSampler(_Walk):
    """Euler's method in sigma (Karras et al. 2022, algorithm 2 without churn), or with fresh noise at each step.

    An `ancestral` step goes below the next sigma and adds noise up to it (k-diffusion, `sample_euler_ancestral`).
    """

    def __init__(self, schedule: NoiseSchedule, steps: int, first: int, *, ancestral: bool = False) -> None:
        super().__init__(schedule, schedule.spaced(steps, "linspace", whole=False), first)
        self.ancestral = ancestral

    def begin(self, noise: Tensor, clean: Tensor | None) -> Tensor:
        """Noise `[B, C, h, w]` of the greatest sigma, or latents of images with noise of the first one."""
        if clean is not None:
            return clean + self.sigma_at(0) * noise
        most = max(self.sigmas)
        return noise * ((most**2 + 1) ** 0.5 if self.schedule.spacing == "leading" else most)

    def scale(self, latents: Tensor, index: int) -> Tensor:
        """Latents `[B, C, h, w]` of variance 1."""
        return latents / (self.sigma_at(index) ** 2 + 1) ** 0.5

    def step(
        self, latents: Tensor, prediction: Tensor, index: int, draw_noise: Callable[[], Tensor]
    ) -> Tensor:
        """Latents `[B, C, h, w]` at the next sigma."""
        sigma, target = self.sigma_at(index), self.sigma_at(index + 1)
        slope = prediction  # of the latents in sigma: the noise
        if self.schedule.prediction == "v_prediction":
            image = latents / (sigma**2 + 1) - prediction * (sigma / (sigma**2 + 1) ** 0.5)
            slope = (latents - image) / sigma
        if not self.ancestral:
            return latents + slope * (target - sigma)
        added = (target**2 * (sigma**2 - target**2) / sigma**2) ** 0.5
        return latents + slope * ((target**2 - added**2) ** 0.5 - sigma) + draw_noise() * added


class DpmSampler(_Walk):
    """DPM-Solver++ of second order, multistep (Lu et al. 2022, arXiv 2211.01095, algorithm 2)."""

    def __init__(self, schedule: NoiseSchedule, steps: int, first: int) -> None:
        if (schedule.spacing or "linspace") == "trailing":
            times = schedule.spaced(steps, "trailing", whole=True)
        else:
            times = schedule.spaced(steps + 1, "linspace", whole=True)[:-1]
        super().__init__(schedule, times, first)
        self.last: tuple[Tensor, float] | None = (
            None  # the image that was predicted before, and its log SNR / 2
        )

    def begin(self, noise: Tensor, clean: Tensor | None) -> Tensor:
        """Noise `[B, C, h, w]`, or latents of images with as much noise as the first time has."""
        self.last = None
        return super().begin(noise, clean)

    def step(
        self, latents: Tensor, prediction: Tensor, index: int, draw_noise: Callable[[], Tensor]
    ) -> Tensor:
        """Latents `[B, C, h, w]` at the next time."""
        sigma, target = self.sigma_at(index), self.sigma_at(index + 1)
        image, _ = self.split(latents, prediction, 1 / (sigma**2 + 1))
        before, self.last = self.last, (image, -math.log(sigma))
        if target == 0:
            return image
        step = math.log(sigma / target)  # h
        signal, noise = 1 / (target**2 + 1) ** 0.5, target / (target**2 + 1) ** 0.5
        here = sigma / (sigma**2 + 1) ** 0.5
        out = noise / here * latents - signal * math.expm1(-step) * image
        if before is None:
            return out
        ratio = (-math.log(sigma) - before[1]) / step  # r0
        return out - signal * math.expm1(-step) * (image - before[0]) / (2 * ratio)


SAMPLERS = ("pndm", "ddim", "euler", "euler_ancestral", "dpm")
Steps = DdimSampler | PndmSampler | SigmaEulerSampler | DpmSampler


def build_sampler(schedule: NoiseSchedule, settings: DrawSettings) -> Steps:
    """A new sampler. Raises UsageError for an unknown one, and for settings that leave no step."""
    if not 1 <= settings.steps <= schedule.times:
        raise UsageError(f"steps={settings.steps}: must be from 1 to {schedule.times}")
    first = settings.steps - min(int(settings.steps * settings.strength), settings.steps)
    if first == settings.steps:
        raise UsageError(
            f"strength={settings.strength}: leaves no step of {settings.steps}; raise one of the two"
        )
    if settings.sampler == "pndm":
        return PndmSampler(schedule, settings.steps, first)
    if settings.sampler == "ddim":
        return DdimSampler(schedule, settings.steps, first)
    if settings.sampler == "dpm":
        return DpmSampler(schedule, settings.steps, first)
    if settings.sampler not in SAMPLERS:
        raise UsageError(f'sampler="{settings.sampler}": must be one of {", ".join(SAMPLERS)}')
    return SigmaEulerSampler(schedule, settings.steps, first, ancestral=settings.sampler == "euler_ancestral")
