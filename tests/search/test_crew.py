"""Workers of an index: answers in order whoever dies, the same index as by one process, on Ray as on this machine."""

from __future__ import annotations

import os
import pickle
import signal
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import chain
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import sightloop
from sightloop.apps.cli import main
from sightloop.data.video.writing import write_video
from sightloop.errors import ImageError, SightloopError, UsageError
from sightloop.inference.model import Model
from sightloop.search.crew import Crew
from sightloop.search.embedding_server import Description, NamedImage
from sightloop.search.index import Index, Spread
from sightloop.types import Failed
from sightloop.workers import processes
from tests.data.video.clips import noise_frames
from tests.search.test_index import OPTIONS, write_images
from tests.tiny_checkpoints.clip_and_blip import write_clip

COUNT = 12


class Echo:
    """Server whose description of an image is its name."""

    def answer(self, request: Any, send: Any) -> list[Description]:
        del send
        return [Description({"name": image.name}, ()) for image in request]


class Engine:
    """Engine of workers in this process, which die when `deadly` says so; `pick` chooses who is ready."""

    def __init__(
        self, make: Callable[[int], Any], deadly: Callable[[list[NamedImage]], bool], pick: Any
    ) -> None:
        self.make, self.deadly, self.pick = make, deadly, pick
        self.started, self.ended, self.closed = 0, 0, False

    def start(self, number: int) -> Any:
        self.started += 1
        return Hand(self, self.make(number))

    def ready(self, workers: Any) -> list[Any]:
        return [self.pick(list(workers))]

    def close(self) -> None:
        self.closed = True


class Hand:
    def __init__(self, engine: Engine, server: Any) -> None:
        self.engine, self.server = engine, server

    def give(self, request: Any) -> None:
        self.request = request

    def take(self) -> list[object]:
        if self.engine.deadly(self.request):
            raise EOFError
        return [self.server.answer(self.request, None)]

    def stop(self) -> str:
        self.engine.ended += 1
        return "exit status -9"


@given(
    sizes=st.lists(st.integers(0, 4), max_size=12),
    count=st.integers(1, 4),
    killers=st.sets(st.integers(0, 30), max_size=4),
    data=st.data(),
)
def test_answers_are_in_order_whoever_dies(
    sizes: list[int], count: int, killers: set[int], data: st.DataObject
) -> None:
    """Some images kill every worker; besides, a worker may die once at each batch."""
    numbers = iter(range(sum(sizes)))
    batches = [[NamedImage(str(next(numbers)), b"") for _ in range(size)] for size in sizes]
    first_of_batches = {batch[0].name for batch in batches if len(batch) > 1}
    unlucky = set(data.draw(st.sets(st.sampled_from(sorted(first_of_batches)))) if first_of_batches else ())
    worst = max((sum(int(image.name) in killers for image in batch) for batch in batches), default=0)

    def deadly(images: list[NamedImage]) -> bool:
        if len(images) > 1 and images[0].name in unlucky:
            unlucky.remove(images[0].name)
            return True
        return any(int(image.name) in killers for image in images)

    def pick(workers: list[Any]) -> Any:
        return data.draw(st.sampled_from(workers))

    engine = Engine(lambda number: Echo(), deadly, pick)
    warnings: list[str] = []
    crew = Crew(lambda: engine, count, warn=warnings.append)
    if worst > 2:
        return  # may count as workers that die whatever they do
    answers = list(crew.describe(batches))
    assert [len(answer) for answer in answers] == sizes
    for answer, image in zip(chain(*answers), chain(*batches), strict=True):
        if int(image.name) in killers:
            assert isinstance(answer, ImageError)
            assert (answer.name, answer.reason) == (image.name, "took a worker down twice (exit status -9)")
        else:
            assert isinstance(answer, Description)
            assert answer.fields["name"] == image.name
    assert engine.started == engine.ended
    assert engine.closed == (engine.started > 0) == any(sizes)
    assert all("exit status -9" in warning for warning in warnings)


