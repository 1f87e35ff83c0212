"""Remote images, fetched so that no request of a client reaches the networks that only this machine can reach.

Every hop, redirects included: the URL is taken apart once, its host is resolved once, every address that it resolves to
must be public, and the connection goes to the address that was checked, whatever the name says later. Proxies are not
used. An answer says that an image could not be fetched, and not why, so that it tells nothing about what listens where.
"""

from __future__ import annotations

import asyncio
import http.client
import ipaddress
import re
import socket
import ssl
import time
from collections.abc import Callable, Collection
from typing import NamedTuple
from urllib.parse import urljoin, urlsplit

from sightloop.apps.server.errors import ApiError
from sightloop.apps.server.limits import MAX_BODY, REDIRECTS, REMOTE_PORTS, REMOTE_SECONDS
from sightloop.data.bounded_socket import BoundedReader, seconds_until

_AT_ONCE = 4
_MAX_URL = 2048
_NAME = re.compile(r"(?!-)[A-Za-z0-9_-]{1,63}(?<!-)(\.(?!-)[A-Za-z0-9_-]{1,63}(?<!-))*\.?")
_REDIRECTED = (301, 302, 303, 307, 308)
_HEADERS = {"User-Agent": "sightloop", "Accept": "image/*,*/*;q=0.5", "Accept-Encoding": "identity"}

Address = ipaddress.IPv4Address | ipaddress.IPv6Address

# Ranges of IPv6 that lead to addresses of IPv4 (NAT64, 6to4, Teredo, translated and compatible ones), and site-local.
_TUNNELS = [
    ipaddress.ip_network(text)
    for text in ("::/96", "::ffff:0:0/96", "::ffff:0:0:0/96", "64:ff9b::/96", "64:ff9b:1::/48", "2002::/16")
] + [ipaddress.ip_network(text) for text in ("2001::/32", "fec0::/10", "100::/64", "5f00::/16", "3fff::/20")]
_RELAYS = ipaddress.ip_network("192.88.99.0/24")


def is_public(address: Address) -> bool:
    """Whether an address belongs to the public internet: not private, loopback, link-local, multicast or reserved."""
    if not address.is_global or address.is_multicast or address.is_reserved or address.is_unspecified:
        return False
    if isinstance(address, ipaddress.IPv6Address):
        return not any(address in network for network in _TUNNELS)
    return address not in _RELAYS


class _Refused(Exception):
    """The URL, or what it leads to, is not allowed; the message is for the client."""


class _Target(NamedTuple):
    secure: bool
    host: str
    port: int
    path: str


