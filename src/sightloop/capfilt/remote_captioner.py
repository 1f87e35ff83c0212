"""Captioner behind an OpenAI-compatible chat completions server, named as http://host:8000/v1#model.

Used only if such an address is given. A request holds the preprocessed image as a new JPEG, without name, place or
date, and the prompt. Redirects and proxies are not followed. A key is read from the environment (SIGHTLOOP_API_KEY) and
sent over https, or to this machine. No message, file or report contains the address.
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
from typing import NamedTuple
from urllib.parse import urlsplit

from PIL import Image

from sightloop.capfilt.options import CapFiltOptions
from sightloop.data.bounded_socket import BoundedReader, seconds_until, too_slow
from sightloop.data.rng import generator
from sightloop.errors import ImageError, SightloopError, UsageError
from sightloop.types import ImageSpec, JsonDict, Pixels

KEY = "SIGHTLOOP_API_KEY"
_PROMPT = "Describe this image in one short sentence."
_TRIES = 5
_SECONDS = 120.0  # for one request and its whole answer
_LONGEST_WAIT = 60.0  # seconds between two tries
_MOST_SENT, _MOST_READ = 20 << 20, 1 << 20  # bytes of a request's image, and of an answer with its headers
_LONGEST = 4000  # characters of a text
_AT_ONCE = 8  # requests in flight
_REFUSED = (400, 413, 415, 422)  # HTTP statuses about this image, not about the server
_BUSY = (408, 409, 425, 429, 500, 502, 503, 504, 529)


def is_address(source: str) -> bool:
    """Whether a captioner is named by an address, and not by a checkpoint."""
    return re.match(r"https?://", source, re.IGNORECASE) is not None


class RemoteCaptioner:
    """Client of a captioning server, with several requests in flight. Its texts may differ from call to call.

    Attributes:
        model: The server's name of the model.
        fingerprint: Model and a digest of the address, without the address itself.

    Args:
        address: http(s)://host[:port]/v1#model.

    Raises:
        UsageError: The address is incomplete, or would send the key unencrypted.
    """

    image_spec = ImageSpec(shortest_edge=384)

    def __init__(self, address: str) -> None:
        parts = urlsplit(address)
        self._key = os.environ.get(KEY, "")
        self._secure = parts.scheme.lower() == "https"
        self._path = parts.path.rstrip("/") + "/chat/completions"
        self.model = parts.fragment
        self._abandoned = Event()  # set when the caller no longer waits for answers
        try:
            self._host, self._port = parts.hostname or "", parts.port
        except ValueError:
            self._host, self._port = "", None
        if not self._host or not self.model:
            raise UsageError("the captioner's address is incomplete: http://host:8000/v1#name-of-the-model")
        if parts.username or parts.password or parts.query:
            raise UsageError(f"the captioner's address must hold no password: put the key into {KEY}")
        if self._key and not self._secure and self._host not in ("localhost", "127.0.0.1", "::1"):
            raise UsageError(f"{KEY} is set and would be sent unencrypted: use https, or unset it")
        self.fingerprint = f"{self.model} {hashlib.sha256(address.encode()).hexdigest()[:12]}"

    def caption(
        self, images: Sequence[Pixels], keys: Sequence[str], options: CapFiltOptions
    ) -> list[list[str] | ImageError]:
        """Requests `options.captions` texts for each image.

        An interrupt or an error does not wait for requests in flight: their threads are daemons (those of a pool are
        not), and start no other request.

        Args:
            images: The preprocessed images.
            keys: Their keys in the dataset, from which the seeds are drawn.
            options: Options of the run.

        Returns:
            The texts of each image, or why it got none.

        Raises:
            SightloopError: The server does not answer, or refuses everything.
        """
        gate, futures = Semaphore(_AT_ONCE), [Future[list[str] | ImageError]() for _ in keys]

        def work(future: Future[list[str] | ImageError], image: Pixels, key: str) -> None:
            with gate:
                if future.set_running_or_notify_cancel():
                    try:
                        future.set_result(self._caption_image(image, key, options))
                    except Exception as error:
                        future.set_exception(error)

        try:
            for arguments in zip(futures, images, keys, strict=True):
                Thread(target=work, args=arguments, daemon=True).start()
            return [future.result() for future in futures]
        except BaseException:
            self._abandoned.set()
            for future in futures:
                future.cancel()
            raise

    def _caption_image(self, image: Pixels, key: str, options: CapFiltOptions) -> list[str] | ImageError:
        file = io.BytesIO()
        Image.fromarray(image.values.transpose(1, 2, 0)).save(file, "JPEG", quality=90)
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
                self._request(
                    body | {"seed": int(generator("caption", options.seed, key, n).integers(2**31))}, key
                )
                for n in range(options.captions)
            ]
        except ImageError as error:
            return error.with_traceback(None)

    def _request(self, body: JsonDict, key: str) -> str:
        """The text of an answer, in at most `_TRIES` tries.

        Raises `ImageError` if the server fails at this image, `SightloopError` if it does not work at all.
        """
        cause, image_failure, wait = "", "", 1.0
        for tries_left in reversed(range(_TRIES)):
            pause = image_failure = ""
            try:
                answer = self._post(json.dumps(body).encode())
                if answer.status == 200:
                    text = _text(answer.body, key)
                    if text is not None:
                        return text
                    image_failure = f"the captioner answered without a text for its image in {_TRIES} tries"
                elif answer.status in _REFUSED:
                    raise ImageError(key, f"the captioner refused its image (HTTP {answer.status})")
                elif answer.status not in _BUSY:
                    raise SightloopError(_refusal(answer.status))
                else:
                    cause = pause = f"HTTP {answer.status}"
                    wait = max(wait, answer.retry_after)
                    if answer.status == 500:
                        image_failure = f"the captioner failed at its image, {_TRIES} times ({cause})"
            except (OSError, http.client.HTTPException, ValueError) as error:
                cause = pause = (error.strerror if isinstance(error, OSError) else "") or type(error).__name__
            if self._abandoned.is_set():
                break
            if pause and tries_left:
                if self._abandoned.wait(min(wait, _LONGEST_WAIT)):
                    break
                wait *= 2
        if image_failure:
            raise ImageError(key, image_failure)
        raise SightloopError(
            f"the captioner's endpoint gave no answer in {_TRIES} tries ({cause}): check that it runs, and run the "
            "same command again: it resumes"
        )

    def _post(self, body: bytes) -> _Answer:
        """Sends one request. Raises OSError, HTTPException or ValueError if no whole answer comes in `_SECONDS`."""
        deadline = time.monotonic() + _SECONDS
        kind = http.client.HTTPSConnection if self._secure else http.client.HTTPConnection
        connection = kind(self._host, self._port, timeout=_SECONDS)
        headers = {"Content-Type": "application/json"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        _connect(connection, deadline)
        try:
            connection.sock.settimeout(seconds_until(deadline))
            connection.request("POST", self._path, body, headers)
            reader = BoundedReader(connection.sock, deadline, _MOST_READ)
            response = http.client.HTTPResponse(reader, method="POST")  # pyright: ignore[reportArgumentType]
            try:
                response.begin()
                data = b"".join(iter(lambda: response.read1(1 << 16), b""))
                retry_after = response.getheader("Retry-After", "0")
                return _Answer(response.status, float(retry_after) if retry_after.isdecimal() else 0.0, data)
            finally:
                response.close()
        finally:
            connection.close()


def _connect(connection: http.client.HTTPConnection, deadline: float) -> None:
    """Connects in a thread, because no timeout bounds the look-up of a host's name, nor the addresses tried in turn.

    Raises:
        TimeoutError: It is not connected at the deadline. The thread ends with the look-up, and closes the connection.
        OSError: The host is not known, or refuses the connection.
    """
    connected: Future[None] = Future()

    def work() -> None:
        try:
            connected.set_result(connection.connect())
        except Exception as error:
            connected.set_exception(error)

    Thread(target=work, daemon=True).start()
    try:
        connected.result(seconds_until(deadline))
    except TimeoutError as error:
        connected.add_done_callback(lambda _: connection.close())
        raise too_slow() from error


class _Answer(NamedTuple):
    """An HTTP answer; `retry_after`: seconds that the server asks to wait."""

    status: int
    retry_after: float
    body: bytes


def _text(data: bytes, key: str) -> str | None:
    """The text of an answer; None for an answer whose choices have none (`"content": null`, `"choices": []`).

    Raises:
        ValueError: It is no answer of a chat completions server.
        ImageError: The text is too long.
    """
    try:
        choices = json.loads(data)["choices"]
        text = choices[0]["message"]["content"] if choices else None
    except (LookupError, TypeError, RecursionError) as error:
        raise ValueError("no text in it") from error
    if text is None:
        return None
    if not isinstance(text, str):
        raise ValueError("no text in it")
    if len(text) > _LONGEST:
        raise ImageError(key, "the captioner's text is too long")
    return text.encode("utf-8", "replace").decode()


def _refusal(status: int) -> str:
    if status in (401, 403):
        return f"the captioner's endpoint refuses the key (HTTP {status}): put a valid one into {KEY}"
    if status == 404:
        return "the captioner's endpoint has no such model or path (HTTP 404): http://host:8000/v1#model"
    return f"the captioner's endpoint refuses requests (HTTP {status})"
