"""The options that commands share, in groups; each dataclass is spread into plain flags."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias

from cyclopts import Group, Parameter, Token

from sightloop.checkpoints.catalog import BUNDLED
from sightloop.errors import UsageError
from sightloop.types import Bits, JsonDict


def whole(kind: Any, tokens: Sequence[Token]) -> int:
    """A whole number, as it stands: 3.5 is an error and not 3."""
    try:
        return int(tokens[0].value)
    except ValueError:
        raise ValueError(f"{tokens[0].value!r} is not a whole number") from None


Dtype: TypeAlias = Literal["float32", "bfloat16", "float16"]
BoxOption: TypeAlias = Annotated[str | None, Parameter(metavar="LEFT,TOP,RIGHT,BOTTOM")]

MACHINE_GROUP = Group("Model and machine", sort_key=40)
DECODING_GROUP = Group("How the model writes", sort_key=30)
FILTER_GROUP = Group("Which captions are kept", sort_key=20)
WRITE_GROUP = Group("Where captions go", sort_key=10)


@Parameter(name="*", group=MACHINE_GROUP)
@dataclass(frozen=True, slots=True, kw_only=True)
class MachineOptions:
    """Which model, where, and how images are read."""

    model: Annotated[str | None, Parameter(alias="-m")] = None
    """A hub id (Salesforce/blip-image-captioning-base), a folder or a file. `sightloop models` lists what is known.
    Without it: nano, which comes with the package; small, and often wrong."""

    device: str = "auto"
    """auto takes a GPU where there is one; or name it: cpu, cuda, cuda:1, mps."""

    dtype: Dtype = "float32"
    """Number format of the model. bfloat16 is about twice as fast on GPUs, and a little less exact."""

    quantize: Bits | None = None
    """Weights of a language model in so few bits: int4 takes a quarter of bfloat16's memory, int8 half, and answers
    differ a little."""

    batch_size: Annotated[int | None, Parameter(converter=whole)] = None
    """Images in one pass of the model: it changes speed and memory only. Without it: 8 on a CPU, 32 on a GPU."""

    workers: Annotated[int, Parameter(converter=whole)] = 2
    """Processes that read and prepare images beside the model."""

    max_pixels: Annotated[int, Parameter(converter=whole)] = 128 * 1024 * 1024
    """Images with more pixels than this are refused."""

    json: Annotated[bool, Parameter(negative=(), show_default=False)] = False
    """Print one JSON object a line instead of a table."""

    @property
    def source(self) -> str:
        """What to load."""
        return BUNDLED if self.model is None else self.model

    def check(self) -> None:
        """Raises `UsageError` for values out of range."""
        if self.batch_size is not None:
            at_least("--batch-size", self.batch_size, 1)
        at_least("--workers", self.workers, 1)
        at_least("--max-pixels", self.max_pixels, 1)
        if not re.fullmatch(r"auto|cpu|(cuda|xpu)(:\d+)?|mps", self.device):
            raise UsageError(f"--device {self.device}: use auto, cpu, cuda, cuda:N, xpu or mps.")


@Parameter(name="*", group=DECODING_GROUP)
@dataclass(frozen=True, slots=True, kw_only=True)
class DecodingOptions:
    """How text is generated. What is not given is left to the model's own setting."""

    num_beams: Annotated[int | None, Parameter(converter=whole)] = None
    """Beams: that many drafts are followed side by side and the likeliest is taken. 1 is greedy."""

    top_p: float | None = None
    """Sample from the likeliest tokens that together have this probability, above 0 up to 1."""

    top_k: Annotated[int | None, Parameter(converter=whole)] = None
    """Sample from this many of the likeliest tokens."""

    temperature: float | None = None
    """Divide logits by this before sampling: below 1 is safer, above 1 is wilder."""

    min_new_tokens: Annotated[int | None, Parameter(converter=whole)] = None
    """Least length of the text in tokens."""

    max_new_tokens: Annotated[int | None, Parameter(converter=whole)] = None
    """Greatest length of the text in tokens."""

    repetition_penalty: float | None = None
    """Above 1 makes tokens that stand there already less likely."""

    length_penalty: float | None = None
    """With beams: above 0 favours longer texts, below 0 shorter ones."""

    seed: Annotated[int | None, Parameter(converter=whole)] = None
    """For sampling: the same seed gives the same text."""

    def given(self) -> JsonDict:
        """What was set, by name. Raises `UsageError` for values that are out of range or contradict each other."""
        ranges = {
            "num_beams": 1, "top_k": 1, "min_new_tokens": 0, "max_new_tokens": 1, "seed": 0,
        }  # fmt: skip
        for name, least in ranges.items():
            if (value := getattr(self, name)) is not None:
                at_least(flag(name), value, least)
        for name in ("temperature", "repetition_penalty"):
            value = getattr(self, name)
            if value is not None and not 0 < value < float("inf"):
                raise UsageError(f"{flag(name)} {value:g}: must be above 0.")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise UsageError(f"--top-p {self.top_p:g}: must be above 0 and at most 1.")
        if self.length_penalty is not None and not abs(self.length_penalty) < float("inf"):
            raise UsageError(f"--length-penalty {self.length_penalty}: must be a number.")
        sampling = [name for name in ("top_p", "top_k", "temperature") if getattr(self, name) is not None]
        if self.num_beams is not None and self.num_beams > 1 and sampling:
            raise UsageError(f"--num-beams and {flag(sampling[0])}: choose beams or sampling, not both.")
        if self.min_new_tokens is not None and self.max_new_tokens is not None:
            at_least("--max-new-tokens", self.max_new_tokens, self.min_new_tokens)
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in values.items() if value is not None}


