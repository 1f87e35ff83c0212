"""CapFilt: the verdicts follow their rules, and the result is the same whatever happened on the way."""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from functools import partial
from html import escape
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import sightloop
from sightloop.apps.cli import main
from sightloop.capfilt import manifest, shard, workers
from sightloop.capfilt.bootstrap import bootstrap, estimate
from sightloop.capfilt.filtering import CandidateText, decide, drop_unusable
from sightloop.capfilt.job import open_job
from sightloop.capfilt.options import CapFiltOptions
from sightloop.capfilt.refilter import check_scores
from sightloop.data.atomic import TEMP_PREFIX
from sightloop.data.datasets.dataset import open_dataset
from sightloop.data.datasets.synthetic import synthetic_world, write_synthetic_world
from sightloop.errors import SightloopError, UnsupportedError, UsageError, from_options
from sightloop.types import Done, Failed, ImageSpec, Skipped
from sightloop.workers import processes, ray_actors
from sightloop.workers.engine import LazyServer
from tests.capfilt.failing import CALLS, failing
from tests.data.datasets.sources import tar
from tests.tiny_checkpoints.clip_and_blip import write_blip, write_clip

LONG = bool(os.environ.get("SIGHTLOOP_LONG"))
COUNT, BLOCK = 22, 8  # shards of 8, 6 (the first source's end) and 8
QUICK: dict[str, Any] = {"block": BLOCK, "group": 3, "threads": 1, "isolate": False, "max_tokens": 7}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two models, and two shards of scenes; the second one's texts belong to other images."""
    folder = tmp_path_factory.mktemp("capfilt")
    write_blip(folder / "caption")
    write_blip(folder / "match", head="match")
    write_clip(folder / "clip")
    write_synthetic_world(folder / "a.tar", synthetic_world("train", 14, 1))
    write_synthetic_world(folder / "b.tar", synthetic_world("unseen", 8, 1, shuffled=True))
    return folder


def run(place: Path, out: Path, **options: Any) -> Any:
    given = {"captioner": place / "caption", "filter": place / "match", **QUICK, **options}
    return bootstrap([place / "a.tar", place / "b.tar"], out=out, **given)


