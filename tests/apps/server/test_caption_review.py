"""Review of captions: edits compare and swap, the journal survives kills, proposals never touch the files."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from sightloop.apps.server import caption_review as review_module
from sightloop.apps.server.caption_review import ABSENT, CaptionReview, EditConflict, Proposal
from sightloop.errors import UsageError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("a.jpg", "b.jpg", "c.jpg"):
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "a.txt").write_text("a cat\n")
    return tmp_path


def test_an_edit_needs_the_text_that_was_seen(folder: Path) -> None:
    review = CaptionReview(folder)
    seen = review.read("a.jpg")
    (folder / "a.txt").write_text("a person's words\n")

    with pytest.raises(EditConflict) as conflict:
        review.edit("a.jpg", "mine", seen.etag)

    assert conflict.value.current.text == "a person's words"
    assert (folder / "a.txt").read_text() == "a person's words\n"
    assert review.history("a.jpg") == ()
    written = review.edit("a.jpg", "mine", conflict.value.current.etag)
    assert written == review.read("a.jpg")
    assert (folder / "a.txt").read_text() == "mine\n"
    review.close()


def test_a_proposal_is_not_on_disk_until_it_is_accepted(folder: Path) -> None:
    review = CaptionReview(folder)
    review.propose({"b.jpg": Proposal("a dog", "nano", 1.0, 0.9)})

    assert review.read("b.jpg").text is None
    assert review.state("b.jpg") == "open"
    review.edit("b.jpg", "a dog", ABSENT, "accepted")
    assert (folder / "b.txt").read_text() == "a dog\n"
    assert review.state("b.jpg") == "accepted"
    review.propose({"b.jpg": Proposal("a dog", "nano", 2.0)})
    assert review.state("b.jpg") == "accepted"
    review.propose({"b.jpg": Proposal("a wolf", "nano", 3.0)})
    assert review.state("b.jpg") == "open"
    review.reject("b.jpg")
    assert review.state("b.jpg") == "rejected"
    review.close()


def test_what_was_decided_is_there_after_a_restart(folder: Path) -> None:
    review = CaptionReview(folder)
    review.propose({"a.jpg": Proposal("a cat on a mat", "nano", 1.0)})
    etag = review.read("a.jpg").etag
    review.set_fits([("a.jpg", etag, 0.25)])
    review.edit("a.jpg", "two\nlines", etag)
    before = (
        review.history("a.jpg"),
        review.proposal("a.jpg"),
        review.state("a.jpg"),
        review.fit("a.jpg", etag),
    )
    review.close()

    review = CaptionReview(folder)
    assert (review.history("a.jpg"), review.proposal("a.jpg"), review.state("a.jpg")) == before[:3]
    assert review.fit("a.jpg", etag) == 0.25
    assert review.fit("a.jpg", review.read("a.jpg").etag) is None
    review.close()


def test_undo_leaves_what_was_changed_since(folder: Path) -> None:
    review = CaptionReview(folder)
    for name in ("a.jpg", "b.jpg", "c.jpg"):
        review.edit(name, "replaced", review.read(name).etag, "replaced", "r1")
    review.edit("b.jpg", "by hand", review.read("b.jpg").etag)

    assert review.undo("r1") == (2, ["b.jpg"])

    assert review.read("a.jpg").text == "a cat"
    assert review.read("b.jpg").text == "by hand"
    assert not (folder / "c.txt").exists()
    review.close()


def test_the_sidecar_that_readers_take_is_the_one_that_is_edited(folder: Path) -> None:
    (folder / "b.TXT").write_text("old")
    review = CaptionReview(folder)

    review.edit("b.jpg", "new", review.read("b.jpg").etag)

    assert (folder / "b.TXT").read_text() == "new\n"
    assert not (folder / "b.txt").exists()
    review.close()


@pytest.mark.parametrize("text", ["", " \n ", "a\0b", "x" * 70_000])
def test_texts_that_are_no_captions_are_refused(folder: Path, text: str) -> None:
    review = CaptionReview(folder)
    with pytest.raises(UsageError):
        review.edit("b.jpg", text, ABSENT)
    assert not (folder / "b.txt").exists()
    review.close()


def test_one_process_reviews_a_folder(folder: Path) -> None:
    review = CaptionReview(folder)
    with pytest.raises(UsageError, match="another run"):
        CaptionReview(folder)
    review.close()


def test_a_kill_before_the_caption_file_changes_leaves_no_edit(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    review = CaptionReview(folder)
    monkeypatch.setattr(review_module, "replace_if_unchanged", lambda *_: True)
    review.edit("a.jpg", "never written", review.read("a.jpg").etag)
    review.close()

    review = CaptionReview(folder)
    assert review.history("a.jpg") == ()
    assert review.read("a.jpg").text == "a cat"
    review.close()


_WRITER = """
import sys
from sightloop.apps.server.caption_review import CaptionReview
review = CaptionReview(sys.argv[1])
for number in range(10_000):
    name = f"{'abc'[number % 3]}.jpg"
    review.edit(name, f"{sys.argv[2]} {number}", review.read(name).etag)
    print(name, f"{sys.argv[2]} {number}", flush=True)
