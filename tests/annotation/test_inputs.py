from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from sightloop.annotation.inputs import find_images, is_image_name
from sightloop.errors import os_error_reason
from sightloop.types import Failed, Skipped


def touch(root: Path, *names: str) -> None:
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")


def find(root: Path, *arguments: str | Path) -> list[str]:
    """The paths of `find_images`, relative to root; failures as "!name", skips as "-name"."""
    marks = {Failed: "!", Skipped: "-"}
    out = []
    for item in find_images([root / argument for argument in arguments]):
        path = item if isinstance(item, str) else item.name
        out.append(marks.get(type(item), "") + os.path.relpath(path, root))
    return out


def test_folder_is_walked_in_order(tmp_path: Path) -> None:
    touch(
        tmp_path,
        "b.jpg",
        "a.PNG",
        "z/1.webp",
        "c/2.jpeg",
        "c/d/3.gif",
        "notes.txt",
        "a.txt",
        "x.mp4",
        "c/Z.jpg",
    )
    assert find(tmp_path, ".") == ["a.PNG", "b.jpg", "c/2.jpeg", "c/Z.jpg", "c/d/3.gif", "z/1.webp"]


def test_hidden_folders_and_companion_files_are_left_out_unless_named(tmp_path: Path) -> None:
    touch(tmp_path, ".git/a.jpg", "._b.jpg", "b.jpg", ".c.jpg", "d/.thumbs/e.jpg")
    assert find(tmp_path, ".") == [".c.jpg", "b.jpg"]
    assert find(tmp_path, ".git") == [".git/a.jpg"]


def test_named_files_are_taken_whatever_their_ending(tmp_path: Path) -> None:
    touch(tmp_path, "a.dat", "b", "c.txt", "d.jpg", "d.txt", "d.jpg.txt", "E.JPG", "E.txt")
    assert find(tmp_path, "a.dat", "b", "c.txt") == ["a.dat", "b", "c.txt"]
    # `folder/*` also matches the caption files of images.
    assert find(tmp_path, "d.jpg", "d.txt", "d.jpg.txt", "E.txt") == [
        "d.jpg",
        "-d.txt",
        "-d.jpg.txt",
        "-E.txt",
    ]


def test_every_file_is_yielded_once(tmp_path: Path) -> None:
    touch(tmp_path, "p/a.jpg", "p/b.jpg", "p/q/c.jpg", "x.dat")
    assert find(tmp_path, "p/b.jpg", "p", "p", "p/q/c.jpg", "p/q", "p/../p/a.jpg", "x.dat", "x.dat") == [
        "p/b.jpg",
        "p/a.jpg",
        "p/q/c.jpg",
        "x.dat",
    ]


def test_links_to_folders_are_followed_once_and_cycles_end(tmp_path: Path) -> None:
    touch(tmp_path, "p/real/a.jpg", "far/b.jpg")
    os.symlink("real", tmp_path / "p/alias")
    os.symlink("..", tmp_path / "p/real/up")
    os.symlink("../far", tmp_path / "p/elsewhere")
    os.symlink("a.jpg", tmp_path / "p/real/z.jpg")
    assert find(tmp_path, "p") == ["p/real/a.jpg", "p/real/z.jpg", "p/elsewhere/b.jpg"]
    assert find(tmp_path, "p/alias", "p/real") == [
        "p/alias/a.jpg",
        "p/alias/z.jpg",
        "p/alias/up/elsewhere/b.jpg",
    ]


def test_unreadable_files_fail_in_input_order(tmp_path: Path) -> None:
    touch(tmp_path, "p/a.jpg")
    os.mkfifo(tmp_path / "p/b.jpg")
    os.symlink("nowhere.jpg", tmp_path / "p/c.jpg")
    os.symlink("d.jpg", tmp_path / "p/d.jpg")
    assert find(tmp_path, "missing.jpg", "p", "gone", "") == [
        "!missing.jpg",
        "p/a.jpg",
        "!p/b.jpg",
        "!p/c.jpg",
        "!p/d.jpg",
        "!gone",
    ]
    assert find(tmp_path, "p/b.jpg", "p/c.jpg", "p/a.jpg/x") == ["!p/b.jpg", "!p/c.jpg", "!p/a.jpg/x"]
    assert list(find_images([""])) == [Failed("", "no such file or folder")]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may list every folder")
