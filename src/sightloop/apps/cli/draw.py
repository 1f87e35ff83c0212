"""The command `sightloop draw`."""

from __future__ import annotations

import hashlib
import json
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Group, Parameter

from sightloop.apps.cli.checks import check_capability, check_checkpoint, check_output_folder, check_texts
from sightloop.apps.cli.common import check_model, model_for, prepare_threads
from sightloop.apps.cli.options import (
    NamedModelOptions,
    RuntimeOptions,
    check_at_least,
    integer,
    option_name,
    read_lines,
)
from sightloop.apps.cli.output import RESUME_HINT, Column, OutputTable, ProgressReporter
from sightloop.checkpoints.hub import weights_identity
from sightloop.errors import UsageError
from sightloop.ranking.policy import Policy, read_policy
from sightloop.types import Done, Failed, JsonDict, Skipped

if TYPE_CHECKING:
    from sightloop.inference.model import Model

_IMAGES_AT_ONCE = 32  # of one call; a model that takes fewer splits them
_GRID_MARK = b"tEXtSoftware\0sightloop"  # near the start of a grid's file
_REFUSED = "the policy leaves out so many drawings of its text that none is left for it"
_SETTINGS_GROUP = Group(
    "Drawing", help="Options that are not given keep the checkpoint's own setting.", sort_key=20
)
_EPILOGUE = (
    "Examples:\n"
    "  sightloop draw 'a red circle' -m run/model --out drawings\n"
    "  sightloop draw 'a red circle' -m run/model --out drawings -n 8 --keep 2 --judge itm/model\n"
    "  sightloop draw -m run/model --file prompts.txt --out drawings --grid grid.png"
)


@Parameter(name="*", group=_SETTINGS_GROUP)
@dataclass(frozen=True, slots=True, kw_only=True)
class SettingsOptions:
    """How images are drawn, as in `sightloop.types.DrawSettings`."""

    steps: Annotated[int | None, Parameter(converter=integer)] = None
    """Steps of the sampler: more take longer, and are more exact."""

    guidance: float | None = None
    """Scale of classifier-free guidance: above 1 follows the text more closely; 1 is off."""

    size: Annotated[str | None, Parameter(metavar="SIDE|WIDTHxHEIGHT")] = None
    """Size in pixels."""

    sampler: str | None = None
    """Name of a sampler of the model, such as euler."""

    negative: str | None = None
    """Text that the images are led away from."""

    init: Annotated[Path | None, Parameter(metavar="IMAGE")] = None
    """Image to start from, stretched to the size. Default: noise."""

    strength: float | None = None
    """With --init: how much of it is replaced, above 0 up to 1 (all of it)."""

    def as_kwargs(self) -> JsonDict:
        """The options that were given, by their names in Python. Raises UsageError for a value out of range."""
        for name in ("steps", "guidance", "strength"):
            if (value := getattr(self, name)) is not None:
                check_at_least(option_name(name), value, 1 if name == "steps" else 0)
        if self.strength is not None and not 0 < self.strength <= 1:
            raise UsageError(f"--strength {self.strength:g}: must be above 0, at most 1.")
        if (self.strength is None) != (self.init is None):
            raise UsageError("--init and --strength: give both, such as --strength 0.6.")
        if self.init is not None and not self.init.is_file():
            raise UsageError(f"--init {self.init}: no such file.")
        options = {
            name: getattr(self, name) for name in ("steps", "guidance", "sampler", "negative", "strength")
        }
        options |= {"size": _parse_size(self.size), "init": None if self.init is None else str(self.init)}
        return {name: value for name, value in options.items() if value is not None}


@dataclass(frozen=True, slots=True)
class _Job:
    """What is drawn: each text's files are named by a digest of all that decides about them."""

    folder: Path
    n: int
    keep: int
    seed: int
    identity: str
    settings: JsonDict

    def files(self, prompt: str) -> list[Path]:
        """The files of a text's images, the best first."""
        key = json.dumps([prompt, self.n, self.keep, self.seed, self.identity, self.settings], sort_keys=True)
        digest = _digest(key.encode("utf-8", "surrogatepass"))
        words = "-".join(re.findall(r"\w+", prompt.lower()))[:48] or "text"
        return [self.folder / f"{words}-{digest}-{rank}.png" for rank in range(1, self.keep + 1)]

    def missing(self, prompt: str) -> list[Path]:
        """Those of them that are not there."""
        return [path for path in self.files(prompt) if not path.is_file()]


