"""Remote images: whatever a URL says, only public addresses are connected to, hop by hop."""

from __future__ import annotations

import asyncio
import http.server
import ipaddress
import socket
import threading
from collections.abc import Generator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sightloop.apps.server.errors import ApiError
from sightloop.apps.server.remote_images import RemoteImages, is_public
from tests.apps.server.running import jpeg, running

# Each leads to this machine or a private network, or is no plain URL; {port} is a canary's.
HOSTILE = """
http://127.0.0.1:{port}/ http://127.0.0.1/ http://localhost:{port}/ http://localhost/ http://LOCALHOST./
http://127.1:{port}/ http://127.1/ http://127.0.1/ http://0177.0.0.1/ http://0x7f.0.0.1/ http://0x7f000001/
http://2130706433/ http://017700000001/ http://0/ http://0.0.0.0/ http://0.0.0.0:{port}/ http://127.127.127.127/
http://[::1]/ http://[::1]:{port}/ http://[::]/ http://[::ffff:127.0.0.1]/ http://[::ffff:7f00:1]/ http://[::127.0.0.1]/
http://[0:0:0:0:0:ffff:127.0.0.1]/ http://[64:ff9b::7f00:1]/ http://[64:ff9b::127.0.0.1]/ http://[64:ff9b:1::7f00:1]/
http://[2002:7f00:1::]/ http://[2001:0:7f00:1::]/ http://[fe80::1]/ http://[fe80::1%25lo]/ http://[fc00::1]/
http://[fd00:ec2::254]/ http://[fec0::1]/ http://[ff02::1]/ http://169.254.169.254/latest/meta-data/
http://169.254.170.2/ http://10.0.0.1/ http://172.16.0.1/ http://192.168.0.1/ http://192.168.1.1:8080/
http://100.64.0.1/ http://198.18.0.1/ http://192.0.0.192/ http://192.88.99.1/ http://224.0.0.1/ http://239.255.255.250/
http://240.0.0.1/ http://255.255.255.255/ http://user@127.0.0.1/ http://public.example@127.0.0.1/
http://127.0.0.1:{port}#@public.example/ http://127.0.0.1\\@public.example/ http://public.example:{port}/
http://127.0.0.1.:{port}/ http://①②⑦.⓪.⓪.①/ http://127。0。0。1/ http://127.0.0.1%00.public.example/
http://%31%32%37.0.0.1/ http:///127.0.0.1/ http:127.0.0.1/ http://127.0.0.1:22/ http://127.0.0.1:6379/
https://127.0.0.1/ https://[::1]/ http://-a.example/ http://a..b/ http://[::1/ http://127.0.0.1:99999/ http://
""".split()


class _Canary(http.server.BaseHTTPRequestHandler):
    hits: list[str]
    location = ""

    def do_GET(self) -> None:
        self.hits.append(self.path)
        if self.location:
            self.send_response(302)
            self.send_header("Location", self.location)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        self.send_response(200)
        self.send_header("Content-Length", str(len(jpeg())))
        self.end_headers()
        self.wfile.write(jpeg())

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def canary() -> Generator[tuple[int, list[str], type[_Canary]]]:
    handler = type("Handler", (_Canary,), {"hits": []})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
        thread.start()
        yield server.server_port, handler.hits, handler
        server.shutdown()
        thread.join()


def fetch(url: str, **options: Any) -> bytes:
    return asyncio.run(RemoteImages(**options).fetch(url, "image"))


def test_no_hostile_url_reaches_a_canary(canary: tuple[int, list[str], Any]) -> None:
    port, hits, _ = canary
    assert len(HOSTILE) >= 60
    for url in HOSTILE:
        # The canary's port is allowed, so that the address alone decides.
        with pytest.raises(ApiError) as caught:
            fetch(url.replace("{port}", str(port)), ports={80, 443, 8080, port}, seconds=5.0)
        assert caught.value.status_code == 400, url
    assert hits == []


def test_an_allowed_address_is_fetched_from(canary: tuple[int, list[str], Any]) -> None:
    port, hits, _ = canary
    allow = {"allowed": lambda _address: True, "ports": {port}}
    assert fetch(f"http://127.0.0.1:{port}/a.jpg?x=1", **allow) == jpeg()
    assert hits == ["/a.jpg?x=1"]


