"""A captioner behind an address: what is sent, what goes wrong, and what is never said."""

from __future__ import annotations

import base64
import contextlib
import io
import json
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from sightloop.apps.cli import main
from sightloop.capfilt import remote_captioner
from sightloop.capfilt.bootstrap import bootstrap
from sightloop.data.datasets.dataset import open_dataset
from sightloop.data.datasets.synthetic import synthetic_world, write_synthetic_world
from sightloop.errors import SightloopError, UsageError
from tests.tiny_checkpoints.clip_and_blip import write_blip

COUNT = 5


def answer_of(content: str | None) -> bytes:
    return json.dumps({"choices": [{"message": {"content": content}}]}).encode()


class Server:
    """Answers with what `replies` say, one after the other, then with a caption. Each is a status and a body; with None
    as the body there is no answer until the test ends."""

    def __init__(self) -> None:
        self.replies: list[tuple[int, Any]] = []
        self.asked: list[tuple[str, dict[str, str], dict[str, Any]]] = []
        self.header: dict[str, str] = {}
        lock, server = threading.Lock(), self
        self.over = threading.Event()

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with lock:
                    server.asked.append((self.path, dict(self.headers), body))
                    status, content = server.replies.pop(0) if server.replies else (200, "a red dog")
                if isinstance(content, str):
                    content = answer_of(content)
                if content is None:
                    server.over.wait()
                    return
                self.send_response(status)
                for name, value in server.header.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *_: Any) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.thread = threading.Thread(target=self.http.serve_forever)
        self.thread.start()
        self.address = f"http://127.0.0.1:{self.http.server_port}/v1#tiny-vlm"

    def close(self) -> None:
        self.over.set()
        self.http.shutdown()
        self.http.server_close()
        self.thread.join()


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.delenv(remote_captioner.KEY, raising=False)
    monkeypatch.setattr(remote_captioner, "_LONGEST_WAIT", 0.0)
    monkeypatch.setattr(remote_captioner, "_AT_ONCE", 1)
    server = Server()
    yield server
    server.close()


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("scenes")
    write_synthetic_world(folder / "a.tar", synthetic_world("train", COUNT, 1))
    write_blip(folder / "match", head="match")
    return folder


def run(scenes: Path, out: Path, server: Server, **options: Any) -> Any:
    given = {"mode": "captioner-only", "isolate": False, "threads": 1, **options}
    return bootstrap(scenes / "a.tar", out=out, captioner=server.address, filter=scenes / "match", **given)


def test_texts_are_judged_as_any(scenes: Path, tmp_path: Path, server: Server, monkeypatch: Any) -> None:
    monkeypatch.setenv(remote_captioner.KEY, "secret-key")
    done = run(scenes, tmp_path, server, mode="both", captions=2, prompt="What is it?", seed=4)
    assert not done.failed
    assert len(server.asked) == 2 * COUNT
    for path, headers, body in server.asked:
        assert path == "/v1/chat/completions"
        assert headers["Authorization"] == "Bearer secret-key"
        assert (body["model"], body["max_tokens"], body["top_p"]) == ("tiny-vlm", 20, 0.9)
        text, image_part = body["messages"][0]["content"]
        assert text["text"] == "What is it?"
        data = base64.b64decode(image_part["image_url"]["url"].removeprefix("data:image/jpeg;base64,"))
        with Image.open(io.BytesIO(data)) as image:
            assert image.size == (384, 384)
            assert not image.getexif()
    assert len({body["seed"] for _, _, body in server.asked}) == 2 * COUNT
    lines = [json.loads(line) for line in (tmp_path / "evidence" / "000000.jsonl").read_text().splitlines()]
    written = [line for line in lines if line["source"] == "synthetic"]
    assert {line["text"] for line in written} == {"a red dog"}
    assert [line["reason"] == "duplicate" for line in written] == [False, True] * COUNT
    assert all(line["itm"] is not None for line in written if line["reason"] != "duplicate")
    assert all(line["captioner"].startswith("tiny-vlm ") for line in written)
    for file in (path for path in tmp_path.rglob("*") if path.is_file()):
        assert b"127.0.0.1" not in file.read_bytes()
        assert b"secret-key" not in file.read_bytes()


def test_what_passes_is_tried_again(scenes: Path, tmp_path: Path, server: Server) -> None:
    server.replies = [
        (429, b""),
        (503, b"busy"),
        (200, b"no json"),
        (200, answer_of(None)),
        (200, "a cat"),
    ]
    server.header = {"Retry-After": "1"}
    assert not run(scenes, tmp_path, server).failed
    assert len(server.asked) == COUNT + 4


