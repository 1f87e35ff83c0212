"""Options that several commands share. Each dataclass is a group of command line options, one field an option."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Literal, TypeAlias

from cyclopts import Group, Parameter, Token

from sightloop.checkpoints.catalog import BUNDLED
from sightloop.errors import UsageError
from sightloop.types import Bits, Box, JsonDict


def integer(_type: object, tokens: Sequence[Token]) -> int:
    """Converter of cyclopts for integers that refuses 3.5 instead of rounding it.

    Raises:
        ValueError: The token is not an integer.
    """
    try:
        return int(tokens[0].value)
    except ValueError:
        raise ValueError(f"{tokens[0].value!r} is not an integer") from None


def batch_size_of(_type: object, tokens: Sequence[Token]) -> int | Literal["auto"]:
    """Converter of cyclopts for a number of images or auto.

    Raises:
        ValueError: The token is neither.
    """
    return "auto" if tokens[0].value == "auto" else integer(int, tokens)


BatchSizeOption: TypeAlias = Annotated[
    int | Literal["auto"] | None, Parameter(converter=batch_size_of, metavar="N|auto")
]
DevicesOption: TypeAlias = Annotated[str | None, Parameter(metavar="DEVICE,DEVICE,...")]
Dtype: TypeAlias = Literal["auto", "float32", "bfloat16", "float16"]
RegionOption: TypeAlias = Annotated[str | None, Parameter(metavar="LEFT,TOP,RIGHT,BOTTOM")]

_DEVICE = r"auto|cpu|(cuda|xpu)(:\d+)?|mps"
RUNTIME_GROUP = Group("Model and runtime", sort_key=40)
DECODING_GROUP = Group(
    "Decoding", help="Options that are not given keep the checkpoint's own setting.", sort_key=30
)
FILTER_GROUP = Group("Caption filter", sort_key=20)
WRITE_GROUP = Group("Output", sort_key=10)


@Parameter(name="*", group=RUNTIME_GROUP)
@dataclass(frozen=True, slots=True, kw_only=True)
class RuntimeOptions:
    """The model, its device and precision, and how images are loaded."""

    model: Annotated[str | None, Parameter(alias="-m")] = None
    """Hub id (Salesforce/blip-image-captioning-base), folder or weights file; `sightloop models` lists the known
    ones. Default: nano, which comes with the package and is small and often wrong."""

    device: str = "auto"
    """cpu, cuda, cuda:N, xpu, mps, or auto: a GPU if there is one."""

    dtype: Dtype = "float32"
    """Precision of weights and activations. auto: the lowest that this machine multiplies natively and whose error is
    known, such as bfloat16; faster, and slightly less exact than float32."""

    quantize: Bits | None = None
    """Quantize the weights of a language model: int8 needs half of the memory of bfloat16, int4 a quarter; answers
    change slightly. Of other models int8 quantizes weights and activations, which is for speed. Default: off."""

    lora: Annotated[Path | None, Parameter(metavar="FOLDER")] = None
    """LoRA adapter, such as the adapter/ of a training run, merged into the weights; excludes --quantize. Default:
    none."""

    batch_size: BatchSizeOption = None
    """Images per forward pass, or auto: as many as fit the memory. Changes speed and memory, not results. Default: 8 on
    a CPU, 32 on a GPU."""

    workers: Annotated[int, Parameter(converter=integer)] = 2
    """Processes that decode and preprocess images."""

    max_pixels: Annotated[int, Parameter(converter=integer)] = 128 * 1024 * 1024
    """Images with more pixels (width x height) than this count as failed."""

    json: Annotated[bool, Parameter(negative=(), show_default=False)] = False
    """Print one JSON object per line instead of a table."""

    @property
    def source(self) -> str:
        """The checkpoint to load: `model`, or the bundled one."""
        return BUNDLED if self.model is None else self.model

    def check(self) -> None:
        """Raises `UsageError` for values out of range."""
        if isinstance(self.batch_size, int):
            check_at_least("--batch-size", self.batch_size, 1)
        check_at_least("--workers", self.workers, 1)
        check_at_least("--max-pixels", self.max_pixels, 1)
        if not re.fullmatch(_DEVICE, self.device):
            raise UsageError(f"--device {self.device}: use auto, cpu, cuda, cuda:N, xpu or mps.")
        if self.lora is not None and self.quantize is not None:
            raise UsageError(f"--lora {self.lora} and --quantize {self.quantize}: give only one of them.")


@Parameter(name="*", group=RUNTIME_GROUP)
@dataclass(frozen=True, slots=True, kw_only=True)
class NamedModelOptions(RuntimeOptions):
    """`RuntimeOptions` of commands that the bundled model has no capability for."""

    model: Annotated[str | None, Parameter(alias="-m", show_default=False)] = None
    """Hub id, folder or weights file; required, because nano, which comes with the package, cannot do this. `sightloop
    models` lists the known ones; the examples below name one to start with."""


@Parameter(name="*", group=RUNTIME_GROUP)
@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceListOptions(RuntimeOptions):
    """`RuntimeOptions` of commands that share their images among several devices."""

    devices: DevicesOption = None
    """One copy of the model on each of these devices, in place of --device: cuda:0,cuda:1 or cpu,cpu. Results and their
    order are those of one. Default: one."""

    def names(self) -> tuple[str, ...]:
        """The devices of --devices, () without it. Raises `UsageError` for a wrong name."""
        return parse_devices(self.devices, self.device)


@Parameter(name="*", group=RUNTIME_GROUP)
@dataclass(frozen=True, slots=True, kw_only=True)
class IndexRuntimeOptions(RuntimeOptions):
    """`RuntimeOptions`, and which processes decode and embed the images."""

    engine: Literal["local", "ray"] = "local"
    """local: this machine; ray: a Ray cluster (RAY_ADDRESS), to which this machine sends the images."""

    copies: Annotated[int, Parameter(converter=integer)] = 1
    """Copies of the model, each in a process with its own --workers: of this machine, or of the cluster with
    --engine ray; on GPUs the next one for each."""

    devices: DevicesOption = None
    """A copy of the model on each of these devices, in place of --copies and --device: cuda:0,cuda:1 or cpu,cpu."""

    def names(self) -> tuple[str, ...]:
        """The devices of --devices, () without it. Raises `UsageError` for a wrong name or number."""
        check_at_least("--copies", self.copies, 1)
        if self.copies > 1 and self.devices is not None:
            raise UsageError(f"--copies {self.copies} and --devices {self.devices}: give only one of them.")
        return parse_devices(self.devices, self.device)


@Parameter(name="*", group=DECODING_GROUP)
@dataclass(frozen=True, slots=True, kw_only=True)
class DecodingOptions:
    """Decoding of generated text, as in `sightloop.tasks.decoding_options.Decoding`."""

    num_beams: Annotated[int | None, Parameter(converter=integer)] = None
    """Number of beams of beam search; 1 is greedy decoding."""

    top_p: float | None = None
    """Nucleus sampling: sample from the most probable tokens whose probabilities sum to this, above 0 up to 1."""

    top_k: Annotated[int | None, Parameter(converter=integer)] = None
    """Sample from this number of most probable tokens."""

    temperature: float | None = None
    """Sample from logits divided by this, above 0; below 1 sharpens the distribution, above 1 flattens it."""

    min_new_tokens: Annotated[int | None, Parameter(converter=integer)] = None
    """Minimum length of the generated text in tokens."""

    max_new_tokens: Annotated[int | None, Parameter(converter=integer)] = None
    """Maximum length of the generated text in tokens."""

    repetition_penalty: float | None = None
    """Above 1 makes tokens that the text already contains less likely; 1 is off."""

    length_penalty: float | None = None
    """Exponent of the length that divides a beam's log-probability: above 0 favors longer texts, below 0 shorter."""

    seed: Annotated[int | None, Parameter(converter=integer)] = None
    """Random seed of sampling: the same seed gives the same text."""

    def as_kwargs(self) -> JsonDict:
        """The options that were given, by name.

        Raises:
            UsageError: A value is out of range, or two options contradict each other.
        """
        minimums = {
            "num_beams": 1, "top_k": 1, "min_new_tokens": 0, "max_new_tokens": 1, "seed": 0,
        }  # fmt: skip
        for name, minimum in minimums.items():
            if (value := getattr(self, name)) is not None:
                check_at_least(option_name(name), value, minimum)
        for name in ("temperature", "repetition_penalty"):
            value = getattr(self, name)
            if value is not None and not 0 < value < float("inf"):
                raise UsageError(f"{option_name(name)} {value:g}: must be above 0.")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise UsageError(f"--top-p {self.top_p:g}: must be above 0 and at most 1.")
        if self.length_penalty is not None and not abs(self.length_penalty) < float("inf"):
            raise UsageError(f"--length-penalty {self.length_penalty}: must be a finite number.")
        sampling = [name for name in ("top_p", "top_k", "temperature") if getattr(self, name) is not None]
        if self.num_beams is not None and self.num_beams > 1 and sampling:
            raise UsageError(
                f"--num-beams and {option_name(sampling[0])}: choose beams or sampling, not both."
            )
        if self.min_new_tokens is not None and self.max_new_tokens is not None:
            check_at_least("--max-new-tokens", self.max_new_tokens, self.min_new_tokens)
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in values.items() if value is not None}


