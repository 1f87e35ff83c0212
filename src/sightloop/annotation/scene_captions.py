"""Captions of the scenes of videos, with their times: SRT, WebVTT or JSON lines; a killed run goes on where it was."""

from __future__ import annotations

import json
import os
import unicodedata
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

from sightloop.annotation.runner import in_parallel
from sightloop.data.atomic import atomic_write, check_regular
from sightloop.data.journal import Journal, JournalLine
from sightloop.data.video.pixels import frame_side, preprocess_frame, stack_frames
from sightloop.data.video.reader import check_installed as check_installed
from sightloop.data.video.reader import find_scenes, read_frames
from sightloop.data.video.sampling import at_times, sample_times, uniform
from sightloop.errors import ImageError, UsageError
from sightloop.tasks.caption_filter import CaptionFilter, drop_reason
from sightloop.types import Done, Event, Failed, ImageSpec, JsonDict, Pixels, Skipped, Video, VideoScene

FORMATS = (".srt", ".vtt", ".jsonl")
FRAMES = 8  # of each scene
_BATCH = 4  # scenes


class SceneCaptioner(Protocol):
    """Model that writes captions of images and of frames."""

    @property
    def image_spec(self) -> ImageSpec: ...
    def caption(self, images: list[Pixels], prompt: str | None = None, **options: Any) -> list[str]: ...


@dataclass(frozen=True, slots=True)
class SceneCaption:
    """A scene with its caption; "" where it was dropped, and why."""

    start: float
    end: float
    text: str
    reason: str = ""