def test_a_refused_image_is_skipped_by_name(scenes: Path, tmp_path: Path, server: Server) -> None:
    server.replies = [(400, b"cannot read it"), *[(500, b"")] * 5, (200, "x" * 5000)]
    done = run(scenes, tmp_path, server)
    assert [reason for _, _, reason in done.failed] == [
        "the captioner refused its image (HTTP 400)",
        "the captioner failed at its image, 5 times (HTTP 500)",
        "the captioner's text is too long",
    ]
    assert {shard for shard, _, _ in done.failed} == {"a.tar"}
    assert len(open_dataset(tmp_path)) == COUNT - 3


@pytest.mark.parametrize("answer", [answer_of(None), b'{"choices": []}'])
def test_an_image_without_an_answer_is_skipped_by_name(
    scenes: Path, tmp_path: Path, server: Server, answer: bytes
) -> None:
    server.replies = [(200, answer)] * 5
    done = run(scenes, tmp_path, server)
    assert [(key, reason) for _, key, reason in done.failed] == [
        (
            open_dataset(scenes / "a.tar").key(0),
            "the captioner answered without a text for its image in 5 tries",
        )
    ]
    assert len(server.asked) == 5 + COUNT - 1
    assert len(open_dataset(tmp_path)) == COUNT - 1


# Endless answers: the beginning, then what is sent again and again.
CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
ENDLESS = {
    "status": (b"HTTP/1.1 200 ", b"O"),
    "headers": (b"HTTP/1.1 200 OK\r\n", b"X-A: b\r\n"),
    "one header": (b"HTTP/1.1 200 OK\r\nX-A: ", b"b"),
    "interim answers": (b"", b"HTTP/1.1 100 Continue\r\n\r\n"),
    "body": (b"HTTP/1.1 200 OK\r\nContent-Length: 999999\r\n\r\n", b"x"),
    "body without length": (b"HTTP/1.1 200 OK\r\n\r\n", b"x"),
    "chunks": (CHUNKED, b"1\r\nx\r\n"),
    "a chunk's line": (CHUNKED + b"1;", b"x"),
    "trailers": (CHUNKED + b"0\r\n", b"X-A: b\r\n"),
    "nothing": (b"", b""),
}


@pytest.mark.parametrize("pause", [0.02, 0.0])
@pytest.mark.parametrize("kind", ENDLESS)
def test_an_endless_answer_ends_at_the_deadline(
    monkeypatch: pytest.MonkeyPatch, kind: str, pause: float
) -> None:
    start, again = ENDLESS[kind]
    monkeypatch.setattr(remote_captioner, "_SECONDS", 0.4)
    monkeypatch.setattr(remote_captioner, "_TRIES", 1)
    over = threading.Event()

    def serve() -> None:
        connection, _ = listener.accept()
        with connection, contextlib.suppress(OSError):
            connection.sendall(start)
            while not over.wait(pause):
                connection.sendall(again * (1 if pause else 1000))

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=serve)
        thread.start()
        captioner = remote_captioner.RemoteCaptioner(f"http://127.0.0.1:{listener.getsockname()[1]}/v1#m")
        try:  # the server never ends by itself: that this returns is the deadline's doing
            with pytest.raises(SightloopError, match="no answer in 1 tries") as caught:
                captioner._request({"model": "m"}, "key")
        finally:
            over.set()
            thread.join()
    assert "127.0.0.1" not in str(caught.value)


def test_a_slow_name_server_ends_at_the_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    over, looked_up = threading.Event(), threading.Event()

    def look_up(*_: object, **__: object) -> Any:
        over.wait(60)
        looked_up.set()
        raise OSError("not found")

    monkeypatch.setattr(remote_captioner, "_SECONDS", 0.2)
    monkeypatch.setattr(remote_captioner, "_TRIES", 1)
    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    captioner = remote_captioner.RemoteCaptioner("http://captioner.test/v1#m")
    try:
        with pytest.raises(SightloopError, match="no answer in 1 tries") as caught:
            captioner._request({"model": "m"}, "key")
        assert not looked_up.is_set()
    finally:
        over.set()
    assert "captioner.test" not in str(caught.value)
    assert looked_up.wait(30)


