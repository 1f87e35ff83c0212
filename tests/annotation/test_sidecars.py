from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sightloop.annotation.sidecars import SidecarSink, joined_lines
from sightloop.types import Failed, Skipped


def picture(folder: Path, name: str = "a.jpg") -> str:
    (folder / name).write_bytes(b"picture")
    return str(folder / name)


def test_a_caption_is_one_line_of_utf8(tmp_path: Path) -> None:
    name = picture(tmp_path)
    assert SidecarSink().check(name) is None
    assert SidecarSink().write(name, "ein Bär \U0001f43b") is None
    assert (tmp_path / "a.txt").read_bytes() == "ein Bär \U0001f43b\n".encode()
    assert sorted(os.listdir(tmp_path)) == ["a.jpg", "a.txt"]


@pytest.mark.parametrize("present", [b"", b"by hand", b"\xff\xfe odd"])
def test_skip_never_touches_what_is_there(tmp_path: Path, present: bytes) -> None:
    name = picture(tmp_path)
    (tmp_path / "a.txt").write_bytes(present)
    assert isinstance(SidecarSink().check(name), Skipped)
    assert isinstance(SidecarSink().write(name, "new"), Skipped)
    assert (tmp_path / "a.txt").read_bytes() == present


def test_skip_survives_a_file_made_meanwhile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = picture(tmp_path)
    sidecars = SidecarSink()
    monkeypatch.setattr(sidecars, "check", lambda _: None)  # the look came before the person
    (tmp_path / "a.txt").write_text("by hand")
    assert isinstance(sidecars.write(name, "new"), Skipped)
    assert (tmp_path / "a.txt").read_text() == "by hand"


def test_overwrite_append_prepend(tmp_path: Path) -> None:
    name, target = picture(tmp_path), tmp_path / "a.txt"
    assert SidecarSink("append").write(name, "one") is None
    assert SidecarSink("append").write(name, "two") is None
    assert isinstance(SidecarSink("append").write(name, "two"), Skipped)
    assert SidecarSink("prepend").write(name, "zero") is None
    assert isinstance(SidecarSink("prepend").write(name, "zero"), Skipped)
    assert target.read_text() == "zero\none\ntwo\n"
    assert SidecarSink("overwrite").write(name, "new") is None
    assert target.read_text() == "new\n"


@given(st.text().map(str.encode), st.text(min_size=1).map(str.encode), st.booleans())
def test_joining_keeps_what_is_there_and_is_idempotent(present: bytes, line: bytes, first: bool) -> None:
    line = b" ".join(line.split()) or b"x"
    joined = joined_lines(present, line, first=first)
    assert joined_lines(joined, line, first=first) == joined
    body = joined.removeprefix(b"\xef\xbb\xbf")
    assert body.startswith(line) if first else body.rstrip(b"\r\n").endswith(line)
    if present.strip():
        assert present in joined or joined == present or (first and present.startswith(b"\xef\xbb\xbf"))


def test_joining_keeps_byte_order_marks_and_line_ends() -> None:
    assert joined_lines(b"\xef\xbb\xbfone\r\ntwo", b"x", first=True) == b"\xef\xbb\xbfx\r\none\r\ntwo\r\n"
    assert joined_lines(b"\xef\xbb\xbfone\r\ntwo", b"x", first=False) == b"\xef\xbb\xbfone\r\ntwo\r\nx\r\n"
    assert joined_lines(b"one x", b"x", first=False) == b"one x\nx\n"
    assert joined_lines(b"x one", b"x", first=True) == b"x\nx one\n"
    assert joined_lines(b" \n", b"x", first=False) == b"x\n"


def test_what_is_no_plain_file_fails(tmp_path: Path) -> None:
    names = [picture(tmp_path, f"{stem}.jpg") for stem in "abcd"]
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
    name, target = picture(tmp_path), tmp_path / "a.txt"
    target.write_bytes(b"\xff\xfea\0")
    assert "UTF-8" in SidecarSink("append").write(name, "new").reason  # type: ignore[union-attr]
    target.chmod(0o444)
    assert "read-only" in SidecarSink("overwrite").check(name).reason  # type: ignore[union-attr]
    assert target.read_bytes() == b"\xff\xfea\0"


def test_pictures_that_differ_in_their_ending_only(tmp_path: Path) -> None:
    said: list[str] = []
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
        picture(tmp_path, name)
    (tmp_path / "e").mkdir()
    sidecars = SidecarSink(notify=said.append)
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
    assert len(said) == 1


def test_temporaries_of_killed_runs_are_cleared(tmp_path: Path) -> None:
    name = picture(tmp_path)
    (tmp_path / ".sightloop-0123456789abcdef.tmp").write_bytes(b"half")
    SidecarSink().write(name, "a")
    assert sorted(os.listdir(tmp_path)) == ["a.jpg", "a.txt"]


def test_a_missing_folder_fails(tmp_path: Path) -> None:
    assert isinstance(SidecarSink().check(str(tmp_path / "gone" / "a.jpg")), Failed)
    assert isinstance(SidecarSink().check(str(tmp_path / ("x" * 250 + ".weird"))), Failed)
