"""Records that cross rooms: image specs, tokens, samples, events, encoded images, losses.

Imports neither torch nor NumPy at run time. Shape letters used everywhere: B images (or memories), R rows (texts,
beams, candidates), N image tokens, L text tokens, D width, H heads, V vocabulary, P embedding width, Q queries.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, Literal, TypeAlias, TypeVar

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import DTypeLike, NDArray
    from PIL import Image
    from torch import Tensor

# A JSON object as it was parsed, or as it is to be written; values are checked where they are read.
JsonDict: TypeAlias = dict[str, Any]
JsonMapping: TypeAlias = Mapping[str, Any]

# Arrays of any shape.
Floats: TypeAlias = "NDArray[np.float64]"
Floats32: TypeAlias = "NDArray[np.float32]"
Integers: TypeAlias = "NDArray[np.int64]"

# Left, top, right, bottom in pixels of the upright image; right and bottom exclusive.
Box: TypeAlias = tuple[float, float, float, float]
# Height and width in pixels.
Size: TypeAlias = tuple[int, int]
Bits: TypeAlias = Literal["int8", "int4"]
# How the logits of classes become probabilities: over all classes, or for each class alone.
LogitActivation: TypeAlias = Literal["softmax", "sigmoid"]
# "pieces": SigLIP's; "language": an OPT's or a T5's; "llama" and "gemma": those of these language models.
TokenizerKind: TypeAlias = Literal["clip", "bert", "pieces", "bart", "language", "llama", "gemma"]
Interpolation: TypeAlias = Literal["nearest", "box", "bilinear", "hamming", "bicubic", "lanczos"]

# Where the tokens of an image go in a prompt.
IMAGE_PLACEHOLDER = "<image>"

# An image as a caller may pass it: a path, encoded bytes, a PIL image, an array `[H, W]` or `[H, W, 3 or 4]` (uint8,
# uint16 or float 0..1), or one that is prepared already.
ImageSource: TypeAlias = "str | PathLike[str] | bytes | Image.Image | NDArray[np.generic] | Pixels"

T = TypeVar("T")


# Images.


@dataclass(frozen=True, slots=True)
class ImageSpec:
    """Preprocessing of a decoded RGB image: resize, center crop, scale, normalize.

    A pixel value v in 0..255 becomes (v * scale - mean) / std, in float32. At most one of `shortest_edge`, `resize`
    and `patches` may be set.

    Args:
        shortest_edge: length of the shorter side in pixels after the resize; keeps the aspect ratio.
        resize: (height, width) after the resize; stretches.
        crop: (height, width) of the center crop; padded with black where the image is smaller.
        interpolation: filter of the resize.
        scale: factor on pixel values.
        mean: subtracted per channel.
        std: divided by per channel.
        patches: (side of a patch in pixels, greatest number of patches): as large as whole patches allow, nearly at
            the image's own aspect ratio, so that images differ in size (SigLIP 2's NaFlex).
        tiles: resolutions (height, width), multiples of a square `crop`: the image is fitted into the best of them and
            cut into squares; the whole image, stretched, comes first, all below one another (LLaVA 1.6).
        square: color (0..255 each) of a square onto whose center the image is put first; its side is the image's longer
            one.
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
    """Bounds on decoding one image; an image beyond any of them raises `ImageError`.

    Args:
        max_pixels: height times width.
        max_file_bytes: size of the encoded image.
        max_seconds: processor time.
        max_memory_bytes: memory of the child process that decodes.
    """

    max_pixels: int = 128 * 1024 * 1024
    max_file_bytes: int = 512 * 1024 * 1024
    max_seconds: float = 8.0
    max_memory_bytes: int = 2 * 1024**3


@dataclass(frozen=True, slots=True)
class Pixels:
    """A preprocessed image, or frames of a video, before scale and normalization.

    Args:
        name: for messages: the file name, `<bytes>`, `<array>` or the sample's key.
        values: uint8 `[3, H, W]`; frames are below one another.
        size: (height, width) of the original image, upright.
        frames: how many there are.
    """

    name: str
    values: NDArray[np.uint8]
    size: Size
    frames: int = 1


# Videos.


@dataclass(frozen=True, slots=True)
class Video:
    """A video, or a part of one, as an argument of the verbs.

    Args:
        path: the file.
        start: where the part begins, in seconds; None for the beginning.
        end: where it ends, in seconds, exclusive; None for the end.
        frames: how many of its frames a verb reads; None for as many as the verb's protocol has.
    """

    path: str | PathLike[str]
    start: float | None = None
    end: float | None = None
    frames: int | None = None


