"""What crosses rooms: plain, frozen records and the protocols of what a network can do. Imports no torch at run time.

Shape letters used everywhere: B images (or memories), R rows (texts, beams, candidates), N image tokens, L text
tokens, D width, H heads, V vocabulary, P embedding width.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, Literal, Protocol, TypeAlias, TypeVar

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from PIL import Image
    from torch import Tensor, nn

# A JSON object as it was parsed, or as it is to be written; values are checked where they are read.
JsonDict: TypeAlias = dict[str, Any]
JsonMapping: TypeAlias = Mapping[str, Any]

# Arrays of any shape.
Floats: TypeAlias = "NDArray[np.float64]"
Floats32: TypeAlias = "NDArray[np.float32]"
Integers: TypeAlias = "NDArray[np.int64]"

Box: TypeAlias = tuple[
    float, float, float, float
]  # left, top, right, bottom in pixels; right and bottom exclusive
Size: TypeAlias = tuple[int, int]  # height, width in pixels
Bits: TypeAlias = Literal["int8", "int4"]

Interpolation = Literal["nearest", "box", "bilinear", "hamming", "bicubic", "lanczos"]


@dataclass(frozen=True, slots=True)
class ImageSpec:
    """How a decoded RGB image becomes the pixels that a network sees: resize, centre crop, scale, normalise.

    At most one of these may be set: `shortest_edge` (keeps the aspect), `resize` (height, width; stretches), and
    `patches` (their side in pixels, how many at most): as large as whole patches allow, nearly in the image's own
    aspect, so that images differ in size (SigLIP 2's NaFlex).
    tiles: resolutions (height, width), multiples of a square `crop`; the image is made as large as fits into the best
    of them and cut into squares; the stretched whole stands above them, all below one another (LLaVA 1.6).
    square: an image is first put in the middle of a square of this colour (0..255 each), as large as its longer side.
    `crop` is (height, width), cut from the centre, padded with black where the image is smaller.
    A pixel value v in 0..255 becomes (v * scale - mean) / std, in float32.
    """

    shortest_edge: int | None = None
    resize: tuple[int, int] | None = None
    crop: tuple[int, int] | None = None
    interpolation: Interpolation = "bicubic"
    scale: float = 1 / 255
    mean: tuple[float, float, float] = (0.0, 0.0, 0.0)
    std: tuple[float, float, float] = (1.0, 1.0, 1.0)
    patches: tuple[int, int] | None = None
    tiles: tuple[tuple[int, int], ...] = ()
    square: tuple[int, int, int] | None = None


@dataclass(frozen=True, slots=True)
class Limits:
    """What decoding one image may cost. Beyond any of these the image is refused with an `ImageError`."""

    max_pixels: int = 128 * 1024 * 1024
    max_file_bytes: int = 512 * 1024 * 1024
    max_seconds: float = 8.0
    max_memory_bytes: int = 2 * 1024**3


@dataclass(frozen=True, slots=True)
class Pixels:
    """One prepared image: uint8 `[3, H, W]` after resize and crop, before scale and normalise.

    `name` is for messages; `size` is the (height, width) of the original image after its EXIF turn.
    """

    name: str
    values: NDArray[np.uint8]
    size: tuple[int, int]


@dataclass(frozen=True, slots=True)
class Tokens:
    """Token ids of R texts, padded at the end to one length: int64 `[R, L]`, and the lengths `[R]` without padding."""

    ids: NDArray[np.int64]
    lengths: NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Encoded:
    """What every tower returns. tokens `[B, N, D]`, pooled `[B, D]`, mask bool `[B, N]` (True = attend)."""

    tokens: Tensor
    pooled: Tensor | None = None
    mask: Tensor | None = None


class ImageTowerConfig(Protocol):
    """Sizes of an image tower.

    image_size: pixels a side. patch: pixels between the positions of its output. dim: width of the pooled state.
    """

    @property
    def image_size(self) -> int: ...
    @property
    def patch(self) -> int: ...
    @property
    def dim(self) -> int: ...
    def build(self) -> nn.Module: ...


@dataclass(frozen=True, slots=True)
class Question:
    """A question about an image and the answers that people gave, at least one; equal answers may repeat."""

    question: str
    answers: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation. role: "user" or "assistant", or "system" for how the model is to behave, first.

    images: the images that the user shows with it, in order.
    """

    role: str
    text: str
    images: tuple[ImageSource, ...] = ()


@dataclass(frozen=True, slots=True)
class Region:
    """A thing in an image.

    box: (left, top, right, bottom) in pixels of the upright image, right and bottom exclusive.
    polygons: outlines as flat x, y, x, y, ... rows in the same pixels; empty where there are none.
    score: how sure the model that found it is; higher is surer. None where it does not say, or where people drew it.
    mask: bool `[H, W]` of the whole upright image, or None.
    """

    label: str
    box: tuple[float, float, float, float]
    polygons: tuple[tuple[float, ...], ...] = ()
    score: float | None = None
    mask: NDArray[np.bool_] | None = field(default=None, compare=False, repr=False)


@dataclass(frozen=True, slots=True)
class Sample:
    """What every source of training or evaluation data yields: one image and what is known about it.

    key: unique in its dataset, and its name in messages. image: the encoded bytes, or the file that holds them.
    extra: what the source says beside that, as JSON values, kept by conversions.
    """

    key: str
    image: bytes | Path
    captions: tuple[str, ...] = ()
    questions: tuple[Question, ...] = ()
    regions: tuple[Region, ...] = ()
    label: str | None = None
    extra: Mapping[str, Any] = field(default_factory=dict[str, Any])


@dataclass(frozen=True, slots=True)
class Loss:
    """What every objective returns.

    value: a scalar with a gradient: this process's share of the loss of the global batch; the shares of all processes
    sum to that loss. chance: what the whole loss is worth when nothing was learned. facts: further shares to report.
    """

    value: Tensor
    chance: float
    facts: Mapping[str, Tensor] = field(default_factory=dict[str, "Tensor"])


T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Done(Generic[T]):
    """The verb was applied to the image `name`; `value` is what it gave."""

    name: str
    value: T


@dataclass(frozen=True, slots=True)
class Skipped:
    """The input needed no work; `reason` says why, as the end of a sentence ("it has a caption already")."""

    name: str
    reason: str


@dataclass(frozen=True, slots=True)
class Failed:
    """The input could not be worked on; `reason` says why and, where there is one, gives the remedy."""

    name: str
    reason: str


Event: TypeAlias = "Done[T] | Skipped | Failed"

# An image as a caller may hand it over: a path, encoded bytes, a PIL image, an array [H, W], [H, W, 3|4] (uint8,
# uint16 or float 0..1), or one that is already prepared.
ImageSource: TypeAlias = "str | PathLike[str] | bytes | Image.Image | NDArray[np.generic] | Pixels"
