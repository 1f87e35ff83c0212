"""Speed over an hour of 720p video: `python -m benchmarks.video_speed [-m MODEL] [--minutes 60]`.

The video is 20 seconds of rendered scenes, encoded once (H.264, a keyframe every 2 seconds as streaming services have
them) and repeated without encoding again. Reported are seconds and times real time of: keyframes read and embedded,
one frame a second read and embedded, scenes by all frames and by keyframes.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import av
import numpy as np

import sightloop
from sightloop.data.datasets.synthetic import synthetic_videos
from sightloop.data.video.pixels import frame_side, preprocess_frame
from sightloop.data.video.reader import find_scenes, read_frames, stop_workers, video_info
from sightloop.data.video.sampling import Sampling, every, keyframes
from sightloop.data.video.writing import write_video


def write_hour(path: Path, minutes: float) -> None:
    """A 720p video of so many minutes."""
    short = path.with_name("short.mp4")
    (video,) = synthetic_videos(1, seed=1, scenes=10, size=96)
    frames = (np.kron(frame[:90, :80], np.ones((8, 16, 1), np.uint8)) for frame in video.frames())
    options = {"preset": "veryfast", "x264-params": "mbtree=0:keyint=50:min-keyint=50:scenecut=0"}
    write_video(short, frames, rate=25, options=options)
    length = round(video_info(short).duration * 12800)
    with av.open(str(path), "w") as output:
        stream, shift = None, 0
        while shift < minutes * 60 * 12800:
            with av.open(str(short)) as source:
                own = source.streams.video[0]
                stream = stream or output.add_stream_from_template(own)
                for packet in source.demux(own):
                    if packet.dts is None or packet.pts is None:
                        continue
                    packet.pts, packet.dts = packet.pts + shift, packet.dts + shift
                    packet.stream = stream
                    output.mux(packet)
            shift += length


def embed(model: sightloop.Model, path: Path, sampling: Sampling) -> int:
    """Reads and embeds frames; how many there were."""
    stream, count = read_frames(path, sampling, side=frame_side(model.image_spec)), 0
    while frames := list(islice(stream, 32)):
        count += len(model.embed_images([preprocess_frame(frame, model.image_spec) for frame in frames]))
    return count


def processor_seconds() -> float:
    """Processor time of this process and of the decoders that it started, which end here."""
    stop_workers()
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-m", "--model", default="openai/clip-vit-base-patch32")
    parser.add_argument("--minutes", type=float, default=60)
    arguments = parser.parse_args()
    model = sightloop.load(arguments.model)
    model.embed_images(np.zeros((224, 224, 3), np.uint8))  # kernels are chosen
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "hour.mp4"
        write_hour(path, arguments.minutes)
        info = video_info(path)
        print(f"{info.size[1]} x {info.size[0]}, {info.duration:.0f} s, {path.stat().st_size >> 20} MB")
        tasks: dict[str, Callable[[], int]] = {
            "keyframes, embedded": lambda: embed(model, path, keyframes()),
            "one frame a second, embedded": lambda: embed(model, path, every(1.0)),
            "scenes by keyframes": lambda: len(find_scenes(path, keyframes_only=True)),
            "scenes by all frames": lambda: len(find_scenes(path)),
        }
        for name, task in tasks.items():
            start, before = time.monotonic(), processor_seconds()
            count = task()
            seconds, used = time.monotonic() - start, processor_seconds() - before
            print(
                f"{name}: {count:,} in {seconds:.1f} s, {info.duration / seconds:.1f} times real time; "
                f"{used:.1f} s of processor time, {info.duration / used:.1f} times real time a core",
                flush=True,
            )


if __name__ == "__main__":
    main()
