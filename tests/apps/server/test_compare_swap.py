"""Compare-and-swap of files: nothing that another program wrote is lost."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sightloop.apps.server import compare_swap
from sightloop.apps.server.compare_swap import read_or_none, replace_if_unchanged

CONTENT = st.one_of(st.none(), st.sampled_from([b"", b"a", b"b\n", b"long " * 100]))


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(present=CONTENT, expected=CONTENT, new=CONTENT)
def test_it_writes_only_over_what_is_expected(
    tmp_path: Path, present: bytes | None, expected: bytes | None, new: bytes | None
) -> None:
    path = tmp_path / "a.txt"
    path.unlink(missing_ok=True)
    if present is not None:
        path.write_bytes(present)

    assert replace_if_unchanged(path, expected, new) is (present == expected)

    assert read_or_none(path) == (new if present == expected else present)
    assert set(os.listdir(tmp_path)) <= {"a.txt"}


@pytest.mark.parametrize("new", [b"mine", None])
def test_a_write_between_check_and_exchange_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, new: bytes | None
) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"before")
    swap = compare_swap._swap

    def swap_late(*arguments: object) -> bool:
        path.write_bytes(b"theirs")
        return swap(*arguments)  # pyright: ignore[reportArgumentType]

    monkeypatch.setattr(compare_swap, "_swap", swap_late)

    assert not replace_if_unchanged(path, b"before", new)

    assert path.read_bytes() == b"theirs"
    assert os.listdir(tmp_path) == ["a.txt"]


def test_permissions_are_kept(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"a")
    path.chmod(0o640)

    assert replace_if_unchanged(path, b"a", b"b")

    assert path.stat().st_mode & 0o777 == 0o640


@pytest.mark.parametrize("new", [b"new", None])
@pytest.mark.parametrize("present", [b"old", b"theirs"])
def test_without_exchange_the_content_is_checked_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, present: bytes, new: bytes | None
) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(present)
    monkeypatch.setattr(compare_swap, "exchange_paths", lambda *_: False)

    assert replace_if_unchanged(path, b"old", new) is (present == b"old")

    assert read_or_none(path) == (new if present == b"old" else present)
    assert set(os.listdir(tmp_path)) <= {"a.txt"}


def test_every_write_of_another_program_is_seen(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"start")
    stop = threading.Event()

    def edit() -> None:
        """Marks what it saw with "+", as a person edits what is shown."""
        while not stop.is_set():
            seen = read_or_none(path)
            if seen and not seen.endswith(b"+"):
                replace_if_unchanged(path, seen, seen + b"+")

    editor = threading.Thread(target=edit)
    editor.start()
    try:
        for number in range(60):
            mine = b"%d" % number
            path.write_bytes(mine)  # in place, as a shell's `>` does
            # What was edited before may be seen for a moment, until the editor has compared and put `mine` back.
            passing = (b"", mine, b"start+")
            content = mine
            for _ in range(1_000_000):
                if content not in passing:
                    break
                content = path.read_bytes()
            assert content == mine + b"+"
    finally:
        stop.set()
        editor.join()


def test_a_missing_folder_is_an_error_that_names_the_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"gone/a\.txt"):
        replace_if_unchanged(tmp_path / "gone" / "a.txt", None, b"a")
