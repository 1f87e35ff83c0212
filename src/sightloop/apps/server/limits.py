"""Limits of the server: sizes, counts, times. A request beyond one of them is refused in words, and costs little."""

from __future__ import annotations

from typing import Final

from sightloop.types import Limits

MAX_BODY: Final = 20 << 20
"""Bytes of a request's body, counted while they arrive."""
MAX_DEPTH: Final = 32
"""Objects and arrays inside one another in a body."""
BODY_SECONDS: Final = 60.0
"""Time for a body to arrive."""
REQUEST_SECONDS: Final = 300.0
"""Time for an answer, waiting included."""
MAX_BODIES: Final = 512 << 20
"""Bytes of all bodies at a time."""
DRAIN_BYTES: Final = 32 << 20
"""Bytes of a refused body that are read and dropped, so that the client sees the answer and not a reset."""
DRAIN_SECONDS: Final = 5.0

QUEUE: Final = 64
"""Requests at work or waiting."""
RESERVE: Final = 16
"""Places beyond QUEUE for clients that have none in it, so that one client cannot fill it for all."""

MAX_CHAT_IMAGES: Final = 16
MAX_IMAGES: Final = 32
"""Images of a request of any other kind."""
MAX_TEXTS: Final = 2048
MAX_TEXT: Final = 32_768
"""Characters of a text."""
MAX_PAIRS: Final = 512
"""Pairs of an image and a text in one request."""
MAX_PROMPTS: Final = 4096
"""Labels times templates."""
MAX_CHOICES: Final = 4
MAX_NEW_TOKENS: Final = 4096
MAX_BEAMS: Final = 16
MAX_TURNS: Final = 256
"""Messages of a conversation."""

IMAGE_LIMITS: Final = Limits(
    max_pixels=64 << 20, max_file_bytes=MAX_BODY, max_seconds=8.0, max_memory_bytes=1 << 30
)
"""Bounds on decoding one image, held by child processes."""

REMOTE_SECONDS: Final = 10.0
"""Time for one remote image, redirects included."""
REMOTE_PORTS: Final = frozenset({80, 443, 8080, 8443})
REDIRECTS: Final = 3
