"""Stores by their place: a folder of LanceDB, or a collection of a Qdrant server."""

from __future__ import annotations

from os import PathLike, fspath
from pathlib import Path
from typing import Final

from sightloop.search.lance import INFO_NAME, LanceStore
from sightloop.search.store import IndexInfo, Store

_SERVER: Final = "qdrant://"


def is_index(path: str | PathLike[str]) -> bool:
    """Whether there is an index in a folder, or a collection at an address."""
    name = fspath(path)
    if name.startswith(_SERVER):
        from sightloop.search.qdrant import connect_qdrant

        client, collection = connect_qdrant(name)
        return client.collection_exists(collection)
    return (Path(name) / INFO_NAME).is_file()


def open_store(name: str) -> Store:
    """The store at a place. Raises UsageError if there is none."""
    if name.startswith(_SERVER):
        from sightloop.search.qdrant import QdrantStore, connect_qdrant

        return QdrantStore(*connect_qdrant(name), name)
    return LanceStore(Path(name))


def create_store(name: str, info: IndexInfo) -> Store:
    """A new store at a place. Raises UsageError if it is taken."""
    if name.startswith(_SERVER):
        from sightloop.search.qdrant import QdrantStore, connect_qdrant

        client, collection = connect_qdrant(name)
        return QdrantStore.create(client, collection, info, name)
    return LanceStore.create(Path(name), info)
