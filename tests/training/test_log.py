from __future__ import annotations

import builtins
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sightloop.errors import SightloopError, UsageError
from sightloop.training.events import (
    Calibrated,
    CheckpointSaved,
    Evaluated,
    RunEnded,
    RunEvent,
    RunStarted,
    SampleSkipped,
    StepDone,
    WarningRaised,
    to_json,
)
from sightloop.training.log import METRICS, RunLog, checkpoint_folder, read_log

STEPS, EVERY = 12, 4


def run(folder: Path, first: int, seconds: float = 1.0) -> list[RunEvent]:
    """What a loop that goes on behind step `first` says; skips and warnings are where the data and curves have them."""
    events: list[RunEvent] = [
        RunStarted("r", STEPS, 8, 96, 10, 10, first),
        WarningRaised(0, "leakage", "two copies"),
    ]
    for step in range(first + 1, STEPS + 1):
        key = f"{step % 6}.jpg"  # each is named once in the life of a process
        if step % 3 == 1 and SampleSkipped(key, "damaged") not in events:
            events.append(SampleSkipped(key, "damaged"))
        events.append(StepDone(step, step / 12, 1 / step, {"lm": 1 / step}, {"lm": 3.0}, 0.1, seconds, 8))
        events += [WarningRaised(step, "lm", "chance")] * (step % 5 == 0)
        if step % EVERY == 0:
            events.append(Evaluated(step, {"cider": step / 10}, (("a", "a dog"),)))
            events.append(CheckpointSaved(step, checkpoint_folder(folder, step)))
    shares = {"kept": 0.75, "dropped": 0.75}
    events.append(Calibrated(STEPS, "", 50, 200, 0.8, shares | {"kept": 0.5}, shares))
    return [*events, RunEnded(STEPS, seconds * STEPS, folder / "model")]


def records(folder: Path) -> list[dict[str, object]]:
    lines = (folder / METRICS).read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in lines]


def whole(folder: Path) -> list[dict[str, object]]:
    with RunLog(folder) as log:
        for event in run(folder, 0):
            log.write(event)
    return records(folder)


@settings(max_examples=60, deadline=None)
@given(kills=st.lists(st.integers(0, 40), max_size=4), torn=st.integers(0, 30))
def test_an_interrupted_log_is_an_unbroken_one(tmp_path_factory, kills: list[int], torn: int) -> None:
    expected = whole(tmp_path_factory.mktemp("whole"))
    folder = tmp_path_factory.mktemp("killed")
    first: int | None = None
    for attempt, count in enumerate([*kills, 10**6]):
        with RunLog(folder, first) as log:
            for event in run(folder, first or 0, seconds=2.0 + attempt)[:count]:
                if isinstance(event, CheckpointSaved):
                    event.folder.mkdir(parents=True, exist_ok=True)
                    first = event.step
                log.write(event)
        if count < 10**6:
            first = first or 0
            with (folder / METRICS).open("ab") as file:  # the kill came within a line
                file.write(b'{"kind": "step", "step": 3, "epoch": 0.1'[:torn])
    assert records(folder) == expected


def test_a_checkpoint_whose_line_was_lost_is_written_down(tmp_path: Path) -> None:
    expected = whole(tmp_path / "whole")
    folder = tmp_path / "killed"
    events = run(folder, 0)
    cut = events.index(CheckpointSaved(8, checkpoint_folder(folder, 8)))
    with RunLog(folder) as log:
        for event in events[:cut]:
            log.write(event)
    checkpoint_folder(folder, 8).mkdir(parents=True)
    with RunLog(folder, 8) as log:
        for event in run(folder, 8):
            log.write(event)
    assert records(folder) == expected


def test_folders_are_relative_to_the_run(tmp_path: Path) -> None:
    with RunLog(tmp_path) as log:
        log.write(CheckpointSaved(4, tmp_path / "checkpoints" / "step-000004"))
        log.write(RunEnded(4, 1.0, Path("/elsewhere")))
    assert list(read_log(tmp_path)) == [
        CheckpointSaved(4, Path("checkpoints/step-000004")),
        RunEnded(4, 1.0, Path("/elsewhere")),
    ]


def test_a_run_is_not_begun_twice_in_one_folder(tmp_path: Path) -> None:
    RunLog(tmp_path / "run").close()
    with pytest.raises(UsageError, match="resume"):
        RunLog(tmp_path / "run")


