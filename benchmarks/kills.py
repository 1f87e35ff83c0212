"""Does a killed `index` lose or repeat anything? `python -m benchmarks.kills`: 5,000 images, 50 kills, 10 at commits.

Small random images are indexed by a process that is killed (SIGKILL) again and again: at random moments, and while the
store commits. Each run goes on where the last one was killed. In the end every image that a killed run had reported
must be there, and the index must equal that of an unbroken run, row by row, vectors included.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
from PIL import Image

import sightloop
from sightloop.inference.model import Model

_COMMIT_IMAGES = 32
_LONGEST_WAIT = 0.4  # seconds from an image that was reported to a kill
_COMMIT_SECONDS = 0.03  # within which a commit is hit


def write_images(folder: Path, count: int) -> None:
    """Images of random noise in subfolders of 500, each tenth equal to the one before it, each third with a caption."""
    rng, last = np.random.default_rng(0), b""
    for number in range(count):
        path = folder / str(number // 500) / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        if number % 10 == 9:
            path.write_bytes(last)
            continue
        Image.fromarray(rng.integers(0, 256, (12, 16, 3), np.uint8)).resize((48, 36)).save(path)
        last = path.read_bytes()
        if number % 3 == 0:
            path.with_suffix(".txt").write_text(f"image number {number}")


def index(place: Path, images: Path, model: Model, report: int, commits: int) -> None:
    """Indexes in this process.

    Args:
        place: of the index.
        images: folder.
        model: that embeds.
        report: descriptor to which the id of every image goes, after the commit that holds it.
        commits: kill this process during the commit of this number; 0 never.
    """
    from sightloop.search.index import BuildOptions, Index, is_index, open_index
    from sightloop.search.lance import LanceStore

    add, seen = LanceStore.add, 0

    def add_and_die(self: LanceStore, rows: object) -> None:
        nonlocal seen
        seen += 1
        if seen == commits:
            wait = random.random() * _COMMIT_SECONDS
            threading.Timer(wait, os.kill, (os.getpid(), signal.SIGKILL)).start()
        add(self, rows)

    LanceStore.add = add_and_die
    opened = open_index(place, model=model) if is_index(place) else Index.create(place, model=model)
    options = BuildOptions(isolate=False, workers=1, commit_images=_COMMIT_IMAGES)
    for event in opened.build([images], options=options):
        if value := getattr(event, "value", None):
            os.write(report, f"{value.id}\n".encode())


def run_child(place: Path, images: Path, model: Model, kill_after: int | None, commits: int) -> list[str]:
    """Indexes in a child process and kills it.

    Args:
        place: of the index.
        images: folder.
        model: that embeds; loaded already, as the child is a fork of this process.
        kill_after: number of images after which it is killed, at a random moment; None never.
        commits: see `index`.

    Returns:
        The ids that it reported. RuntimeError if it ended otherwise than by itself or by a kill.
    """
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        try:
            index(place, images, model, writing, commits)
        except BaseException as error:
            print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
            os._exit(1)
        os._exit(0)
    os.close(writing)
    names: list[str] = []
    with open(reading) as lines:
        for line in lines:
            names.append(line.strip())
            if len(names) == kill_after:
                time.sleep(random.random() * _LONGEST_WAIT)
                os.kill(child, signal.SIGKILL)
    status = os.waitpid(child, 0)[1]
    if status not in (0, signal.SIGKILL):
        raise RuntimeError(f"the run ended with status {status}")
    return names


def main() -> None:
    """Kills, compares, and prints what it found; exit status 1 if the indexes differ."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=int, default=5000)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--commits", type=int, default=10, help="of the kills, those during a commit")
    parser.add_argument("--model", default="nano")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    random.seed(options.seed)
    aims = [True] * options.commits + [False] * (options.kills - options.commits)
    random.shuffle(aims)
    with tempfile.TemporaryDirectory() as folder:
        images, killed, whole = (Path(folder) / name for name in ("images", "killed", "whole"))
        write_images(images, options.images)
        model = sightloop.load(options.model)
        model.embed_images([np.zeros((32, 32, 3), np.uint8)])
        reported, step = set[str](), options.images / (len(aims) + 1)
        kills = {True: 0, False: 0}
        for at_commit in aims:
            after = None if at_commit else random.randint(1, max(1, round(step)))
            names = run_child(killed, images, model, after, random.randint(1, 2) if at_commit else 0)
            kills[at_commit] += 1
            reported.update(names)
            if len(reported) >= options.images:
                break
        reached = len(reported)
        reported.update(run_child(killed, images, model, None, 0))
        run_child(whole, images, model, None, 0)
        equal, text = compare(killed, whole, reported)
    text |= {"kills": kills[False], "at commits": kills[True], "images reported by killed runs": reached}
    print(json.dumps({"equal": equal} | text))
    sys.exit(not equal)


def compare(killed: Path, whole: Path, reported: set[str]) -> tuple[bool, dict[str, object]]:
    """Whether two indexes are equal, row by row, and hold what was reported; and the figures."""
    from sightloop.search.index import open_index

    first, second = (open_index(place).to_arrow(vectors=True) for place in (killed, whole))
    ids = first["id"].to_pylist()
    figures = {
        "rows": len(ids),
        "of an unbroken run": len(second),
        "twice": len(ids) - len(set(ids)),
        "lost": len(reported - set(ids)),
        "ghosts": len(set(ids) - set(second["id"].to_pylist())),
    }
    return first.equals(second) and not figures["lost"], figures


if __name__ == "__main__":
    main()
