"""Facts about an index: how many images of which folders, and whose vectors."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from sightloop.search.store import Store, VectorSpace
from sightloop.types import JsonDict


@dataclass(frozen=True, slots=True)
class IndexStats:
    """Facts about an index.

    Args:
        name: its path or address.
        images: rows.
        models: its vector spaces.
        roots: number of images by folder or dataset.
        with_captions: rows that have captions.
        version: of the store.
    """

    name: str
    images: int
    models: tuple[VectorSpace, ...]
    roots: Mapping[str, int]
    with_captions: int
    version: int

    def as_json(self) -> JsonDict:
        """A JSON object."""
        models = [
            {
                "model": s.model,
                "fingerprint": s.fingerprint,
                "dim": s.dim,
                "queries": s.queries,
                "dtype": s.dtype,
            }
            for s in self.models
        ]
        counts = {"images": self.images, "with_captions": self.with_captions, "version": self.version}
        return {"name": self.name, **counts, "models": models, "roots": dict(self.roots)}

    @classmethod
    def of(cls, store: Store) -> IndexStats:
        """The facts of a store."""
        roots: Counter[str] = Counter()
        captions = 0
        for part in store.scan(["root", "caption_keys"]):
            roots.update(part["root"].to_pylist())
            captions += sum(map(bool, part["caption_keys"].to_pylist()))
        by_root = {root or "": count for root, count in roots.items()}
        return cls(store.name, roots.total(), store.info().spaces, by_root, captions, store.version())

    def __str__(self) -> str:
        models = ", ".join(space.model or f"vectors of {space.dim}" for space in self.models)
        return f"{self.name}: {self.images:,} images ({self.with_captions:,} with captions), {models}"