@Parameter(name="*", group=Group("Choice", sort_key=10))
@dataclass(frozen=True, slots=True, kw_only=True)
class ChoiceOptions:
    """How many images are drawn of each text, and which are kept."""

    number: Annotated[int, Parameter(alias="-n", converter=integer)] = 1
    """Images drawn of each text."""

    keep: Annotated[int | None, Parameter(converter=integer)] = None
    """Images kept of each text. Default: the best one with --judge, else all."""

    judge: Annotated[str | None, Parameter(metavar="MODEL")] = None
    """Model that orders the images of a text, by ITM if it can, else by cosine. Default: none."""

    seed: Annotated[int, Parameter(converter=integer)] = 0
    """Random seed; with text and number it decides the noise of an image."""

    policy: Annotated[Path | None, Parameter(metavar="FILE")] = None
    """TOML file of words that no text may have, and of concepts that no drawing may show. What it refuses is left out,
    and counts as failed. Default: none."""

    def kept(self) -> int:
        """Images kept of each text. Raises UsageError for numbers that do not go together."""
        check_at_least("--number", self.number, 1)
        keep = self.keep if self.keep is not None else self.number if self.judge is None else 1
        check_at_least("--keep", keep, 1)
        if keep > self.number:
            raise UsageError(f"--keep {keep}: is more than the {self.number} of --number that are drawn.")
        if keep < self.number and self.judge is None:
            raise UsageError(
                f"--keep {keep}: which of {self.number} are best is for a model to say; add --judge MODEL."
            )
        if self.judge is not None:
            check_capability(self.judge, "similarity")
            check_checkpoint(self.judge)
        return keep

    def read_policy(self) -> Policy:
        """The policy. Raises UsageError for a wrong file, or for a judge that there is not."""
        policy = Policy() if self.policy is None else read_policy(self.policy, images=True)
        if policy.concepts:
            check_capability(policy.judge, "similarity")
            check_checkpoint(policy.judge)
        return policy

    def identity(self, policy: Policy) -> str:
        """What of the judges decides about the images that are kept."""
        judges = "" if self.judge is None else weights_identity(self.judge)
        if not policy.concepts:
            return judges
        return f"{judges} {weights_identity(policy.judge)} {policy.concepts}"


_CHOICE, _SETTINGS, _RUNTIME = ChoiceOptions(), SettingsOptions(), NamedModelOptions()


def draw(
    *texts: Annotated[str, Parameter(name="TEXT", negative=())],
    file: Annotated[Path | None, Parameter(alias="-f")] = None,
    out: Annotated[Path, Parameter(alias="-o", metavar="FOLDER")],
    grid: Annotated[Path | None, Parameter(metavar="FILE.png")] = None,
    choice: ChoiceOptions = _CHOICE,
    settings: SettingsOptions = _SETTINGS,
    runtime: NamedModelOptions = _RUNTIME,
) -> int:
    """Draw images of texts.

    Each image is a PNG file with text, seed, model and settings inside, and a .json file beside it with the text as
    caption and "source": "synthetic": the folder is a dataset. A text whose images are there is skipped, so an
    interrupted run is resumed by the same command. An image depends on its text, number and seed, not on the others.

    Args:
        texts: Texts, each in quotes.
        file: Text file with one text a line; blank lines are left out. Default: none.
        out: Output folder.
        grid: Also write all images on one page. Default: none.
    """
    prompts = _prompts(texts, file)
    kept, options = choice.kept(), settings.as_kwargs()
    policy = choice.read_policy()
    check_output_folder("--out", out)
    _check_grid(grid, out)
    check_model("draw", runtime)
    identity = [weights_identity(runtime.source, runtime.lora), choice.identity(policy), runtime.dtype]
    identity += [runtime.quantize or "", "" if settings.init is None else _digest(settings.init.read_bytes())]
    job = _Job(out, choice.number, kept, choice.seed, " ".join(identity), options)
    allowed = [prompt for prompt in prompts if not policy.refuse_text(prompt)]
    rows = OutputTable([Column("file"), Column("text"), Column("score", 8, True)], as_json=runtime.json)
    with ExitStack() as stack:
        if any(job.missing(prompt) for prompt in allowed):
            prepare_threads()
            from sightloop.inference.load import drawing_folder  # imports torch

            stack.enter_context(drawing_folder(out))
        progress = stack.enter_context(ProgressReporter("drawing", rows, RESUME_HINT))
        progress.count_ahead(lambda: len(allowed) * kept + len(prompts) - len(allowed))
        for prompt in prompts:
            if reason := policy.refuse_text(prompt):
                progress.event(Failed(prompt, reason))
        if model := _draw_all(job, allowed, choice, policy, runtime, progress):
            progress.message(f"{out}: a dataset of images that {model} drew.")
    if grid is not None and allowed:
        from sightloop.inference.load import write_grid

        files = {prompt: [path for path in job.files(prompt) if path.is_file()] for prompt in allowed}
        write_grid(list(files.items()), grid)
    return progress.status