def test_workers_that_always_die_end_the_run() -> None:
    engine = Engine(lambda number: Echo(), lambda images: True, lambda workers: workers[0])
    crew = Crew(lambda: engine, 2, warn=lambda text: None)
    batch = [NamedImage(f"{i}.png", b"") for i in range(8)]
    with pytest.raises(SightloopError, match=r"5 workers ended .*exit status -9.*fewer copies"):
        list(crew.describe([batch]))
    assert engine.started == engine.ended
    assert engine.closed


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("crew")
    write_clip(folder / "clip")
    write_images(folder / "photos", COUNT)
    (folder / "photos" / "003.txt").write_text("a red car\n")
    (folder / "photos" / "005.png").write_bytes(b"torn")
    write_video(folder / "photos" / "v.mp4", noise_frames(np.random.default_rng(0), 20, 32, 48))  # one scene
    return folder


@pytest.fixture(scope="module")
def clip(place: Path) -> Model:
    return sightloop.load(place / "clip")


@pytest.fixture(scope="module")
def whole(place: Path, clip: Model) -> Index:
    """The index that one process makes."""
    index = Index.create(place / "whole", model=clip)
    assert index.add(place / "photos", options=OPTIONS) == Counter(added=COUNT, failed=1)
    return index


def equal(index: Index, other: Index) -> bool:
    return index.to_arrow(vectors=True).equals(other.to_arrow(vectors=True))


class Cluster:
    """A stand-in for the module `ray`, whose actors live here, behind a pickle; an actor dies at a call of `deadly`."""

    class exceptions:
        class RayError(Exception):
            pass

    def __init__(self, deadly: Callable[[int, Any], bool]) -> None:
        self.deadly, self.calls, self.killed = deadly, 0, 0
        self.options: list[dict[str, Any]] = []

    def is_initialized(self) -> bool:
        return True

    def cluster_resources(self) -> dict[str, float]:
        return {"CPU": 8.0}

    def remote(self, **options: Any) -> Any:
        self.options.append(options)

        def make(kind: Any) -> Any:
            return SimpleNamespace(remote=lambda *arguments: self.handle(kind, pickle.dumps(arguments)))

        return make

    def handle(self, kind: Any, arguments: bytes) -> Any:
        actor = kind(*pickle.loads(arguments))
        return SimpleNamespace(answer=SimpleNamespace(remote=lambda request: (actor, pickle.dumps(request))))

    def wait(self, calls: list[Any], num_returns: int) -> tuple[list[Any], list[Any]]:
        return calls[-num_returns:], calls[:-num_returns]

    def get(self, call: Any) -> Any:
        actor, request = call[0], pickle.loads(call[1])
        self.calls += 1
        if self.deadly(self.calls, request):
            raise self.exceptions.RayError
        return pickle.loads(pickle.dumps(actor.answer(request)))

    def kill(self, handle: Any) -> None:
        del handle
        self.killed += 1


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Cluster]]:
    before = os.getcwd()

    def make(deadly: Callable[[int, Any], bool] = lambda call, request: False) -> Cluster:
        ray = Cluster(deadly)
        monkeypatch.setitem(sys.modules, "ray", ray)
        return ray

    yield make
    os.chdir(before)


RAY = replace(OPTIONS, spread=Spread("ray", 3, device="cpu", batch_size=2))


