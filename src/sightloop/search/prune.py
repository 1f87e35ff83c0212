"""Entries of an index whose images are gone."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence, Set

from sightloop.search.build import KnownRows, is_there
from sightloop.search.store import Store
from sightloop.search.videos import known_videos


def find_gone(
    store: Store, below: Sequence[str] | None = None, archived: Mapping[str, Set[str]] | None = None
) -> list[tuple[str, str]]:
    """Ids and names of entries whose images are gone, though the folder or dataset that held them is there.

    A disk that is not mounted, or a root that was moved as a whole, takes no entry with it.

    Args:
        store: of the index.
        below: files and folders to which the search is limited; None for all.
        archived: by dataset of encoded images, the keys that it was just seen to hold.
    """
    places = None if below is None else [os.path.abspath(name) for name in below]
    gone: list[tuple[str, str]] = []
    for row in KnownRows(store):
        name = os.path.join(row.root, row.path)
        if places is not None and not any(_is_below(name, place) for place in places):
            continue
        keys = (archived or {}).get(row.root)
        left_archive = keys is not None and row.path not in keys
        if left_archive or (os.path.isdir(row.root) and not is_there(row.root, row.path)):
            gone.append((row.id, name))
    for name, video in known_videos(store).items():
        if places is not None and not any(_is_below(name, place) for place in places):
            continue
        if os.path.isdir(video.root) and not is_there(video.root, video.path):
            gone += [(identity, name) for identity in video.ids]
    return gone


def _is_below(name: str, place: str) -> bool:
    return name == place or name.startswith(os.path.join(place, ""))
