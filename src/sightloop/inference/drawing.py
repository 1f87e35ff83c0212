"""Drawing of images from texts: noise by key, batches, and the best of several by a judge."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from sightloop.data.images.preprocess import normalize, preprocess
from sightloop.data.text.tokenizer import Tokenizer
from sightloop.errors import UsageError
from sightloop.inference.draw_policy import DrawPolicy
from sightloop.inference.draw_policy import open_policy as open_policy
from sightloop.inference.drawing_files import write_drawing
from sightloop.inference.judges import Judge
from sightloop.inference.sample_rank import judge_signals
from sightloop.protocols import DrawNetwork, Network, require
from sightloop.tasks.denoise import DrawInputs, build_sampler, denoise
from sightloop.types import DrawSettings, Encoded, ImageSource, ImageSpec, JsonDict, JsonMapping, Limits, Size

OPTIONS = tuple(field.name for field in fields(DrawSettings))
_MAX_SIDE = 8192  # pixels; more is a mistake


def _ignore(done: int, total: int) -> None:
    """No progress is shown."""


class Drawing(NamedTuple):
    """One image to draw: the text, and which of its images."""

    prompt: str
    number: int


def image_seed(seed: int, prompt: str, number: int) -> int:
    """Seed of one image's noise, 0 to 2^63 - 1: an image depends on nothing but its key, whatever its batch."""
    key = repr((int(seed), prompt, int(number))).encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "little") >> 1


def draw_settings(defaults: DrawSettings, options: JsonMapping) -> DrawSettings:
    """A network's settings with a caller's in their place.

    Args:
        defaults: of the network.
        options: fields of `DrawSettings`; None for the default. `size` may be one number, for a square.

    Raises:
        UsageError: an unknown name, or a value that cannot be.
    """
    values = {name: value for name, value in options.items() if value is not None}
    if unknown := sorted(values.keys() - set(OPTIONS)):
        raise UsageError(f"{unknown[0]}: no option of drawing; there are {', '.join(OPTIONS)}")
    if "size" in values:
        values["size"] = _size(values["size"])
    if "interval" in values:
        values["interval"] = tuple(values["interval"])
    settings = replace(defaults, **values)
    wrong = {
        f"steps={settings.steps}: must be a whole number from 1": not _is_int(settings.steps)
        or settings.steps < 1,
        f"guidance={settings.guidance}: must be a number, at least 0 (1 for none)": not _is_number(
            settings.guidance
        )
        or not 0 <= settings.guidance < float("inf"),
        f"interval={settings.interval}: must be two shares of the steps, such as (0.0, 0.8)": len(
            settings.interval
        )
        != 2
        or not all(_is_number(share) and 0 <= share <= 1 for share in settings.interval),
        f"strength={settings.strength}: must be above 0, at most 1": not _is_number(settings.strength)
        or not 0 < settings.strength <= 1,
        f"negative={settings.negative!r}: must be a text": not isinstance(settings.negative, str),  # pyright: ignore[reportUnnecessaryIsInstance]
    }
    for text, is_wrong in wrong.items():
        if is_wrong:
            raise UsageError(text)
    return settings


def _size(value: object) -> Size:
    sides = (value, value) if _is_int(value) else value
    if isinstance(sides, (tuple, list)) and len(sides) == 2:
        height, width = sides
        if (
            isinstance(height, int)
            and isinstance(width, int)
            and 0 < min(height, width) <= max(height, width) <= _MAX_SIDE
        ):
            return height, width
    raise UsageError(f"size={value!r}: must be a side in pixels, or (height, width)")


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


@dataclass(frozen=True)
class Drawer:
    """What draws: a network with its tokenizer.

    Args:
        name: of the model.
        network: predicts.
        tokenizer: of the prompts.
        spec: normalization of pixels.
        device: of the network.
        dtype: of weights and activations.
        batch_size: images at once; with guidance the network sees twice as many rows.
    """

    name: str
    network: Network
    tokenizer: Tokenizer
    spec: ImageSpec
    device: torch.device
    dtype: torch.dtype
    batch_size: int

    @property
    def _network(self) -> DrawNetwork:
        return require(self.network, DrawNetwork)

    def draw(
        self,
        drawings: Sequence[Drawing],
        settings: DrawSettings,
        seed: int,
        init: ImageSource | None = None,
        on_step: Callable[[int, int], None] = _ignore,
    ) -> list[Image.Image]:
        """The images, in order, in batches of `batch_size` from the first on.

        Args:
            drawings: what to draw.
            settings: of all of them.
            seed: with prompt and number the key of each image's noise.
            init: image to start from, as `settings.strength` says; None for noise.
            on_step: called with the network's evaluations done and their number, of all batches.
        """
        build_sampler(self._network, settings)  # an unknown one is refused before there is work
        shape = self._network.latent_shape(settings.size)
        texts = list(dict.fromkeys([settings.negative, *(drawing.prompt for drawing in drawings)]))
        encoded = self._encode(texts)
        clean = None if init is None else self._clean(init, settings.size)
        images: list[Image.Image] = []
        batches = range(0, len(drawings), self.batch_size)
        for number, start in enumerate(batches):
            part = drawings[start : start + self.batch_size]
            rows = [texts.index(drawing.prompt) for drawing in part]
            inputs = DrawInputs(
                self._noise(part, shape, seed),
                _rows(encoded, rows),
                _rows(encoded, [0] * len(part)),
                None if clean is None else clean.expand(len(part), *shape),
            )
            latents = denoise(
                self._network,
                settings,
                inputs,
                lambda done, total, number=number: on_step(number * total + done, len(batches) * total),
            )
            with torch.inference_mode():
                pixels = self._network.decode_latents(latents.to(self.dtype)).float()
            images += to_images(pixels, self.spec)
        return images

    def write(self, image: Image.Image, path: Path) -> None:
        """Writes a drawn image; see `drawing_files`."""
        write_drawing(image, path)

    @torch.inference_mode()
    def _encode(self, texts: list[str]) -> Encoded:
        tokens = self.tokenizer.encode(texts)
        ids, lengths = (torch.from_numpy(x).to(self.device) for x in (tokens.ids, tokens.lengths))
        return self._network.encode_prompts(ids, lengths)

    @torch.inference_mode()
    def _clean(self, init: ImageSource, size: Size) -> Tensor:
        """Latents `[1, C, h, w]` of an image, stretched to the size."""
        read = preprocess(
            init, replace(self.spec, resize=size, crop=None, shortest_edge=None), limits=Limits()
        )
        pixels = normalize([read], self.spec, device=self.device, dtype=self.dtype)
        return self._network.encode_pixels(pixels).float()

    def _noise(
        self, drawings: Sequence[Drawing], shape: tuple[int, int, int], seed: int
    ) -> Callable[[], Tensor]:
        """Draws noise `[B, C, h, w]`, each image's from its own generator, on the CPU whatever the device."""
        generators = [
            torch.Generator().manual_seed(image_seed(seed, drawing.prompt, drawing.number))
            for drawing in drawings
        ]
        return lambda: torch.stack([torch.randn(shape, generator=own) for own in generators]).to(self.device)


