"""The command `sightloop caption`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, closing
from itertools import chain
from typing import TYPE_CHECKING, Literal, TypeAlias

from sightloop.apps.cli.caption_scenes import caption_videos
from sightloop.apps.cli.checks import check_capability, check_checkpoint
from sightloop.apps.cli.common import (
    Paths,
    check_model,
    list_images,
    loader_config,
    models_for,
    require_capability,
    start_reading,
)
from sightloop.apps.cli.options import (
    DeviceListOptions,
    FilterOptions,
    RegionOption,
    RuntimeOptions,
    SceneWriteOptions,
    WriteOptions,
    parse_region,
)
from sightloop.apps.cli.output import RESUME_HINT, Column, OutputTable, ProgressReporter, print_message
from sightloop.apps.cli.ranking_options import WritingOptions
from sightloop.checkpoints.hub import weights_identity
from sightloop.errors import UsageError
from sightloop.types import Done, Failed, JsonDict, Skipped

if TYPE_CHECKING:
    from sightloop.annotation.captioning import CaptionTable
    from sightloop.annotation.sidecars import SidecarSink
    from sightloop.apps.cli.device_pool import DevicePool
    from sightloop.inference.model import Model
    from sightloop.tasks.caption_filter import CaptionFilter

# The captioner, and the model that scores its captions.
_Models: TypeAlias = "tuple[Model | DevicePool, Model | DevicePool | None]"
_OUTPUT, _FILTER = SceneWriteOptions(), FilterOptions()
_DECODING, _RUNTIME = WritingOptions(), DeviceListOptions()

_EPILOGUE = (
    "Examples:\n"
    "  sightloop caption photos\n"
    "  sightloop caption photos -m Salesforce/blip-image-captioning-base\n"
    "  sightloop caption 'photos/**/*.jpg' -m M --num-beams 3 --prefix 'ohwx, '\n"
    "  sightloop caption photos -m M --min-match 0.3 --judge Salesforce/blip-itm-base-coco\n"
    "  sightloop caption photos -m M --out captions.jsonl\n"
    "  sightloop caption clips --scenes --out captions.srt\n"
    "  sightloop caption cat.jpg -m florence-community/Florence-2-base-ft --region 10,20,200,180"
)


def caption(
    *paths: Paths,
    prompt: str | None = None,
    length: Literal["short", "detailed", "long"] | None = None,
    region: RegionOption = None,
    output: SceneWriteOptions = _OUTPUT,
    filtering: FilterOptions = _FILTER,
    decoding: WritingOptions = _DECODING,
    runtime: DeviceListOptions = _RUNTIME,
) -> int:
    """Write a caption for every image.

    Each caption goes to a .txt file next to its image. An image that has one is skipped: your own edits are kept, and
    an interrupted run is resumed by the same command. Empty captions and captions that repeat themselves are dropped
    and reported.

    With --scenes, for every scene of videos, with its times, as subtitles or a table.

    Args:
        prompt: Beginning of every caption, such as "a photo of". Default: none.
        length: Length of the captions, for models trained on several (Florence-2); excludes --prompt.
        region: Caption only this box, in pixels of the upright image (Florence-2); excludes --prompt and --length.
    """
    from sightloop.tasks.caption_filter import CaptionFilter

    rules = CaptionFilter(
        prompt=prompt,
        prefix=output.prefix,
        suffix=output.suffix,
        drop_if=filtering.pattern(),
        min_match=filtering.min_match,
        keep_all=filtering.keep_all,
        decoding=decoding.as_kwargs() | _length_or_region(prompt, length, region),
    )
    runtime.names()
    check_model("caption", runtime)
    if output.scenes:
        return caption_videos(paths, output, runtime, rules)
    _check_judge(runtime, filtering)
    columns = [Column("name"), Column("caption")] + [Column("match", 6, True)] * (rules.min_match is not None)
    rows = OutputTable(columns, as_json=runtime.json, ignore_closed_pipe=True)
    with ExitStack() as stack:
        sink = stack.enter_context(closing(_caption_sink(output, runtime, filtering, rules)))
        resume_hint = "" if output.write == "overwrite" and output.out is None else RESUME_HINT
        progress = stack.enter_context(ProgressReporter("captioning", rows, resume_hint))
        inputs = list_images(paths, videos=True)
        first = _first_needed(inputs, sink, progress)
        if first is None:
            sink.finish()
            return progress.status
        models = _captioner_and_judge(stack, runtime, filtering)
        progress.start_clock()
        progress.count_ahead(lambda: sum(1 for _ in list_images(paths, videos=True)))
        _caption(models, chain([first], inputs), sink, rules, progress, runtime)
    return progress.status


def _first_needed(
    inputs: Iterator[str | Skipped | Failed], sink: SidecarSink | CaptionTable, progress: ProgressReporter
) -> str | None:
    """The first image that needs a caption; the inputs before it are reported. None if no image needs one."""
    from sightloop.annotation.inputs import not_an_image

    for item in inputs:
        event = sink.check(item) if isinstance(item, str) else item
        if event is None and isinstance(item, str):
            if not (reason := not_an_image(item)):
                return item
            event = Failed(item, reason)
        if isinstance(event, Skipped):
            sink.note_skipped(event.name)
        if event is not None:
            progress.event(event)
    return None


def _caption(
    models: _Models,
    inputs: Iterator[str | Skipped | Failed],
    sink: SidecarSink | CaptionTable,
    rules: CaptionFilter,
    progress: ProgressReporter,
    runtime: RuntimeOptions,
) -> None:
    """Captions the images, and prints a row for each caption that is kept."""
    from sightloop.annotation.captioning import caption_images

    loader = loader_config(runtime, models[0], videos=True)
    with closing(caption_images(models, inputs, sink, rules, loader)) as events:
        for event in events:
            progress.event(event)
            if not isinstance(event, Done):
                continue
            result = event.value
            if result.dropped:
                progress.drop(event.name, result.dropped, result.reason)
            else:
                match = {"match": result.score} if models[1] else {}
                progress.row({"name": event.name, "caption": result.text} | match)


def _length_or_region(prompt: str | None, length: str | None, region: str | None) -> JsonDict:
    """--length or --region as keyword arguments of `Model.caption`."""
    if (prompt is not None) + (length is not None) + (region is not None) > 1:
        raise UsageError("--prompt, --length and --region: give only one of them.")
    if region is not None:
        return {"region": parse_region(region)}
    return {} if length is None else {"length": length}


def _check_judge(runtime: RuntimeOptions, filtering: FilterOptions) -> None:
    """Checks, before a model is loaded, that the model of --min-match exists and can match."""
    if filtering.min_match is None:
        return
    check_capability(filtering.judge or runtime.model, "match")
    if filtering.judge is not None:
        check_checkpoint(filtering.judge)


def _captioner_and_judge(stack: ExitStack, runtime: DeviceListOptions, filtering: FilterOptions) -> _Models:
    """The captioning model, and the ITM model for --min-match."""
    start_reading()
    model = models_for(stack, "caption", runtime)
    if filtering.min_match is None:
        return model, None
    if filtering.judge is not None:
        return model, models_for(stack, "match", runtime, filtering.judge)
    require_capability(model, "match")
    return model, model


def _caption_sink(
    output: WriteOptions, runtime: RuntimeOptions, filtering: FilterOptions, rules: CaptionFilter
) -> SidecarSink | CaptionTable:
    """The writer of sidecar files, or of the table of --out."""
    from sightloop.annotation.captioning import CaptionTable
    from sightloop.annotation.sidecars import SidecarSink

    writer = weights_identity(runtime.source, runtime.lora)
    if output.out is None:
        return SidecarSink(output.write, print_message, writer)
    if output.write in ("append", "prepend"):
        raise UsageError(f"--write {output.write} is for .txt files; with --out use skip or overwrite.")
    settings = {"model": runtime.source, "judge": filtering.judge, "rules": str(rules)}
    return CaptionTable(output.out, "overwrite" if output.write == "overwrite" else "skip", settings, writer)


COMMANDS = {caption: _EPILOGUE}
