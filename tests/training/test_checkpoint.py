"""Checkpoints: bit-equal, whole or absent whatever fails and wherever a writer is killed; damage is named."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from sightloop.data.datasets.synthetic import synthetic_world, write_synthetic_world
from sightloop.errors import CheckpointError
from sightloop.training import checkpoint
from sightloop.training.checkpoint import TrainState, init_optimizer_state, prune, resume, save_checkpoint
from sightloop.training.events import StepDone, WarningRaised
from sightloop.training.trainer import train


@pytest.fixture(autouse=True)
def quick_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test outlives a power cut: what is asked of the disk counts; to do it takes a busy one minutes."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


def state(seed: int, step: int = 0, width: int = 5) -> TrainState:
    """A small one with all that a state can hold, tied weights among it; every tensor is random."""
    torch.manual_seed(seed)
    network = nn.ModuleDict({"a": nn.Linear(3, width), "b": nn.Linear(3, width)})
    network["b"].weight = network["a"].weight
    heads = nn.ModuleDict({"h": nn.Linear(width, 2)})
    optimizer = torch.optim.AdamW([*network.parameters(), *heads.parameters()])
    init_optimizer_state(optimizer)
    for moments in optimizer.state.values():
        for tensor in moments.values():
            tensor.copy_(torch.rand_like(tensor))
    teacher = nn.ModuleDict({"a": nn.Linear(3, width)})
    queue = {"image": torch.rand(4, 3), "ids": torch.arange(4) + seed}
    return TrainState(
        network, heads, teacher, None, queue, optimizer, step, {"pointer": seed, "best": [step, 0.5]}
    )


def values(of: TrainState) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in checkpoint._tensors(of).items()}


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return set(a) == set(b) and all(torch.equal(a[name], b[name]) for name in a)


def names(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").iterdir())


def test_a_checkpoint_is_loaded_bit_equal(tmp_path: Path) -> None:
    ours, other = state(0, step=7), state(1)
    folder = save_checkpoint(ours, tmp_path)
    assert names(tmp_path) == ["step-000007"]
    assert equal(load_file(folder / "state.safetensors"), values(ours))  # the format's own reader agrees
    assert resume(other, tmp_path) == []
    assert equal(values(other), values(ours))
    assert (other.step, other.notes) == (7, {"pointer": 0, "best": [7, 0.5]})
    assert other.network["a"].weight is other.network["b"].weight


def test_no_checkpoint_changes_nothing(tmp_path: Path) -> None:
    ours = state(0)
    before = values(ours)
    assert resume(ours, tmp_path) == []
    assert equal(values(ours), before)


class Stop(BaseException):
    """Neither caught nor cleaned up after: a killed process."""


def fail_at(monkeypatch: pytest.MonkeyPatch, count: int, error: BaseException) -> Callable[[], int]:
    """The count-th call that touches the disk fails; how many there were."""
    calls = 0

    def wrapped(original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == count:
                if isinstance(error, Stop):  # the dead clean nothing up
                    monkeypatch.setattr(os, "unlink", lambda *_, **__: None)
                    monkeypatch.setattr(shutil, "rmtree", lambda *_, **__: None)
                raise error
            return original(*args, **options)

        return call

    for module, name in ((os, "fsync"), (os, "replace"), (os, "open"), (os, "mkdir"), (shutil, "rmtree")):
        monkeypatch.setattr(module, name, wrapped(getattr(module, name)))
    return lambda: calls


@pytest.mark.parametrize("error", [OSError(28, "no space left on device"), Stop()])
@pytest.mark.parametrize("over_damaged", [False, True])
def test_a_failed_write_keeps_the_last_checkpoint(
    error: BaseException, over_damaged: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every operation on the disk fails once, or is the last one before death: 3 is there or 6 is, and whole."""
    first, second = state(3, step=3), state(6, step=6)
    for count in range(1, 100):
        run = tmp_path / str(count)
        save_checkpoint(first, run)
        if over_damaged:
            (run / "checkpoints" / "step-000006").mkdir()
        with monkeypatch.context() as patch:
            calls = fail_at(patch, count, error)
            with suppress(OSError, Stop):
                save_checkpoint(second, run)
            done = calls() < count
        found = state(0)
        assert len(resume(found, run)) <= over_damaged
        assert equal(values(found), values(second if found.step == 6 else first))
        save_checkpoint(second, run)  # whatever was left behind is in nobody's way
        prune(run, 6, keep=2, best=None)
        assert names(run) == ["step-000003", "step-000006"]
        if done:
            assert count > 12  # it did count
            return
    raise AssertionError("never got through")


