"""Admission: how many requests the server takes at a time, and from whom."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable

from sightloop.apps.server.errors import ApiError


class Admission:
    """Counter of the requests at work or waiting.

    Args:
        limit: requests in all.
        reserve: places beyond it for clients that have none.
    """

    def __init__(self, limit: int, reserve: int) -> None:
        self._limit, self._reserve = limit, reserve
        self._by_client: Counter[Hashable] = Counter()
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

    def leave(self, client: Hashable) -> None:
        """Gives the place back."""
        self.count -= 1
        self._by_client[client] -= 1
        if not self._by_client[client]:
            del self._by_client[client]
