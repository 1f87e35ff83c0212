"""The command `sightloop caption`."""

from __future__ import annotations

from contextlib import ExitStack, closing
from typing import TYPE_CHECKING, Literal

from sightloop.apps.cli.common import Paths, list_images, loader_config, model_for, require_capability
from sightloop.apps.cli.options import (
    DecodingOptions,
    FilterOptions,
    RegionOption,
    RuntimeOptions,
    WriteOptions,
    parse_region,
)
from sightloop.apps.cli.output import RESUME_HINT, Column, OutputTable, ProgressReporter, print_message
from sightloop.errors import UsageError
from sightloop.types import Done, JsonDict

if TYPE_CHECKING:
    from sightloop.annotation.caption_table import CaptionTable
    from sightloop.annotation.sidecars import SidecarSink
    from sightloop.inference.model import Model
    from sightloop.tasks.caption_filter import CaptionFilter

_OUTPUT, _FILTER = WriteOptions(), FilterOptions()
_DECODING, _RUNTIME = DecodingOptions(), RuntimeOptions()

_EPILOGUE = (
    "Examples:\n"
    "  sightloop caption photos\n"
    "  sightloop caption photos -m Salesforce/blip-image-captioning-base\n"
    "  sightloop caption 'photos/**/*.jpg' -m M --num-beams 3 --prefix 'ohwx, '\n"
    "  sightloop caption photos -m M --min-match 0.3 --judge Salesforce/blip-itm-base-coco\n"
    "  sightloop caption photos -m M --out captions.jsonl\n"
    "  sightloop caption cat.jpg -m florence-community/Florence-2-base-ft --region 10,20,200,180"
)


def caption(
    *paths: Paths,
    prompt: str | None = None,
    length: Literal["short", "detailed", "long"] | None = None,
    region: RegionOption = None,
    output: WriteOptions = _OUTPUT,
    filtering: FilterOptions = _FILTER,
    decoding: DecodingOptions = _DECODING,
    runtime: RuntimeOptions = _RUNTIME,
) -> int:
    """Write a caption for every image.

    Each caption goes to a .txt file next to its image. An image that has one is skipped: your own edits are kept, and
    an interrupted run is resumed by the same command. Empty captions and captions that repeat themselves are dropped
    and reported.

    Args:
        prompt: Beginning of every caption, such as "a photo of". Default: none.
        length: Length of the captions, for models trained on several (Florence-2); excludes --prompt.
        region: Caption only this box, in pixels of the upright image (Florence-2); excludes --prompt and --length.
    """
    from sightloop.annotation.captioning import caption_images
    from sightloop.tasks.caption_filter import CaptionFilter

    runtime.check()
    rules = CaptionFilter(
        prompt=prompt,
        prefix=output.prefix,
        suffix=output.suffix,
        drop_if=filtering.pattern(),
        min_match=filtering.min_match,
        keep_all=filtering.keep_all,
        decoding=decoding.as_kwargs() | _length_or_region(prompt, length, region),
    )
    columns = [Column("name"), Column("caption")] + [Column("match", 6, True)] * (rules.min_match is not None)
    rows = OutputTable(columns, as_json=runtime.json, ignore_closed_pipe=True)
    with ExitStack() as stack:
        sink = stack.enter_context(closing(_caption_sink(output, runtime, filtering, rules)))
        model, judge = _captioner_and_judge(runtime, filtering)
        resume_hint = "" if output.write == "overwrite" and output.out is None else RESUME_HINT
        progress = stack.enter_context(ProgressReporter("captioning", rows, resume_hint))
        progress.count_ahead(lambda: sum(1 for _ in list_images(paths)))
        events = caption_images(
            (model, judge), list_images(paths), sink, rules, loader_config(runtime, model)
        )
        for event in stack.enter_context(closing(events)):
            progress.event(event)
            if not isinstance(event, Done):
                continue
            result = event.value
            if result.dropped:
                progress.drop(event.name, result.dropped, result.why)
            else:
                match = {"match": result.score} if judge else {}
                progress.row({"name": event.name, "caption": result.text} | match)
    return progress.status


def _length_or_region(prompt: str | None, length: str | None, region: str | None) -> JsonDict:
    """--length or --region as keyword arguments of `Model.caption`."""
    if (prompt is not None) + (length is not None) + (region is not None) > 1:
        raise UsageError("--prompt, --length and --region: give only one of them.")
    if region is not None:
        return {"region": parse_region(region)}
    return {} if length is None else {"length": length}


def _captioner_and_judge(runtime: RuntimeOptions, filtering: FilterOptions) -> tuple[Model, Model | None]:
    """The captioning model, and the ITM model for --min-match."""
    model = model_for("caption", runtime)
    if filtering.min_match is None:
        return model, None
    if filtering.judge is not None:
        return model, model_for("match", runtime, filtering.judge)
    require_capability(model, "match")
    return model, model


def _caption_sink(
    output: WriteOptions, runtime: RuntimeOptions, filtering: FilterOptions, rules: CaptionFilter
) -> SidecarSink | CaptionTable:
    """The writer of sidecar files, or of the table of --out."""
    from sightloop.annotation.caption_table import CaptionTable
    from sightloop.annotation.sidecars import SidecarSink

    if output.out is None:
        return SidecarSink(output.write, print_message)
    if output.write in ("append", "prepend"):
        raise UsageError(f"--write {output.write} is for .txt files; with --out use skip or overwrite.")
    settings = {"model": runtime.source, "judge": filtering.judge, "rules": str(rules)}
    return CaptionTable(output.out, "overwrite" if output.write == "overwrite" else "skip", settings)


COMMANDS = {caption: _EPILOGUE}
