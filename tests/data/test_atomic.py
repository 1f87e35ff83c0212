from __future__ import annotations

import errno
import os
import re
import socket
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sightloop.data import atomic
from sightloop.data.atomic import (
    atomic_path,
    atomic_write,
    exchange_paths,
    remove_stale_temporaries,
    try_lock,
)
from sightloop.errors import UsageError, describe_os_error


def names(folder: Path) -> set[str]:
    return {p.name for p in folder.iterdir()}


@given(data=st.binary(max_size=300) | st.text(max_size=100).filter(lambda t: t.isprintable()))
@settings(max_examples=25, deadline=None)
def test_what_is_written_is_what_is_read(tmp_path_factory: pytest.TempPathFactory, data: bytes | str) -> None:
    folder = tmp_path_factory.mktemp("a")
    atomic_write(folder / "x", data)
    atomic_write(folder / "x", data)
    assert (folder / "x").read_bytes() == (data.encode() if isinstance(data, str) else data)
    assert names(folder) == {"x"}


def test_line_ends_stay(tmp_path: Path) -> None:
    atomic_write(tmp_path / "x", "a\r\nb\n")
    assert (tmp_path / "x").read_bytes() == b"a\r\nb\n"


def test_exclusive_never_replaces(tmp_path: Path) -> None:
    atomic_write(tmp_path / "x", "first", exclusive=True)
    with pytest.raises(FileExistsError):
        atomic_write(tmp_path / "x", "second", exclusive=True)
    assert (tmp_path / "x").read_text() == "first"
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    with pytest.raises(FileExistsError):
        atomic_write(tmp_path / "dangling", "second", exclusive=True)
    assert names(tmp_path) == {"x", "dangling"}


def test_exclusive_loses_to_a_file_that_came_meanwhile(tmp_path: Path) -> None:
    with (
        pytest.raises(FileExistsError),
        atomic_path(tmp_path / "x", exclusive=True) as temporary,
    ):
        temporary.write_text("ours")
        (tmp_path / "x").write_text("by hand")
    assert (tmp_path / "x").read_text() == "by hand"
    assert names(tmp_path) == {"x"}


def test_of_many_exclusive_writers_one_wins(tmp_path: Path) -> None:
    won: list[int] = []

    def write(i: int) -> None:
        try:
            atomic_write(tmp_path / "x", str(i), exclusive=True)
            won.append(i)
        except FileExistsError:
            return

    threads = [threading.Thread(target=write, args=(i,)) for i in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(won) == 1
    assert (tmp_path / "x").read_text() == str(won[0])
    assert names(tmp_path) == {"x"}


@pytest.mark.parametrize("code", [errno.EPERM, errno.EOPNOTSUPP])
def test_exclusive_without_hard_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "link", refuse)
    atomic_write(tmp_path / "x", "first", exclusive=True)
    with pytest.raises(FileExistsError), atomic_path(tmp_path / "y", exclusive=True):
        (tmp_path / "y").write_text("by hand")
    assert (tmp_path / "x").read_text() == "first"
    assert (tmp_path / "y").read_text() == "by hand"
    assert names(tmp_path) == {"x", "y"}


def test_a_failed_write_changes_nothing(tmp_path: Path) -> None:
    (tmp_path / "x").write_text("old")
    with pytest.raises(RuntimeError), atomic_path(tmp_path / "x") as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert (tmp_path / "x").read_text() == "old"
    assert names(tmp_path) == {"x"}


def test_permissions_and_links_are_kept(tmp_path: Path) -> None:
    old = os.umask(0o027)
    try:
        atomic_write(tmp_path / "new", "x")
    finally:
        os.umask(old)
    assert stat.S_IMODE((tmp_path / "new").stat().st_mode) == 0o640
    (tmp_path / "new").chmod(0o604)
    atomic_write(tmp_path / "new", "y")
    assert stat.S_IMODE((tmp_path / "new").stat().st_mode) == 0o604
    (tmp_path / "link").symlink_to("new")
    atomic_write(tmp_path / "link", "z")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "new").read_text() == "z"


def test_a_writer_that_replaces_the_temporary_keeps_the_usual_permissions(tmp_path: Path) -> None:
    with atomic_path(tmp_path / "a") as temporary:  # as safetensors does
        other = temporary.with_name("other")
        other.write_text("x")
        other.chmod(0o600)
        os.replace(other, temporary)
    (tmp_path / "b").write_text("x")
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == stat.S_IMODE((tmp_path / "b").stat().st_mode)


def test_exchange_of_folders(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / name / name).mkdir(parents=True)
    if exchange_paths(tmp_path / "a", tmp_path / "b"):
        assert names(tmp_path / "a") == {"b"}
        assert names(tmp_path / "b") == {"a"}
    assert not exchange_paths(tmp_path / "a", tmp_path / "missing")
    assert (tmp_path / "a").is_dir()