def test_a_folder_that_may_not_be_listed_fails(tmp_path: Path) -> None:
    touch(tmp_path, "p/a.jpg", "p/q/b.jpg")
    (tmp_path / "p/q").chmod(0)
    try:
        assert find(tmp_path, "p") == ["p/a.jpg", "!p/q"]
    finally:
        (tmp_path / "p/q").chmod(0o755)


def test_globs(tmp_path: Path) -> None:
    touch(
        tmp_path,
        "p/a.jpg",
        "p/b.png",
        "p/b.txt",
        "p/q/c.jpg",
        "p/q/r/d.jpg",
        "p/.git/e.jpg",
        "p/f.dat",
        "p/g[1].jpg",
    )
    assert find(tmp_path, "p/*.jpg") == ["p/a.jpg", "p/g[1].jpg"]
    assert find(tmp_path, "p/**/*.jpg") == ["p/a.jpg", "p/g[1].jpg", "p/q/c.jpg", "p/q/r/d.jpg"]
    assert find(tmp_path, "p/*") == ["p/a.jpg", "p/b.png", "p/g[1].jpg", "p/q/c.jpg", "p/q/r/d.jpg"]
    assert find(tmp_path, "p/**") == ["p/a.jpg", "p/b.png", "p/g[1].jpg", "p/q/c.jpg", "p/q/r/d.jpg"]
    assert find(tmp_path, "p/?.dat", "p/[ab].*") == ["p/f.dat", "p/a.jpg", "p/b.png"]
    assert find(tmp_path, "p/.git/*.jpg") == ["p/.git/e.jpg"]
    assert find(tmp_path, "p/g[1].jpg") == ["p/g[1].jpg"]  # a file of exactly that name takes precedence
    assert find(tmp_path, "p/*.webp", "p/*.tx?", "x**y/*") == ["!p/*.webp", "!p/*.tx?", "!x**y/*"]


def test_globs_end_when_links_make_cycles(tmp_path: Path) -> None:
    touch(tmp_path, "p/a.jpg")
    os.symlink(".", tmp_path / "p/one")
    os.symlink(".", tmp_path / "p/two")
    assert find(tmp_path, "p/**/*.jpg") == ["p/a.jpg"]


def test_relative_globs_and_names_with_odd_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    touch(tmp_path, "a\nb.jpg", "é.jpg")
    (Path(os.fsdecode(os.fsencode(str(tmp_path)) + b"/\xff.jpg"))).write_bytes(b"x")
    assert list(find_images(["*.jpg"])) == ["a\nb.jpg", "é.jpg", "\udcff.jpg"]
    assert list(find_images(["."])) == ["./a\nb.jpg", "./é.jpg", "./\udcff.jpg"]


def test_image_names() -> None:
    assert is_image_name("a.JPG")
    assert is_image_name("dir/x.tiff")
    assert not is_image_name("._a.jpg")
    assert not is_image_name("dir/._a.jpg")
    assert not is_image_name("jpg")
    assert not is_image_name(".jpg")


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (
            OSError(errno.ENOSPC, "Error writing bytes to file. Detail: [errno 28]", "a.parquet"),
            "no space left on device",
        ),
        (FileNotFoundError(errno.ENOENT, "No such file or directory", "a.jpg"), "no such file or directory"),
        (OSError("a Sentence"), "a sentence"),
        (OSError(), "oserror"),
    ],
)
def test_reasons_are_in_the_words_of_the_system(error: OSError, words: str) -> None:
    assert os_error_reason(error) == words


def test_folders_without_an_image(tmp_path: Path) -> None:
    """They fail where nothing else is found, and are skipped, by name, among others."""
    (tmp_path / "empty" / "below").mkdir(parents=True)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "a.jpg").write_bytes(b"")
    empty, full = tmp_path / "empty", tmp_path / "full"
    assert [(type(item), item.name) for item in find_images([empty, empty / "below"])] == [
        (Failed, str(empty))
    ]
    first, *rest = find_images([empty, full, full / "a.jpg", full])
    assert first == str(full / "a.jpg")
    assert [(type(item), item.name) for item in rest] == [(Skipped, str(empty))]


def test_a_url_is_told_what_to_do() -> None:
    (event,) = find_images(["https://example.org/a.jpg?size=1"])
    assert isinstance(event, Failed)
    assert "download" in event.reason
