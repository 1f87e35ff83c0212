"""The scheduler: batches of one kind, turns between clients, cancellation, errors, the end."""

from __future__ import annotations

import threading
import time
from collections.abc import Generator, Iterator
from concurrent.futures import CancelledError
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sightloop.apps.server.admission import Admission
from sightloop.apps.server.errors import ApiError
from sightloop.apps.server.scheduler import Kind, QueuedJob, Scheduler, Stream
from sightloop.errors import UsageError

Item = tuple[str, int]


class Recorder:
    """Kinds that square numbers and record their batches; held until `go`."""

    def __init__(self) -> None:
        self.batches: list[tuple[str, list[Item]]] = []
        self.go = threading.Event()

    def kind(self, name: str, at_once: int = 4) -> Kind[Item, int]:
        def run(items: list[Item]) -> list[int]:
            self.go.wait(30)
            self.batches.append((name, items))
            if any(number < 0 for _, number in items):
                raise UsageError("negative")
            return [number**2 for _, number in items]

        return Kind(name, name, run, at_once)


@pytest.fixture
def recorder() -> Recorder:
    return Recorder()


@pytest.fixture
def scheduler() -> Generator[Scheduler]:
    one = Scheduler()
    yield one
    one.stop()
    one.join(30)


def hold(scheduler: Scheduler, recorder: Recorder) -> QueuedJob[Item, int]:
    """Keeps the thread busy until `go`, so that what follows waits."""
    job = QueuedJob("holder", recorder.kind("hold"), [("holder", 0)])
    scheduler.submit(job)
    while not job.started:
        time.sleep(0.001)
    return job


def job(client: str, kind: Kind[Item, int], numbers: list[int]) -> QueuedJob[Item, int]:
    return QueuedJob(client, kind, [(client, number) for number in numbers])


requests = st.lists(
    st.tuples(
        st.sampled_from("abc"),
        st.sampled_from(["x", "y"]),
        st.lists(st.integers(-1, 9) | st.integers(0, 9), min_size=1, max_size=9),
    ),
    min_size=1,
    max_size=12,
)


@settings(max_examples=60)
@given(requests, st.integers(1, 5))
def test_every_job_gets_its_own_results(listed: list[tuple[str, str, list[int]]], at_once: int) -> None:
    recorder, scheduler = Recorder(), Scheduler()
    holder = hold(scheduler, recorder)
    jobs = [job(client, recorder.kind(kind, at_once), numbers) for client, kind, numbers in listed]
    for each in jobs:
        scheduler.submit(each)
    recorder.go.set()
    assert holder.future.result(30) == [0]
    for each, (_, _, numbers) in zip(jobs, listed, strict=True):
        if min(numbers) < 0:
            with pytest.raises(UsageError):
                each.future.result(30)
        else:
            assert each.future.result(30) == [number**2 for number in numbers]
    assert scheduler.depth == 0
    scheduler.stop()
    scheduler.join(30)
    assert all(len(items) <= at_once for name, items in recorder.batches if name != "hold")


def test_requests_of_one_kind_share_a_batch_and_clients_take_turns(
    scheduler: Scheduler, recorder: Recorder
) -> None:
    hold(scheduler, recorder)
    greedy = job("greedy", recorder.kind("x"), list(range(20)))
    small = [job(f"small{i}", recorder.kind("x"), [i]) for i in range(3)]
    other = job("small0", recorder.kind("y"), [1])
    for each in (greedy, *small, other):
        scheduler.submit(each)
    recorder.go.set()
    assert greedy.future.result(30) == [i**2 for i in range(20)]
    order = recorder.batches[1:]
    # The first batch has an item of each client, whoever asked most; the other kind does not wait for the greedy one.
    assert [client for client, _ in order[0][1]] == ["greedy", "small0", "small1", "small2"]
    assert [name for name, _ in order].index("y") <= 2


def test_a_cancelled_job_is_not_computed(scheduler: Scheduler, recorder: Recorder) -> None:
    hold(scheduler, recorder)
    gone, stays = job("a", recorder.kind("x"), [1, 2]), job("b", recorder.kind("x"), [3])
    scheduler.submit(gone)
    scheduler.submit(stays)
    assert gone.future.cancel()
    recorder.go.set()
    assert stays.future.result(30) == [9]
    assert recorder.batches[1:] == [("x", [("b", 3)])]
    with pytest.raises(CancelledError):
        gone.future.result(0)