def _rows(encoded: Encoded, rows: list[int]) -> Encoded:
    pooled = None if encoded.pooled is None else encoded.pooled[rows]
    return Encoded(encoded.tokens[rows], pooled, None if encoded.mask is None else encoded.mask[rows])


def to_images(pixels: Tensor, spec: ImageSpec) -> list[Image.Image]:
    """Images of normalized pixels `[B, 3, H, W]`, clipped to what an image can hold."""
    mean, std = (pixels.new_tensor(values)[:, None, None] for values in (spec.mean, spec.std))
    values = ((pixels * std + mean) / spec.scale).round().clamp(0, 255).to(torch.uint8)
    return [Image.fromarray(np.ascontiguousarray(own)) for own in values.permute(0, 2, 3, 1).cpu().numpy()]


def draw_images(
    drawer: Drawer,
    prompts: Sequence[str],
    options: JsonMapping,
    *,
    n: int,
    keep: int | None,
    seed: int,
    judge: Judge | None,
) -> list[Image.Image]:
    """The `keep` best of `n` images of each prompt, best first; without a judge in the order of their numbers.

    Each image's `info` has "prompt", "number", "seed", "model", "settings" and with a judge "scores" and "judge".

    Args:
        drawer: draws.
        prompts: texts.
        options: fields of `DrawSettings`, `init` (an image to start from), `on_step`, and `policy` (a `DrawPolicy`).
        n: images of each prompt.
        keep: how many are kept; None for one with a judge, for all without.
        seed: of the noise, with prompt and number.
        judge: scores the images; None for no judge.

    Raises:
        UsageError: a wrong option.
    """
    more = {name: value for name, value in options.items() if name not in ("init", "on_step", "policy")}
    settings = draw_settings(require(drawer.network, DrawNetwork).draw_defaults, more)
    kept = keep if keep is not None else n if judge is None else 1
    if not _is_int(n) or not _is_int(kept) or not 1 <= kept <= n:
        raise UsageError(f"n={n}, keep={keep}: both must be whole numbers, at least 1, and keep at most n")
    if judge is None and kept < n:
        raise UsageError(f"keep={keep}: which of {n} images are best is for a judge to say; give judge=")
    policy = options.get("policy")
    if isinstance(policy, DrawPolicy):
        policy.check_prompts(prompts)
    drawings = [Drawing(prompt, number) for prompt in prompts for number in range(n)]
    images = drawer.draw(
        drawings, settings, seed, init=options.get("init"), on_step=options.get("on_step") or _ignore
    )
    described: JsonDict = asdict(settings) | {
        "size": list(settings.size),
        "interval": list(settings.interval),
    }
    for drawing, image in zip(drawings, images, strict=True):
        image.info |= {**drawing._asdict(), "seed": seed, "model": drawer.name, "settings": described}
    groups = [images[start : start + n] for start in range(0, len(images), n)]
    if isinstance(policy, DrawPolicy):
        images = policy.keep_allowed(images)
    if judge is None or not images:
        return images
    texts = [image.info["prompt"] for image in images]
    for image, scores in zip(images, judge_signals(judge, images, texts), strict=True):
        image.info |= {"scores": scores, "judge": judge.name}
    best: list[Image.Image] = []
    for group in groups:
        own = [image for image in group if "scores" in image.info]
        best += sorted(own, key=lambda image: -judge_score(image.info["scores"]))[:kept]
    return best


def judge_score(scores: JsonMapping) -> float:
    """What images are ordered by: the ITM logit, of a judge without it the cosine."""
    return scores["itm"] if "itm" in scores else scores["itc"]
