"""Video file, opened with PyAV: what it is, where its frames are, and the frames themselves; in the child process only.

Times are seconds from the beginning of the container, as players count them, and never come from frame numbers: frames
of many videos last differently long.
"""

from __future__ import annotations

import os
import stat
from bisect import bisect_right
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from time import process_time
from typing import Final

import av
import av.error
from av.container import InputContainer
from av.packet import Packet
from av.stream import Disposition
from av.video.stream import VideoStream

from sightloop.data.images import headers
from sightloop.data.video.conversion import rotation_of
from sightloop.errors import ImageError
from sightloop.types import VideoInfo, VideoLimits

# Containers that are opened; playlists and whatever else opens other files or addresses are not among them. The audio
# ones are there so that a file without video is called that.
_FORMATS: Final = (
    "mov,mp4,matroska,webm,avi,gif,apng,mpegts,mpeg,mpegvideo,flv,ogg,asf,h264,hevc,ivf,m4v,mxf,yuv4mpegpipe,"
    "mp3,wav,flac,aac"
)
_SCANNED_BYTES: Final = 1 << 28  # files up to this size have all packets listed first
_ANIMATIONS: Final = ("gif", "apng")
_FAR_SECONDS: Final = 5.0  # a gap worth a seek, in files without an index
_NEAR_SECONDS: Final = 0.25  # a gap that is never worth one
_SAME_SECONDS: Final = 1e-6  # times that differ by less are one
_STALE_SECONDS: Final = 1.0  # a frame that should have been replaced so long ago stands for nothing
_THREADS: Final = 4


@dataclass(slots=True)
class Timeline:
    """Where the frames of a video are.

    Args:
        times: of all frames, ascending, in seconds; empty where they were not counted.
        keys: times of keyframes that can be sought, ascending; empty where unknown.
        end: when the last frame ends.
    """

    times: list[float] = field(default_factory=list[float])
    keys: list[float] = field(default_factory=list[float])
    end: float = 0.0