class SceneFile:
    """Writer of the captions of scenes; a context manager.

    Every caption goes to a journal, FILE.partial, at once; the same command resumes from there. At the end FILE is
    written whole: of several videos as SRT or WebVTT, one file each, `captions.NAME.srt`.

    Args:
        path: FILE, ending in .srt, .vtt or .jsonl.
        settings: of the run; a journal of other settings is refused.
        overwrite: whether files that exist are replaced.

    Attributes:
        written: the files that `finish` wrote.

    Raises:
        UsageError: FILE exists, cannot be written, or another run with other settings was interrupted.
    """

    def __init__(self, path: Path, settings: Mapping[str, object], *, overwrite: bool = False) -> None:
        if path.suffix.lower() not in FORMATS:
            raise UsageError(f"--out {path}: with --scenes it must end in .srt, .vtt or .jsonl.")
        if not path.parent.is_dir():
            raise UsageError(f"--out {path}: the folder {path.parent} does not exist; make it first.")
        check_regular(path)
        self.path, self.overwrite = path, overwrite
        self.written: list[Path] = []
        self._refuse_existing(path)
        self._settings: JsonDict = json.loads(json.dumps(settings, default=str))
        self._scenes: dict[str, tuple[list[int], list[VideoScene]]] = {}
        self._captions: dict[str, dict[int, SceneCaption]] = {}
        self._resumed = False
        self._journal = Journal(path.with_name(path.name + ".partial"), self._load, sync_every=1)
        if not self._resumed:
            self._journal.add({"settings": self._settings})

    def _refuse_existing(self, path: Path) -> None:
        if path.exists() and not self.overwrite:
            raise UsageError(f"--out {path}: it exists; --write overwrite replaces it.")

    def _load(self, line: JournalLine) -> None:
        entry = line.entry
        if entry is None or (line.number == 1) != ("settings" in entry):
            raise UsageError(f"{self.path}.partial is not the journal of a run: move it elsewhere.")
        if "settings" in entry:
            if entry["settings"] != self._settings:
                raise UsageError(
                    f"{self.path}.partial: is of a run with other options that was interrupted: run that command "
                    "again, or remove the file."
                )
            self._resumed = True
        elif "scenes" in entry:
            scenes = [VideoScene(start, end) for start, end in entry["scenes"]]
            self._scenes[entry["video"]] = (entry["state"], scenes)
            self._captions[entry["video"]] = {}
        else:
            scene = self._scenes[entry["video"]][1][entry["scene"]]
            caption = SceneCaption(scene.start, scene.end, entry["caption"], entry["reason"])
            self._captions[entry["video"]][entry["scene"]] = caption

    def scenes(self, video: str) -> list[VideoScene]:
        """Scenes of a video: those of an interrupted run, if the file is still the same, else found now."""
        state = os.stat(video)
        own = [state.st_size, state.st_mtime_ns]
        if video not in self._scenes or self._scenes[video][0] != own:
            scenes = find_scenes(video)
            edges = [(scene.start, scene.end) for scene in scenes]
            self._journal.add({"video": video, "state": own, "scenes": edges})
            self._scenes[video] = (own, scenes)
            self._captions[video] = {}
        return self._scenes[video][1]

    def missing(self, video: str) -> list[int]:
        """Numbers of the scenes without a caption, after `scenes`."""
        return [i for i in range(len(self._scenes[video][1])) if i not in self._captions[video]]

    def add(self, video: str, number: int, caption: SceneCaption) -> None:
        """The caption of a scene, by its number."""
        self._journal.add(
            {"video": video, "scene": number, "caption": caption.text, "reason": caption.reason}
        )
        self._captions[video][number] = caption

    def captions(self, video: str) -> list[SceneCaption]:
        """Captions of a video in order."""
        return [self._captions[video][i] for i in sorted(self._captions[video])]

    def finish(self, videos: list[str]) -> None:
        """Write FILE, or a file for each video, and remove the journal.

        Args:
            videos: those that were captioned, in order; nothing is written if there is none.
        """
        for path, own in self._targets(videos).items():
            if path != self.path:
                self._refuse_existing(path)
            atomic_write(path, self._text(path.suffix.lower(), own))
            self.written.append(path)
        if self.written:
            self._journal.remove()

    def _targets(self, videos: list[str]) -> dict[Path, list[str]]:
        if len(videos) < 2 or self.path.suffix.lower() == ".jsonl":
            return {self.path: videos} if videos else {}
        targets: dict[Path, list[str]] = {}
        for video in videos:
            stem, number = Path(video).stem, 1
            path = self.path.with_name(f"{self.path.stem}.{stem}{self.path.suffix}")
            while path in targets:  # equal names in two folders
                number += 1
                path = self.path.with_name(f"{self.path.stem}.{stem}-{number}{self.path.suffix}")
            targets[path] = [video]
        return targets

    def _text(self, kind: str, videos: list[str]) -> str:
        if kind == ".jsonl":
            rows = [
                {"name": video, "start": c.start, "end": c.end, "caption": c.text}
                for video in videos
                for c in self.captions(video)
                if c.text
            ]
            return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        cues = [caption for caption in self.captions(videos[0]) if caption.text]
        return subrip(cues) if kind == ".srt" else webvtt(cues)

    def __enter__(self) -> SceneFile:
        return self

    def __exit__(self, *_: object) -> None:
        if not self._journal.closed:
            self._journal.close()


def subrip(captions: Iterable[SceneCaption]) -> str:
    """Captions as SubRip (SRT)."""
    return "".join(
        f"{number}\n{_clock(c.start, ',')} --> {_clock(c.end, ',')}\n{_one_line(c.text)}\n\n"
        for number, c in enumerate(captions, start=1)
    )


def webvtt(captions: Iterable[SceneCaption]) -> str:
    """Captions as WebVTT (https://www.w3.org/TR/webvtt1/)."""
    cues = "".join(
        f"{_clock(c.start, '.')} --> {_clock(c.end, '.')}\n{_escape_cue(_one_line(c.text))}\n\n"
        for c in captions
    )
    return f"WEBVTT\n\n{cues}"