@pytest.fixture(scope="module")
def whole(place: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What an unbroken run wrote."""
    out = tmp_path_factory.mktemp("whole") / "out"
    run(place, out)
    return out


def content(out: Path) -> dict[str, bytes]:
    """The result: everything but what is about a run."""
    about_runs = ("log.jsonl", "report.json", "report.html")
    files = (path for path in out.rglob("*") if path.is_file() and path.name not in about_runs)
    return {path.relative_to(out).as_posix(): path.read_bytes() for path in files}


def evidence(out: Path) -> list[dict[str, Any]]:
    files = sorted((out / "evidence").iterdir())
    return [json.loads(line) for file in files for line in file.read_text().splitlines()]


# -- what is kept ------------------------------------------------------------------------------------------------------


def test_the_output_is_the_kept_texts_of_the_same_images(place: Path, whole: Path) -> None:
    before = {s.key: s for s in open_dataset([place / "a.tar", place / "b.tar"])}
    after = {s.key: s for s in open_dataset(whole)}
    assert list(after) == list(before)  # each has questions, so it stays even without a text
    lines = evidence(whole)
    for key, sample in after.items():
        assert sample.image == before[key].image
        assert sample.questions == before[key].questions
        mine = [line for line in lines if line["key"] == key]
        assert [line["source"] for line in mine] == ["web", "synthetic"]
        assert mine[0]["text"] == before[key].captions[0]
        assert sample.captions == tuple(line["text"] for line in mine if line["verdict"] == "kept")
    reasons = {line["reason"] for line in lines}
    assert {"matched", "unmatched"} <= reasons
    assert all((line["itm"] >= 0.5) == (line["reason"] == "matched") for line in lines if line["itm"])


def test_scores_are_the_verbs_scores(place: Path, whole: Path) -> None:
    model = sightloop.load(place / "match")
    images = {s.key: s.image for s in open_dataset([place / "a.tar", place / "b.tar"])}
    for line in evidence(whole)[:12]:
        image = images[line["key"]]
        if line["itm"] is not None:
            assert line["itm"] == pytest.approx(model.match(image, line["text"])[0], abs=2e-5)
            assert line["itc"] == pytest.approx(model.similarity(image, line["text"])[0, 0], abs=2e-5)
        assert len(line["filter"]) == 32
        assert "captioner" in line if line["source"] == "synthetic" else "captioner" not in line


def test_one_mode_writes_and_the_other_judges(place: Path, tmp_path: Path) -> None:
    done = run(place, tmp_path / "c", mode="captioner-only", filter=place / "gone", captions=3)
    assert {name for name in done.texts if "web" in name} == {"web unjudged"}
    counts = {name: n for name, n in done.texts.items() if "synthetic" in name}
    assert sum(counts.values()) == 3 * COUNT
    assert all(line["itm"] is None for line in evidence(tmp_path / "c"))
    done = run(place, tmp_path / "f", mode="filter-only", captioner=place / "gone")
    assert sum(done.texts.values()) == COUNT
    assert {line["source"] for line in evidence(tmp_path / "f")} == {"web"}


def test_top_k_by_a_ranker(place: Path, tmp_path: Path) -> None:
    run(place, tmp_path, keep="top-k-itc", ranker=str(place / "clip"), captions=3, top=2, to="parquet")
    lines = evidence(tmp_path)
    for sample in open_dataset(tmp_path):
        ranked = [line for line in lines if line["key"] == sample.key and line["itc"] is not None]
        best = sorted(ranked, key=lambda line: -line["itc"])[:2]
        assert sorted(sample.captions) == sorted(line["text"] for line in best)
    model = sightloop.load(place / "clip")
    image = next(iter(open_dataset(place / "a.tar"))).image
    assert lines[0]["itc"] == pytest.approx(model.similarity(image, lines[0]["text"])[0, 0], abs=2e-5)


def test_a_image_without_anything_left_is_left_out(place: Path, tmp_path: Path) -> None:
    folder = tmp_path / "photos"
    folder.mkdir()
    for i, sample in enumerate(synthetic_world("train", 4, 1)):
        assert isinstance(sample.image, bytes)
        (folder / f"{i}.png").write_bytes(sample.image)
        (folder / f"{i}.txt").write_text("a dog\n")
    options = QUICK | {"captioner": place / "caption", "filter": place / "match", "threshold": 1.0}
    done = bootstrap(folder, out=tmp_path / "out", **options)
    assert (done.samples, done.written) == (4, 0)
    with tarfile.open(tmp_path / "out" / "000000.tar") as tar:
        assert tar.getnames() == []
    assert len(evidence(tmp_path / "out")) == 8


texts = st.builds(
    CandidateText,
    st.sampled_from(["web", "synthetic"]),
    st.text("ab ", max_size=4),
    st.sampled_from([0.0, 0.2, 0.5, 0.7, 1.0]),
    st.sampled_from([-1.0, 0.0, 0.5, 1.0]),
)


@given(st.lists(texts, max_size=6), st.sampled_from(["matching", "best", "top-k-itc"]), st.integers(1, 3))
def test_rules(found: list[CandidateText], keep: Any, top: int) -> None:
    found.sort(key=lambda text: text.source == "synthetic")
    left = drop_unusable(found)
    decide(left, CapFiltOptions(keep=keep, top=top))
    assert all(text.reason for text in found)
    kept = [text for text in found if text.kept]
    assert all(text.text.strip() for text in kept)
    written = [text.text.strip() for text in kept if text.source == "synthetic"]
    assert len(written) == len(set(written))
    if keep == "top-k-itc":
        assert len(kept) == min(top, len(left))
        assert min((t.itc for t in kept), default=0) >= max((t.itc for t in left if not t.kept), default=-1)
        return
    matching = [text for text in left if text.itm is not None and text.itm >= 0.5]
    assert kept == (
        matching if keep == "matching" else [max(matching, key=lambda t: t.itm or 0)] if matching else []
    )


def test_loops_and_repetitions_are_dropped_unseen() -> None:
    web, same, loop = (
        CandidateText("web", "A dog"),
        CandidateText("synthetic", "a  dog"),
        CandidateText("synthetic", "so so so so so"),
    )
    assert drop_unusable([web, same, loop, CandidateText("synthetic", " ")]) == [web]
    assert (same.reason, loop.reason) == ("duplicate", "looping")
    bare = CandidateText("synthetic", "A photo of.")
    assert drop_unusable([bare], "a photo of") == []
    assert bare.reason == "empty"


# -- the same, whatever happened ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [1, 7, 32])
def test_no_batch_size_changes_a_byte(place: Path, whole: Path, tmp_path: Path, batch_size: int) -> None:
    run(place, tmp_path / "out", batch_size=batch_size)
    assert content(tmp_path / "out") == content(whole)


def test_a_cluster_changes_no_byte(place: Path, whole: Path, tmp_path: Path) -> None:
    pytest.importorskip("ray", reason="the extra `ray` is not installed")
    run(place, tmp_path / "out", engine="ray", workers=2)
    assert content(tmp_path / "out") == content(whole)


def test_ray_is_started_again_or_its_lack_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    slow = [2]

    def init(**options: Any) -> None:
        slow[0] -= 1
        if slow[0] >= 0:
            raise Exception("the node timed out\nmore of it")

    ray = SimpleNamespace(is_initialized=lambda: False, init=init, shutdown=lambda: None)
    monkeypatch.setitem(sys.modules, "ray", ray)
    monkeypatch.setattr(ray_actors, "_WAIT", 0.0)
    assert ray_actors.start_ray() == (ray, True)
    slow[0] = 3
    with pytest.raises(SightloopError, match=r"did not start in 3 tries \(the node timed out\)"):
        ray_actors.start_ray()
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UsageError, match=r"pip install .*\[ray\]"):
        ray_actors.start_ray()


@pytest.fixture(autouse=True)
def threads_as_they_were() -> Iterator[None]:
    """A worker takes its process's threads for itself; those of `Crew` live in this one."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


class Crew:
    """An engine whose workers live here, and die when `deadly` says so. models: so often they were loaded."""

    def __init__(self, job: Any, deadly: Any) -> None:
        self.job, self.deadly, self.started = job, deadly, 0

    def start(self, place: int) -> Any:
        self.started += 1
        return Hand(self, LazyServer(partial(workers.ShardServer, self.job), place))

    def ready(self, hands: Any) -> Any:
        return list(hands)[-1:]

    def close(self) -> None:
        self.started = -self.started


class Hand:
    def __init__(self, crew: Crew, server: LazyServer) -> None:
        self.crew, self.server = crew, server

    def give(self, request: Any) -> None:
        self.request = request

    def take(self) -> list[object]:
        if self.crew.deadly(self.request):
            raise EOFError
        items: list[object] = []
        last = self.server.answer(self.request, items.append)
        return [*items, last]

    def stop(self) -> str:
        return "exit status -9"


def crew_of(place: Path, out: Path, deadly: Any, **options: Any) -> tuple[Any, Crew]:
    (out / "evidence").mkdir(parents=True)
    given = from_options(CapFiltOptions, QUICK | {"workers": 3} | options)
    dataset = open_dataset([place / "a.tar", place / "b.tar"])
    job, _ = open_job(dataset, out, (str(place / "caption"), str(place / "match")), given)
    return job, Crew(job, deadly)


def test_a_sample_that_takes_workers_down_is_left_out(
    place: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = open_dataset(place / "a.tar").key(3)

    def deadly(request: Any) -> bool:
        if isinstance(request, workers.TrySample):
            return request.sample == 3
        return request.shard == 0 and key not in request.quarantined

    job, crew = crew_of(place, tmp_path, deadly)
    told: list[tuple[str, str, str]] = []
    loads: list[Any] = []
    monkeypatch.setattr(workers, "load_models", lambda job: loads.append(job) or shard.load_models(job))
    found = list(workers.process_shards(job, crew, [0, 1, 2], {}, lambda *what: told.append(what)))
    entries = {each["unit"]: each for each in found if isinstance(each, dict)}
    reason = "took a worker down twice (exit status -9)"
    assert told == [("a.tar", key, reason)]
    assert entries[0]["failed"] == [["a.tar", key, reason]]
    assert (entries[0]["samples"], entries[0]["written"]) == (8, 7)
    assert crew.started == -(3 + 2)
    assert len(loads) == 4  # once in each that came to work: the first died before
    assert (tmp_path / "000001.tar").read_bytes() == (whole / "000001.tar").read_bytes()
    assert len([each for each in found if isinstance(each, tuple)]) == COUNT


def test_workers_that_die_without_cause_end_the_job(place: Path, tmp_path: Path) -> None:
    job, crew = crew_of(
        place, tmp_path, lambda request: isinstance(request, workers.ProcessShard) and request.shard == 1
    )
    with pytest.raises(SightloopError, match=r"000001\.tar: 3 workers died at it.*fewer --workers"):
        list(workers.process_shards(job, crew, [0, 1, 2], {}, lambda *what: None))


def test_a_worker_s_error_is_the_job_s(place: Path, tmp_path: Path) -> None:
    job, crew = crew_of(place, tmp_path, lambda request: False)
    job.models["captioner"] = str(place / "clip")
    with pytest.raises(UnsupportedError, match="cannot caption"):
        list(workers.process_shards(job, crew, [0, 1, 2], {}, lambda *what: None))
    assert crew.started < 0


def test_a_finished_job_does_nothing_and_proves_it(place: Path, whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(whole, out)
    seen: list[Any] = []
    done = run(place, out, on_event=seen.append)
    assert (done.new, done.samples) == (0, COUNT)
    assert all(isinstance(event, Skipped) for event in seen)
    data = bytearray((out / "000001.tar").read_bytes())
    data[600] ^= 1
    (out / "000001.tar").write_bytes(data)
    (out / "evidence" / "000002.jsonl").unlink()
    assert run(place, out).new == 6 + 8
    assert content(out) == content(whole)


def test_damaged_and_torn_lines_are_work_to_do_again(place: Path, whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(whole, out)
    lines = (out / "manifest.jsonl").read_bytes().splitlines(keepends=True)
    (out / "manifest.jsonl").write_bytes(
        lines[0].replace(b'"written": 8', b'"written": 7') + b'["check"]\n"\xff"\n' + lines[1] + lines[2][:50]
    )
    (out / "log.jsonl").write_bytes(b'\xff\n{"samples": "x"}\n')
    (out / f"{TEMP_PREFIX}0.tmp").write_bytes(b"half")
    assert run(place, out).new == 16
    assert content(out) == content(whole)


def test_a_seed_draws_other_texts_and_only_those(place: Path, whole: Path, tmp_path: Path) -> None:
    run(place, tmp_path, seed=1)
    ours, theirs = evidence(tmp_path), evidence(whole)
    assert [a["text"] == b["text"] for a, b in zip(ours, theirs, strict=True) if a["source"] == "web"] == [
        True
    ] * COUNT
    assert [a["text"] for a in ours] != [b["text"] for b in theirs]


# One process is begun, and forked for each kill: [what it dies at, the how manieth, a little later].
KILLER = """
import json, os, signal, sys, time
from sightloop.capfilt.bootstrap import bootstrap
from sightloop.data.journal import Journal

def dying(call, left):
    def called(*given):
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        found = call(*given)
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return found
    return called

def work(place, out, aim, count, delay, options):
    left = [count]
    if aim == "commit":
        Journal.add = dying(Journal.add, left)
    if aim == "replace":
        os.replace = dying(os.replace, left)
    def watch(event):
        left[0] -= type(event).__name__ == "Done" and aim == "sample"
        if left[0] == 0:
            time.sleep(delay)
            os.kill(os.getpid(), signal.SIGKILL)
    bootstrap([f"{place}/a.tar", f"{place}/b.tar"], out=out, captioner=f"{place}/caption",
              filter=f"{place}/match", on_event=watch, **options)

place, out, kills, options = sys.argv[1], sys.argv[2], *map(json.loads, sys.argv[3:])
for kill in kills:
    child = os.fork()
    if not child:
        work(place, out, *kill, options)
        os._exit(0)
    print(os.waitpid(child, 0)[1], flush=True)
"""
# SIGHTLOOP_LONG=1: 50 kills of a job over 2,000 images, ten of them at a commit.
KILLS: list[tuple[str, int, float]] = [
    ("sample", 3, 0.0),
    ("replace", 3, 0.0),
    ("commit", 1, 0.0),
    ("sample", 9, 0.003),
    ("commit", 2, 0.0),
]
if LONG:
    draw = random.Random(0)
    KILLS = [("sample", draw.randint(1, 70), 0.02 * draw.random()) for _ in range(40)]
    KILLS += [(draw.choice(["commit", "replace"]), draw.randint(1, 6), 0.0) for _ in range(10)]
    draw.shuffle(KILLS)


def test_killed_anywhere_it_goes_on(place: Path, whole: Path, tmp_path: Path) -> None:
    out, options, count = tmp_path / "out", dict(QUICK), COUNT
    if LONG:
        larger, count = tmp_path / "larger", 2000
        shutil.copytree(place, larger)
        write_synthetic_world(larger / "a.tar", synthetic_world("train", 1300, 1))
        write_synthetic_world(larger / "b.tar", synthetic_world("train", 700, 2))
        place, whole, options = larger, tmp_path / "whole", options | {"block": 40}
        run(place, whole, **options)
    words = [sys.executable, "-c", KILLER, str(place), str(out), json.dumps(KILLS), json.dumps(options)]
    found = subprocess.run(words, capture_output=True, text=True, check=True)
    assert [int(status) for status in found.stdout.split()] == [signal.SIGKILL] * len(KILLS), found.stderr
    lines = (out / "manifest.jsonl").read_bytes().count(b"\n")
    seen: list[Any] = []
    done = run(place, out, on_event=seen.append, **options)
    assert content(out) == content(whole)
    assert 0 < done.new < count
    assert len([event for event in seen if isinstance(event, Skipped)]) + done.new == count
    assert lines >= 1
    keys = [sample.key for sample in open_dataset(out)]
    assert len(set(keys)) == len(keys) == count


def test_a_worker_that_dies_is_replaced(place: Path, whole: Path, tmp_path: Path) -> None:
    victims: list[int] = []
    begin = processes.Process.__init__

    def start(self: Any, make: Any, number: int, threads: int) -> None:
        begin(self, make, number, threads)
        victims.append(self.process.pid)
        if len(victims) == 1:
            os.kill(self.process.pid, signal.SIGKILL)

    seen: list[Any] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(processes.Process, "__init__", start)
        done = run(place, tmp_path / "out", workers=2, isolate=True, on_event=seen.append)
    assert len(victims) == 3
    assert content(tmp_path / "out") == content(whole)
    assert done.new == done.samples == COUNT
    assert len({event.name for event in seen if isinstance(event, Done)}) == COUNT


@pytest.fixture
def modelless(monkeypatch: pytest.MonkeyPatch) -> None:
    """Verdicts without models: what is done with them is the same."""

    def work(job: Any, models: Any, items: Any) -> None:
        for item in items:
            web = [CandidateText("web", text, 0.75, 0.25, True, "matched") for text in item.sample.captions]
            item.texts = [
                *web,
                CandidateText("synthetic", f"a dog in {item.key}", 0.25, 0.125, False, "unmatched"),
            ]

    models = shard.Models(None, None, None)
    monkeypatch.setattr(shard.Models, "specs", [ImageSpec(resize=(16, 16))])
    monkeypatch.setattr("sightloop.capfilt.bootstrap.load_models", lambda job: models)
    monkeypatch.setattr(shard, "_caption_and_filter", work)


# Which calls fail, and whether all after them fail too. SIGHTLOOP_LONG=1: every one up to the 200th.
FAULTS = [(2, True), (9, False), (47, True)]
if LONG:
    FAULTS = [(n, n % 2 == 0) for n in range(1, 201)]


@pytest.mark.usefixtures("modelless")
@pytest.mark.parametrize("to", ["tar", "parquet"])
@pytest.mark.parametrize("call", CALLS)
def test_every_nth_failing_call_is_said_and_the_rest_resumes(
    place: Path, tmp_path: Path, call: str, to: str
) -> None:
    """A clean word, or the right result; nothing half written."""
    assert not word_of(place, tmp_path / "whole", to)
    right = content(tmp_path / "whole")
    struck = 0
    for n, lasting in FAULTS:
        out = tmp_path / "out"
        with failing(call, out, n, lasting) as fault:
            said = word_of(place, out, to)
        struck += fault.struck
        if said:
            assert f"{out}: cannot continue: no space left on device" in said
            assert "run the same command again" in said
            there = content(out) if out.exists() else {}
            assert not [name for name in there if TEMP_PREFIX in name]
            growing = ("manifest.jsonl", "quarantine.jsonl")
            assert {n: d for n, d in there.items() if n not in growing}.items() <= right.items()
        assert not word_of(place, out, to)
        assert content(out) == right, (call, n)
        shutil.rmtree(out)
    assert struck >= 2


def word_of(place: Path, out: Path, to: str) -> str:
    """Why a run ended, if it did not end well."""
    try:
        run(place, out, block=1, to=to)
    except SightloopError as error:
        return str(error)
    return ""


def test_a_full_disk_is_said_by_the_command(
    place: Path, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    words = ["bootstrap", place / "a.tar", place / "b.tar", "--captioner", place / "caption"]
    words += ["--filter", place / "match", "--out", out, "--block", 8, "--max-tokens", 7, "--group", 3]
    words += ["--threads", 1, "--readers", 1]
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))  # of a file
    try:
        assert main.main([*map(str, words)]) == 1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    said = capsys.readouterr().err
    assert f"{out}: cannot continue: file too large" in said
    assert "make room there, and run the same command again" in said
    assert not list(out.glob("*.tar"))
    assert not list(out.glob(f"{TEMP_PREFIX}*"))
    assert main.main([*map(str, words)]) == 0
    assert content(out) == content(whole)


def test_the_report_counts_what_the_evidence_says(whole: Path) -> None:
    told = json.loads((whole / "report.json").read_text())
    lines = evidence(whole)
    for source in ("web", "synthetic"):
        mine = [line for line in lines if line["source"] == source]
        kept = [line for line in mine if line["verdict"] == "kept"]
        assert (told["texts"][source]["total"], told["texts"][source]["kept"]) == (len(mine), len(kept))
        judged = [line for line in mine if line["itm"] is not None]
        assert sum(told["itm_histogram"][source]) == len(judged)
        assert told["texts"][source]["noise_ratio"] == pytest.approx(1 - len(kept) / len(judged), abs=1e-4)
    assert told["images"] == {"samples": COUNT, "written": COUNT, "failed": 0}
    assert told["throughput"]["images"] >= COUNT
    page = (whole / "report.html").read_text()
    assert page.count("data:image/jpeg") >= 8
    assert f"<bdi>{escape(lines[0]['text'])}</bdi>" in page
    assert "<script" not in page
    assert "http" not in page


def test_an_estimate_writes_nothing(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    models = {"captioner": place / "caption", "filter": place / "match"}
    made = estimate(place / "a.tar", samples=6, price=2.0, **models, **QUICK, workers=4)
    assert (made.samples, made.measured) == (14, 6)
    huge = made.of(10**9)
    assert huge.hours == pytest.approx(10**9 / made.images_per_second / 4 / 3600, rel=1e-3)
    assert huge.bytes == pytest.approx(10**9 * made.bytes_per_image)
    assert huge.cost == pytest.approx(2 * 4 * huge.hours, rel=1e-3)
    assert [each["samples"] for each in made.to_json()["scales"]] == [10**power for power in range(4, 10)]
    assert made.hours > 0
    assert made.cost is not None
    assert 14 / 6 * 1000 < made.bytes < 10_000_000
    assert sum(made.texts.values()) == 12
    for price in (-1.0, float("nan")):
        with pytest.raises(UsageError, match="price"):
            estimate(place / "a.tar", price=price, **models, **QUICK)
    assert list(tmp_path.iterdir()) == []


def test_the_command(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["bootstrap", place / "a.tar", "--captioner", place / "caption", "--filter", place / "match"]
    words += ["--out", tmp_path / "x", "--block", 8, "--max-tokens", 6, "--json"]
    assert main.main([*map(str, words), "--estimate"]) == 0
    assert json.loads(capsys.readouterr().out)["samples"] == 14
    assert main.main([*map(str, words)]) == 0
    out, said = capsys.readouterr()
    assert json.loads(out)["samples"] == 14
    assert "14 done" in said
    assert main.main([*map(str, words)]) == 0
    assert "14 skipped" in capsys.readouterr().err
    assert main.main([*map(str, words), "--seed", "3"]) == 2
    assert "other settings" in capsys.readouterr().err


# -- what is refused, and what is broken -------------------------------------------------------------------------------


def test_another_job_a_strange_folder_and_a_second_process_are_refused(
    place: Path, whole: Path, tmp_path: Path
) -> None:
    before = content(whole)
    with pytest.raises(UsageError, match=r"seed: 0, now 1"):
        run(place, whole, seed=1)
    with pytest.raises(UsageError, match="filter"):
        run(place, whole, filter=place / "clip", keep="top-k-itc")
    with manifest.open_manifest(whole), pytest.raises(UsageError, match="another process"):
        run(place, whole)
    assert content(whole) == before
    (tmp_path / "mine.txt").write_text("x")
    with pytest.raises(UsageError, match="holds no bootstrap"):
        run(place, tmp_path)
    with pytest.raises(UnsupportedError, match="cannot match"):
        run(place, tmp_path / "out", filter=place / "clip")
    with pytest.raises(UsageError, match="no such option"):
        run(place, tmp_path / "out2", bogus=1)
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["mine.txt"]


def test_what_is_another_job_is_said_by_name(place: Path, tmp_path: Path) -> None:
    data, out = tmp_path / "data", tmp_path / "out"
    data.mkdir()
    for name in ("a.tar", "b.tar"):
        shutil.copy(place / name, data)
    shutil.copytree(place / "match", tmp_path / "match")
    given = {**QUICK, "mode": "filter-only", "filter": tmp_path / "match"}
    bootstrap(data, out=out, **given)
    shutil.copytree(data, tmp_path / "more")
    write_synthetic_world(tmp_path / "more" / "b.tar", synthetic_world("unseen", 8, 2))
    write_synthetic_world(tmp_path / "more" / "c.tar", synthetic_world("unseen", 2, 3))
    (tmp_path / "more" / "a.tar").unlink()
    with pytest.raises(UsageError, match=r"DATA: b\.tar has changed, a\.tar is gone, c\.tar is new"):
        bootstrap(tmp_path / "more", out=out, **given)
    turned = open_dataset(data).select(range(COUNT)[::-1])
    with pytest.raises(UsageError, match="DATA: other samples of it, or in another order"):
        bootstrap(turned, out=out, **given)
    with pytest.raises(UsageError, match=r"filter: \S+match, now \S+caption"):
        bootstrap(data, out=out, **given | {"filter": place / "caption"})
    write_blip(tmp_path / "match", head="match", seed=5)
    with pytest.raises(UsageError, match=r"filter: \S+match has other weights now\): use"):
        bootstrap(data, out=out, **given)


def test_a_job_that_did_nothing_yet_can_be_another(place: Path, whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(UnsupportedError, match="cannot match"):
        run(place, out, filter=place / "clip", seed=3)
    run(place, out)
    assert content(out) == content(whole)


def test_a_file_that_is_in_the_way_is_named(place: Path, tmp_path: Path) -> None:
    dataset = open_dataset(shutil.copy(place / "a.tar", tmp_path / "gone.tar"))
    (tmp_path / "gone.tar").unlink()
    with pytest.raises(SightloopError, match=r"cannot continue: no such file or directory \(.*gone\.tar\)"):
        bootstrap(dataset, out=tmp_path / "out", filter=place / "match", mode="filter-only", **QUICK)


@pytest.mark.parametrize(
    "options",
    [
        {"threshold": 2},
        {"mode": "x"},
        {"keep": "x"},
        {"captions": 0},
        {"num_beams": 0},
        {"max_pixels": 0},
        {"ranker": "x"},
        {"top_p": 0},
        {"to": "csv"},
        {"mode": "captioner-only", "keep": "best"},
        {"min_tokens": 9, "max_tokens": 5},
    ],
)
def test_wrong_options(options: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        from_options(CapFiltOptions, options)


def test_broken_shards_and_images_are_named_once(place: Path, tmp_path: Path) -> None:
    whole = (place / "a.tar").read_bytes()
    (tmp_path / "cut.tar").write_bytes(whole[: len(whole) * 2 // 3])
    folder = tmp_path / "bad"
    folder.mkdir()
    for i, sample in enumerate(synthetic_world("train", 4, 2)):
        assert isinstance(sample.image, bytes)
        (folder / f"{i}.png").write_bytes(sample.image if i != 2 else sample.image[:200])
    (folder / "9.png").write_text("no image")
    more = tar(tmp_path / "more.tar", {"m.png": (folder / "0.png").read_bytes(), "m.npy": "left out"})
    data = [tmp_path / "cut.tar", folder, more]
    options = QUICK | {"captioner": place / "caption", "filter": place / "match", "isolate": True}
    seen: list[Any] = []
    done = bootstrap(data, out=tmp_path / "out", on_event=seen.append, **options)
    assert done.notes == ("more.tar: members of other kinds are left out: 1 .npy",)
    assert [(shard, key) for shard, key, _ in done.failed] == [
        ("cut.tar", "cut.tar"),
        ("bad", "2"),
        ("bad", "9"),
    ]
    assert [event.name for event in seen if isinstance(event, Failed)] == ["cut.tar", "2", "9"]
    lines = [json.loads(line) for line in (tmp_path / "out" / "quarantine.jsonl").read_text().splitlines()]
    assert [line["key"] for line in lines] == ["cut.tar", "2", "9"]
    assert all(line["reason"] and line["shard"] in ("cut.tar", "bad") for line in lines)
    assert bootstrap(data, out=tmp_path / "out", **options).new == 0


def test_draws_are_a_function_of_the_image(place: Path, tmp_path: Path) -> None:
    """The same images in another order and other shards get the same texts."""
    shuffled = open_dataset([place / "a.tar", place / "b.tar"]).select(
        np.random.default_rng(0).permutation(COUNT)
    )
    given = {"captioner": place / "caption", "filter": place / "match", **QUICK, "block": 5}
    bootstrap(shuffled, out=tmp_path / "x", **given)
    run(place, tmp_path / "y")

    def texts(out: Path) -> dict[str, list[str]]:
        lines = [line for line in evidence(out) if line["source"] == "synthetic"]
        return {line["key"]: line["text"] for line in lines}

    assert texts(tmp_path / "x") == texts(tmp_path / "y")


# -- images that stay where they are ---------------------------------------------------------------------------------


def test_images_by_reference(place: Path, tmp_path: Path) -> None:
    folder = tmp_path / "photos" / "in"
    folder.mkdir(parents=True)
    for i, sample in enumerate(synthetic_world("train", 4, 1)):
        assert isinstance(sample.image, bytes)
        (folder / f"{i}.png").write_bytes(sample.image)
        (folder / f"{i}.txt").write_text("a dog\n")
    options = QUICK | {"mode": "captioner-only", "captioner": place / "caption"}
    options |= {"to": "parquet", "by_reference": True}
    bootstrap(tmp_path / "photos", out=tmp_path / "out", **options)
    found = list(open_dataset(tmp_path / "out"))
    assert [s.key for s in found] == [f"in/{i}" for i in range(4)]
    assert all(isinstance(s.image, Path) and s.image.samefile(folder / f"{s.key[3:]}.png") for s in found)
    assert all(s.captions[0] == "a dog" for s in found)
    real = tmp_path / "far" / "away"
    real.mkdir(parents=True)
    (tmp_path / "link").symlink_to(real)
    bootstrap(tmp_path / "photos", out=tmp_path / "link" / "out", **options)
    behind = list(open_dataset(tmp_path / "link" / "out"))
    assert [Path(str(s.image)).read_bytes() for s in behind] == [
        Path(str(s.image)).read_bytes() for s in found
    ]
    with pytest.raises(UsageError, match=r"the images of a\.tar are stored inside it"):
        bootstrap(place / "a.tar", out=tmp_path / "out2", **options)
    with pytest.raises(UsageError, match="use to='parquet'"):
        CapFiltOptions(by_reference=True)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("settings", []),
        ("settings", None),
        ("group", "many"),
        ("group", 0),
        ("group", 10**400),
        ("threads", [1]),
        ("threads", 1.5),
        ("threads", True),
        ("models", [1]),
        ("models", {"filter": 7}),
        ("sources", {"a": "b"}),
        ("sources", [["a.tar"]]),
        ("sources", [["a.tar", 7]]),
        ("sources", 3),
        ("", [1]),
        ("", "text"),
        ("", None),
    ],
)
def test_a_job_file_with_wrong_types_is_named(
    place: Path, whole: Path, tmp_path: Path, name: str, value: object
) -> None:
    out = shutil.copytree(whole, tmp_path / "out")
    job = json.loads((out / "job.json").read_text())
    if name in ("group", "threads"):
        job["settings"][name] = value
    elif name:
        job[name] = value
    else:
        job = value
    (out / "job.json").write_text(json.dumps(job))
    before = content(out)
    with pytest.raises(UsageError, match=r"job\.json.*--out") as caught:
        run(place, out, group=None, threads=None)
    assert "\n" not in str(caught.value)
    assert content(out) == before


@pytest.mark.parametrize("data", [b"", b"{", b"\xff\xfe", b"[" * 100_000])
def test_a_job_file_that_is_no_json_is_named(place: Path, whole: Path, tmp_path: Path, data: bytes) -> None:
    out = shutil.copytree(whole, tmp_path / "out")
    (out / "job.json").write_bytes(data)
    with pytest.raises(UsageError, match=r"job\.json is not JSON"):
        run(place, out)


@given(
    st.dictionaries(
        st.sampled_from(["settings", "models", "sources", "notes", "units", "group"]),
        st.recursive(
            st.none() | st.booleans() | st.integers() | st.text(max_size=3),
            lambda inner: (
                st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3)
            ),
        ),
    )
)
def test_any_job_file_is_refused_or_compared(
    tmp_path_factory: pytest.TempPathFactory, job: dict[str, Any]
) -> None:
    out = tmp_path_factory.mktemp("job")
    (out / "job.json").write_text(json.dumps(job))
    (out / "log.jsonl").write_text("x\n")  # a run that has results
    current = {"settings": {"seed": 0}, "models": {"filter": "m"}, "sources": [["a.tar", "0"]], "units": 1}
    with pytest.raises(UsageError):
        manifest.Manifest(out, current, check_scores)


def test_a_script_without_a_main_guard_may_use_several_workers(place: Path, tmp_path: Path) -> None:
    """A worker does not run the script again, which would start workers of its own."""
    script = tmp_path / "script.py"
    options = {"captioner": str(place / "caption"), "filter": str(place / "match"), **QUICK, "workers": 2}
    script.write_text(
        f"import sightloop\nprint(sightloop.bootstrap({[str(place / 'b.tar')]!r}, out='out', **{options!r}))\n"
    )
    done = subprocess.run(
        [sys.executable, "script.py"], capture_output=True, text=True, cwd=tmp_path, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("CapFiltSummary(") == 1