@Parameter(name="*", group=FILTER_GROUP)
@dataclass(frozen=True, slots=True, kw_only=True)
class FilterOptions:
    """Which captions are dropped."""

    drop_if: Annotated[str | None, Parameter(metavar="REGEX")] = None
    """Drop captions in which this regular expression matches anywhere. Default: none."""

    min_match: float | None = None
    """Drop captions whose image-text matching (ITM) probability is below this, 0 to 1. Default: no matching."""

    judge: str | None = None
    """ITM model that scores captions for --min-match. Default: the captioning model, if it has an ITM head."""

    keep_all: Annotated[bool, Parameter(negative=(), show_default=False)] = False
    """Keep empty captions and captions that repeat themselves, which are dropped by default."""

    def pattern(self) -> re.Pattern[str] | None:
        """The compiled --drop-if.

        Raises:
            UsageError: An option of this group has a bad value.
        """
        if self.min_match is not None and not 0 <= self.min_match <= 1:
            raise UsageError(f"--min-match {self.min_match:g}: must be from 0 to 1.")
        if self.judge is not None and self.min_match is None:
            raise UsageError("--judge needs --min-match, the minimum probability of a caption.")
        try:
            return None if self.drop_if is None else re.compile(self.drop_if)
        except re.error as error:
            raise UsageError(f"--drop-if {self.drop_if!r}: not a regular expression: {error}.") from error