def test_no_such_folder(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        atomic_write(tmp_path / "no" / "x", "a")


WRITER = """
import sys, time
from sightloop.data.atomic import atomic_path
with atomic_path(sys.argv[1]) as temporary:
    temporary.write_text("half")
    print("ready", flush=True)
    time.sleep(60)
"""


def test_a_living_writer_is_left_alone_and_a_killed_one_is_cleaned_up(tmp_path: Path) -> None:
    command = [sys.executable, "-c", WRITER, str(tmp_path / "x")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as writer:
        assert writer.stdout is not None
        assert writer.stdout.readline() == "ready\n"
        assert remove_stale_temporaries(tmp_path) == 0
        assert len(names(tmp_path)) == 1
        writer.kill()
    assert remove_stale_temporaries(tmp_path) == 1
    assert names(tmp_path) == set()


def test_only_our_own_regular_files_are_removed(tmp_path: Path) -> None:
    for name in ("a.tmp", ".sightloop-1.txt", "sightloop-1.tmp", ".sightloop-dead.tmp"):
        (tmp_path / name).write_text("x")
    (tmp_path / ".sightloop-folder.tmp").mkdir()
    os.mkfifo(tmp_path / ".sightloop-pipe.tmp")
    (tmp_path / ".sightloop-link.tmp").symlink_to(tmp_path / "a.tmp")
    assert remove_stale_temporaries(tmp_path) == 1
    assert not (tmp_path / ".sightloop-dead.tmp").exists()
    assert len(names(tmp_path)) == 6
    assert remove_stale_temporaries(tmp_path / "no such folder") == 0


def test_without_locks_age_decides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(atomic, "fcntl", None)
    for name in ("young", "old"):
        (tmp_path / f".sightloop-{name}.tmp").write_text("x")
    yesterday = time.time() - 2 * 24 * 3600
    os.utime(tmp_path / ".sightloop-old.tmp", (yesterday, yesterday))
    assert remove_stale_temporaries(tmp_path) == 1
    assert names(tmp_path) == {".sightloop-young.tmp"}
    atomic_write(tmp_path / "x", "written")
    assert (tmp_path / "x").read_text() == "written"


def test_a_lock_is_one_process_s_until_it_closes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fcntl = pytest.importorskip("fcntl")
    with open(tmp_path / "x", "wb") as mine, open(tmp_path / "x", "rb") as theirs:
        assert try_lock(mine)
        assert not try_lock(theirs)
    with open(tmp_path / "x", "rb") as theirs:
        assert try_lock(theirs)

        def none(file: object, kind: int) -> None:
            raise OSError(errno.ENOLCK, "No locks available")

        monkeypatch.setattr(fcntl, "flock", none)
        assert try_lock(theirs)  # a file system without locks keeps nobody out


@pytest.mark.parametrize("kind", ["pipe", "folder", "socket", "device", "link to a pipe"])
def test_only_regular_files_are_replaced(tmp_path: Path, kind: str) -> None:
    target = tmp_path / "x"
    if kind == "folder":
        target.mkdir()
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(str(target))
    elif kind == "device":
        target = Path(os.devnull)
    else:
        os.mkfifo(target)
        if kind != "pipe":
            (tmp_path / "link").symlink_to(target)
            target = tmp_path / "link"
    before = names(tmp_path), os.stat(target).st_mode
    with pytest.raises(UsageError, match=re.escape(str(target.resolve()))):
        atomic_write(target, "text")
    assert (names(tmp_path), os.stat(target).st_mode) == before


class LibraryError(Exception):
    pass


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        OSError("Error writing bytes to file. Detail: [errno 28] No space left on device"),
        LibraryError("I/O error: No space left on device (os error 28)"),
    ],
)
def test_an_error_of_the_disk_names_the_file(tmp_path: Path, error: Exception) -> None:
    with pytest.raises(OSError) as caught, atomic_path(tmp_path / "x.bin"):
        raise error
    assert caught.value.errno == errno.ENOSPC
    message = describe_os_error(caught.value)
    assert (
        message
        == f"{tmp_path / 'x.bin'}: no space left on device: make room there, and run the same command again."
    )
    assert names(tmp_path) == set()


def test_other_errors_pass_through(tmp_path: Path) -> None:
    for error in (LibraryError("os error 5000"), KeyError("x"), OSError(errno.ECONNRESET, "reset")):
        with pytest.raises(type(error)) as caught, atomic_path(tmp_path / "x"):
            raise error
        assert caught.value is error
    with pytest.raises(OSError) as absent:
        atomic_write(tmp_path / "no" / "x", "text")
    assert absent.value.filename == str(tmp_path / "no" / "x")


@given(
    st.sampled_from(sorted(errno.errorcode)),
    st.one_of(st.none(), st.text(min_size=1).filter(str.isprintable)),
)
def test_an_error_of_the_system_is_one_line_with_its_file(number: int, name: str | None) -> None:
    message = describe_os_error(OSError(number, os.strerror(number), name))
    assert os.strerror(number).lower() in message
    assert message.startswith(name or "")
    assert "Errno" not in message
    assert len(message.splitlines()) == 1