@Parameter(name="*", group=FILTER_GROUP)
@dataclass(frozen=True, slots=True, kw_only=True)
class FilterOptions:
    """Which captions are not worth keeping."""

    drop_if: Annotated[str | None, Parameter(metavar="REGEX")] = None
    """Drop captions in which this regular expression is found."""

    min_match: float | None = None
    """Drop captions whose probability of matching the image, as the judge sees it, is below this (0 to 1)."""

    judge: str | None = None
    """The image-text matching model that judges for --min-match. Without it the captioning model does, if it can."""

    keep_all: Annotated[bool, Parameter(negative=(), show_default=False)] = False
    """Keep empty and looping captions, which are dropped otherwise."""

    def pattern(self) -> re.Pattern[str] | None:
        """The compiled --drop-if. Raises `UsageError` for bad values of any option of this group."""
        if self.min_match is not None and not 0 <= self.min_match <= 1:
            raise UsageError(f"--min-match {self.min_match:g}: must be from 0 to 1.")
        if self.judge is not None and self.min_match is None:
            raise UsageError("--judge needs --min-match: the least probability that a caption must have.")
        try:
            return None if self.drop_if is None else re.compile(self.drop_if)
        except re.error as error:
            raise UsageError(f"--drop-if {self.drop_if!r}: not a regular expression: {error}.") from error


@Parameter(name="*", group=WRITE_GROUP)
@dataclass(frozen=True, slots=True, kw_only=True)
class WriteOptions:
    """What becomes of the captions."""

    write: Literal["skip", "overwrite", "append", "prepend"] = "skip"
    """Where a caption exists: skip the image, replace the caption, or add the new one as last or first line."""

    prefix: Annotated[str, Parameter(show_default=False)] = ""
    """Text put before every caption, as it stands."""

    suffix: Annotated[str, Parameter(show_default=False)] = ""
    """Text put behind every caption, as it stands."""

    out: Annotated[Path | None, Parameter(metavar="FILE")] = None
    """Write one table, .jsonl or .csv, instead of a .txt file beside each image."""


def at_least(name: str, value: float, least: float) -> None:
    """Raises `UsageError` where `value` is below `least`."""
    if not value >= least:
        raise UsageError(f"{name} {value:g}: must be at least {least:g}.")


def flag(name: str) -> str:
    """The flag of an option: `num_beams` -> `--num-beams`."""
    return "--" + name.replace("_", "-")


def words_or_file(option: str, value: str) -> list[str]:
    """The entries of `a,b,c`, or the lines of a file of that name; blank ones are left out.

    Raises `UsageError` where there are none, where one stands twice, or where the file cannot be read.
    """
    path = Path(value)
    try:
        is_file = path.is_file()
    except (OSError, ValueError):
        is_file = False
    if is_file:
        try:
            entries = path.read_text(encoding="utf-8-sig").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"{option} {value}: the file cannot be read as UTF-8 text: {error}.") from error
    elif "," not in value and (path.suffix.lower() in (".txt", ".csv", ".lst") or "/" in value):
        raise UsageError(f"{option} {value}: no such file; name one, or give the entries as a,b,c.")
    else:
        entries = value.split(",")
    entries = [stripped for entry in entries if (stripped := entry.strip())]
    if not entries:
        raise UsageError(f"{option} {value!r}: nothing in it; give a,b,c or a file with one entry a line.")
    twice = (
        [entry for i, entry in enumerate(entries) if entry in entries[:i]]
        if len(set(entries)) < len(entries)
        else []
    )
    if twice:
        raise UsageError(f"{option}: {twice[0]!r} stands there twice.")
    return entries


def box_of(text: str) -> tuple[float, float, float, float]:
    """The box of `left,top,right,bottom`. Raises `UsageError` for anything else, and for one that holds nothing."""
    try:
        left, top, right, bottom = (float(edge) for edge in text.split(","))
    except ValueError:
        raise UsageError(f"--box {text}: give four numbers: left,top,right,bottom in pixels.") from None
    if not (0 <= left < right < float("inf") and 0 <= top < bottom < float("inf")):
        raise UsageError(f"--box {text}: left must be below right, and top below bottom.")
    return left, top, right, bottom
