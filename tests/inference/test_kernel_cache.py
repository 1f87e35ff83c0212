"""Times of kernels are kept between processes, and a file that is not one of them counts as none."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from sightloop.errors import UsageError
from sightloop.inference import kernel_cache
from sightloop.inference.kernel_cache import cache_folder, read_times, time_shapes
from sightloop.inference.load import load
from sightloop.nn import kernels
from sightloop.nn.kernels import MANY, Shape

SHAPE = Shape(96, 64, torch.float32)
needs_onednn = pytest.mark.skipif(not kernels.can_pack(), reason="this torch has no oneDNN")


@pytest.fixture(autouse=True)
def folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """A cache folder that is not there yet."""
    monkeypatch.setenv(kernel_cache.KERNELS_VARIABLE, "auto")
    monkeypatch.setenv(kernel_cache.FOLDER_VARIABLE, str(tmp_path / "cache"))
    kernels.forget_times()
    yield tmp_path / "cache"
    kernels.forget_times()
    kernels.pin("packed")


@needs_onednn
def test_what_one_process_timed_the_next_one_reads(folder: Path) -> None:
    time_shapes({SHAPE: {MANY}})
    file = next(folder.iterdir())
    written = file.read_bytes()
    kernels.forget_times()
    time_shapes({SHAPE: {MANY}})
    assert kernels.times_of([SHAPE.key]) == read_times(file)
    assert file.read_bytes() == written
    time_shapes({Shape(64, 64, torch.float32): {MANY}})
    assert set(read_times(file)) == {SHAPE.key, "float32 64x64"}


@needs_onednn
@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff\xfe",
        b"[]",
        b'{"format": 3}',
        b'{"format": 0, "times": {}}',
        b'{"format": 3, "times": {"float32 96x64": {"plain": [1, 1, 1]}}}',
        b'{"format": 3, "times": {"float32 96x64": {"plain": [1, 1, 1, "1"]}}}',
        b'{"format": 3, "times": {"float32 96x64": {"plain": [1, 1, 1, NaN]}}}',
        b'{"format": 3, "times": {"float32 96x64": {"onednn": [1, 1, 1, 1]}}}',
        b'{"format": 3, "times": {"float32 96x64": 3}}',
    ],
)
def test_a_damaged_file_is_replaced(folder: Path, content: bytes) -> None:
    time_shapes({SHAPE: {MANY}})
    file = next(folder.iterdir())
    file.write_bytes(content)
    assert read_times(file) == {}
    kernels.forget_times()
    time_shapes({SHAPE: {MANY}})
    assert json.loads(file.read_text())["times"].keys() == {SHAPE.key}


@needs_onednn
def test_what_was_timed_on_a_busy_machine_is_timed_again_once_it_is_not(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads: list[int] = []
    measure = kernel_cache.measure

    def watched(*args: Any, **kwargs: Any) -> dict[str, kernels.Times]:
        threads.append(torch.get_num_threads())
        return measure(*args, **kwargs)

    monkeypatch.setattr(kernel_cache, "measure", watched)
    for busy, timed in ((True, 1), (True, 1), (False, 2), (False, 2), (True, 2)):
        monkeypatch.setattr(kernel_cache, "is_busy", lambda busy=busy: busy)
        time_shapes({SHAPE: {MANY}})
        kernels.forget_times()
        assert len(threads) == timed
    assert threads == [1, torch.get_num_threads()]
    [file] = folder.iterdir()
    assert kernel_cache.read_rough(file) == set()
    monkeypatch.setattr(kernel_cache, "is_busy", lambda: True)
    other = Shape(64, 64, torch.float32)
    time_shapes({other: {MANY}})
    assert kernel_cache.read_rough(file) == {other.key}


@needs_onednn
def test_a_folder_that_cannot_be_written_keeps_nothing(folder: Path) -> None:
    folder.write_text("a file where the folder should be")
    time_shapes({SHAPE: {MANY}})
    assert kernels.times_of([SHAPE.key])
    assert folder.read_text() == "a file where the folder should be"


def test_nothing_is_written_where_a_kernel_is_pinned(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(kernel_cache.KERNELS_VARIABLE, "packed")
    load(device="cpu")
    assert not folder.exists()
    monkeypatch.setenv(kernel_cache.KERNELS_VARIABLE, "fastest")
    with pytest.raises(UsageError, match="SIGHTLOOP_KERNELS=fastest"):
        load(device="cpu")


def test_the_folder_follows_xdg(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv(kernel_cache.FOLDER_VARIABLE)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "sightloop"
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    assert cache_folder() == Path.home() / ".cache" / "sightloop"


@needs_onednn
def test_a_loaded_model_says_the_same_whatever_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Embeddings of nano by timed, plain and packed kernels."""
    texts = ["a red square above a blue circle", "a dog"]
    timed = load(device="cpu").embed_texts(texts)
    assert len(list(cache_folder().iterdir())) == 1
    for name in ("plain", "packed"):
        monkeypatch.setenv(kernel_cache.KERNELS_VARIABLE, name)
        assert abs(load(device="cpu").embed_texts(texts) - timed).max() < 1e-5
