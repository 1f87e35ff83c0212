"""The server under what it was not asked for: overload, hostile images, clients that leave, the order to stop."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import httpx
import pytest

from benchmarks.http_load import post, send
from sightloop.apps.server.app import create_app
from sightloop.apps.server.serve import serve
from sightloop.apps.server.service import Service
from sightloop.apps.server.settings import ServerSettings
from sightloop.errors import CheckpointError
from tests.apps.server.running import Running, data_url, jpeg, running, wait_for
from tests.rules import PACKAGE, REPOSITORY


def test_overload_is_refused_at_once_and_what_is_taken_is_done(nano: Any) -> None:
    """Eight times as many requests at once as the queue has places."""
    release = threading.Event()
    with running(lambda _source: nano) as server:
        embed = nano.embed_texts
        nano.embed_texts = lambda texts: (release.wait(60), embed(texts))[1]
        try:
            timer = threading.Timer(3.0, release.set)
            timer.start()
            address = server.address
            load = asyncio.run(
                send(address, [post("/api/embed", {"texts": f"{i}"}) for i in range(512)], 512)
            )
            timer.join()
        finally:
            del nano.embed_texts
        assert set(load.statuses) == {200, 429}
        assert load.statuses[200] >= 64
        wait_for(lambda: server.service.admission.count == 0)


def hostile_images() -> list[bytes]:
    """Files that are no images, or no longer."""
    whole = jpeg(size=(64, 48))
    images = [whole[:n] for n in range(1, len(whole) - 2, len(whole) // 12)]
    images += [
        b"\xff\xd8\xff" + os.urandom(200),
        b"\x89PNG\r\n\x1a\n" + os.urandom(200),
        b"GIF89a" + b"\xff" * 50,
    ]
    # A PNG that claims 60,000 x 60,000 pixels; SVG; PDF; PostScript; a script.
    images += [
        b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR\0\0\xea\x60\0\0\xea\x60\x08\x02\0\0\0" + b"\0" * 40,
        b"<svg xmlns='http://www.w3.org/2000/svg'/>",
        b"%PDF-1.4",
        b"%!PS-Adobe-3.0 EPSF\n(/etc/passwd) (r) file",
        b"<?php system('id'); ?>",
        b"RIFF\xff\xff\xff\xffWEBPVP8 ",
        b"II*\0\xff\xff\xff\xff",
    ]
    return images


def test_hostile_images_are_400_each(server: Running) -> None:
    for image in hostile_images():
        for path, body in (
            ("/v1/embeddings", {"input": [data_url(image)], "modality": "image"}),
            ("/api/caption", {"images": [data_url(jpeg()), data_url(image)]}),
        ):
            answer = server.post(path, body)
            assert answer.status_code == 400, image[:20]
            assert answer.json()["error"]["code"] == "invalid_image"
    assert server.http.get("/health").status_code == 200


def test_a_client_that_leaves_is_not_worked_for(nano: Any) -> None:
    seen: list[str] = []
    release = threading.Event()
    embed = nano.embed_texts

    def slow(texts: list[str]) -> Any:
        seen.extend(texts)
        if texts == ["hold"]:
            release.wait(60)
        return embed(texts)

    with running(lambda _source: nano) as server:
        nano.embed_texts = slow
        try:
            with httpx.Client(base_url=server.address, timeout=60) as other:
                holder = threading.Thread(target=lambda: other.post("/api/embed", json={"texts": "hold"}))
                holder.start()
                wait_for(lambda: seen == ["hold"])
                with pytest.raises(httpx.ReadTimeout):
                    server.post("/api/embed", {"texts": "left"}, timeout=0.3)
                wait_for(lambda: server.service.admission.count == 1)
                release.set()
                holder.join(60)
            assert server.post("/api/embed", {"texts": "after"}).status_code == 200
        finally:
            del nano.embed_texts
    assert seen == ["hold", "after"]


def test_health_is_503_while_the_model_loads() -> None:
    service = Service(
        ServerSettings(models={"x": "x"}), lambda _source: pytest.fail("nothing is loaded here")
    )

    async def ask() -> httpx.Response:
        transport = httpx.ASGITransport(create_app(service))
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as http:
            return await http.get("/health")

    answer = asyncio.run(ask())
    assert answer.status_code == 503
    assert answer.json()["error"]["code"] == "loading"
    assert answer.headers["retry-after"]
    service.stop()


def test_a_model_that_cannot_be_loaded_ends_the_server(capsys: pytest.CaptureFixture[str]) -> None:
    def load(_source: str) -> Any:
        raise CheckpointError("x: has no weights")

    with pytest.raises(CheckpointError, match="no weights"):
        serve(ServerSettings(models={"x": "x"}, port=0), load)
    assert "Traceback" not in capsys.readouterr().err


def test_models_share_a_memory_budget_and_idle_ones_go(nano: Any, tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        nano.save(tmp_path / name)
    import sightloop

    sources = {name: str(tmp_path / name) for name in ("a", "b", "c")}
    size = (tmp_path / "a" / "model.safetensors").stat().st_size
    with running(
        lambda source: sightloop.load(source, device="cpu"), models=sources, max_memory=2 * size
    ) as server:

        def loaded() -> str:
            return "".join(state.id for state in server.service.pool.states() if state.is_loaded)

        assert loaded() == "a"
        for name, expected in (("b", "ab"), ("c", "bc"), ("a", "ac")):
            assert server.post("/api/embed", {"texts": "x", "model": name}).status_code == 200
            assert loaded() == expected
        server.service.pool._idle_seconds = 0.01
        time.sleep(0.02)
        loop_run(server, server.service.pool.unload_idle())
        assert loaded() == "a"


def loop_run(server: Running, coroutine: Any) -> None:
    """Runs a coroutine on the server's loop."""
    loop = server.server.servers[0].get_loop()
    asyncio.run_coroutine_threadsafe(coroutine, loop).result(60)


@pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")
def test_sigterm_finishes_what_runs(tmp_path: Path) -> None:
    """The command as people start it: it says where it is, serves, and stops with status 0."""
    environment = {**os.environ, "PYTHONPATH": str(PACKAGE.parent), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "sightloop", "serve", str(tmp_path), "--port", "0", "--workers", "1"]
    with subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, env=environment, cwd=REPOSITORY
    ) as process:
        assert process.stderr is not None
        lines = iter(process.stderr.readline, "")
        address = next(line.split(" at ")[1].split()[0] for line in lines if line.startswith("Serving"))
        with httpx.Client(base_url=address, timeout=120) as http:
            wait_for(lambda: http.get("/health").status_code == 200)
            body = {"images": data_url(jpeg()), "num_beams": 8, "max_new_tokens": 60, "min_new_tokens": 60}
            answers: list[int] = []
            asks = threading.Thread(
                target=lambda: answers.append(http.post("/api/caption", json=body).status_code)
            )
            asks.start()
            metrics = "sightloop_requests_in_flight 1.0"
            with httpx.Client(base_url=address, timeout=60) as other:
                wait_for(lambda: metrics in other.get("/metrics").text or bool(answers))
            process.send_signal(signal.SIGTERM)
            asks.join(120)
            # It ran, or it waited and was refused in words; it was not cut off.
            assert answers[0] in (200, 503)
        assert process.wait(60) == 0
        assert "Traceback" not in process.stderr.read()


def test_wrong_options_are_one_line(
    server: Running, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from sightloop.apps.cli import main

    port = server.address.rpartition(":")[2]
    for arguments in (
        ["--port", port],
        ["--port", "70000"],
        ["--max-memory", "much"],
        ["--key", "short"],
        ["--host", "no.such.host.invalid"],
        ["--workers", "0"],
        ["--device", "abacus"],
        [str(tmp_path / "absent")],
        ["-m", str(tmp_path / "absent")],
        ["-m", "nano", "-m", "nano"],
    ):
        assert main.main(["serve", *arguments]) == 2, arguments
        lines = [
            line for line in capsys.readouterr().err.splitlines() if not line.startswith("using the bundled")
        ]
        assert len(lines) == 1, lines
