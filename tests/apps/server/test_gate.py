"""Who may call, and how much: Host, Origin, key, body; errors in one form, without paths and tracebacks."""

from __future__ import annotations

import json
import re
import socket
from collections.abc import Generator
from typing import Any

import pytest

from tests.apps.server.running import Running, data_url, jpeg, running, wait_for

KEY = "0123456789abcdef"


def raw(server: Running, data: bytes, seconds: float = 20.0) -> bytes:
    """What a server says to bytes on a new connection."""
    host, _, port = server.address.removeprefix("http://").partition(":")
    with socket.create_connection((host, int(port)), timeout=seconds) as sock:
        sock.sendall(data)
        sock.shutdown(socket.SHUT_WR)
        parts: list[bytes] = []
        while part := sock.recv(1 << 16):
            parts.append(part)
        return b"".join(parts)


@pytest.mark.parametrize(
    "host",
    [
        "evil.example",
        "evil.example:8000",
        "127.0.0.1.evil.example",
        "localhost.evil.example",
        "127.0.0.1@evil.example",
        "10.0.0.1",
        "[::ffff:10.0.0.1]",
        "2130706433",
        "local host",
        "",
    ],
)
def test_a_host_of_somebody_else_is_refused(server: Running, host: str) -> None:
    answer = server.http.get("/v1/models", headers={"Host": host})
    assert answer.status_code == 403
    assert answer.json()["error"]["code"] == "host_refused"


@pytest.mark.parametrize("host", ["127.0.0.1:1", "localhost", "LOCALHOST:99", "[::1]:8000", "127.0.0.2"])
def test_names_of_this_machine_are_served(server: Running, host: str) -> None:
    assert server.http.get("/v1/models", headers={"Host": host}).status_code == 200


@pytest.mark.parametrize(
    "headers",
    [
        {"Origin": "https://evil.example"},
        {"Origin": "null"},
        {"Origin": "http://127.0.0.1:1"},
        {"Origin": "file://"},
        {"Sec-Fetch-Site": "cross-site"},
        {"Sec-Fetch-Site": "same-site"},
        {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "no-cors"},
    ],
)
def test_requests_of_other_pages_are_refused(server: Running, headers: dict[str, str]) -> None:
    for answer in (
        server.http.get("/v1/models", headers=headers),
        server.post("/api/embed", {"texts": "a"}, headers=headers),
    ):
        assert answer.status_code == 403
        assert answer.json()["error"]["code"] == "origin_refused"