def test_a_cluster_makes_the_same_index(
    place: Path, clip: Model, whole: Index, tmp_path: Path, cluster: Callable[..., Cluster]
) -> None:
    """Actors die at their first and their third call; what they had is done again, and said."""
    ray, warnings = cluster(lambda call, request: call in (1, 3)), list[str]()
    index = Index.create(tmp_path / "index", model=clip)
    options = replace(RAY, warn=warnings.append)
    assert index.add(place / "photos", options=options) == Counter(added=COUNT, failed=1)
    assert equal(index, whole)
    assert len(warnings) == 2
    assert all("a worker ended (RayError); what it had is embedded again" in text for text in warnings)
    assert len(ray.options) == ray.killed == 3 + 2
    assert {(each["num_cpus"], each["num_gpus"]) for each in ray.options} == {(8 // 3, 0)}
    # Only the torn image is left to try; without it no actor starts.
    assert index.add(place / "photos", options=options) == Counter(skipped=COUNT, failed=1)
    assert len(ray.options) == 3 + 2 + 1
    assert index.add(place / "photos" / "001.png", options=options) == Counter(skipped=1)
    assert len(ray.options) == 3 + 2 + 1


def test_an_image_that_takes_workers_down_is_left_out(
    place: Path, clip: Model, tmp_path: Path, cluster: Callable[..., Cluster]
) -> None:
    cluster(lambda call, request: any(image.name.endswith("007.png") for image in request))
    index = Index.create(tmp_path / "index", model=clip)
    options = replace(RAY, warn=lambda text: None)
    events = list(index.build([place / "photos"], options=options))
    failed = {Path(event.name).name: event.reason for event in events if isinstance(event, Failed)}
    assert failed["007.png"] == "took a worker down twice (RayError)"
    assert sorted(failed) == ["005.png", "007.png"]
    assert [Path(event.name).name for event in events] == sorted(Path(event.name).name for event in events)
    assert len(index) == COUNT - 1


def test_a_run_that_is_stopped_goes_on(
    place: Path, clip: Model, whole: Index, tmp_path: Path, cluster: Callable[..., Cluster]
) -> None:
    cluster(lambda call, request: call > 2)
    index = Index.create(tmp_path / "index", model=clip)
    options = replace(RAY, warn=lambda text: None, spread=Spread("ray", 1, device="cpu", batch_size=2))
    with pytest.raises(SightloopError, match="workers ended one after the other"):
        index.add(place / "photos", options=options)
    assert 0 < len(index) < COUNT - 1
    cluster()
    index.add(place / "photos", options=options)
    assert equal(index, whole)


def test_a_worker_with_another_model_is_refused(
    place: Path,
    clip: Model,
    tmp_path: Path,
    cluster: Callable[..., Cluster],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cluster()
    index = Index.create(tmp_path / "index", model=clip)
    write_clip(tmp_path / "other", seed=1)
    monkeypatch.setattr(clip, "name", str(tmp_path / "other"))
    with pytest.raises(UsageError, match=r"its vectors are of .*clip"):
        index.add(place / "photos", options=RAY)
    assert len(index) == 0


@pytest.mark.skipif(sys.platform == "win32", reason="kills by a signal")
def test_processes_make_the_same_index(
    place: Path, clip: Model, whole: Index, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first of them is killed."""
    victims: list[int] = []
    begin = processes.Process.__init__

    def start(self: Any, make: Any, number: int, threads: int) -> None:
        begin(self, make, number, threads)
        victims.append(self.process.pid)
        if len(victims) == 1:
            os.kill(self.process.pid, signal.SIGKILL)

    monkeypatch.setattr(processes.Process, "__init__", start)
    warnings: list[str] = []
    index = Index.create(tmp_path / "index", model=clip)
    spread = Spread(copies=1, device="cpu", batch_size=4)
    index.add(place / "photos", options=replace(OPTIONS, isolate=True, spread=spread, warn=warnings.append))
    assert equal(index, whole)
    assert len(victims) == 2
    assert "exit status -9" in warnings[0]


def test_the_command(
    place: Path,
    whole: Index,
    tmp_path: Path,
    cluster: Callable[..., Cluster],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ray, words = cluster(), ("index", place / "photos", "--store", tmp_path / "index", "-m", place / "clip")
    assert main.main([*map(str, words), "--engine", "ray", "--copies", "2", "--device", "cpu"]) == 1
    assert f"{COUNT} added" in capsys.readouterr().err
    assert equal(sightloop.open_index(tmp_path / "index"), whole)
    assert len(ray.options) == 1  # one request holds all images
    monkeypatch.setitem(sys.modules, "ray", None)
    for more, message in (
        (("--engine", "ray"), "Ray is not installed"),
        (("--copies", "0"), "--copies 0: must be at least 1"),
        (("--copies", "2", "--devices", "cpu,cpu"), "give only one of them"),
    ):
        assert main.main([*map(str, words), *more]) == 2
        assert message in capsys.readouterr().err