def test_one_bad_request_spoils_no_other(scheduler: Scheduler, recorder: Recorder) -> None:
    hold(scheduler, recorder)
    jobs = [job(client, recorder.kind("x"), [number]) for client, number in (("a", 1), ("b", -1), ("c", 3))]
    for each in jobs:
        scheduler.submit(each)
    recorder.go.set()
    assert [jobs[0].future.result(30), jobs[2].future.result(30)] == [[1], [9]]
    with pytest.raises(UsageError):
        jobs[1].future.result(30)


def test_a_verb_that_gives_too_few_results_fails(scheduler: Scheduler) -> None:
    short = QueuedJob("a", Kind("k", "k", lambda items: items[1:], 4), [1, 2, 3])
    scheduler.submit(short)
    with pytest.raises(RuntimeError, match="2 results for 3 items"):
        short.future.result(30)


def test_stopping_finishes_what_runs_and_refuses_the_rest(scheduler: Scheduler, recorder: Recorder) -> None:
    holder = hold(scheduler, recorder)
    waiting = job("a", recorder.kind("x"), [1])
    scheduler.submit(waiting)
    scheduler.stop()
    with pytest.raises(ApiError) as caught:
        scheduler.submit(job("b", recorder.kind("x"), [1]))
    assert caught.value.status_code == 503
    with pytest.raises(ApiError):
        waiting.future.result(30)
    recorder.go.set()
    assert holder.future.result(30) == [0]


def test_a_stream_and_batches_take_turns(scheduler: Scheduler, recorder: Recorder) -> None:
    pieces: list[Any] = []
    ended = threading.Event()
    recorder.go.set()
    beside = job("b", recorder.kind("x"), [2])

    def write() -> Iterator[str]:
        for i in range(4):
            time.sleep(0.06)  # longer than a turn
            yield str(i)
            if i == 0:
                scheduler.submit(beside)

    def emit(piece: Any) -> None:
        pieces.append(("done" if beside.future.done() else "open", piece))
        if piece is None:
            ended.set()

    scheduler.submit(Stream("a", write, emit))
    assert ended.wait(30)
    assert [piece for _, piece in pieces] == ["0", "1", "2", "3", None]
    assert pieces[2][0] == "done"  # the batch ran between two pieces


def test_a_stream_that_fails_or_is_left_ends(scheduler: Scheduler) -> None:
    pieces: list[Any] = []
    ended = threading.Event()

    def write() -> Iterator[str]:
        yield "a"
        raise UsageError("no more")

    def emit(piece: Any) -> None:
        pieces.append(piece)
        if isinstance(piece, Exception):
            ended.set()

    scheduler.submit(Stream("a", write, emit))
    assert ended.wait(30)
    assert pieces[0] == "a"
    assert isinstance(pieces[1], UsageError)
    steps: list[int] = []

    def endless() -> Iterator[str]:
        while True:
            steps.append(1)
            time.sleep(0.01)
            yield "x"

    left = Stream("a", endless, lambda _piece: None)
    scheduler.submit(left)
    while not steps:
        time.sleep(0.001)
    left.cancel()
    while scheduler.depth:
        time.sleep(0.001)
    count = len(steps)
    time.sleep(0.05)
    assert len(steps) <= count + 1


def test_bodies_have_room_together() -> None:
    admission = Admission(6, 2, room=100)
    for client in "ab":
        admission.enter(client)
    admission.take(60)
    with pytest.raises(ApiError) as caught:
        admission.take(41)
    assert caught.value.status_code == 503
    admission.leave("a", 60)
    admission.take(100)


@settings(max_examples=60)
@given(st.lists(st.tuples(st.sampled_from("abcdefgh"), st.booleans()), max_size=60))
def test_admission_counts_and_keeps_places_for_newcomers(steps: list[tuple[str, bool]]) -> None:
    admission, inside = Admission(6, 2), list[str]()
    for client, leaves in steps:
        if leaves and client in inside:
            inside.remove(client)
            admission.leave(client)
            continue
        if len(inside) < (6 if client in inside else 8):
            admission.enter(client)
            inside.append(client)
            continue
        with pytest.raises(ApiError) as caught:
            admission.enter(client)
        assert caught.value.status_code == 429
        assert caught.value.headers == {"Retry-After": "1"}
    assert admission.count == len(inside)