def _check_grid(grid: Path | None, out: Path) -> None:
    """Raises UsageError for a grid that would replace a file of somebody, or become an image of the dataset."""
    if grid is None:
        return
    check_output_folder("--grid", grid.parent)
    if grid.suffix.lower() != ".png":
        raise UsageError(f"--grid {grid}: must end in .png.")
    if grid.resolve().is_relative_to(out.resolve()):
        raise UsageError(
            f"--grid {grid}: is in {out}, all of whose images are drawings; name another folder."
        )
    if grid.exists():
        is_grid = False
        if grid.is_file():
            with grid.open("rb") as file:
                is_grid = _GRID_MARK in file.read(256)
        if not is_grid:
            raise UsageError(f"--grid {grid}: exists and is no grid of sightloop; name another file.")


def _digest(content: bytes) -> str:
    return hashlib.blake2b(content, digest_size=5).hexdigest()


def _prompts(texts: Sequence[str], file: Path | None) -> list[str]:
    """The texts of the command line and of the file, each once."""
    lines = [] if file is None else [line.strip() for line in read_lines("--file", file)]
    if not texts and not any(lines):
        raise UsageError("TEXT: none is given; name texts in quotes, or a file of texts with --file.")
    check_texts("TEXT", texts)
    return list(dict.fromkeys([*texts, *filter(None, lines)]))


def _parse_size(size: str | None) -> int | tuple[int, int] | None:
    """(height, width) of WIDTHxHEIGHT, or a side."""
    if size is None:
        return None
    match = re.fullmatch(r"(\d{1,5})(?:x(\d{1,5}))?", size)
    if match is None:
        raise UsageError(f"--size {size}: must be a side in pixels, or WIDTHxHEIGHT, such as 64x32.")
    return int(match[1]) if match[2] is None else (int(match[2]), int(match[1]))


def _chunks(prompts: Sequence[str], number: int) -> Iterator[list[str]]:
    """Texts that are drawn together, the same ones in every run: an image's last bit may depend on its batch."""
    count = max(1, _IMAGES_AT_ONCE // number)
    for start in range(0, len(prompts), count):
        yield list(prompts[start : start + count])


def _draw_all(
    job: _Job,
    prompts: Sequence[str],
    choice: ChoiceOptions,
    policy: Policy,
    runtime: RuntimeOptions,
    progress: ProgressReporter,
) -> str:
    """Draws what is missing; returns the model's name, "" where nothing was."""
    model: Model | None = None
    for chunk in _chunks(prompts, job.n):
        missing = {path for prompt in chunk for path in job.missing(prompt)}
        for prompt in chunk:
            for path in job.files(prompt):
                if path not in missing:
                    progress.event(Skipped(path.name, "it is drawn already"))
        if not missing:
            continue
        if model is None:
            model = model_for("draw", runtime)
            progress.start_clock()
        settings = job.settings | {"policy": policy}
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            images = model.draw(chunk, job.n, seed=job.seed, keep=job.keep, judge=choice.judge, **settings)
        _pass_on(caught, progress)
        for prompt in chunk:
            own = [image for image in images if image.info["prompt"] == prompt]
            ranks = range(len(own)) if choice.judge is not None else [image.info["number"] for image in own]
            drawn = dict(zip(ranks, own, strict=True))
            for rank, path in enumerate(job.files(prompt)):
                if path not in missing:
                    continue
                if rank not in drawn:
                    progress.event(Failed(path.name, _REFUSED))
                    continue
                image = drawn[rank]
                model.drawer.write(image, path)
                progress.event(Done(path.name, None))
                score = next(iter(image.info.get("scores", {}).values()), None)
                progress.row({"file": str(path), "text": prompt, "score": score})
    return "" if model is None else model.name


def _pass_on(caught: Sequence[warnings.WarningMessage], progress: ProgressReporter) -> None:
    """Shows warnings of drawing: those of a policy, which count, of each batch of texts; others once."""
    for warning in caught:
        if str(warning.message).startswith("policy:"):
            progress.message(str(warning.message))
        else:
            warnings.warn(warning.message, stacklevel=2)


COMMANDS = {draw: _EPILOGUE}
