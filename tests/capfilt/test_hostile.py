"""Strangers' shards: what is broken costs itself and nothing else, and nothing happens outside OUT."""

from __future__ import annotations

import json
import os
import tarfile
from pathlib import Path

from sightloop.capfilt.bootstrap import bootstrap
from sightloop.data.datasets.dataset import open_dataset
from tests.capfilt.hostile import good, write_shards
from tests.tiny_checkpoints.clip_and_blip import write_blip

EACH = 100 if os.environ.get("SIGHTLOOP_LONG") else 20


def test_hostile_shards(tmp_path: Path) -> None:
    """240 of them (SIGHTLOOP_LONG=1: 1,200), and three shards that are damaged themselves."""
    data, out, here = (tmp_path / name for name in ("data", "out", "here"))
    for folder in (data, here):
        folder.mkdir()
    secret = here / "secret.png"
    secret.write_bytes(good(77, "PNG"))
    must, may = write_shards(data, secret, 12, EACH)
    assert len(must | may) == 12 * EACH
    whole = (data / "000.tar").read_bytes()
    (data / "cut.tar").write_bytes(whole[:20_000])
    (data / "noise.tar").write_bytes(os.urandom(5000))
    (data / "pax.tar").write_bytes(header_bomb())
    write_blip(tmp_path / "match", head="match")
    before = seen(tmp_path, out)
    options = {"mode": "filter-only", "threshold": 0.0, "block": 64, "threads": 1}
    done = bootstrap(data, out=out, filter=tmp_path / "match", **options)
    assert seen(tmp_path, out) == before

    named = [(shard, key) for shard, key, _ in done.failed]
    assert len(named) == len(set(named))
    assert {"cut.tar", "noise.tar", "pax.tar"} <= {key for _, key in named}
    own = {
        number: [shard for shard, key in named if number in key and shard != "cut.tar"]
        for number in must | may
    }
    for number, shards in own.items():
        home = f"{int(number[1:]) // EACH:03}.tar"
        assert shards == [home] if number in must else set(shards) <= {home}, (number, shards)
    lines = (out / "quarantine.jsonl").read_text().splitlines()
    assert [(each["shard"], each["key"]) for each in map(json.loads, lines)] == named

    assert {f"good{shard}{end}" for shard in range(12) for end in "ab"} <= keys(out)
    for path in sorted(out.glob("*.tar")):
        assert secret.read_bytes() not in path.read_bytes()
        with tarfile.open(path, errors="surrogateescape") as tar:
            for member in tar:
                assert member.isreg()
                assert not member.name.startswith("/")
                assert ".." not in member.name.split("/")
                assert not any(number in member.name for number in must)
    assert "<script>alert" not in (out / "report.html").read_text()


def header_bomb() -> bytes:
    """An extended header that says it is 8 GB long."""
    info = tarfile.TarInfo("x")
    info.type, info.size = tarfile.XHDTYPE, 8 << 30
    return info.tobuf(tarfile.GNU_FORMAT) + bytes(4096)


def seen(folder: Path, out: Path) -> dict[str, float]:
    """Everything but OUT, and when it was changed."""
    found = (path for path in folder.rglob("*") if out not in (path, *path.parents))
    return {str(path): path.lstat().st_mtime for path in found if path != folder}


def keys(data: Path) -> set[str]:
    return {sample.key for sample in open_dataset(data).stream(lambda key, reason: None)}
