"""Edits from two browsers and a shell at once, while the server is killed: nothing acknowledged is lost, nothing is
overwritten by somebody who did not see it.

Every text is written once, by one writer, who notes the text that it replaces. So at the end every text that was on
disk is there still, or some writer has seen it and replaced it. SIGHTLOOP_EDITS=1000 makes as many edits, with a kill
after every hundredth (the default is 90, with 2 kills).
"""

from __future__ import annotations

import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import pytest

from sightloop.apps.server.caption_review import CaptionReview
from sightloop.data.atomic import exchange_paths
from tests.apps.fake_model import FakeModel
from tests.apps.server.running import jpeg, running, wait_for
from tests.apps.web.browser import needs_chromium, opened_page
from tests.rules import REPOSITORY

# Without a model: no edit needs one, and the server is there sooner.
_SERVE = """
import sys
from pathlib import Path
from sightloop.apps.server.serve import serve
from sightloop.apps.server.settings import ServerSettings
from tests.apps.fake_model import FakeModel
settings = ServerSettings(models={"fake": "fake"}, folder=Path(sys.argv[1]), port=int(sys.argv[2]), workers=1)
serve(settings, lambda _source: FakeModel())
"""
EDITS = int(os.environ.get("SIGHTLOOP_EDITS", "90"))
KILLS = max(2, EDITS // 100)
IMAGES = 12


@dataclass
class Server:
    """`sightloop serve` as a process of its own, on one port."""

    folder: Path
    port: int
    process: subprocess.Popen[bytes] | None = None

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        command = [sys.executable, "-c", _SERVE, str(self.folder), str(self.port)]
        paths = os.pathsep.join([str(REPOSITORY / "src"), str(REPOSITORY)])
        with (self.folder.parent / "server.log").open("ab") as log:
            environment = {**os.environ, "PYTHONPATH": paths}
            self.process = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
        wait_for(self.answers)

    def answers(self) -> bool:
        try:
            return httpx.get(f"{self.address}/api/info").status_code == 200
        except httpx.TransportError:
            return False

    def kill(self) -> None:
        assert self.process is not None
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()


@dataclass
class Writer:
    """Somebody who writes captions. replaced: for each text of theirs, the text that it replaced and they had seen."""

    name: str
    replaced: dict[tuple[str, str], str | None] = field(default_factory=dict)
    unsure: dict[tuple[str, str], str | None] = field(default_factory=dict)
    conflicts: int = 0
    count: int = 0

    def next_text(self) -> str:
        self.count += 1
        return f"{self.name} {self.count}"


@pytest.fixture
def server(tmp_path: Path) -> Generator[Server]:
    folder = tmp_path / "photos"
    folder.mkdir()
    for number in range(IMAGES):
        (folder / f"{number:02d}.jpg").write_bytes(jpeg(number))
        (folder / f"{number:02d}.txt").write_text(f"first {number}\n")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    one = Server(folder, port)
    one.start()
    try:
        yield one
    finally:
        one.kill()


def browse(server: Server, writer: Writer, edits: int, seed: int) -> None:
    """Edits as the page does: from the text that it shows, which may be old by now, with that text's ETag."""
    draw = random.Random(seed)
    shown: dict[str, dict[str, str]] = {}
    with httpx.Client(base_url=server.address, headers={"X-Sightloop": "1"}, timeout=30) as http:
        while writer.count < edits:
            try:
                if not shown or draw.random() < 0.3:
                    rows = http.get("/api/images").json()["images"]
                    shown = {row["id"]: {"path": row["path"], **row["caption"]} for row in rows}
                image = draw.choice(sorted(shown))
                seen, text = shown[image], writer.next_text()
                key = (seen["path"], text)
                writer.unsure[key] = seen["text"]
                body = {"text": text, "origin": "typed"}
                answer = http.put(
                    f"/api/images/{image}/caption", json=body, headers={"If-Match": f'"{seen["etag"]}"'}
                )
            except httpx.TransportError:
                shown = {}
                time.sleep(0.05)  # the server was killed: nobody knows whether that edit took place
                continue
            if answer.status_code == 200:
                writer.replaced[key] = writer.unsure.pop(key)
                seen |= answer.json()["caption"]
            else:
                assert answer.status_code == 412, answer.text
                del writer.unsure[key]
                writer.conflicts += 1
                seen |= answer.json()["current"]
            time.sleep(draw.random() * 0.02)


def script(folder: Path, writer: Writer, stop: threading.Event, seed: int) -> None:
    """Writes caption files by its own ways: in place, and a new file in the place of the old one."""
    draw = random.Random(seed)
    while not stop.is_set():
        path = folder / f"{draw.randrange(IMAGES):02d}.txt"
        text = writer.next_text()
        if draw.random() < 0.5:
            with path.open("r+") as file:
                seen = file.read()
                file.seek(0)
                file.write(text + "\n")
                file.truncate()
        else:
            other = folder.parent / "new.txt"
            other.write_text(text + "\n")
            assert exchange_paths(other, path)
            seen = other.read_text()
        writer.replaced[(path.with_suffix(".jpg").name, text)] = seen.rstrip("\n")
        time.sleep(draw.random() * 0.05)


@contextmanager
def at_work(*threads: threading.Thread) -> Generator[None]:
    for thread in threads:
        thread.start()
    yield
    for thread in threads:
        thread.join(600)
        assert not thread.is_alive()


def test_nothing_is_lost_and_nothing_is_overwritten_unseen(server: Server) -> None:
    browsers, shell, stop = [Writer("anna"), Writer("ben")], Writer("shell"), threading.Event()
    threads = [
        threading.Thread(target=browse, args=(server, writer, EDITS // 2, seed), daemon=True)
        for seed, writer in enumerate(browsers)
    ]
    other = threading.Thread(target=script, args=(server.folder, shell, stop, 7), daemon=True)
    draw = random.Random(11)
    with at_work(other):
        with at_work(*threads):
            for kill in range(1, KILLS + 1):
                until = kill * EDITS // (KILLS + 1)
                wait_for(lambda until=until: sum(writer.count for writer in browsers) >= until, 300)
                time.sleep(draw.random() * 0.02)
                server.kill()
                server.start()
        stop.set()
    server.kill()
    # The review is opened once more, as the next start of the server does.
    review = CaptionReview(server.folder)
    writers = [*browsers, shell]
    for number in range(IMAGES):
        name = f"{number:02d}.jpg"
        final = review.read(name).text
        history = review.history(name)
        took_place = {edit.after: edit.before for edit in history}
        acknowledged = {
            text: seen
            for writer in browsers
            for (image, text), seen in writer.replaced.items()
            if image == name
        }
        for text, seen in acknowledged.items():
            assert took_place.get(text) == seen, (
                f"{name}: {text!r} was acknowledged, and is not in the history"
            )
        seen_by_others = {
            seen for writer in writers for (image, _), seen in writer.replaced.items() if image == name
        }
        # Edits that a kill left without an answer; they count only if they took place.
        seen_by_others |= {edit.before for edit in history}
        written = [text for writer in writers for (image, text) in writer.replaced if image == name]
        lost = [
            text for text in [f"first {number}", *written] if text != final and text not in seen_by_others
        ]
        assert lost == [], f"{name}: overwritten unseen; the file has {final!r}"
    review.close()
    edits = sum(len(writer.replaced) for writer in browsers)
    print(
        f"\n{edits} edits acknowledged, {sum(writer.conflicts for writer in browsers)} refused as conflicts, ",
        end="",
    )
    print(
        f"{sum(len(writer.unsure) for writer in browsers)} without an answer; {shell.count} by a shell; {KILLS} kills"
    )


@needs_chromium
def test_what_was_typed_outlives_the_connection(tmp_path: Path) -> None:
    (tmp_path / "0.jpg").write_bytes(jpeg())
    sidecar = tmp_path / "0.txt"
    sidecar.write_text("first\n")
    with (
        running(lambda _source: FakeModel(), folder=tmp_path) as server,
        opened_page(server.address) as page,
    ):
        page.keyboard.press("2")
        page.wait_for_selector(".editor")
        page.context.set_offline(True)
        page.keyboard.press("e")
        page.keyboard.press("Control+A")
        page.keyboard.type("typed meanwhile")
        page.keyboard.press("Control+Enter")
        page.wait_for_selector(".banner")
        assert page.input_value(".editor textarea") == "typed meanwhile"
        assert sidecar.read_text() == "first\n"
        page.context.set_offline(False)
        page.wait_for_selector(".banner", state="detached", timeout=20_000)
        page.focus(".editor textarea")
        page.keyboard.press("Control+Enter")
        wait_for(lambda: sidecar.read_text() == "typed meanwhile\n", 10)