class VideoFile:
    """An open video.

    Args:
        path: a regular file.
        limits: bounds; memory and processor time are up to the process.
        tick: called again and again while frames are decoded.

    Attributes:
        warnings: what could not be read.

    Raises:
        ImageError: it is no video, or beyond the limits.
    """

    def __init__(self, path: str, limits: VideoLimits, tick: Callable[[], None] = lambda: None) -> None:
        self.path, self.limits, self.tick = path, limits, tick
        self.warnings: list[str] = []
        self.bytes = check_file(path, limits)
        self._decoded = self._damaged = self._missing = 0
        self._cut_short = self._is_limited = False
        self._open()
        self._check_size(self.stream.codec_context.width, self.stream.codec_context.height)
        self._most = limits.max_frames
        # Small files can hold endlessly many frames of a large canvas, and each one needs those before it.
        self._is_animation = self.container.format.name in _ANIMATIONS
        self._processor_end = process_time() + limits.max_seconds / 2

    def _open(self) -> None:
        """Open it, or open it again from its beginning."""
        options = {"format_whitelist": _FORMATS, "protocol_whitelist": "file"}
        try:
            self.container = av.open(f"file:{self.path}", "r", options=options, metadata_errors="replace")
        except UnicodeEncodeError:  # a name that is no UTF-8
            self.container = av.open(open(self.path, "rb"), "r", options=options, metadata_errors="replace")  # noqa: SIM115
        except av.error.FFmpegError as error:
            raise ImageError(self.path, _open_reason(self.path, error)) from None
        self.stream = _video_stream(self.path, self.container)
        context = self.stream.codec_context
        context.thread_type = "AUTO"
        context.thread_count = min(_THREADS, os.cpu_count() or 1)
        context.options = {"max_pixels": str(self.limits.max_pixels)}
        self.origin = (self.container.start_time or 0) / av.time_base
        if self.stream.time_base is None:
            raise ImageError(self.path, "damaged: its video has no time base")
        self.tick_seconds = float(self.stream.time_base)

    def close(self) -> None:
        """Close the file."""
        self.container.close()

    def info(self) -> VideoInfo:
        """Its properties; decodes one frame.

        Raises:
            ImageError: no frame decodes.
        """
        timeline = self.timeline(by_index=False)
        frame = next(self.decode(), None)
        if frame is None:
            raise ImageError(self.path, "no frame of it can be decoded")
        _, first = frame
        turned = rotation_of(first)
        height, width = first.height, self.display_width(first.width)
        counted = len(timeline.times) or self.stream.frames or None
        return VideoInfo(
            size=(width, height) if turned in (90, 270) else (height, width),
            duration=timeline.end,
            rate=self.rate(timeline),
            frames=counted,
            rotation=turned,
            container=self.container.format.name.partition(",")[0],
            codec=self.stream.codec_context.name,
            has_audio=bool(self.container.streams.audio),
        )

    def rate(self, timeline: Timeline) -> float:
        """Frames a second: the header's average, else counted ones over their time; 0 where unknown."""
        if self.stream.average_rate:
            return float(self.stream.average_rate)
        return len(timeline.times) / timeline.end if timeline.end > 0 else 0.0

    def display_width(self, width: int) -> int:
        """Width in square pixels, by the sample aspect ratio; ratios beyond 1:4 are taken for damage."""
        ratio = self.stream.sample_aspect_ratio
        if not ratio or not 0.25 <= ratio <= 4:
            return width
        return max(1, round(width * float(ratio)))

    def timeline(self, *, by_index: bool) -> Timeline:
        """Where the frames are: all packets listed, or, of a large file, what its header and index say.

        Args:
            by_index: whether all frames must be counted, also of a large file.
        """
        duration = self._stated_duration()
        if by_index or duration is None or self.bytes <= _SCANNED_BYTES or self._ends_early(duration):
            return self._scan(duration)
        keys = sorted(
            entry.timestamp * self.tick_seconds - self.origin
            for entry in self.stream.index_entries
            if entry.is_keyframe
        )
        return Timeline([], keys, duration)

    def _stated_duration(self) -> float | None:
        if self.stream.duration:
            first = (self.stream.start_time or 0) * self.tick_seconds - self.origin
            return max(0.0, first) + self.stream.duration * self.tick_seconds
        return self.container.duration / av.time_base if self.container.duration else None

    def _ends_early(self, duration: float) -> bool:
        """Whether there is nothing within ten seconds of the end that the header states."""
        self.seek(max(0.0, duration - 1.0))
        packet = next((p for p in self._packets() if p.pts is not None or p.dts is not None), None)
        time = None if packet is None else self._packet_time(packet)
        self._cut_short = False
        self.rewind()
        return time is None or time < duration - 10.0

    def _scan(self, duration: float | None) -> Timeline:
        times: list[float] = []
        keys: list[float] = []
        end, longest = 0.0, 0
        for packet in self._packets():
            time = self._packet_time(packet)
            if time is None or packet.is_discard:
                continue
            times.append(time)
            if packet.is_keyframe:
                keys.append(time)
            end, longest = max(end, time + (packet.duration or 0) * self.tick_seconds), longest + packet.size
            if len(times) >= self._most:
                self._warn_limit()
                break
            if len(times) % 64 == 0:
                self.tick()
        times.sort()
        keys.sort()
        if not times:
            raise ImageError(self.path, "no frame in it: its video is empty, or cut off before the first one")
        if len(times) > 1 and end <= times[-1]:  # no durations
            end = times[-1] + (times[-1] - times[0]) / (len(times) - 1)
        end = max(end, times[-1] + 1e-3)
        self._check_end(duration, end, len(times))
        self.rewind()
        return Timeline(times, keys, end)

    def _check_end(self, duration: float | None, end: float, frames: int) -> None:
        """Say it where the file ends before its header does."""
        stated = self.stream.frames
        missing = 0 < frames < stated and frames < self._most
        # A container's duration may be that of longer sound: there, only a good part missing is a sign.
        slack = 1.0 if self.stream.duration else max(2.0, 0.1 * (duration or 0.0))
        if (missing or self._cut_short) and duration:
            of = f"{frames} of {stated} frames, " if missing else ""
            self.warnings.append(f"cut short or damaged: {of}{end:.1f} s of {duration:.1f} s are there")
        elif duration and end < duration - slack and frames < self._most:
            self.warnings.append(f"cut short or damaged: {end:.1f} s of {duration:.1f} s are there")
        elif self._cut_short:
            self.warnings.append(f"cut short or damaged: it ends at {end:.1f} s")

    def rewind(self) -> None:
        """Back to the beginning."""
        self.container.close()
        self._open()
        self._cut_short = False

    def seek(self, time: float) -> None:
        """To the keyframe before a time, where the file allows it, else to the beginning."""
        if self._is_animation:
            self.rewind()
            return
        try:
            offset = int((time + self.origin) / self.tick_seconds)
            self.container.seek(offset, stream=self.stream, backward=True)
        except av.error.FFmpegError:
            self.rewind()

    def _packets(self, *, keys_only: bool = False) -> Iterator[Packet[VideoStream]]:
        """Packets from here on; the end of a damaged file is its end."""
        try:
            for packet in self.container.demux(self.stream):
                # Some decoders cannot skip: they are handed keyframes alone. The demuxer is not told to skip: that
                # of MP4 then gives wrong times to some. An empty packet ends the stream.
                if not packet.size or packet.is_keyframe or not keys_only:
                    yield packet
        except av.error.FFmpegError:
            self._cut_short = True

    def _packet_time(self, packet: Packet[VideoStream]) -> float | None:
        stamp = packet.dts if packet.pts is None else packet.pts
        return None if stamp is None else stamp * self.tick_seconds - self.origin

    def decode(self, *, keys_only: bool = False) -> Iterator[tuple[float, av.VideoFrame]]:
        """Frames from here on with their times; what does not decode is counted and left out."""
        self.stream.codec_context.skip_frame = "NONKEY" if keys_only else "DEFAULT"
        time = -1.0
        for packet in self._packets(keys_only=keys_only):
            self.tick()
            try:
                frames = packet.decode()
            except MemoryError:
                raise
            except (av.error.FFmpegError, ValueError):
                self._damaged += 1
                continue
            for frame in frames:
                if frame.is_corrupt:
                    self._damaged += 1
                    continue
                is_late = self._is_animation and process_time() > self._processor_end
                if self._decoded >= self._most or is_late:
                    self._warn_limit()
                    return
                self._decoded += 1
                self._check_size(frame.width, frame.height)
                stamp = frame.dts if frame.pts is None else frame.pts
                rate = float(self.stream.average_rate or 25)
                time = time + 1 / rate if stamp is None else stamp * self.tick_seconds - self.origin
                yield time, frame

    def frames_at(
        self, times: list[float], timeline: Timeline, *, keep: bool
    ) -> Iterator[tuple[float, av.VideoFrame]]:
        """The frame that is shown at each time, with the time at which it begins.

        Args:
            times: ascending, in seconds.
            timeline: of this video, whose keyframes spare decoding what is between.
            keep: take the frame before where one does not decode; else there is none for that time.
        """
        frames, shown, following = self.decode(), None, None
        is_first, ended = True, False
        for time in times:
            position = -1.0 if is_first else following[0] if following else shown[0] if shown else time
            if self._is_far(position, time, timeline):
                frames, following = self._frames_before(time)
                shown, ended = None, following is None
            is_first = False
            while not ended and (following is None or following[0] <= time + _SAME_SECONDS):
                shown = following or shown
                following = next(frames, None)
                ended = following is None
            best = shown or following
            if best is None:
                self._missing += 1
            elif keep or not self._is_stale(best[0], time, timeline):
                yield best
            else:
                self._missing += 1

    def _is_stale(self, shown: float, time: float, timeline: Timeline) -> bool:
        """Whether frames between the one that decoded last and a time did not decode, for a second or more."""
        after = bisect_right(timeline.times, time + _SAME_SECONDS)
        expected = timeline.times[after - 1] if after else min(time, timeline.end)
        return expected - shown > _STALE_SECONDS if timeline.times else time - shown > 10 * _STALE_SECONDS

    def _is_far(self, position: float, time: float, timeline: Timeline) -> bool:
        """Whether a seek to a time decodes less than going on."""
        if self._is_animation or time - max(position, 0.0) < _NEAR_SECONDS:
            return False
        if timeline.keys:
            passed = bisect_right(timeline.keys, max(position, timeline.keys[0]))
            return bisect_right(timeline.keys, time + _SAME_SECONDS) > passed
        return time - max(position, 0.0) > _FAR_SECONDS

    def _frames_before(
        self, time: float
    ) -> tuple[Iterator[tuple[float, av.VideoFrame]], tuple[float, av.VideoFrame] | None]:
        """Frames from the last keyframe not after a time on, and the first of them."""
        for back in (0.0, 2.0, 20.0):
            self.seek(max(0.0, time - back))
            frames = self.decode()
            first = next(frames, None)
            if first is not None and first[0] <= time + _SAME_SECONDS:
                return frames, first
        self.rewind()
        frames = self.decode()
        return frames, next(frames, None)

    def _check_size(self, width: int, height: int) -> None:
        if width < 1 or height < 1:
            raise ImageError(self.path, f"its frames have {width} x {height} pixels: its header is damaged")
        if width * height > self.limits.max_pixels:
            raise ImageError(
                self.path, f"frames of {width} x {height} pixels, over the limit of {self.limits.max_pixels}"
            )

    def _warn_limit(self) -> None:
        if not self._is_limited:
            self._is_limited = True
            count = self._decoded or self._most
            self.warnings.append(
                f"only the first {count:,} of its frames were read: more are over the limits"
            )

    def final_warnings(self) -> list[str]:
        """`warnings`, and how many frames did not decode."""
        texts = list(self.warnings)
        if self._damaged:
            texts.append(f"{self._damaged} of its frames did not decode and were left out")
        if self._missing:
            texts.append(f"{self._missing} of the frames asked for did not decode and are missing")
        return texts


