"""Journals: every whole line survives a cut at any byte, damage is found, one process writes."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sightloop.data.journal import Journal, JournalLine, read_journal, write_journal
from sightloop.errors import UsageError

VALUES = st.none() | st.integers() | st.text(max_size=8) | st.lists(st.integers(), max_size=3)
ENTRIES = st.lists(st.dictionaries(st.text(max_size=4), VALUES, min_size=1, max_size=3), max_size=4)
every_example = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)


def utf8(entry: Any) -> str:
    return json.dumps(entry, ensure_ascii=False)


def entries(path: Path, **options: Any) -> list[Any]:
    return [line.entry for line in read_journal(path, **options)]


def append(path: Path, rows: list[Any], **options: Any) -> list[Any]:
    """Opens the journal, appends rows, closes it; returns the entries that were in it before."""
    lines: list[JournalLine] = []
    journal = Journal(path, lines.append, **options)
    for row in rows:
        journal.add(row)
    journal.close()
    return [line.entry for line in lines]


@settings(every_example, max_examples=30)  # each is cut at every byte
@given(ENTRIES, st.booleans(), st.sampled_from([json.dumps, utf8]))
def test_a_cut_at_any_byte_loses_no_whole_line(
    tmp_path: Path, rows: list[Any], checksum: bool, dumps: Any
) -> None:
    path = tmp_path / "j.jsonl"
    path.unlink(missing_ok=True)
    append(path, rows, checksum=checksum, dumps=dumps)
    data = path.read_bytes()
    for cut in range(len(data) + 1):
        path.write_bytes(data[:cut])
        whole = rows[: data[:cut].count(b"\n")]
        assert entries(path, checksum=checksum) == whole
        assert append(path, [{"next": cut}], checksum=checksum, dumps=dumps) == whole
        assert entries(path, checksum=checksum) == [*whole, {"next": cut}]


@every_example
@given(ENTRIES.filter(bool), st.data())
def test_a_changed_byte_costs_its_own_line(tmp_path: Path, rows: list[Any], draw: st.DataObject) -> None:
    path = tmp_path / "j.jsonl"
    path.unlink(missing_ok=True)
    append(path, rows, checksum=True)
    data = bytearray(path.read_bytes())
    place = draw.draw(st.sampled_from([i for i, byte in enumerate(data) if byte != ord("\n")]))
    data[place] ^= 1 if data[place] ^ 1 != ord("\n") else 2
    path.write_bytes(data)
    expected: list[Any] = list(rows)
    expected[data[:place].count(b"\n")] = None
    assert entries(path, checksum=True) == expected


@pytest.mark.parametrize("tail", [b"\0" * 9, b"\0" * 9 + b"\n", b'{"a": \n', b"[1]\n"])
def test_a_last_line_that_does_not_parse_is_cut_off(tmp_path: Path, tail: bytes) -> None:
    path = tmp_path / "j.jsonl"
    append(path, [{"a": 1}, {"a": 2}])
    data = path.read_bytes()
    path.write_bytes(data + tail)
    assert append(path, []) == [{"a": 1}, {"a": 2}]
    assert path.read_bytes() == data


def test_a_file_that_load_refuses_stays_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("first\nsecond")

    def refuse(line: JournalLine) -> None:
        assert line == (1, 0, 6, None)
        raise UsageError("no journal")

    with pytest.raises(UsageError, match="no journal"):
        Journal(path, refuse)
    assert path.read_text() == "first\nsecond"


def test_offsets_lead_back_to_entries(tmp_path: Path) -> None:
    path = tmp_path / "j.jsonl"
    append(path, [{"a": "old"}])
    journal = Journal(path, lambda line: None, checksum=False)
    journal.clear()
    starts = [journal.add({"a": i}) for i in range(3)]
    assert [journal.read(start) for start in reversed(starts)] == [{"a": 2}, {"a": 1}, {"a": 0}]
    journal.clear()
    assert journal.add({"b": 1}) == 0
    assert journal.read(0) == {"b": 1}
    journal.remove()
    assert not path.exists()


def test_two_writers_are_refused(tmp_path: Path) -> None:
    pytest.importorskip("fcntl")
    path = tmp_path / "j.jsonl"
    journal = Journal(path, lambda line: None)
    journal.add({"a": 1})
    with pytest.raises(UsageError, match=r"j\.jsonl: another run"):
        Journal(path, lambda line: None)
    assert entries(path) == [{"a": 1}]  # readers are welcome
    journal.close()
    assert append(path, []) == [{"a": 1}]


@pytest.mark.parametrize(("sync_every", "expected"), [(0, 0), (1, 5), (2, 3), (9, 1)])
def test_lines_are_synced_as_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sync_every: int, expected: int
) -> None:
    path = tmp_path / "j.jsonl"
    append(path, [])
    synced: list[int] = []
    monkeypatch.setattr(os, "fsync", lambda file: synced.append(os.fstat(file).st_size))
    append(path, [{"a": i} for i in range(5)], sync_every=sync_every)
    assert len(synced) == expected
    assert not synced or synced[-1] == path.stat().st_size


def test_a_line_that_cannot_be_synced_is_taken_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "j.jsonl"
    journal = Journal(path, lambda line: None, sync_every=1)
    journal.add({"a": 1})

    def full(file: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch, pytest.raises(OSError, match="space"):
        patch.setattr(os, "fsync", full)
        journal.add({"a": 2})
    assert entries(path) == [{"a": 1}]
    journal.add({"a": 3})
    journal.close()
    journal.close()
    assert entries(path) == [{"a": 1}, {"a": 3}]


def test_finishing_replaces_the_content_once(tmp_path: Path) -> None:
    path = tmp_path / "j.jsonl"
    rows = [{"a": 2}, {"a": 1}]
    append(path, rows, checksum=True)
    for ordered in (rows[::-1], rows[::-1]):
        before = path.stat().st_ino
        Journal(path, lambda line: None, checksum=True).finish(ordered)
        assert entries(path, checksum=True) == ordered
    assert path.stat().st_ino == before


def test_writing_from_what_is_read(tmp_path: Path) -> None:
    path = tmp_path / "j.jsonl"
    append(path, [{"a": i} for i in range(5)])
    write_journal(path, (line.entry for line in read_journal(path) if line.entry and line.number % 2))
    assert entries(path) == [{"a": 0}, {"a": 2}, {"a": 4}]