@pytest.mark.parametrize(
    ("status", "words"),
    [
        (401, "refuses the key"),
        (404, "no such model"),
        (302, "refuses requests"),
        (503, r"no answer in 5 tries \(HTTP 503\)"),
        (200, "no answer in 5 tries"),
    ],
)
def test_a_server_that_does_not_work_ends_the_job(
    scenes: Path, tmp_path: Path, server: Server, status: int, words: str
) -> None:
    server.replies = [(status, b"x" * (2 << 20) if status == 200 else b"")] * 20
    server.header = {"Location": "http://127.0.0.1:9/elsewhere"} if status == 302 else {}
    with pytest.raises(SightloopError, match=words) as caught:
        run(scenes, tmp_path / "out", server)
    assert "127.0.0.1" not in str(caught.value)
    server.replies, server.header = [], {}
    assert not run(scenes, tmp_path / "out", server).failed  # the same command goes on


def test_ctrl_c_waits_for_no_answer(
    scenes: Path, tmp_path: Path, server: Server, capfd: pytest.CaptureFixture[str]
) -> None:
    """Ctrl-C ends the command although requests are in flight; a rerun requests nothing again of finished shards."""
    words = (
        f"bootstrap {scenes}/a.tar --mode captioner-only --block 2 --threads 1 --captioner {server.address}"
    )

    def start(out: str) -> subprocess.Popen[bytes]:
        with (tmp_path / f"{out}.txt").open("wb") as messages:
            return subprocess.Popen(
                [sys.executable, "-m", "sightloop", *words.split(), "--out", str(tmp_path / out)],
                stderr=messages,
                stdout=subprocess.DEVNULL,
                # A suite that a shell put into the background has SIGINT ignored, and its children would, too.
                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
            )

    def finish(process: subprocess.Popen[bytes], out: str) -> tuple[int, str]:
        """Exit status and messages; a machine under load may take minutes to start the command."""
        try:
            status = process.wait(timeout=300)
        finally:
            process.kill()
            process.wait()
        return status, (tmp_path / f"{out}.txt").read_text()

    server.replies = [(200, "a red dog"), (200, "a red dog"), (200, None), (200, None)]
    process = start("out")
    # The last two requests get no answer until the test ends, so the command can only end by the signal.
    while len(server.asked) < 4 and process.poll() is None:
        time.sleep(0.05)
    requested = {json.dumps(body, sort_keys=True) for _, _, body in server.asked[:2]}
    process.send_signal(signal.SIGINT)
    status, messages = finish(process, "out")
    assert status == 130, messages
    assert "same command again" in messages
    assert "Traceback" not in messages
    before = len(server.asked)  # more than 4 where a request was tried again before the signal
    for out in ("out", "unbroken"):
        assert main.main([*words.split(), "--out", str(tmp_path / out)]) == 0
        assert "Traceback" not in capfd.readouterr().err
    again = {json.dumps(body, sort_keys=True) for _, _, body in server.asked[before:-COUNT]}
    assert len(again) == COUNT - 2
    assert not again & requested
    for path in (tmp_path / "unbroken").glob("*.tar"):
        assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes()


def test_nobody_there(scenes: Path, tmp_path: Path, server: Server) -> None:
    server.address = "http://127.0.0.1:9/v1#m"
    with pytest.raises(SightloopError, match=r"no answer in 5 tries \(Connection refused") as caught:
        run(scenes, tmp_path, server)
    assert "127.0.0.1" not in str(caught.value)


@pytest.mark.parametrize(
    ("address", "words"),
    [
        ("http://host/v1", "incomplete"),
        ("http://#m", "incomplete"),
        ("http://host:99999/v1#m", "incomplete"),
        ("https://me:word@host/v1#m", "no password"),
        ("https://host/v1?key=1#m", "no password"),
        ("http://example.org/v1#m", "unencrypted"),
    ],
)
def test_addresses(address: str, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(remote_captioner.KEY, "k")
    with pytest.raises(UsageError, match=words):
        remote_captioner.RemoteCaptioner(address)
    assert remote_captioner.RemoteCaptioner("https://example.org/v1#m").model == "m"


def test_a_filter_is_never_elsewhere(scenes: Path, tmp_path: Path, server: Server) -> None:
    with pytest.raises(UsageError, match="must be models"):
        bootstrap(scenes / "a.tar", out=tmp_path, filter=server.address)
    with pytest.raises(UsageError, match="samples its texts"):
        run(scenes, tmp_path, server, num_beams=3)
