"""Runs that are killed, and readers beside a writer, in processes of their own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np

import sightloop
from sightloop.search.index import Index, open_index
from tests.search.test_index import OPTIONS, write_images
from tests.tiny_checkpoints.clip_and_blip import write_clip

ENVIRONMENT = {**os.environ, "PYTHONPATH": str(Path(sightloop.__file__).parents[1])}


def test_killed_runs_lose_and_repeat_nothing(tmp_path: Path) -> None:
    write_images(tmp_path / "photos", 30)
    write_clip(tmp_path / "clip")
    clip = sightloop.load(tmp_path / "clip")
    whole = Index.create(tmp_path / "whole", model=clip)
    whole.add(tmp_path / "photos", options=OPTIONS)
    script = (
        "import sys; from sightloop.search.index import *; import sightloop\n"
        "place, photos, model = sys.argv[1:]\n"
        "model = sightloop.load(model)\n"
        "index = open_index(place, model=model) if is_index(place) else Index.create(place, model=model)\n"
        "for event in index.build([photos], options=BuildOptions(isolate=False, workers=1, commit_images=4)):\n"
        "    print(event.value.id if hasattr(event, 'value') else '', flush=True)\n"
    )
    command = [sys.executable, "-c", script, tmp_path / "killed", tmp_path / "photos", tmp_path / "clip"]
    seen: list[str] = []
    for kills in (1, 9, 0):  # after so many lines
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=ENVIRONMENT)
        assert process.stdout is not None
        for line in process.stdout:
            seen += [line.strip()] if line.strip() else []
            kills -= bool(line.strip())
            if kills == 0:
                process.send_signal(signal.SIGKILL)
        process.stdout.close()
        process.wait()
    index = open_index(tmp_path / "killed")
    assert index.to_arrow(vectors=True).equals(whole.to_arrow(vectors=True))
    assert set(seen) <= set(index.to_arrow(["id"])["id"].to_pylist())


def test_readers_beside_a_writer_see_whole_commits(tmp_path: Path) -> None:
    index = Index.create(tmp_path / "index", dim=4)
    # Each commit adds ten rows whose width is its number; an answer holds all ten of a commit or none.
    script = (
        "import sys; from collections import Counter; from sightloop.search.index import open_index\n"
        "index = open_index(sys.argv[1]); print('ready', flush=True); last = 0\n"
        "while last < 20:\n"
        "    for where in ((), 'width>=0'):\n"
        "        hits = index.search(vector=[1, 0, 0, 0], k=1_000, where=where)\n"
        "        counts = Counter(hit.row['width'] for hit in hits)\n"
        "        assert set(counts.values()) <= {10} and len(counts) >= last, counts\n"
        "        assert sorted(counts) == list(range(len(counts))), counts\n"
        "        last = len(counts)\n"
    )
    command = [sys.executable, "-c", script, tmp_path / "index"]
    readers = [
        subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    assert [reader.stdout.readline() for reader in readers if reader.stdout] == ["ready\n"] * 2
    rng = np.random.default_rng(0)
    for number in range(20):
        index.add_vectors(rng.standard_normal((10, 4)), [{"width": number}] * 10)
        if number == 10:
            with index.store.writing():
                index.store.maintain(whole=True)
    for reader in readers:
        assert reader.communicate()[1] == ""
        assert reader.returncode == 0