def test_files_are_synced_before_the_rename(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files and folders are synced, and the folder that holds the new name after it."""
    log: list[tuple[str, str]] = []
    fsync, replace = os.fsync, os.replace

    def synced(descriptor: int) -> None:
        log.append(("sync", Path(os.readlink(f"/proc/self/fd/{descriptor}")).name))
        fsync(descriptor)

    def renamed(source: Any, target: Any) -> None:
        log.append(("name", Path(target).name))
        replace(source, target)

    if not Path("/proc/self/fd").exists():
        pytest.skip("no /proc to tell which file a descriptor is")
    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", renamed)
    save_checkpoint(state(0, step=1), tmp_path)
    kinds = [(what, "tmp" if name.endswith(".tmp") else name) for what, name in log]
    assert kinds == [
        ("sync", tmp_path.name),
        *[("sync", "tmp"), ("name", "state.safetensors"), ("sync", "tmp")],
        *[("sync", "tmp"), ("name", "state.json"), ("sync", "tmp")],
        *[("name", "step-000001"), ("sync", "checkpoints")],
    ]


def test_the_last_and_the_best_are_kept(tmp_path: Path) -> None:
    for step in range(1, 7):
        save_checkpoint(state(step, step), tmp_path)
        prune(tmp_path, step, keep=2, best=3 if step >= 3 else None)
    assert names(tmp_path) == ["step-000003", "step-000005", "step-000006"]
    (tmp_path / "checkpoints" / ".sightloop-step-000007-1.tmp").mkdir()
    (tmp_path / "checkpoints" / "mine").mkdir()
    prune(tmp_path, 6, keep=1, best=None)
    assert names(tmp_path) == ["mine", "step-000006"]


def cut(folder: Path) -> None:
    with (folder / "state.safetensors").open("r+b") as file:
        file.truncate(200)


DAMAGE: dict[str, Callable[[Path], None]] = {
    "cut": cut,
    "empty": lambda folder: (folder / "state.safetensors").write_bytes(b"") and None,
    "no tensors": lambda folder: (folder / "state.safetensors").unlink(),
    "no notes": lambda folder: (folder / "state.json").unlink(),
    "no JSON": lambda folder: (folder / "state.json").write_text("{") and None,
    "other JSON": lambda folder: (folder / "state.json").write_text("[]") and None,
    "a list for notes": lambda folder: (
        (folder / "state.json").write_text('{"step": 1, "notes": []}') and None
    ),
}


@pytest.mark.parametrize("how", DAMAGE)
def test_a_damaged_checkpoint_is_skipped_and_named(how: str, tmp_path: Path) -> None:
    first = state(1, step=1)
    save_checkpoint(first, tmp_path)
    DAMAGE[how](save_checkpoint(state(2, step=2), tmp_path))
    found = state(0)
    (text,) = resume(found, tmp_path)
    assert "step-000002 is damaged" in text
    assert equal(values(found), values(first))
    DAMAGE[how](tmp_path / "checkpoints" / "step-000001")
    with pytest.raises(CheckpointError, match=r"no checkpoint can be read.*start anew"):
        resume(found, tmp_path)


def test_later_damaged_checkpoints_do_not_replace_good_ones(tmp_path: Path) -> None:
    save_checkpoint(state(1, step=1), tmp_path)
    cut(save_checkpoint(state(9, step=9), tmp_path))
    found = state(0)
    resume(found, tmp_path)
    found.step = 2
    save_checkpoint(found, tmp_path)
    prune(tmp_path, 2, keep=1, best=None)
    assert names(tmp_path) == ["step-000002"]


def test_a_checkpoint_of_another_run_changes_nothing(tmp_path: Path) -> None:
    save_checkpoint(state(1, step=1), tmp_path)
    other, lacking = state(0, width=6), state(0)
    lacking.queue = {}
    for ours in (other, lacking):
        before = values(ours)
        with pytest.raises(CheckpointError, match="step-000001: belongs to another run"):
            resume(ours, tmp_path)
        assert equal(values(ours), before)


def test_a_run_warns_of_damaged_checkpoints(tmp_path: Path) -> None:
    data, out = tmp_path / "world.tar", tmp_path / "run"
    write_synthetic_world(data, synthetic_world("train", 12, seed=0))
    settings = ["data.batch=4", "terms.itc=0", "terms.itm=0", "terms.vqa=0", "steps=3", "save_every=1"]
    list(train("world", str(data), out, settings=settings, device="cpu", stop_after=2))
    cut(out / "checkpoints" / "step-000002")
    events = list(train("world", str(data), out, settings=settings, device="cpu"))
    (warning,) = [
        event for event in events if isinstance(event, WarningRaised) and event.about == "checkpoint"
    ]
    assert "step-000002 is damaged" in warning.text
    assert [event.step for event in events if isinstance(event, StepDone)] == [2, 3]


@pytest.mark.parametrize("name", ["state.safetensors", "state.json"])
def test_a_flipped_bit_anywhere_is_noticed(name: str, tmp_path: Path) -> None:
    older, newer = state(0, step=1), state(1, step=2)
    save_checkpoint(older, tmp_path)
    path = save_checkpoint(newer, tmp_path) / name
    data = path.read_bytes()
    for at in range(0, len(data), 7):
        path.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
        other = state(2)
        damaged = resume(other, tmp_path)
        # White space of the JSON may change without a change of its values.
        assert (other.step == 1 and "step-000002" in damaged[0]) or (name == "state.json" and other.step == 2)
        assert equal(values(other), values(older if other.step == 1 else newer))


@pytest.mark.parametrize(
    "notes",
    [
        [],
        {"best": 3},
        {"best": ["a", 1.0]},
        {"pointer": "x"},
        {"watch": [1]},
        {"watch": {"seen": "many"}},
        {"watch": {"windows": {"loss": [None]}}},
        {"watch": {"best": [1.0]}},
        {"watch": {"last": "x"}},
    ],
)
def test_state_of_wrong_types_is_a_damaged_checkpoint(notes: object, tmp_path: Path) -> None:
    folder = save_checkpoint(state(0, step=3), tmp_path)
    (folder / "state.json").write_text(json.dumps({"step": 3, "notes": notes}))
    with pytest.raises(CheckpointError, match=r"state\.json"):
        resume(state(1), tmp_path)