@dataclass(frozen=True, slots=True)
class VideoLimits:
    """Bounds on decoding one video, all held in a child process; a video beyond them raises `ImageError`.

    Args:
        max_pixels: height times width of a frame; 8K video (33 million) is refused unless this is raised.
        max_frames: frames decoded in one request; what comes after is left out, with a warning.
        max_file_bytes: size of the file.
        max_seconds: processor time in which no frame comes out.
        max_total_seconds: processor time of one request.
        max_memory_bytes: memory of the child process.
    """

    max_pixels: int = 4096 * 4096
    max_frames: int = 2_000_000
    max_file_bytes: int = 256 * 1024**3
    max_seconds: float = 8.0
    max_total_seconds: float = 4 * 3600.0
    max_memory_bytes: int = 2 * 1024**3


@dataclass(frozen=True, slots=True)
class VideoInfo:
    """What a video is, as its header and its first frame say.

    Args:
        size: (height, width) of the upright frames, square pixels.
        duration: in seconds, from the header, or from the last frame where that says none or is wrong.
        rate: frames a second on average; 0 where unknown.
        frames: number of frames where it was counted or the header has it, else None.
        rotation: degrees, clockwise, by which frames are turned to be upright: 0, 90, 180 or 270.
        container: "mov", "matroska", "avi", ...
        codec: "h264", "vp9", ...
        has_audio: whether there is sound, which is never read.
    """

    size: Size
    duration: float
    rate: float
    frames: int | None
    rotation: int
    container: str
    codec: str
    has_audio: bool


@dataclass(frozen=True, slots=True, eq=False)
class VideoFrame:
    """A frame of a video.

    Args:
        time: when it is shown first, in seconds from the beginning of the video.
        pixels: uint8 `[H, W, 3]`, RGB, upright.
    """

    time: float
    pixels: NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class VideoScene:
    """A part of a video between two cuts, in seconds; `end` is exclusive."""

    start: float
    end: float


# Texts.


@dataclass(frozen=True, slots=True)
class Tokens:
    """Token ids of R texts, padded at the end to one length.

    Args:
        ids: int64 `[R, L]`.
        lengths: int64 `[R]`, tokens without padding.
    """

    ids: NDArray[np.int64]
    lengths: NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Message:
    """A turn of a conversation.

    Args:
        role: "user", "assistant", or "system" (how the model is to behave; the first message only).
        text: what was said.
        images: the images that come with it, in order.
    """

    role: str
    text: str
    images: tuple[ImageSource, ...] = ()


@dataclass(frozen=True, slots=True)
class ChatTemplate:
    """Chat template.

    Args:
        user: a user's turn, "{}" for the words.
        assistant: an assistant's turn.
        system: the system message.
        asks: what comes before the assistant's next words.
        literals: the strings that the hub's Jinja template of this form prints, the words aside.
        opening: what comes first if there is no system message.
    """

    user: str
    assistant: str
    system: str
    asks: str
    literals: frozenset[str]
    opening: str = ""


# Drawing.


@dataclass(frozen=True, slots=True)
class DrawSettings:
    """How an image is drawn from noise.

    Args:
        size: (height, width) in pixels.
        steps: of the sampler, at least 1.
        guidance: scale of classifier-free guidance (Ho and Salimans 2022); 1 for none.
        interval: shares of the steps between which guidance acts (Kynkaanniemi et al. 2024): (0, 1) for all.
        sampler: one of the network's.
        negative: text that guidance leads away from; "" for the empty text.
        strength: with an image to start from, how far toward noise it is taken first, above 0 up to 1 (all noise).
    """

    size: Size
    steps: int
    guidance: float
    interval: tuple[float, float] = (0.0, 1.0)
    sampler: str = "euler"
    negative: str = ""
    strength: float = 1.0


# Datasets.


@dataclass(frozen=True, slots=True)
class Question:
    """A question about an image, and the answers of its annotators: at least one, equal ones may repeat."""

    question: str
    answers: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Round:
    """A round of a visual dialogue: a question, its answer, and answers among which the true one is to be found.

    Args:
        question: what was asked.
        answer: what a person said; None where the set keeps it secret (the last round of a test set).
        candidates: C answers to rank, 100 in VisDial; () without.
        truth: index of the true answer among the candidates; None if it is not known.
        relevance: for each candidate how right people found it, 0..1; () without.
        attributes: name, such as "sensible" -> for each candidate whether it has it, 1 or 0; {} without.
    """

    question: str
    answer: str | None = None
    candidates: tuple[str, ...] = ()
    truth: int | None = None
    relevance: tuple[float, ...] = ()
    attributes: Mapping[str, tuple[float, ...]] = field(default_factory=dict[str, "tuple[float, ...]"])


