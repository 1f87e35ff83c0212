from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sightloop.annotation.sidecars import SidecarSink, add_line
from sightloop.types import Failed, Skipped


def write_image(folder: Path, name: str = "a.jpg") -> str:
    (folder / name).write_bytes(b"image")
    return str(folder / name)


def test_a_caption_is_one_line_of_utf8(tmp_path: Path) -> None:
    name = write_image(tmp_path)
    assert SidecarSink().check(name) is None
    assert SidecarSink().write(name, "ein Bär \U0001f43b") is None
    assert (tmp_path / "a.txt").read_bytes() == "ein Bär \U0001f43b\n".encode()
    assert sorted(os.listdir(tmp_path)) == ["a.jpg", "a.txt"]


@pytest.mark.parametrize("present", [b"by hand", b"\xff\xfe odd"])
def test_skip_never_changes_an_existing_file(tmp_path: Path, present: bytes) -> None:
    name = write_image(tmp_path)
    (tmp_path / "a.txt").write_bytes(present)
    assert isinstance(SidecarSink().check(name), Skipped)
    assert isinstance(SidecarSink().write(name, "new"), Skipped)
    assert (tmp_path / "a.txt").read_bytes() == present


def test_skip_survives_a_file_made_meanwhile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = write_image(tmp_path)
    sidecars = SidecarSink()
    monkeypatch.setattr(sidecars, "check", lambda _: None)  # checked before the file was made
    (tmp_path / "a.txt").write_text("by hand")
    assert isinstance(sidecars.write(name, "new"), Skipped)
    assert (tmp_path / "a.txt").read_text() == "by hand"


def test_overwrite_append_prepend(tmp_path: Path) -> None:
    name, target = write_image(tmp_path), tmp_path / "a.txt"
    assert SidecarSink("append").write(name, "one") is None
    assert SidecarSink("append").write(name, "two") is None
    assert isinstance(SidecarSink("append").write(name, "two"), Skipped)
    assert SidecarSink("prepend").write(name, "zero") is None
    assert isinstance(SidecarSink("prepend").write(name, "zero"), Skipped)
    assert target.read_text() == "zero\none\ntwo\n"
    assert SidecarSink("overwrite").write(name, "new") is None
    assert target.read_text() == "new\n"


@given(st.text().map(str.encode), st.text(min_size=1).map(str.encode), st.booleans())
def test_add_line_keeps_the_text_and_is_idempotent(present: bytes, line: bytes, first: bool) -> None:
    line = b" ".join(line.split()) or b"x"
    updated = add_line(present, line, first=first)
    assert add_line(updated, line, first=first) == updated
    body = updated.removeprefix(b"\xef\xbb\xbf")
    assert body.startswith(line) if first else body.rstrip(b"\r\n").endswith(line)
    if present.strip():
        assert present in updated or (first and present.startswith(b"\xef\xbb\xbf"))


def test_add_line_keeps_byte_order_marks_and_line_ends() -> None:
    assert add_line(b"\xef\xbb\xbfone\r\ntwo", b"x", first=True) == b"\xef\xbb\xbfx\r\none\r\ntwo\r\n"
    assert add_line(b"\xef\xbb\xbfone\r\ntwo", b"x", first=False) == b"\xef\xbb\xbfone\r\ntwo\r\nx\r\n"
    assert add_line(b"one x", b"x", first=False) == b"one x\nx\n"
    assert add_line(b"x one", b"x", first=True) == b"x\nx one\n"
    assert add_line(b" \n", b"x", first=False) == b"x\n"


def test_caption_files_that_are_no_plain_files_fail(tmp_path: Path) -> None:
    names = [write_image(tmp_path, f"{stem}.jpg") for stem in "abcd"]
    (tmp_path / "a.txt").mkdir()
    (tmp_path / "target").write_text("t")
    os.symlink("target", tmp_path / "b.txt")
    os.symlink("nowhere", tmp_path / "c.txt")
    os.mkfifo(tmp_path / "d.txt")
    for mode in ("overwrite", "append", "prepend"):
        for name in names:
            assert isinstance(SidecarSink(mode).check(name), Failed), (mode, name)
            assert isinstance(SidecarSink(mode).write(name, "new"), Failed), (mode, name)
    kinds = [type(SidecarSink("skip").check(name)) for name in names]
    assert kinds == [Failed, Skipped, Failed, Failed]  # a link to a caption is a caption
    assert (tmp_path / "target").read_text() == "t"


def test_read_only_and_foreign_encodings_fail(tmp_path: Path) -> None:
    name, target = write_image(tmp_path), tmp_path / "a.txt"
    target.write_bytes(b"\xff\xfea\0")
    assert "UTF-8" in SidecarSink("append").write(name, "new").reason  # type: ignore[union-attr]
    target.chmod(0o444)
    assert "read-only" in SidecarSink("overwrite").check(name).reason  # type: ignore[union-attr]
    assert target.read_bytes() == b"\xff\xfea\0"


def test_images_that_differ_only_in_their_ending(tmp_path: Path) -> None:
    messages: list[str] = []
    names = [
        "a.jpg",
        "a.png",
        "b.jpg",
        "B.PNG",
        "c.jpg",
        "c.jpg.png",
        "d",
        "d.jpg",
        "e.jpg",
        "f.dat",
        "g.txt",
    ]
    for name in names:
        write_image(tmp_path, name)
    (tmp_path / "e").mkdir()
    sidecars = SidecarSink(notify=messages.append)
    paths = [os.path.relpath(sidecars.path(str(tmp_path / name)), tmp_path) for name in names]
    assert paths == [
        "a.jpg.txt",
        "a.png.txt",
        "b.jpg.txt",
        "B.PNG.txt",
        "c.txt",
        "c.jpg.png.txt",
        "d.txt",
        "d.jpg.txt",
        "e.txt",
        "f.dat.txt",
        "g.txt.txt",
    ]
    assert len({path.casefold() for path in paths}) == len(paths)
    assert len(messages) == 1


def test_temporary_files_of_killed_runs_are_removed(tmp_path: Path) -> None:
    name = write_image(tmp_path)
    (tmp_path / ".sightloop-0123456789abcdef.tmp").write_bytes(b"half")
    SidecarSink().write(name, "a")
    assert sorted(os.listdir(tmp_path)) == ["a.jpg", "a.txt"]


def test_a_missing_folder_fails(tmp_path: Path) -> None:
    assert isinstance(SidecarSink().check(str(tmp_path / "gone" / "a.jpg")), Failed)
    assert isinstance(SidecarSink().check(str(tmp_path / ("x" * 250 + ".weird"))), Failed)
