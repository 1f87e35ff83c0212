"""`sightloop caption --scenes`: captions of the scenes of videos, as subtitles or a table."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack, closing
from itertools import chain
from typing import TYPE_CHECKING

from sightloop.apps.cli.common import models_for
from sightloop.apps.cli.options import DeviceListOptions, SceneWriteOptions
from sightloop.apps.cli.output import RESUME_HINT, Column, OutputTable, ProgressReporter
from sightloop.errors import UsageError

if TYPE_CHECKING:
    from sightloop.annotation.captioning import SceneCaption
    from sightloop.tasks.caption_filter import CaptionFilter


def caption_videos(
    paths: Sequence[str], output: SceneWriteOptions, runtime: DeviceListOptions, rules: CaptionFilter
) -> int:
    """Captions every scene of the videos that paths name; the exit status."""
    from sightloop.annotation.captioning import SceneFile, caption_scenes, check_installed
    from sightloop.annotation.inputs import find_images

    if output.out is None:
        raise UsageError("--scenes: give --out FILE.srt, FILE.vtt or FILE.jsonl, which the captions go to.")
    if rules.min_match is not None:
        raise UsageError("--scenes: goes without --min-match.")
    if output.write in ("append", "prepend") or "region" in rules.decoding:
        raise UsageError("--scenes: goes without --region, --write append and --write prepend.")
    check_installed()
    settings = {"model": runtime.source, "lora": runtime.lora, "rules": str(rules)}
    columns = [Column("name"), Column("start", 8, True), Column("end", 8, True), Column("caption")]
    rows = OutputTable(columns, as_json=runtime.json, ignore_closed_pipe=True)
    with ExitStack() as stack:
        file = stack.enter_context(SceneFile(output.out, settings, overwrite=output.write == "overwrite"))
        progress = stack.enter_context(ProgressReporter("captioning", rows, RESUME_HINT))
        inputs = find_images(paths, "video")
        for first in inputs:
            if isinstance(first, str):
                break
            progress.event(first)
        else:
            return progress.status
        model = models_for(stack, "caption", runtime)
        progress.start_clock()

        def show(video: str, caption: SceneCaption) -> None:
            if caption.reason:
                progress.drop(f"{video} at {caption.start:.2f} s", "unwanted", caption.reason)
                return
            times = {"start": round(caption.start, 3), "end": round(caption.end, 3)}
            progress.row({"name": video, **times, "caption": caption.text})

        events = caption_scenes(
            model,
            chain([first], inputs),
            file,
            rules,
            show,
            progress.message,
            parallel=getattr(model, "parallel", 1),
        )
        with closing(events):
            for event in events:
                progress.event(event)
        for path in file.written:
            progress.message(f"{path}: written.")
    return progress.status