@dataclass(frozen=True, slots=True)
class Dialogue:
    """A dialogue about an image (Das et al. 2017): what both sides read first, and the rounds in order."""

    rounds: tuple[Round, ...]
    caption: str = ""


@dataclass(frozen=True, slots=True, eq=False)
class MaskRuns:
    """A mask as run lengths, as files hold it; NumPy takes it for bool `[H, W]`, which is decoded on each use.

    Args:
        shape: height and width.
        counts: int64 `[R]`, lengths of the runs of 0, 1, 0, 1, ... down the columns; they add up to H * W.
    """

    shape: Size
    counts: Integers

    def __array__(self, dtype: DTypeLike | None = None, copy: bool | None = None) -> NDArray[np.generic]:
        import numpy as np

        values = np.arange(len(self.counts)) % 2 == 1  # 0, 1, 0, ...
        bitmap = np.repeat(values, self.counts).reshape(self.shape, order="F")  # [H, W]
        return bitmap if dtype is None else bitmap.astype(dtype, copy=False)


@dataclass(frozen=True, slots=True)
class Region:
    """A labeled region of an image.

    Args:
        label: name, phrase or text.
        box: left, top, right, bottom in pixels of the upright image; right and bottom exclusive.
        polygons: outlines as flat x, y, x, y, ... in the same pixels; empty without outlines.
        score: confidence of the model, higher is surer; None for annotations, or where the model gives none.
        mask: of the whole upright image: bool `[H, W]`, or its run lengths (`np.asarray` decodes them), or None.
    """

    label: str
    box: Box
    polygons: tuple[tuple[float, ...], ...] = ()
    score: float | None = None
    mask: NDArray[np.bool_] | MaskRuns | None = field(default=None, compare=False, repr=False)


@dataclass(frozen=True, slots=True)
class Sample:
    """An image of a dataset with its annotations.

    Args:
        key: unique in its dataset; names the sample in messages.
        image: the encoded bytes, or the path of the file.
        captions: texts that describe the image.
        questions: questions with their answers.
        regions: boxes and outlines.
        label: class.
        extra: further fields of the source, as JSON values; conversions keep them.
        dialogues: conversations about the image.
    """

    key: str
    image: bytes | Path
    captions: tuple[str, ...] = ()
    questions: tuple[Question, ...] = ()
    regions: tuple[Region, ...] = ()
    label: str | None = None
    extra: JsonMapping = field(default_factory=JsonDict)
    dialogues: tuple[Dialogue, ...] = ()


# Events of a job over many images.


@dataclass(frozen=True, slots=True)
class Done(Generic[T]):
    """The result `value` for the image `name`."""

    name: str
    value: T


@dataclass(frozen=True, slots=True)
class Skipped:
    """An image that needed no work; `reason` is the end of a sentence ("it has a caption already")."""

    name: str
    reason: str


@dataclass(frozen=True, slots=True)
class Failed:
    """An image that could not be processed; `reason` gives the cause and, if there is one, the remedy."""

    name: str
    reason: str


Event: TypeAlias = "Done[T] | Skipped | Failed"


# Tensors.


@dataclass(frozen=True, slots=True)
class Encoded:
    """Output of a tower.

    Args:
        tokens: `[B, N, D]`.
        pooled: `[B, D]`, None without pooling.
        mask: bool `[B, N]`, False for padding; None if there is none.
        frames: F of videos, whose tokens are those of F frames one after another; 1 for images.
    """

    tokens: Tensor
    pooled: Tensor | None = None
    mask: Tensor | None = None
    frames: int = 1


@dataclass(frozen=True, slots=True)
class Loss:
    """Output of an objective.

    Args:
        value: scalar with a gradient: this process's share of the loss of the global batch. The shares of all
            processes sum to that loss.
        chance: the loss of a model that has learned nothing.
        facts: further shares to report.
    """

    value: Tensor
    chance: float
    facts: Mapping[str, Tensor] = field(default_factory=dict[str, "Tensor"])
