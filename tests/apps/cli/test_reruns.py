"""A command that has nothing left to do ends without importing torch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from sightloop.apps.cli import main
from sightloop.data.datasets.synthetic import synthetic_world, write_synthetic_world
from tests.apps.fake_model import make_image
from tests.rules import REPOSITORY

COMMANDS = [
    "caption photos",
    "caption photos --out captions.jsonl",
    "embed photos --out vectors.npy",
    "embed photos --out vectors.parquet",
    "bootstrap world.tar -o better --max-tokens 6",
    "bootstrap world.tar -o better --max-tokens 6 --threshold 0.3",
    "evaluate captions -d world.tar -o captions --max-new-tokens 4",
    "evaluate retrieval -d world.tar -o retrieval --rerank 2",
    "evaluate matching -d world.tar -o matching",
    "train captioner -d world.tar -o run --set steps=1 data.batch=2 schedule.warmup_steps=0",
]
PROGRAM = """
import contextlib, io, json, sys
from sightloop.apps.cli.main import main
results = []
for line in json.load(sys.stdin):
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()) as err:
        status = main(line.split())
    results.append([status, err.getvalue(), "torch" in sys.modules])
print(json.dumps(results))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which every command has run once."""
    place = tmp_path_factory.mktemp("reruns")
    (place / "photos").mkdir()
    for name in "ab":
        make_image(place / "photos" / f"{name}.jpg")
    write_synthetic_world(place / "world.tar", synthetic_world("train", 6, 0, different=True))
    before = Path.cwd()
    os.chdir(place)
    try:
        for line in COMMANDS:
            assert main.main(line.split()) == 0, line
    finally:
        os.chdir(before)
    return place


def rerun(folder: Path, lines: list[str]) -> list[tuple[int, str, bool]]:
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY / "src")}
    process = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        input=json.dumps(lines),
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    return [(status, err, torch) for status, err, torch in json.loads(process.stdout)]


def test_nothing_to_do_imports_no_torch(folder: Path) -> None:
    files = {path: path.stat().st_mtime_ns for path in folder.rglob("*.safetensors")}
    lines = [line for line in COMMANDS if "--threshold" not in line or "0.3" in line]
    for line, (status, err, torch) in zip(lines, rerun(folder, lines), strict=True):
        assert (status, torch) == (0, False), (line, err)
    assert files == {path: path.stat().st_mtime_ns for path in folder.rglob("*.safetensors")}


def test_a_changed_image_is_embedded_again(folder: Path) -> None:
    make_image(folder / "photos" / "a.jpg", (0, 0, 0))
    [(status, err, torch)] = rerun(folder, ["embed photos --out vectors.npy"])
    assert (status, torch) == (0, True), err
