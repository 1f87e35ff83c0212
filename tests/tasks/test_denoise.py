"""Drawing from noise: times and samplers on flows with known solutions, and guidance."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from sightloop.errors import CheckpointError, UsageError
from sightloop.protocols import Sampler
from sightloop.tasks.denoise import FLOW_SAMPLERS, DrawInputs, build_sampler, denoise, flow_times
from sightloop.types import DrawSettings, Encoded, Size

SHAPE = (2, 1, 2, 2)


class _Flow:
    """A drawing network with a flow of one's choice: (latents, times, tokens of the prompts) -> flow."""

    draw_defaults = DrawSettings((2, 2), steps=8, guidance=1.0)
    samplers = ("euler", "heun")

    def __init__(self, flow: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
        self.flow, self.rows = flow, list[int]()

    def encode_prompts(self, ids: Tensor, lengths: Tensor) -> Encoded:
        return Encoded(ids[..., None].float())

    def latent_shape(self, size: Size) -> tuple[int, int, int]:
        return (1, *size)

    def time_shift(self, size: Size) -> float:
        return 1.0

    def denoise(self, latents: Tensor, times: Tensor, prompts: Encoded) -> Tensor:
        self.rows.append(len(latents))
        return self.flow(latents, times[:, None, None, None], prompts.tokens[:, :1, :, None])

    def decode_latents(self, latents: Tensor) -> Tensor:
        return latents

    def encode_pixels(self, pixels: Tensor) -> Tensor:
        return pixels


def _inputs(clean: Tensor | None = None) -> DrawInputs:
    random = torch.Generator().manual_seed(0)
    noise = torch.randn(SHAPE, generator=random)
    return DrawInputs(
        lambda: noise, Encoded(torch.full((2, 1, 1), 3.0)), Encoded(torch.full((2, 1, 1), 1.0)), clean
    )


def _draw(network: _Flow, clean: Tensor | None = None, **changes: object) -> Tensor:
    settings = DrawSettings((2, 2), **({"steps": 8, "guidance": 1.0} | changes))  # pyright: ignore
    return denoise(network, settings, _inputs(clean))


def test_times_go_from_noise_to_the_image_and_shift_toward_noise() -> None:
    assert flow_times(4, 1.0).tolist() == [1.0, 0.75, 0.5, 0.25, 0.0]
    # Esser et al. 2024, equation 23, at s = 3: 3 * 0.5 / (1 + 2 * 0.5) = 0.75.
    assert flow_times(2, 3.0).tolist() == [1.0, 0.75, 0.0]
    assert flow_times(4, 1.0, 0.6).tolist() == pytest.approx([0.6, 0.5, 0.25, 0.0])


@pytest.mark.parametrize("sampler", ["euler", "heun"])
def test_a_straight_flow_is_followed_exactly(sampler: str) -> None:
    """Flow = noise - image is constant along the way: any number of steps ends at the image."""
    image = torch.tensor([0.5, -0.25])[:, None, None, None]
    noise = _inputs().noise()
    network = _Flow(lambda x, t, text: noise - image)
    for steps in (1, 3):
        assert torch.allclose(_draw(network, sampler=sampler, steps=steps), image.expand(SHAPE), atol=1e-6)


def test_heun_is_of_second_order_and_euler_of_first() -> None:
    """dx/dt = -2 x from x(1) has x(0) = x(1) e^2; halving the step divides the error by 2, or by 4."""
    exact = _inputs().noise() * torch.tensor(2.0).exp()

    def error(sampler: str, steps: int) -> float:
        network = _Flow(lambda x, t, text: -2 * x)
        return float((_draw(network, sampler=sampler, steps=steps) - exact).abs().max())

    assert error("euler", 64) / error("euler", 128) == pytest.approx(2, rel=0.1)
    assert error("heun", 64) / error("heun", 128) == pytest.approx(4, rel=0.15)


@pytest.mark.parametrize("sampler", ["euler", "heun"])
def test_each_evaluation_sees_the_time_of_its_latents(sampler: str) -> None:
    """With flow = t the sum of the steps is known: Euler's left sum, Heun's trapezoids and Euler's last step."""
    network = _Flow(lambda x, t, text: t.expand_as(x))
    moved = float((_draw(network, sampler=sampler, steps=4) - _inputs().noise())[0, 0, 0, 0])
    euler = -0.25 * (1 + 0.75 + 0.5 + 0.25)
    heun = -0.25 * (0.875 + 0.625 + 0.375 + 0.25)
    assert moved == pytest.approx({"euler": euler, "heun": heun}[sampler])


def test_guidance_leads_away_from_the_negative_in_one_batch() -> None:
    network = _Flow(lambda x, t, text: text.expand_as(x))  # 1 for the negative, 3 for the prompt
    plain, guided = _draw(network, steps=2), _draw(network, steps=2, guidance=4.0)
    assert network.rows == [2, 2, 4, 4]
    noise = _inputs().noise()
    assert torch.allclose(plain, noise - 3)
    assert torch.allclose(guided, noise - (1 + 4 * (3 - 1)))


def test_guidance_acts_in_its_interval_alone() -> None:
    network = _Flow(lambda x, t, text: text.expand_as(x))
    drawn = _draw(network, steps=4, guidance=4.0, interval=(0.25, 0.75))
    assert network.rows == [2, 4, 4, 2]
    assert torch.allclose(drawn, _inputs().noise() - (3 + 9 + 9 + 3) / 4)


def test_a_drawing_may_start_from_an_image() -> None:
    clean = torch.full(SHAPE, 0.7)
    still = _Flow(lambda x, t, text: torch.zeros_like(x))
    for strength in (0.25, 0.5, 1.0):
        expected = torch.lerp(clean, _inputs().noise(), strength)
        assert torch.allclose(_draw(still, clean, strength=strength), expected)


def test_numbers_that_are_not_finite_are_an_error() -> None:
    with pytest.raises(CheckpointError, match="latents are NaN"):
        _draw(_Flow(lambda x, t, text: x * torch.nan))


def test_an_unknown_sampler_is_refused_by_name() -> None:
    with pytest.raises(UsageError, match='sampler="dpm": must be one of euler, heun'):
        build_sampler(_Flow(lambda x, t, text: x), DrawSettings((2, 2), 4, 1.0, sampler="dpm"))


def test_a_network_may_bring_its_own_sampler() -> None:
    class _Own(_Flow):
        def build_sampler(self, settings: DrawSettings) -> Sampler:
            return FLOW_SAMPLERS["euler"](torch.tensor([1.0, 0.0]))

    network = _Own(lambda x, t, text: x)
    assert torch.allclose(_draw(network, steps=50), torch.zeros(SHAPE))
    assert network.rows == [2]
