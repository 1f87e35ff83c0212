"""Models of the server: loaded on demand within a memory budget, and unloaded when nobody asks for them."""

from __future__ import annotations

import asyncio
import gc
import logging
import time
from collections.abc import AsyncGenerator, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from sightloop.apps.server.errors import ApiError
from sightloop.apps.server.limits import IMAGE_LIMITS
from sightloop.checkpoints.catalog import find_entry
from sightloop.checkpoints.hub import locate
from sightloop.data.images.reader import ImagePool
from sightloop.errors import SightloopError

if TYPE_CHECKING:
    from sightloop.inference.model import Model

_LOG = logging.getLogger("sightloop.server")


@dataclass(eq=False)
class LoadedModel:
    """A model at work.

    Args:
        id: as clients name it.
        model: the model; its name is the id, so that no message has a path.
        images: decoder of its images.
    """

    id: str
    model: Model
    images: ImagePool


@dataclass(eq=False)
class _Entry:
    id: str
    source: str
    loaded: LoadedModel | None = None
    capabilities: frozenset[str] | None = None
    size: int = 0
    users: int = 0
    last_used: float = field(default_factory=time.monotonic)


@dataclass(frozen=True, slots=True)
class ModelState:
    """What is known of a model without loading it.

    Args:
        id: as clients name it.
        capabilities: what it can do; None if that is known only once it is loaded.
        is_loaded: whether it is in memory.
    """

    id: str
    capabilities: tuple[str, ...] | None
    is_loaded: bool


class ModelPool:
    """Models by id.

    Args:
        sources: id -> checkpoint; the first is the default, and stays loaded.
        load: loads a checkpoint.
        budget: bytes of weights at a time, None for no bound.
        idle_seconds: after which a model is unloaded, 0 for never.
        workers: decoding processes of a model.
    """

    def __init__(
        self,
        sources: Mapping[str, str],
        load: Callable[[str], Model],
        *,
        budget: int | None = None,
        idle_seconds: float = 600.0,
        workers: int = 2,
    ) -> None:
        self._entries = {name: _Entry(name, source) for name, source in sources.items()}
        for entry in self._entries.values():
            known = find_entry(entry.source)
            entry.capabilities = None if known is None else frozenset(known.capabilities)
        self._load, self._budget = load, budget
        self._idle_seconds, self._workers = idle_seconds, workers
        self._loader = ThreadPoolExecutor(1, thread_name_prefix="sightloop-loader")
        self._lock = asyncio.Lock()  # of loading and unloading
        self._released = asyncio.Event()

    @property
    def default(self) -> str:
        """Id of the model that serves requests without one."""
        return next(iter(self._entries))

    @property
    def is_ready(self) -> bool:
        """Whether the default model is loaded."""
        return self._entries[self.default].loaded is not None

    def states(self) -> list[ModelState]:
        """All models, in the order in which they were named."""
        return [
            ModelState(
                entry.id,
                None if entry.capabilities is None else tuple(sorted(entry.capabilities)),
                entry.loaded is not None,
            )
            for entry in self._entries.values()
        ]

    def source(self, name: str) -> str:
        """The checkpoint of a model."""
        return self._entries[self.find(name)].source

    def add(self, name: str, source: str) -> None:
        """Adds a model, which is loaded when it is first needed. One of that name is replaced if it is not loaded."""
        known = self._entries.get(name)
        if known is None or known.loaded is None:
            self._entries[name] = _Entry(name, source)

    def find(self, name: str | None) -> str:
        """The id of a model that a request names. Raises ApiError (404)."""
        name = name or self.default
        if name not in self._entries:
            there = ", ".join(self._entries)
            raise ApiError(
                404,
                f"there is no model {name[:100]!r} here; there are: {there}",
                param="model",
                code="model_not_found",
            )
        return name

    @asynccontextmanager
    async def lease(self, name: str | None) -> AsyncGenerator[LoadedModel]:
        """A loaded model, which stays loaded inside the block.

        Raises:
            ApiError: there is no such model (404), or it cannot be loaded (503).
        """
        entry = self._entries[self.find(name)]
        entry.users += 1
        try:
            yield entry.loaded or await self._loaded(entry)
        finally:
            entry.users -= 1
            entry.last_used = time.monotonic()
            self._released.set()

    async def unload_idle(self) -> None:
        """Unloads every model but the default that nobody has asked for of late."""
        if not self._idle_seconds:
            return
        async with self._lock:
            for entry in self._evictable():
                if time.monotonic() - entry.last_used > self._idle_seconds:
                    await self._unload(entry)

    async def close(self) -> None:
        """Unloads all models."""
        async with self._lock:
            for entry in self._entries.values():
                await self._unload(entry)
        self._loader.shutdown(wait=False)

    async def _loaded(self, entry: _Entry) -> LoadedModel:
        async with self._lock:
            if entry.loaded is not None:  # loaded for another request meanwhile
                return entry.loaded
            entry.size = await asyncio.to_thread(_size_on_disk, entry.source)
            await self._make_room(entry)
            _LOG.info("loading %s", entry.id)
            start = time.monotonic()
            loop = asyncio.get_running_loop()
            try:
                model = await loop.run_in_executor(self._loader, self._load, entry.source)
            except (SightloopError, OSError, MemoryError) as error:
                _LOG.error("%s cannot be loaded: %s", entry.id, error)
                raise ApiError(
                    503,
                    f"the model {entry.id} cannot be loaded: the server's log says why",
                    code="model_failed",
                ) from error
            model.name = entry.id
            entry.capabilities = model.capabilities
            images = ImagePool(model.image_spec, limits=IMAGE_LIMITS, workers=self._workers)
            entry.loaded = LoadedModel(entry.id, model, images)
            _LOG.info("%s is loaded, in %.1f s", entry.id, time.monotonic() - start)
            return entry.loaded

    async def _make_room(self, entry: _Entry) -> None:
        """Unloads what was not used for longest, until a model fits; waits for models at work."""
        while self._budget is not None:
            used = sum(each.size for each in self._entries.values() if each.loaded is not None)
            if used + entry.size <= self._budget or not used:
                return
            idle = sorted(self._evictable(keep_default=False), key=lambda each: each.last_used)
            if idle:
                await self._unload(idle[0])
            else:
                self._released.clear()
                await self._released.wait()

    def _evictable(self, *, keep_default: bool = True) -> list[_Entry]:
        return [
            entry
            for entry in self._entries.values()
            if entry.loaded is not None
            and not entry.users
            and not (keep_default and entry.id == self.default)
        ]

    async def _unload(self, entry: _Entry) -> None:
        if entry.loaded is None:
            return
        images, entry.loaded = entry.loaded.images, None
        await asyncio.to_thread(images.close)
        gc.collect()
        _LOG.info("%s is unloaded", entry.id)


def _size_on_disk(source: str) -> int:
    """Bytes of a checkpoint's weights, about what they take in memory; 0 if that is not known yet."""
    try:
        return sum(path.stat().st_size for path in locate(source).weights)
    except (SightloopError, OSError):
        return 0
