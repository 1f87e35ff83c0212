"""A captioner elsewhere: a server that speaks OpenAI's chat completions, named as http://host:8000/v1#model.

Off unless such an address is given. What is sent is the prepared image as a new JPEG, without name, place or date,
and the prompt; redirects and proxies are not followed. A key is taken from the environment (SIGHTLOOP_API_KEY) and goes
over https, or to this machine. No message, file or report holds the address.
"""

from __future__ import annotations

import base64
import hashlib
import http.client
import io
import json
import os
import re
import time
from collections.abc import Sequence
from concurrent.futures import Future
from threading import Event, Semaphore, Thread
from urllib.parse import urlsplit

from PIL import Image

from sightloop.capfilt.options import CapFiltOptions
from sightloop.data.rng import generator
from sightloop.errors import ImageError, SightloopError, UsageError
from sightloop.types import ImageSpec, JsonDict, Pixels

KEY = "SIGHTLOOP_API_KEY"
_PROMPT = "Describe this image in one short sentence."
_TRIES = 5
_SECONDS = 120.0  # for one answer
_LONGEST_WAIT = 60.0  # seconds between two tries
_MOST_SENT, _MOST_READ = 20 << 20, 1 << 20  # bytes
_LONGEST = 4000  # characters of a text
_AT_ONCE = 8
_REFUSED = (400, 413, 415, 422)  # this image, not the server
_BUSY = (408, 409, 425, 429, 500, 502, 503, 504, 529)


def is_address(source: str) -> bool:
    """Whether a captioner is named by an address, and not by a checkpoint."""
    return re.match(r"https?://", source, re.IGNORECASE) is not None


class RemoteCaptioner:
    """Asks for captions; several requests run at once. Its texts may differ from call to call."""

    image_spec = ImageSpec(shortest_edge=384)

    def __init__(self, address: str) -> None:
        """address: http(s)://host[:port]/v1#model. Raises `UsageError` for one that is incomplete or not safe."""
        parts = urlsplit(address)
        self._key = os.environ.get(KEY, "")
        self._secure = parts.scheme.lower() == "https"
        self._path = parts.path.rstrip("/") + "/chat/completions"
        self.model = parts.fragment
        self._left = Event()  # nobody waits for an answer any more
        try:
            self._host, self._port = parts.hostname or "", parts.port
        except ValueError:
            self._host, self._port = "", None
        if not self._host or not self.model:
            raise UsageError("the captioner's address is incomplete: http://host:8000/v1#name-of-the-model")
        if parts.username or parts.password or parts.query:
            raise UsageError(f"the captioner's address must hold no password: put the key into {KEY}")
        if self._key and not self._secure and self._host not in ("localhost", "127.0.0.1", "::1"):
            raise UsageError(
                f"{KEY} is set, and would go over the network unencrypted: take https, or unset it"
            )
        self.stamp = f"{self.model} {hashlib.sha256(address.encode()).hexdigest()[:12]}"

    def caption(
        self, pictures: Sequence[Pixels], keys: Sequence[str], options: CapFiltOptions
    ) -> list[list[str] | ImageError]:
        """`options.captions` texts for each image, or why the server refused it.

        Raises SightloopError where the server does not answer, or refuses everything. Whoever interrupts it, or such an
        error, waits for no request: the threads are daemons, which a pool's are not, and go on to no other one.
        """
        gate, waiting = Semaphore(_AT_ONCE), [Future[list[str] | ImageError]() for _ in keys]

        def work(future: Future[list[str] | ImageError], picture: Pixels, key: str) -> None:
            with gate:
                if future.set_running_or_notify_cancel():
                    try:
                        future.set_result(self._texts(picture, key, options))
                    except Exception as error:
                        future.set_exception(error)

        try:
            for given in zip(waiting, pictures, keys, strict=True):
                Thread(target=work, args=given, daemon=True).start()
            return [future.result() for future in waiting]
        except BaseException:
            self._left.set()
            for future in waiting:
                future.cancel()
            raise

    def _texts(self, picture: Pixels, key: str, options: CapFiltOptions) -> list[str] | ImageError:
        file = io.BytesIO()
        Image.fromarray(picture.values.transpose(1, 2, 0)).save(file, "JPEG", quality=90)
        data = f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"
        if len(data) > _MOST_SENT:
            return ImageError(key, "its image is too large to send to the captioner")
        content = [
            {"type": "text", "text": options.prompt or _PROMPT},
            {"type": "image_url", "image_url": {"url": data}},
        ]
        body: JsonDict = {"model": self.model, "messages": [{"role": "user", "content": content}]}
        body |= {"max_tokens": options.max_tokens, "top_p": options.top_p}
        try:
            return [
                self._ask(
                    body | {"seed": int(generator("caption", options.seed, key, n).integers(2**31))}, key
                )
                for n in range(options.captions)
            ]
        except ImageError as error:
            return error.with_traceback(None)

    def _ask(self, body: JsonDict, key: str) -> str:
        why, wait = "", 1.0
        for left in reversed(range(_TRIES)):
            try:
                status, after, data = self._post(json.dumps(body).encode())
                if status == 200:
                    return _text(data, key)
                why = f"HTTP {status}"
                if status in _REFUSED:
                    raise ImageError(key, f"the captioner refused its image ({why})")
                if status not in _BUSY:
                    raise SightloopError(_refusal(status))
                wait = max(wait, after)
            except (OSError, http.client.HTTPException, ValueError) as error:
                why = (error.strerror if isinstance(error, OSError) else None) or type(error).__name__
            if left and self._left.wait(min(wait, _LONGEST_WAIT)):
                break
            wait *= 2
        if why == "HTTP 500":
            raise ImageError(key, f"the captioner failed at its image, {_TRIES} times ({why})")
        raise SightloopError(
            f"the captioner's endpoint gave no answer in {_TRIES} tries ({why}): see that it runs, and give the same "
            "command again; what is done stays done"
        )

    def _post(self, body: bytes) -> tuple[int, float, bytes]:
        """Status, seconds that the server asks to wait, answer. Raises OSError, HTTPException or ValueError."""
        kind = http.client.HTTPSConnection if self._secure else http.client.HTTPConnection
        connection, end = kind(self._host, self._port, timeout=_SECONDS), time.monotonic() + _SECONDS
        headers = {"Content-Type": "application/json"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        try:
            connection.request("POST", self._path, body, headers)
            response = connection.getresponse()
            found = bytearray()
            while part := response.read1(1 << 16):
                found += part
                if len(found) > _MOST_READ or time.monotonic() > end:
                    raise TimeoutError(0, "its answer is too long, or comes too slowly")
            after = response.getheader("Retry-After", "0")
            return response.status, float(after) if after.isdecimal() else 0.0, bytes(found)
        finally:
            connection.close()


def _text(data: bytes, key: str) -> str:
    """The text of an answer. Raises ValueError for what is none."""
    try:
        found = json.loads(data)["choices"][0]["message"]["content"]
    except (LookupError, TypeError, RecursionError) as error:
        raise ValueError("no text in it") from error
    if not isinstance(found, str):
        raise ValueError("no text in it")
    if len(found) > _LONGEST:
        raise ImageError(key, "the captioner's text is too long")
    return found.encode("utf-8", "replace").decode()


def _refusal(status: int) -> str:
    if status in (401, 403):
        return f"the captioner's endpoint refuses the key (HTTP {status}): put a valid one into {KEY}"
    if status == 404:
        return "the captioner's endpoint knows no such model or path (HTTP 404): http://host:8000/v1#model"
    return f"the captioner's endpoint refuses to work (HTTP {status})"