@Parameter(name="*", group=WRITE_GROUP)
@dataclass(frozen=True, slots=True, kw_only=True)
class WriteOptions:
    """Where captions are written."""

    write: Literal["skip", "overwrite", "append", "prepend"] = "skip"
    """For an image that has a caption: skip it, overwrite the caption, or append or prepend the new one as a line."""

    prefix: Annotated[str, Parameter(show_default=False)] = ""
    """Text put directly before every caption. Default: none."""

    suffix: Annotated[str, Parameter(show_default=False)] = ""
    """Text put directly after every caption. Default: none."""

    out: Annotated[Path | None, Parameter(metavar="FILE")] = None
    """Write one table, FILE.jsonl or FILE.csv. Default: a .txt file next to each image."""


@Parameter(name="*", group=WRITE_GROUP)
@dataclass(frozen=True, slots=True, kw_only=True)
class SceneWriteOptions(WriteOptions):
    """`WriteOptions` of captions, which videos have for each scene."""

    scenes: Annotated[bool, Parameter(negative=(), show_default=False)] = False
    """Caption each scene of videos, with its times, into --out FILE.srt, FILE.vtt or FILE.jsonl; of several videos as
    SRT or WebVTT, one file each, FILE.NAME.srt. Other files are left out."""


def check_at_least(name: str, value: float, minimum: float) -> None:
    """Raises `UsageError` if the value of the option `name` is below `minimum`, or NaN."""
    if not value >= minimum:
        raise UsageError(f"{name} {value:g}: must be at least {minimum:g}.")


def option_name(name: str) -> str:
    """The command line option of a field: `num_beams` -> `--num-beams`."""
    return "--" + name.replace("_", "-")


def read_lines(option: str, path: Path) -> list[str]:
    """The lines of a UTF-8 text file. Raises UsageError, with the option, if it cannot be read."""
    try:
        return path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{option} {path}: cannot be read as UTF-8 text: {error}.") from error


def parse_entries(option: str, value: str) -> list[str]:
    """The entries of `a,b,c`, or the lines of the file `value`, stripped and without blank ones.

    Args:
        option: The option, for messages: "--labels".
        value: Its value.

    Raises:
        UsageError: There is no entry, an entry is repeated, or the file cannot be read.
    """
    path = Path(value)
    try:
        is_file = path.is_file()
    except (OSError, ValueError):
        is_file = False
    if is_file:
        entries = read_lines(option, path)
    elif "," not in value and (path.suffix.lower() in (".txt", ".csv", ".lst") or "/" in value):
        raise UsageError(f"{option} {value}: no such file; name one, or give the entries as a,b,c.")
    else:
        entries = value.split(",")
    entries = [stripped for entry in entries if (stripped := entry.strip())]
    if not entries:
        raise UsageError(f"{option} {value!r}: is empty; give a,b,c or a file with one entry per line.")
    if len(set(entries)) < len(entries):
        repeated = next(entry for i, entry in enumerate(entries) if entry in entries[:i])
        raise UsageError(f"{option}: {repeated!r} is given twice.")
    return entries


def parse_devices(text: str | None, device: str = "auto") -> tuple[str, ...]:
    """The devices of `cuda:0,cuda:1`; () for None.

    Args:
        text: The value of --devices.
        device: The value of --device, which excludes it.

    Raises:
        UsageError: A device has a wrong name, or both options are given.
    """
    if text is None:
        return ()
    names = tuple(name.strip() for name in text.split(","))
    for name in names:
        if name == "auto" or not re.fullmatch(_DEVICE, name):
            raise UsageError(f"--devices {text}: {name!r} is none of cpu, cuda, cuda:N, xpu:N and mps.")
    if device != "auto":
        raise UsageError(f"--device {device} and --devices {text}: give only one of them.")
    return names


def parse_region(text: str) -> Box:
    """The box of `left,top,right,bottom`, in pixels.

    Raises:
        UsageError: `text` is not four numbers, or the box is empty.
    """
    try:
        left, top, right, bottom = (float(edge) for edge in text.split(","))
    except ValueError:
        raise UsageError(f"--region {text}: give four numbers: left,top,right,bottom in pixels.") from None
    if not (0 <= left < right < float("inf") and 0 <= top < bottom < float("inf")):
        raise UsageError(f"--region {text}: left must be below right, and top below bottom.")
    return left, top, right, bottom
