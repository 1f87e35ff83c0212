"""Admission: how many requests the server takes at a time, and from whom."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable

from sightloop.apps.server.errors import ApiError
from sightloop.apps.server.limits import MAX_BODIES


class Admission:
    """Counter of the requests at work or waiting.

    Args:
        limit: requests in all.
        reserve: places beyond it for clients that have none.
        room: bytes of their bodies in all.
    """

    def __init__(self, limit: int, reserve: int, room: int = MAX_BODIES) -> None:
        self._limit, self._reserve = limit, reserve
        self._by_client: Counter[Hashable] = Counter()
        self._room = room
        self.count = 0

    def enter(self, client: Hashable) -> None:
        """Takes a place. Raises ApiError (429) if there is none."""
        limit = self._limit + (0 if self._by_client[client] else self._reserve)
        if self.count >= limit:
            if not self._by_client[client]:
                del self._by_client[client]
            raise ApiError(
                429,
                f"{self.count} requests wait already: try again in a second",
                code="queue_full",
                retry_after=1,
            )
        self._by_client[client] += 1
        self.count += 1

    def take(self, size: int) -> None:
        """Takes room for bytes of a body. Raises ApiError (503) if there is none."""
        if size > self._room:
            raise ApiError(503, "the server holds too many images: try again in a second", retry_after=1)
        self._room -= size

    def leave(self, client: Hashable, size: int = 0) -> None:
        """Gives the place back, and the room of its body."""
        self._room += size
        self.count -= 1
        self._by_client[client] -= 1
        if not self._by_client[client]:
            del self._by_client[client]
