"""The view of a training run: plain lines, JSON lines, terminal, interrupts; the history behind the curves."""

from __future__ import annotations

import json
import math
import os
import pty
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sightloop.apps.cli.train_view import History, show_training
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
    from_json,
)

ITC = math.log(64)


def run(steps: int = 1000, first: int = 0) -> Iterator[RunEvent]:
    yield RunStarted("blip_pretrain", steps, 32, 6000, 14_000_000, 13_000_000, first)
    yield SampleSkipped("bad\x1b[31m.jpg", "damaged")
    for step in range(first + 1, steps + 1):
        values = {"itc": max(1.0, ITC - step / 200), "lm": 10 / step, "itm.accuracy": 0.7}
        yield StepDone(step, step / 187, 5.0, values, {"itc": ITC, "lm": 10.3}, 1e-4, 0.2, 32)
        if step == 300:
            yield WarningRaised(step, "itc", "itc has not left chance: try this")
        if step == 400:
            yield WarningRaised(step, "itc", "itc has left chance", over=True)
        if step % 500 == 0:
            yield Evaluated(step, {"cider": 0.3471}, (("a.jpg", "a dog runs"), ("b.jpg", "two\nmen")))
            yield CheckpointSaved(step, Path(f"checkpoints/step-{step:06d}"))
    shares = {"kept": 0.75, "dropped": 0.75}
    yield Calibrated(steps, "", 50, 200, 0.8, shares, shares)
    yield RunEnded(steps, 83.0, Path("RUN/model"))


def test_plain_lines(capsys: pytest.CaptureFixture[str]) -> None:
    assert show_training(run()) == 0
    out, err = capsys.readouterr()
    lines = out.splitlines()
    assert lines[0] == (
        "blip_pretrain: 6,000 samples, batch 32, 1,000 steps, 14,000,000 weights (1,000,000 frozen)"
    )
    steps = [line for line in lines if line.startswith("step ")]
    assert 100 <= len(steps) <= 102
    assert steps[0].startswith(
        "step 1/1,000  itc 4.154 (chance 4.159)  lm 10 (chance 10.3)  lr 0.0001  160 samples/s"
    )
    assert steps[-1].startswith("step 1,000/1,000")
    assert "evaluation, step 500: cider 0.3471" in lines
    assert "  b.jpg: two\\nmen" in lines
    assert lines[-2].startswith("ITM's threshold is set: 0.5 keeps 75.0%")
    assert lines[-1] == "Finished 1,000 steps in 1 min 23 s. The model: RUN/model"
    assert "WARNING, step 300: itc has not left chance: try this" in err
    assert "\nstep 400: itc has left chance\n" in err
    assert "skipped: bad\\x1b[31m.jpg: damaged" in err


def test_a_resumed_run_names_its_step(capsys: pytest.CaptureFixture[str]) -> None:
    assert show_training(run(first=900)) == 0
    assert "resuming after step 900" in capsys.readouterr().out


def test_json_lines(capsys: pytest.CaptureFixture[str]) -> None:
    assert show_training(run(20), json=True) == 0
    out, err = capsys.readouterr()
    assert [from_json(json.loads(line)) for line in out.splitlines()] == list(run(20))
    assert err == ""


def test_few_skipped_samples_are_printed(capsys: pytest.CaptureFixture[str]) -> None:
    show_training(SampleSkipped(f"{n}.jpg", "damaged") for n in range(500))
    err = capsys.readouterr().err.splitlines()
    assert len(err) == 20
    assert err[-1].endswith("(further ones are in metrics.jsonl)")


def test_an_interrupt_names_the_last_checkpoint(capsys: pytest.CaptureFixture[str]) -> None:
    closed = False

    def interrupted() -> Iterator[RunEvent]:
        nonlocal closed
        try:
            for event in run():
                yield event
                if isinstance(event, StepDone) and event.step == 700:
                    raise KeyboardInterrupt
        finally:
            closed = True

    with pytest.raises(KeyboardInterrupt):
        show_training(interrupted())
    assert closed
    assert "Stopped in step 700. The same command resumes after step 500" in capsys.readouterr().err


def test_errors_pass_through() -> None:
    def broken() -> Iterator[RunEvent]:
        yield from run(3)
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        show_training(broken())


CODE = (
    "import sys; from tests.apps.cli.test_train_view import run; "
    "from sightloop.apps.cli.train_view import show_training; "
)


def in_terminal(code: str, **environment: str) -> str:
    """What the code prints on a terminal of 100 columns."""
    parent, child = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", CODE + code],
        stdout=child,
        stderr=child,
        env={**os.environ, "COLUMNS": "100", "LINES": "40", "TERM": "xterm", **environment},
    )
    os.close(child)
    output = b""
    while True:
        try:
            block = os.read(parent, 65536)
        except OSError:
            break
        if not block:
            break
        output += block
    os.close(parent)
    assert process.wait() == 0, output.decode()
    return output.decode()


def test_on_a_terminal() -> None:
    output = in_terminal("show_training(run(2000))")
    for words in ("step 2,000/2,000", "samples/s", "chance 4.159", "a dog runs", "two\\nmen", "itm.accuracy 0.7",
                  "WARNING, step 300", "skipped: bad\\x1b[31m.jpg", "evaluation, step 1,000",
                  "Finished 2,000 steps"):  # fmt: skip
        assert words in output, words
    assert "\u2588" in output
    assert "\x1b[31m\u2588" in output  # at chance: red
    assert "\x1b[36m" in output


def test_on_a_terminal_without_unicode() -> None:
    output = in_terminal("show_training(run(600))", PYTHONIOENCODING="ascii:backslashreplace", PYTHONUTF8="0")
    assert "chance 4.159" in output
    assert "\u2588" not in output
    assert "#" in output


def test_a_closed_output_does_not_stop_the_training() -> None:
    code = CODE + "show_training(run(20000), json=True); print('finished', file=sys.stderr)"
    command = f'{sys.executable} -c "$CODE" | head -n 2'
    done = subprocess.run(
        ["bash", "-c", command], env={**os.environ, "CODE": code}, capture_output=True, text=True, check=True
    )
    assert done.stdout.count("\n") == 2
    assert done.stderr == "finished\n"


@given(st.lists(st.floats(-100, 100), max_size=300), st.integers(1, 40))
def test_history_keeps_the_curve(values: list[float], count: int) -> None:
    history = History(16)
    for value in values:
        history.add(value)
    history.add(math.nan)
    means = history.means(count)
    assert len(means) <= count
    assert bool(means) == bool(values)
    if values:
        assert min(values) - 1e-9 <= min(means) <= max(means) <= max(values) + 1e-9
    if len(values) <= min(15, count):
        assert means == values


def test_a_long_history_is_bounded() -> None:
    history = History(64)
    for value in range(100_000):
        history.add(value)
    means = history.means(10)
    assert means == sorted(means)
    assert means[0] < 12_000
    assert means[-1] > 88_000