def test_the_servers_own_page_and_a_link_to_it_are_served(server: Running) -> None:
    own = {"Origin": server.address, "Sec-Fetch-Site": "same-origin"}
    assert server.post("/api/embed", {"texts": "a"}, headers=own).status_code == 200
    link = {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate"}
    assert server.http.get("/health", headers=link).status_code == 200
    assert server.post("/api/embed", {"texts": "a"}, headers=link).status_code == 403


def test_a_form_of_another_page_is_no_request(server: Running) -> None:
    """What a browser sends across sites without asking: text/plain and forms are not read as JSON."""
    body = json.dumps({"texts": "a"}).encode()
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data", ""):
        assert server.http.post("/api/embed", content=body, headers={"Content-Type": kind}).status_code == 400


@pytest.fixture(scope="module")
def locked(nano: Any) -> Generator[Running]:
    with running(lambda _source: nano, keys=(KEY, "another-key-of-it")) as server:
        yield server


def test_everything_but_health_needs_the_key(locked: Running) -> None:
    paths = [*locked.server.config.app._app.openapi()["paths"], "/", "/openapi.json", "/nothing"]
    for path in paths:
        for method in ("GET", "POST", "PUT", "DELETE", "OPTIONS"):
            answer = locked.http.request(
                method, path.replace("{name}", "nano"), headers={"Authorization": ""}
            )
            expected = 401 if path != "/health" else (200 if method == "GET" else 405)
            assert answer.status_code == expected, (method, path)
    for key in (KEY[:-1], KEY + "x", "another", "é" * 16):
        headers = {"Authorization": f"Bearer {key}".encode()}
        assert locked.http.get("/v1/models", headers=headers).status_code == 401
    for headers in (
        {"Authorization": f"bearer {KEY}"},
        {"Authorization": "", "X-Api-Key": "another-key-of-it"},
    ):
        assert locked.http.get("/v1/models", headers=headers).status_code == 200


def test_the_page_gets_a_cookie_in_place_of_the_key(locked: Running) -> None:
    plain = {"Authorization": ""}
    assert locked.http.get("/session", params={"key": "wrong"}, headers=plain).status_code == 401
    answer = locked.http.get("/session", params={"key": KEY}, headers=plain)
    assert answer.status_code == 303
    cookie = answer.headers["set-cookie"]
    assert KEY not in cookie
    assert all(word in cookie.lower() for word in ("httponly", "samesite=strict", "path=/"))
    session = {"Cookie": cookie.partition(";")[0], **plain}
    assert locked.http.get("/v1/models", headers=session).status_code == 200
    locked.http.cookies.clear()


# Bodies.


def test_a_large_body_is_refused_before_and_while_it_arrives(server: Running) -> None:
    announced = raw(
        server, b"POST /api/embed HTTP/1.1\r\nHost: localhost\r\nContent-Length: 99999999\r\n\r\n{"
    )
    assert announced.startswith(b"HTTP/1.1 413")
    for content in (b"x" * (23 << 20), (b"x" * (1 << 20) for _ in range(23))):
        answer = server.http.post("/api/embed", content=content)
        assert answer.status_code == 413
        assert answer.json()["error"]["code"] == "body_too_large"


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b"1",
        b"null",
        b'"x"',
        b"\xff\xfe{}",
        b'{"texts": NaN}',
        b'{"texts": Infinity}',
        b'{"texts": "\\ud800"}',
        b'{"texts": "\xed\xa0\x80"}',
        b'{"texts": 1' + b"0" * 5000 + b"}",
        b"[" * 100_000,
        b'{"x":' * 100_000,
        b'{"texts": ' + b"[" * 50 + b"]" * 50 + b"}",
        b'{"texts": 1e999}',
        b'{"texts": {"a": "b"}}',
    ],
)
def test_a_body_that_is_no_request_is_400(server: Running, body: bytes) -> None:
    answer = server.http.post("/api/embed", content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code == 400, answer.text
    assert set(answer.json()) == {"error"}


@pytest.mark.parametrize(
    "data",
    [
        b"\0" * 100,
        b"GET / HTTP/9.9\r\n\r\n",
        b"GET\r\n\r\n",
        b"POST /api/embed HTTP/1.1\r\nHost: localhost\r\nContent-Length: -1\r\n\r\n",
        b"POST /api/embed HTTP/1.1\r\nHost: localhost\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n"
        b"0\r\n\r\n",
        b"POST /api/embed HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"POST /api/embed HTTP/1.1\r\nHost: localhost\r\nContent-Length: 50\r\n\r\n{",
        b"GET /" + b"a" * 100_000 + b" HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"GET / HTTP/1.1\r\n" + b"X: y\r\n" * 20_000 + b"\r\n",
        b"GET / HTTP/1.1\r\nHost: localhost\r\nHost: evil.example\r\n\r\n",
        b"GET http://evil.example/ HTTP/1.1\r\nHost: evil.example\r\n\r\n",
        b"GET /nothing HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\n",
        b"BREW /health HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"x" * 50,
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    ],
)
def test_bytes_that_are_no_request_get_no_500_and_leave_it_alive(server: Running, data: bytes) -> None:
    answer = raw(server, data)
    assert not answer or answer.startswith(b"HTTP/1.1 4"), answer[:200]
    assert server.http.get("/health").status_code == 200


def test_every_error_has_one_form(server: Running) -> None:
    http = server.http
    answers = {
        http.get("/nothing"): 404,
        http.get("/v1/nothing/%00"): 404,
        http.get("/api/embed"): 405,
        http.delete("/v1/models"): 405,
        http.post("/api/embed", json={"texts": 3}): 400,
        http.post("/api/embed", json={"texts": "a", "model": "x"}): 404,
        http.get("/v1/models", headers={"Host": "x.example"}): 403,
    }
    for answer, status in answers.items():
        assert answer.status_code == status
        assert set(answer.json()) == {"error"}
        assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert "Traceback" not in answer.text
        assert "/home" not in answer.text


def test_a_fault_of_the_program_says_nothing(nano: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with running(lambda _source: nano) as server:
        monkeypatch.setattr(type(nano), "match", lambda *_: 1 / 0)
        body = {"images": data_url(jpeg()), "texts": "a"}
        answer = server.post("/api/match", body)
        assert answer.status_code == 500
        assert answer.json()["error"]["code"] == "internal_error"
        assert "division" not in answer.text
        assert server.post("/api/embed", {"texts": "a"}).status_code == 200

        def exhausted(*_: Any) -> Any:
            raise MemoryError

        monkeypatch.setattr(type(nano), "match", exhausted)
        answer = server.post("/api/match", body)
        assert answer.status_code == 503
        assert answer.headers["retry-after"]


def test_metrics_and_openapi(server: Running) -> None:
    server.post("/api/embed", {"texts": "a"})
    wait_for(lambda: server.service.admission.count == 0)
    text = server.http.get("/metrics").text
    assert 'sightloop_requests_total{method="POST",route="/api/embed",status="200"}' in text
    assert re.findall(r"^sightloop_requests_in_flight (.*)$", text, re.MULTILINE) == ["0.0"]
    document = server.http.get("/openapi.json").json()
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            assert "422" not in operation["responses"]
            if method == "post" and path.startswith("/v"):
                assert operation["requestBody"]["content"]["application/json"]["examples"], path


def test_the_examples_of_the_document_work(server: Running) -> None:
    document = server.http.get("/openapi.json").json()
    for path, operations in document["paths"].items():
        body = operations.get("post", {}).get("requestBody")
        for example in body["content"]["application/json"].get("examples", {}).values() if body else ():
            answer = server.post(path, example["value"])
            verb = path.rpartition("/")[2]
            expected = 400 if verb in ("detect", "locate", "segment", "read") else 200
            assert answer.status_code == expected, (path, answer.text)