def test_another_length_is_written_down(tmp_path: Path) -> None:
    whole(tmp_path)
    longer = RunStarted("r", 2 * STEPS, 8, 96, 10, 10, STEPS)
    with RunLog(tmp_path, STEPS) as log:
        log.write(longer)
    events = list(read_log(tmp_path))
    assert events[-1] == longer
    assert not any(isinstance(event, RunEnded) for event in events)


def test_reading_a_run_that_goes_on(tmp_path: Path) -> None:
    with RunLog(tmp_path) as log:
        log.write(SampleSkipped("a", "b"))
        assert list(read_log(tmp_path)) == [SampleSkipped("a", "b")]  # on its way to the disk at once
        with (tmp_path / METRICS).open("ab") as file:
            file.write(b'{"kind": "sk')
        assert list(read_log(tmp_path)) == [SampleSkipped("a", "b")]


@pytest.mark.parametrize("line", [b"{}\n", b"[1]\n", b"\xff\n", b"\n", b'{"kind": "saved"}\n'])
def test_a_damaged_line_is_named(tmp_path: Path, line: bytes) -> None:
    good = json.dumps(to_json(SampleSkipped("a", "b"))).encode() + b"\n"
    (tmp_path / METRICS).write_bytes(good + line + good)
    with pytest.raises(SightloopError, match=r"metrics\.jsonl, line 2: .*remove that line"):
        list(read_log(tmp_path))


@pytest.mark.parametrize("line", [b"{}\n", b"[1]\n", b"\xff\n", b'{"kind": "st{"kind": "saved"}\n'])
def test_a_resumed_run_removes_damaged_lines_and_names_them(tmp_path: Path, line: bytes) -> None:
    """A short write, or a disk that was full, must not end the run: its weights are in the checkpoints."""
    start = json.dumps(to_json(RunStarted("r", 2, 8, 96, 10, 10, 0))).encode() + b"\n"
    saved = json.dumps(to_json(CheckpointSaved(5, Path("checkpoints/step-000005")))).encode() + b"\n"
    (tmp_path / METRICS).write_bytes(start + line + saved)
    with RunLog(tmp_path, 5) as log:
        assert len(log.repairs) == 1
        assert "line 2" in log.repairs[0]
    assert (tmp_path / METRICS).read_bytes() == start + saved


def test_no_log(tmp_path: Path) -> None:
    with pytest.raises(SightloopError, match="no such file"):
        list(read_log(tmp_path))
    RunLog(tmp_path, 0).close()  # killed before its first line
    assert (tmp_path / METRICS).read_bytes() == b""


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no SIGKILL on this system")
def test_nothing_written_is_lost_by_a_kill(tmp_path: Path) -> None:
    code = (
        "import os, signal, sys; from pathlib import Path\n"
        "from sightloop.training.log import RunLog; from sightloop.training.events import SampleSkipped\n"
        "log = RunLog(Path(sys.argv[1]))\n"
        "for i in range(50): log.write(SampleSkipped(str(i), 'x'))\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], env=os.environ)
    assert done.returncode == -signal.SIGKILL
    assert len(list(read_log(tmp_path))) == 50


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    event_file_loader = pytest.importorskip("tensorboard.backend.event_processing.event_file_loader")
    tensor_util = pytest.importorskip("tensorboard.util.tensor_util")
    found: dict[str, list[tuple[int, float]]] = {}
    for path in sorted((folder / "tensorboard").iterdir()):
        for event in event_file_loader.EventFileLoader(str(path)).Load():
            for value in event.summary.value:
                number = float(tensor_util.make_ndarray(value.tensor))
                found.setdefault(value.tag, []).append((event.step, round(number, 4)))
    return found


def test_tensorboard_has_every_step_once(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    for first, until in ((None, 30), (4, 10**6)):
        with RunLog(tmp_path, first, tensorboard=True) as log:
            for event in run(tmp_path, first or 0)[:until]:
                log.write(event)
    found = scalars(tmp_path)
    assert found["train/lm"] == [(step, round(1 / step, 4)) for step in range(1, STEPS + 1)]
    assert found["train/samples_per_second"][0] == (1, 8.0)
    assert found["evaluation/cider"] == [(4, 0.4), (8, 0.8), (12, 1.2)]


def test_tensorboard_that_is_not_there_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *rest: object, **more: object) -> object:
        if name.startswith("tensorboard"):
            raise ImportError(name)
        return real(name, *rest, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(UsageError, match=r"\.\[train\]"):
        RunLog(tmp_path / "run", tensorboard=True)
    assert not (tmp_path / "run").exists()
