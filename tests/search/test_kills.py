"""Runs that are killed, and readers beside a writer, in processes of their own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np

import sightloop
from sightloop.search.index import Index
from tests.rules import REPOSITORY
from tests.tiny_checkpoints.clip_and_blip import write_clip

ENVIRONMENT = {**os.environ, "PYTHONPATH": str(Path(sightloop.__file__).parents[1])}


def test_killed_runs_lose_and_repeat_nothing(tmp_path: Path) -> None:
    """The short form of `python -m benchmarks.kills`, which kills 50 runs over 5,000 images."""
    write_clip(tmp_path / "clip")
    command = [sys.executable, "-m", "benchmarks.kills", "--model", tmp_path / "clip", "--images", "150"]
    command += ["--kills", "5", "--commits", "2"]
    done = subprocess.run(command, env=ENVIRONMENT, cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout)
    assert (found["rows"], found["twice"], found["lost"], found["ghosts"]) == (150, 0, 0, 0)
    assert found["equal"]
    assert found["at commits"] > 0


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