@pytest.mark.parametrize(
    "location",
    ["http://10.0.0.1/", "//169.254.169.254/", "file:///etc/passwd", "gopher://127.0.0.1/", "http://u@a.b/"],
)
def test_every_hop_is_checked(canary: tuple[int, list[str], Any], location: str) -> None:
    port, hits, handler = canary
    handler.location = location
    loopback_only = {"allowed": lambda address: address.is_loopback, "ports": {port, 80}}
    with pytest.raises(ApiError):
        fetch(f"http://127.0.0.1:{port}/", **loopback_only)
    assert len(hits) == 1


def test_redirects_end(canary: tuple[int, list[str], Any]) -> None:
    port, hits, handler = canary
    handler.location = "/again"
    with pytest.raises(ApiError):
        fetch(f"http://127.0.0.1:{port}/", allowed=lambda _address: True, ports={port})
    assert 1 < len(hits) < 6


def test_the_address_is_pinned(canary: tuple[int, list[str], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """A name that is public when it is checked and private when it is used (DNS rebinding)."""
    port, hits, _ = canary
    answers = iter(["93.184.216.34", "127.0.0.1", "127.0.0.1"])
    connected: list[str] = []

    def resolve(_host: str, port: int, **_options: Any) -> list[Any]:
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (next(answers), port))]

    def connect(address: tuple[str, int], **_options: Any) -> socket.socket:
        connected.append(address[0])
        raise OSError("no route in this test")

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    monkeypatch.setattr(socket, "create_connection", connect)
    with pytest.raises(ApiError):
        fetch(f"http://rebinding.example:{port}/", ports={port})
    assert connected == ["93.184.216.34"]
    assert hits == []


def test_a_name_with_one_private_address_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    entries = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (ip, 80)) for ip in ("93.184.216.34", "10.0.0.1")]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_args, **_options: entries)
    monkeypatch.setattr(socket, "create_connection", lambda *_args, **_options: pytest.fail("it connects"))
    with pytest.raises(ApiError, match="public internet"):
        fetch("http://both.example/")


def test_size_and_time_are_bounded(canary: tuple[int, list[str], Any]) -> None:
    port, _, handler = canary
    allow = {"allowed": lambda _address: True, "ports": {port}}
    with pytest.raises(ApiError):
        fetch(f"http://127.0.0.1:{port}/", max_bytes=100, **allow)
    stop = threading.Event()
    handler.do_GET = lambda self: stop.wait(20)
    with pytest.raises(ApiError):
        fetch(f"http://127.0.0.1:{port}/", seconds=0.3, **allow)
    stop.set()


@given(st.ip_addresses(v=4, network="10.0.0.0/8") | st.ip_addresses(v=4, network="127.0.0.0/8"))
def test_no_spelling_of_ipv6_makes_a_private_address_public(address: ipaddress.IPv4Address) -> None:
    number = int(address)
    forms = [number, number | 0xFFFF << 32, number | 0xFFFF << 48, (0x64FF9B << 96) | number]
    forms += [
        (0x64FF9B0001 << 80) | number,
        (0x2002 << 112) | number << 80,
        (0x20010000 << 96) | (number ^ 0xFFFFFFFF),
    ]
    assert not is_public(address)
    assert not any(is_public(ipaddress.IPv6Address(form)) for form in forms)


def test_public_addresses_are_public() -> None:
    for text in ("93.184.216.34", "8.8.8.8", "2606:2800:220:1:248:1893:25c8:1946", "2001:4860:4860::8888"):
        assert is_public(ipaddress.ip_address(text))


def test_a_server_fetches_only_if_it_was_told_to(nano: Any, canary: tuple[int, list[str], Any]) -> None:
    port, hits, _ = canary
    with running(lambda _source: nano, allow_urls=True) as server:
        for url in (f"http://127.0.0.1:{port}/", "http://169.254.169.254/", "http://[::1]/"):
            body = {"input": [url], "modality": "image"}
            answer = server.post("/v1/embeddings", body)
            assert answer.status_code == 400
            assert answer.json()["error"]["code"] == "url_refused"
    assert hits == []