class RemoteImages:
    """Fetcher of remote images, a few at a time.

    Args:
        allowed: whether an address may be connected to.
        ports: the ports that may be.
        seconds: for one image, redirects included.
        max_bytes: of one image.
    """

    def __init__(
        self,
        allowed: Callable[[Address], bool] = is_public,
        *,
        ports: Collection[int] = REMOTE_PORTS,
        seconds: float = REMOTE_SECONDS,
        max_bytes: int = MAX_BODY,
    ) -> None:
        self._allowed, self._ports = allowed, ports
        self._seconds, self._max_bytes = seconds, max_bytes
        self._gate = asyncio.Semaphore(_AT_ONCE)

    async def fetch(self, url: str, param: str) -> bytes:
        """The bytes of a remote image.

        Args:
            url: http or https.
            param: name of the field, for messages.

        Raises:
            ApiError: the URL is refused, or gave no image.
        """
        async with self._gate:
            try:
                return await asyncio.to_thread(self._fetch, url)
            except _Refused as error:
                raise ApiError(400, str(error), param=param, code="url_refused") from None
            except (OSError, http.client.HTTPException, ValueError):
                message = "the remote image cannot be fetched: send it as a data URL"
                raise ApiError(400, message, param=param, code="url_failed") from None

    def _fetch(self, url: str) -> bytes:
        deadline = time.monotonic() + self._seconds
        for _ in range(REDIRECTS + 1):
            target = parse_url(url, self._ports)
            status, location, data = self._get(target, deadline)
            if status == 200:
                return data
            if status not in _REDIRECTED or not location:
                raise ValueError("no image")
            url = urljoin(url, location)
        raise ValueError("too many redirects")

    def _get(self, target: _Target, deadline: float) -> tuple[int, str, bytes]:
        """(status, Location, body) of one request, to an address that was checked."""
        address = self._resolve(target)
        raw = socket.create_connection((str(address), target.port), timeout=seconds_until(deadline))
        try:
            if target.secure:
                raw = ssl.create_default_context().wrap_socket(raw, server_hostname=target.host)
            connection = http.client.HTTPConnection(target.host, target.port)
            connection.sock = raw
            raw.settimeout(seconds_until(deadline))
            connection.request("GET", target.path, headers=_HEADERS | {"Host": _host_header(target)})
            reader = BoundedReader(raw, deadline, self._max_bytes + (64 << 10))
            response = http.client.HTTPResponse(reader, method="GET")  # pyright: ignore[reportArgumentType]
            try:
                response.begin()
                if response.status != 200:
                    return response.status, response.getheader("Location", ""), b""
                data = b"".join(iter(lambda: response.read1(1 << 16), b""))
                if len(data) > self._max_bytes:
                    raise ValueError("too large")
                return 200, "", data
            finally:
                response.close()
        finally:
            raw.close()

    def _resolve(self, target: _Target) -> Address:
        """The address that is connected to. All of the name's must be allowed, as an attacker chooses their order."""
        entries = socket.getaddrinfo(target.host, target.port, type=socket.SOCK_STREAM)
        addresses = [ipaddress.ip_address(str(entry[4][0]).partition("%")[0]) for entry in entries]
        if not addresses or not all(map(self._allowed, addresses)):
            raise _Refused("only images of the public internet are fetched")
        return addresses[0]


def parse_url(url: str, ports: Collection[int] = REMOTE_PORTS) -> _Target:
    """The parts of a URL.

    Raises:
        _Refused: anything but a plain http or https URL of a host name or an address in its usual spelling.
    """
    if len(url) > _MAX_URL or not url.isascii() or not url.isprintable() or " " in url or "\\" in url:
        raise _Refused("the URL has characters that a URL cannot have, or is too long")
    try:
        parts = urlsplit(url)
        host, port = parts.hostname or "", parts.port
    except ValueError:
        raise _Refused("the URL is malformed") from None
    if parts.scheme not in ("http", "https"):
        raise _Refused("only http and https are fetched")
    if "@" in parts.netloc:
        raise _Refused("a URL with a user name is refused")
    port = port if port is not None else 443 if parts.scheme == "https" else 80
    if port not in ports:
        raise _Refused(f"only these ports are fetched from: {', '.join(map(str, sorted(ports)))}")
    if not _is_plain_host(host):
        raise _Refused("the host must be a name, or an address in its usual spelling")
    path = parts.path or "/"
    return _Target(parts.scheme == "https", host, port, f"{path}?{parts.query}" if parts.query else path)


def _is_plain_host(host: str) -> bool:
    """Whether a host is a name or a usual address: 127.1, 0x7f.0.0.1 and 2130706433 are spellings to hide one."""
    try:
        ipaddress.ip_address(host)
        return "%" not in host
    except ValueError:
        # The last label of a name has a letter, and is no number in hexadecimal.
        last = host.rstrip(".").rpartition(".")[2]
        return bool(
            _NAME.fullmatch(host)
            and re.search(r"[A-Za-z]", last)
            and not re.fullmatch(r"0[xX][0-9A-Fa-f]*", last)
        )


def _host_header(target: _Target) -> str:
    host = f"[{target.host}]" if ":" in target.host else target.host
    return host if target.port == (443 if target.secure else 80) else f"{host}:{target.port}"