def check_file(path: str, limits: VideoLimits) -> int:
    """Size in bytes of a regular file within the limits."""
    try:
        status = os.stat(path)
    except FileNotFoundError:
        raise ImageError(path, "no such file") from None
    except (OSError, ValueError) as error:
        raise ImageError(path, f"cannot be read: {error}") from None
    if not stat.S_ISREG(status.st_mode):
        raise ImageError(path, "a folder, not a video" if stat.S_ISDIR(status.st_mode) else "no regular file")
    if status.st_size == 0:
        raise ImageError(path, "an empty file")
    if status.st_size > limits.max_file_bytes:
        raise ImageError(path, f"{status.st_size} bytes, over the limit of {limits.max_file_bytes}")
    return status.st_size


def _open_reason(path: str, error: av.error.FFmpegError) -> str:
    """Why a file cannot be opened, by its first bytes."""
    if isinstance(error, PermissionError):
        return "no permission to read it"
    if isinstance(error, av.error.MemoryError):
        return "needs too much memory"
    with open(path, "rb") as file:
        head = file.read(4096)
    kind = headers.image_format(head)
    if kind:
        return f"not a video: it is an image ({kind})"
    if head[4:8] == b"ftyp":
        return (
            "cut short or damaged: its index (the moov box) is missing, without which no frame can be found"
        )
    if head[:4] == b"\x1aE\xdf\xa3" or head[:4] == b"RIFF":
        return "cut short or damaged: its header cannot be read"
    _, _, what = headers.unknown_format_reason(head).rpartition(": ")
    return f"not a video that can be read: {what}"


def _video_stream(path: str, container: InputContainer) -> VideoStream:
    """The video stream that players show: not the cover of an album."""
    streams = [s for s in container.streams.video if not s.disposition & Disposition.attached_pic]
    if not streams:
        sound = "sound only" if container.streams.audio else "neither video nor sound"
        raise ImageError(path, f"there is no video in it: {sound}")
    best = container.streams.best("video")
    stream = next((s for s in streams if best is not None and s.index == best.index), streams[0])
    if stream.codec_context is None:  # pyright: ignore[reportUnnecessaryComparison]
        raise ImageError(path, "its video codec is not supported")
    return stream