"""


def test_kills_lose_no_acknowledged_edit(folder: Path) -> None:
    acknowledged: dict[str, str] = {}
    random_delay = random.Random(0)
    for run in range(4):
        writer = subprocess.Popen(
            [sys.executable, "-c", _WRITER, str(folder), f"run {run}"], stdout=subprocess.PIPE, text=True
        )
        assert writer.stdout is not None
        lines = [writer.stdout.readline()]
        timer = threading.Timer(random_delay.uniform(0.0, 0.1), writer.send_signal, [signal.SIGKILL])
        timer.start()
        lines += writer.stdout.readlines()
        writer.stdout.close()
        writer.wait()
        timer.join()
        acknowledged.update(line.rstrip("\n").split(" ", 1) for line in lines if line.endswith("\n"))
        review = CaptionReview(folder)
        for name, text in acknowledged.items():
            texts = [edit.after for edit in review.history(name)]
            assert text in texts[-2:]  # the last one may be written, and not acknowledged
            assert review.read(name).text == texts[-1]
        review.close()


def test_people_and_a_shell_at_once(folder: Path) -> None:
    review = CaptionReview(folder)
    seen_by_edits: set[str] = set()

    def edit(who: str) -> None:
        for number in range(40):
            while True:
                seen = review.read("a.jpg")
                if seen.text is None or not seen.text:
                    continue
                try:
                    review.edit("a.jpg", f"{who} {number}", seen.etag)
                    seen_by_edits.add(seen.text)
                    break
                except EditConflict:
                    continue

    people = [threading.Thread(target=edit, args=(who,)) for who in ("left", "right")]
    for person in people:
        person.start()
    shell: list[str] = []
    for number in range(20):
        temporary = folder / "shell.tmp"
        temporary.write_text(f"shell {number}\n")
        os.replace(temporary, folder / "a.txt")
        shell.append(f"shell {number}")
        while any(person.is_alive() for person in people) and review.read("a.jpg").text == shell[-1]:
            time.sleep(0)
    for person in people:
        person.join()

    last = review.read("a.jpg").text
    assert set(shell) - seen_by_edits <= {last}
    history = review.history("a.jpg")
    assert len(history) == 80
    assert {edit.before for edit in history} >= set(shell) - {last}
    review.close()


def test_what_a_killed_edit_took_out_unseen_is_kept(folder: Path) -> None:
    review = CaptionReview(folder)
    review.edit("a.jpg", "mine", review.read("a.jpg").etag)
    review.close()
    scratch = folder / ".sightloop"
    (scratch / "swap-1").write_text("a cat\n")  # the text of before: in the history
    (scratch / "swap-2").write_text("another program's\n")

    CaptionReview(folder).close()

    assert not list(scratch.glob("swap-*"))
    assert [file.read_text() for file in scratch.glob("recovered-*")] == ["another program's\n"]
