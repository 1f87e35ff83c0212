"""Another rule filters a finished run again by its evidence, and the result is that of a run with that rule."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from sightloop.capfilt import bootstrap as module
from sightloop.capfilt import shard
from sightloop.capfilt.bootstrap import bootstrap
from sightloop.data.datasets.synthetic import synthetic_world, write_synthetic_world
from sightloop.errors import UsageError
from tests.tiny_checkpoints.clip_and_blip import write_blip, write_clip

RULES: list[dict[str, Any]] = [
    {"threshold": 0.0},
    {"threshold": 0.6},
    {"threshold": 1.0},
    {"keep": "best", "threshold": 0.3},
    {"keep": "top-k-itc", "top": 1},
]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("refilter")
    write_blip(folder / "caption")
    write_blip(folder / "match", head="match")
    write_clip(folder / "clip")
    write_synthetic_world(folder / "a.tar", synthetic_world("train", 7, 1, shuffled=True))
    run(folder, folder / "out")
    return folder


def run(place: Path, out: Path, **options: Any) -> Any:
    given = {"captioner": place / "caption", "filter": place / "match", "max_tokens": 7, **options}
    return bootstrap(place / "a.tar", out=out, block=3, group=3, threads=1, isolate=False, **given)


def content(out: Path) -> dict[str, bytes]:
    """Everything but what is about a run."""
    about_runs = ("log.jsonl", "report.json", "report.html")
    files = (path for path in out.rglob("*") if path.is_file() and path.name not in about_runs)
    return {path.relative_to(out).as_posix(): path.read_bytes() for path in files}


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_the_result_is_that_of_a_fresh_run(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rule: dict[str, Any]
) -> None:
    run(place, tmp_path / "fresh", **rule)
    again = tmp_path / "again"
    shutil.copytree(place / "out", again)
    monkeypatch.setattr(shard, "load_models", None)  # no model is loaded
    monkeypatch.setattr(module, "load_models", None)
    done = run(place, again, **rule)
    assert (done.new, done.samples) == (0, 7)
    assert any("filtered again" in note for note in done.notes)
    assert content(again) == content(tmp_path / "fresh")
    assert not any("filtered again" in note for note in run(place, again, **rule).notes)
    run(place, again)  # and back
    assert content(again) == content(place / "out")


def test_a_kill_on_the_way_is_resumed(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(place, tmp_path / "fresh", threshold=0.6)
    again = tmp_path / "again"
    shutil.copytree(place / "out", again)
    refilter, calls = module.refilter_shard, list[int]()

    def killed(job: Any, index: int) -> Any:
        calls.append(index)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return refilter(job, index)

    monkeypatch.setattr(module, "refilter_shard", killed)
    with pytest.raises(KeyboardInterrupt):
        run(place, again, threshold=0.6)
    run(place, again, threshold=0.6)
    assert calls == [0, 1, 1, 2]
    assert content(again) == content(tmp_path / "fresh")


def test_what_the_evidence_cannot_say_is_refused(place: Path, tmp_path: Path) -> None:
    ranked = {"filter": place / "clip", "keep": "top-k-itc"}
    run(place, tmp_path / "out", **ranked)
    before = content(tmp_path / "out")
    with pytest.raises(UsageError, match=r"needs the ITM score.*name another --out"):
        run(place, tmp_path / "out", filter=place / "clip", keep="matching")
    with pytest.raises(UsageError, match="seed: 0, now 1"):
        run(place, tmp_path / "out", **ranked, top=1, seed=1)
    assert content(tmp_path / "out") == before


@pytest.mark.parametrize(
    ("file", "rule"),
    [("evidence/000001.jsonl", {}), ("000001.tar", {}), ("manifest.jsonl", {}),
     ("evidence/000001.jsonl", {"threshold": 0.6})],
)  # fmt: skip
def test_a_flipped_byte_is_named_and_its_shard_done_again(
    place: Path, tmp_path: Path, file: str, rule: dict[str, Any]
) -> None:
    again = tmp_path / "again"
    shutil.copytree(place / "out", again)
    data = bytearray((again / file).read_bytes())
    data[len(data) // 2 - 1] ^= 1
    (again / file).write_bytes(bytes(data))
    assert any(file in note for note in run(place, again, **rule).notes)
    if not rule:
        assert content(again) == content(place / "out")
