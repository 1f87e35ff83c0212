"""The command `sightloop caption`."""

from __future__ import annotations

from contextlib import ExitStack, closing
from typing import TYPE_CHECKING, Literal

from sightloop.apps.cli.common import Paths, inputs, model_for, reading, require
from sightloop.apps.cli.options import (
    BoxOption,
    DecodingOptions,
    FilterOptions,
    MachineOptions,
    WriteOptions,
    box_of,
)
from sightloop.apps.cli.output import Column, OutputTable, Screen, say
from sightloop.errors import UsageError
from sightloop.types import Done, JsonDict

if TYPE_CHECKING:
    from sightloop.annotation.caption_table import CaptionTable
    from sightloop.annotation.sidecars import SidecarSink
    from sightloop.inference.load import Model
    from sightloop.tasks.caption_filter import CaptionFilter

_WRITING, _KEEPING, _DECODING, _MACHINE = WriteOptions(), FilterOptions(), DecodingOptions(), MachineOptions()
_AGAIN = "The same command goes on from here."

_EPILOGUE = (
    "Examples:\n"
    "  sightloop caption photos\n"
    "  sightloop caption photos -m Salesforce/blip-image-captioning-base\n"
    "  sightloop caption 'photos/**/*.jpg' -m M --num-beams 3 --prefix 'ohwx, '\n"
    "  sightloop caption photos -m M --min-match 0.3 --judge Salesforce/blip-itm-base-coco\n"
    "  sightloop caption photos -m M --out captions.jsonl\n"
    "  sightloop caption photo.jpg -m florence-community/Florence-2-base-ft --box 10,20,200,180 --out part.jsonl"
)


def caption(
    *paths: Paths,
    prompt: str | None = None,
    length: Literal["short", "detailed", "long"] | None = None,
    box: BoxOption = None,
    writing: WriteOptions = _WRITING,
    keeping: FilterOptions = _KEEPING,
    decoding: DecodingOptions = _DECODING,
    machine: MachineOptions = _MACHINE,
) -> int:
    """Write a caption for every image.

    Each caption goes to a .txt file beside its image. An image that has
    one is skipped, so your own edits stay, and a run that was cut off goes on
    where it stopped. Empty and looping captions are dropped, and named.

    Parameters
    ----------
    prompt
        The words that every caption starts with, such as "a photo of".
    length
        How much to say; for models that were trained for it (Florence-2), and in place of a prompt.
    box
        Say what lies in this box, in pixels of the image as it is seen; as --length.
    """
    from sightloop.annotation.captioning import caption_images
    from sightloop.tasks.caption_filter import CaptionFilter

    machine.check()
    rules = CaptionFilter(
        prompt=prompt,
        prefix=writing.prefix,
        suffix=writing.suffix,
        drop_if=keeping.pattern(),
        min_match=keeping.min_match,
        keep_all=keeping.keep_all,
        decoding=decoding.given() | _instead_of_prompt(prompt, length, box),
    )
    columns = [Column("name"), Column("caption")] + [Column("match", 6, True)] * (rules.min_match is not None)
    rows = OutputTable(columns, as_json=machine.json, go_on=True)
    with ExitStack() as stack:
        sink = stack.enter_context(closing(_sink(writing, machine, keeping, rules)))
        model, judge = _writer_and_judge(machine, keeping)
        again = "" if writing.write == "overwrite" and writing.out is None else _AGAIN
        screen = stack.enter_context(Screen("captioning", rows, again))
        screen.count_ahead(lambda: sum(1 for _ in inputs(paths)))
        job = caption_images((model, judge), inputs(paths), sink, rules, reading(machine, model))
        for event in stack.enter_context(closing(job)):
            screen.event(event)
            if not isinstance(event, Done):
                continue
            made = event.value
            if made.dropped:
                screen.drop(event.name, made.dropped, made.reason)
            else:
                screen.row(
                    {"name": event.name, "caption": made.text} | ({"match": made.score} if judge else {})
                )
    return screen.status


def _instead_of_prompt(prompt: str | None, length: str | None, box: str | None) -> JsonDict:
    """--length or --box, as the model takes them."""
    if (prompt is not None) + (length is not None) + (box is not None) > 1:
        raise UsageError("--prompt, --length and --box: give one of them.")
    if box is not None:
        return {"region": box_of(box)}
    return {} if length is None else {"length": length}


def _writer_and_judge(machine: MachineOptions, keeping: FilterOptions) -> tuple[Model, Model | None]:
    model = model_for("caption", machine)
    if keeping.min_match is None:
        return model, None
    if keeping.judge is not None:
        return model, model_for("match", machine, keeping.judge)
    require(model, "match")
    return model, model


def _sink(
    writing: WriteOptions, machine: MachineOptions, keeping: FilterOptions, rules: CaptionFilter
) -> SidecarSink | CaptionTable:
    from sightloop.annotation.caption_table import CaptionTable
    from sightloop.annotation.sidecars import SidecarSink

    if writing.out is None:
        return SidecarSink(writing.write, say)
    if writing.write in ("append", "prepend"):
        raise UsageError(f"--write {writing.write} is for .txt files; with --out use skip or overwrite.")
    settings = {"model": machine.source, "judge": keeping.judge, "rules": str(rules)}
    return CaptionTable(writing.out, "overwrite" if writing.write == "overwrite" else "skip", settings)


COMMANDS = {caption: _EPILOGUE}