def _clock(seconds: float, mark: str) -> str:
    """`01:02:03,456`."""
    thousandths = round(seconds * 1000)
    minutes, rest = divmod(thousandths, 60_000)
    hours, minutes = divmod(minutes, 60)
    return f"{hours:02d}:{minutes:02d}:{rest // 1000:02d}{mark}{rest % 1000:03d}"


def _one_line(text: str) -> str:
    """Without line ends and control characters, and without the arrow that would be read as times."""
    plain = "".join(" " if unicodedata.category(letter) == "Cc" else letter for letter in text)
    return " ".join(plain.split()).replace("-->", "->")


def _escape_cue(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def caption_scenes(
    captioner: SceneCaptioner,
    inputs: Iterable[str | Skipped | Failed],
    file: SceneFile,
    rules: CaptionFilter,
    on_caption: Callable[[str, SceneCaption], None],
    warn: Callable[[str], None],
    *,
    parallel: int = 1,
) -> Generator[Event[int]]:
    """Captions the scenes of videos, and yields one event for each input: `Done` with the number of its scenes.

    Args:
        captioner: the model.
        inputs: paths of videos, and events that are passed on.
        file: where captions go; finished after the last input.
        rules: prompt, decoding and filter.
        on_caption: called with the video and each new caption.
        warn: called with what could not be read.
        parallel: calls of the model at once, each on a thread: one for each device.
    """
    videos: list[str] = []
    for item in inputs:
        if not isinstance(item, str):
            yield item
            continue
        try:
            scenes = file.scenes(item)
            frames = _scene_frames(captioner.image_spec, item, scenes, file.missing(item), warn)
            for number, text in _written(captioner, frames, rules, parallel):
                caption = _kept(scenes[number], text, rules)
                file.add(item, number, caption)
                on_caption(item, caption)
        except ImageError as error:
            yield Failed(item, error.reason)
            continue
        except OSError as error:
            yield Failed(item, error.strerror or "cannot be read")
            continue
        videos.append(item)
        yield Done(item, len(scenes))
    file.finish(videos)


def _written(
    captioner: SceneCaptioner, frames: Iterator[tuple[int, Pixels]], rules: CaptionFilter, parallel: int
) -> Iterator[tuple[int, str]]:
    """Numbers of scenes with the texts that the model writes of their frames, in order."""

    def write(batch: list[tuple[int, Pixels]]) -> list[tuple[int, str]]:
        texts = captioner.caption([own for _, own in batch], rules.prompt, **rules.decoding)
        return [(number, " ".join(text.split())) for (number, _), text in zip(batch, texts, strict=True)]

    batches = iter(lambda: list(islice(frames, _BATCH)), [])
    with closing(in_parallel(write, batches, parallel)) as written:
        for texts in written:
            yield from texts


def _kept(scene: VideoScene, text: str, rules: CaptionFilter) -> SceneCaption:
    """The caption of a scene, "" with the reason if it is dropped."""
    kind, reason = drop_reason(text, rules)
    return SceneCaption(scene.start, scene.end, "" if kind else f"{rules.prefix}{text}{rules.suffix}", reason)


def _scene_frames(
    spec: ImageSpec, video: str, scenes: list[VideoScene], missing: list[int], warn: Callable[[str], None]
) -> Iterator[tuple[int, Pixels]]:
    """Frames of each scene, read in one pass over the video; scenes of which nothing decodes are left out."""
    times = [time for i in missing for time in sample_times(uniform(FRAMES), scenes[i].start, scenes[i].end)]
    if not times:
        return
    waiting, own = list(reversed(missing)), list[Pixels]()
    number = waiting.pop()
    for frame in read_frames(Video(video), at_times(times), side=frame_side(spec), warn=warn):
        # A frame belongs to the scene in which it begins; the first one may begin a moment late.
        while waiting and frame.time >= scenes[waiting[-1]].start - 1e-3:
            if own:
                yield number, stack_frames(video, own)
            number, own = waiting.pop(), []
        own.append(preprocess_frame(frame, spec))
    if own:
        yield number, stack_frames(video, own)
