"""Who may call the server: the Host and Origin of a request, and its key.

A browser sends requests from any page to this machine's addresses. Host is checked against DNS rebinding (a name of
somebody else's that leads here), Origin and Sec-Fetch-Site against requests that another page makes (CSRF).
"""

from __future__ import annotations

import hashlib
import hmac
import re
from collections.abc import Hashable, Mapping
from urllib.parse import urlsplit

from sightloop.apps.server.errors import ApiError
from sightloop.apps.server.settings import ServerSettings, is_loopback

# Paths that need no key: /session takes it.
_OPEN = ("/health", "/session")
_HOST = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]+)(?::(\d{1,5}))?")


class Access:
    """Checks of one server.

    Args:
        settings: its keys, and the names under which it may be called.
    """

    def __init__(self, settings: ServerSettings) -> None:
        self._keys = [key.encode() for key in settings.keys]
        self._is_local = settings.is_local
        own = settings.host.strip("[]").lower()
        self._names = {own, *(name.strip("[]").lower() for name in settings.hosts)}
        self._any_address = own in ("0.0.0.0", "::", "")
        self.cookie = f"sightloop_{settings.port}"

    def check(self, method: str, path: str, headers: Mapping[str, str], address: str) -> Hashable:
        """The client of a request, for turns and counts.

        Args:
            method: "GET".
            path: the path.
            headers: by name in lower case.
            address: of the other end.

        Raises:
            ApiError: 401 or 403.
        """
        self._check_host(headers.get("host", ""))
        self._check_origin(method, headers)
        if path in _OPEN or not self._keys:
            return address
        key = self.key_of(headers)
        if key is None:
            message = "a key is needed: send it as Authorization: Bearer KEY"
            error = ApiError(401, message, code="invalid_api_key")
            error.headers = {"WWW-Authenticate": "Bearer"}
            raise error
        return key, address

    def key_of(self, headers: Mapping[str, str]) -> int | None:
        """Which of the keys a request has, None for none; all are compared, in the same time."""
        kind, _, word = headers.get("authorization", "").partition(" ")
        sent = word.strip() if kind.lower() == "bearer" else headers.get("x-api-key", "")
        cookies = [part.strip().partition("=") for part in headers.get("cookie", "").split(";")]
        session = next((value for name, _, value in cookies if name == self.cookie), "")
        matches = [
            hmac.compare_digest(sent.encode(), key) | hmac.compare_digest(session.encode(), self.session(key))
            for key in self._keys
        ]
        return matches.index(True) if True in matches else None

    def session(self, key: str | bytes) -> bytes:
        """What the page's cookie holds in place of the key."""
        own = key.encode() if isinstance(key, str) else key
        return hashlib.blake2b(b"sightloop page", key=own[:64], digest_size=24).hexdigest().encode()

    def is_key(self, text: str) -> bool:
        """Whether a text is one of the keys."""
        return any(hmac.compare_digest(text.encode(), key) for key in self._keys)

    def _check_host(self, host: str) -> None:
        match = _HOST.fullmatch(host)
        name = match[1].strip("[]").lower().rstrip(".") if match else ""
        if name and (name in self._names or (is_loopback(name) and (self._is_local or self._any_address))):
            return
        if name and self._any_address and _is_address(name):  # a name can be rebound, an address cannot
            return
        raise ApiError(
            403,
            "the server is not called by this Host: use its address, or start it with --allow-host NAME",
            code="host_refused",
        )

    def _check_origin(self, method: str, headers: Mapping[str, str]) -> None:
        origin, site = headers.get("origin"), headers.get("sec-fetch-site", "none")
        navigates = method in ("GET", "HEAD") and headers.get("sec-fetch-mode") == "navigate"
        same = origin is None or urlsplit(origin).netloc.lower() == headers.get("host", "").lower()
        if not same or (site not in ("none", "same-origin") and not navigates):
            raise ApiError(403, "requests from the pages of other sites are refused", code="origin_refused")


def _is_address(name: str) -> bool:
    """Whether a Host is an IP address."""
    return ":" in name or re.fullmatch(r"\d{1,3}(\.\d{1,3}){3}", name) is not None
