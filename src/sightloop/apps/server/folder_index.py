"""The folder's index: search and duplicates, as rows of the library."""

from __future__ import annotations

import os
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from sightloop.apps.server.caption_review import REVIEW_FOLDER
from sightloop.apps.server.errors import ApiError
from sightloop.apps.server.image_library import Library, LibraryImage
from sightloop.apps.server.model_pool import ModelPool
from sightloop.search.opening import is_index
from sightloop.types import JsonDict

if TYPE_CHECKING:
    from sightloop.inference.model import Model
    from sightloop.search.index import Index


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchQuery:
    """What is searched for, as in `search.query.Query`; `like` is a path of the folder."""

    text: str | None = None
    image: bytes | None = None
    like: str | None = None
    blend: float = 0.5
    words: str | None = None
    without: str | None = None
    where: tuple[str, ...] = ()
    k: int = 20
    rerank: int = 0
    cut: float | None = None


class FolderIndex:
    """Index of the server's folder, opened when it is there.

    Args:
        store: folder of the index.
    """

    def __init__(self, store: Path) -> None:
        self.store = store
        self._index: Index | None = None
        self._lock = threading.RLock()

    def exists(self) -> bool:
        """Whether the index was built."""
        return is_index(self.store)

    def describe(self) -> JsonDict | None:
        """Its rows and its model, for the page; None where there is none yet."""
        if not self.exists():
            return None
        return {"rows": len(self._opened()), "model": self._opened().info.space().model}

    def model_id(self, pool: ModelPool) -> str:
        """Id of the served model whose vectors the index has. Raises ApiError (409) if no such model is served."""
        name = self._opened().info.space().model
        ids = [state.id for state in pool.states()]
        for model_id in ids:
            if name in (model_id, pool.source(model_id)):
                return model_id
        raise ApiError(
            409, f"the index was built with {name}, which is not served: start the server with --model"
        )

    def search(self, query: SearchQuery, model: Model, library: Library) -> JsonDict:
        """Hits as rows of the library, each with its scores and why it was found."""
        with self._lock:
            index = self._opened()
            index.use_model(model)
            hits = index.search(
                query.text,
                query.k,
                where=query.where,
                image=query.image,
                like=None if query.like is None else self._row_of(query.like, library),
                blend=query.blend,
                words=query.words,
                without=query.without,
                rerank=query.rerank,
                cut=query.cut,
            )
        rows: list[JsonDict] = []
        for hit in hits:
            entry = _entry_of(hit.name, library)
            if entry is not None:
                scores = {
                    "itc": hit.itc,
                    "itm": hit.itm,
                    "keyword_rank": hit.keyword_rank,
                    "score": hit.score,
                }
                moment = {"start": hit.row["start"], "end": hit.row["end"]} if hit.moment else {}
                rows.append(library.row(entry) | {"scores": scores, "why": hit.why} | moment)
        return {"hits": rows, "note": hits.note, "searched": hits.total}

    def duplicates(self, library: Library) -> JsonDict:
        """Clusters of images that show the same."""
        with self._lock:
            report = self._opened().duplicates()
        clusters: list[JsonDict] = []
        for cluster in report.as_json():
            places = [(image, _entry_of(image["name"], library)) for image in cluster["images"]]
            kept = [entry.id for image, entry in places if entry and image["keep"]]
            members = [library.row(entry) for _, entry in places if entry]
            if len(members) > 1:
                evidence = list(dict.fromkeys(str(edge["evidence"]) for edge in cluster["edges"]))
                kinds: list[str] = cluster["kinds"]
                clusters.append(
                    {
                        "kind": kinds[0],
                        "members": members,
                        "evidence": evidence[:8],
                        "keep": kept[0] if kept else members[0]["id"],
                    }
                )
        return {"clusters": clusters, "summary": report.summary}

    def _opened(self) -> Index:
        from sightloop.search.index import open_index  # loads torch

        with self._lock:
            if self._index is None:
                self._index = open_index(self.store)
            return self._index

    def _row_of(self, path: str, library: Library) -> str:
        """Id in the index of an image of the folder. Raises ApiError (404) if it is not indexed yet."""
        table = self._opened().to_arrow(["id", "root", "path"])
        roots, names = table["root"].to_pylist(), table["path"].to_pylist()
        wanted = os.path.join(library.folder, path)
        for row, (root, name) in enumerate(zip(roots, names, strict=True)):
            if wanted.endswith(name) and os.path.realpath(os.path.join(root, name)) == wanted:
                return str(table["id"][row].as_py())
        raise ApiError(
            404, "the image is not in the index yet: build it again", param="like", code="not_indexed"
        )


def index_of_library(library: Library) -> Path:
    """Where the index of a library is: what is served itself, or below its home."""
    is_one = library.image_set is not None and library.image_set.dataset is None
    return library.source if is_one else library.home / REVIEW_FOLDER / "index"


def _entry_of(name: str, library: Library) -> LibraryImage | None:
    """The image of the library that a path of the index is; None if it is not below the folder."""
    relative = os.path.relpath(os.path.realpath(name), library.folder)
    return None if relative.startswith("..") else library.by_path(relative.replace(os.sep, "/"))
