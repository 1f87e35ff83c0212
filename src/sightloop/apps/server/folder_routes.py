"""Routes of the folder: its images, thumbnails, captions, edits, replacements."""

from __future__ import annotations

import asyncio
import mimetypes
import os
import re
import secrets
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Literal

from fastapi import Header, Query, Request
from pydantic import BaseModel, Field
from starlette.responses import FileResponse, Response

import sightloop
from sightloop.apps.server.caption_review import EditConflict
from sightloop.apps.server.errors import ApiError, JsonResponse, error_body
from sightloop.apps.server.image_library import Library, LibraryImage, Listing, Shown, Sort
from sightloop.apps.server.routing import new_router
from sightloop.apps.server.service import Service, service_of
from sightloop.apps.server.thumbs import SIZES
from sightloop.data.images.decode import upright_size
from sightloop.data.images.headers import image_format
from sightloop.data.video.reader import video_info
from sightloop.errors import ImageError, SightloopError, UnsupportedError
from sightloop.search.sources import video_frame
from sightloop.types import JsonDict

router = new_router("/api", "folder")

_MAX_ROWS = 500
_SHOWN_CHANGES = 1000
_OTHER_MEDIA = "application/octet-stream"
_MEDIA = {
    "JPEG": "image/jpeg",
    "PNG": "image/png",
    "WEBP": "image/webp",
    "GIF": "image/gif",
    "AVIF": "image/avif",
}

CaptionText = Annotated[str, Field(max_length=65_536)]
Term = Annotated[str, Field(max_length=1_000)]
ImageId = Annotated[str, Field(pattern="^[0-9a-f]{16}$")]


def _image_answers(*media: str) -> dict[int | str, JsonDict]:
    """Answers of a route that sends an image, for the OpenAPI document."""
    content = {name: {"schema": {"type": "string", "format": "binary"}} for name in media}
    return {
        200: {"description": "The image", "content": content},
        304: {"description": "The image with this ETag"},
    }


class EditRequest(BaseModel):
    """A new caption; null deletes the file, which only an undo does."""

    text: CaptionText | None
    origin: Literal["typed", "accepted", "undone"] = "typed"


class RejectRequest(BaseModel):
    """What is rejected: the caption on disk with this ETag, or the latest proposal; false takes the former back."""

    caption: Annotated[str, Field(pattern=r"^[\w-]{1,64}$")] | None = None
    rejected: bool = True


class ShownFilter(BaseModel):
    """Which captions a replacement looks at."""

    text: Term = ""
    without: Annotated[str, Field(max_length=1_000, alias="not")] = ""
    state: Shown = ""


class ReplaceRequest(BaseModel):
    """Find and replace in the captions of a listing. `expect`: ETags that the preview showed."""

    find: Annotated[str, Field(min_length=1, max_length=1_000)]
    replace: Term = ""
    whole_words: bool = False
    ignore_case: bool = False
    filter: ShownFilter = ShownFilter.model_validate({})
    preview: bool = True
    expect: Annotated[dict[ImageId, Term], Field(max_length=_SHOWN_CHANGES)] | None = None


class UndoRequest(BaseModel):
    """A replacement to take back."""

    batch: Annotated[str, Field(min_length=1, max_length=100)]


def library_of(service: Service) -> Library:
    """The folder's library. Raises ApiError (404) where the server has no folder."""
    if service.image_library is None:
        raise ApiError(
            404, "the server has no folder of images: start it as sightloop serve FOLDER", code="no_folder"
        )
    return service.image_library


@router.get("/info")
async def info(request: Request) -> JsonResponse:
    """The folder, the models and the index, for the page."""
    service = service_of(request)
    library, index = service.image_library, service.index
    entries = await asyncio.to_thread(library.entries) if library else ()
    videos = sum(entry.is_video for entry in entries)
    answer: JsonDict = {
        "name": library.source.name if library else "sightloop",
        "images": len(entries) - videos,
        "videos": videos,
        "captioned": await asyncio.to_thread(_captioned, library) if library else 0,
        "rejected": await asyncio.to_thread(library.rejected) if library else 0,
        "version": sightloop.__version__,
        "default_model": service.pool.default,
        "models": [
            {"id": state.id, "capabilities": state.capabilities or [], "loaded": state.is_loaded}
            for state in service.pool.states()
        ],
        "index": None if index is None else await asyncio.to_thread(index.describe),
        "editable": bool(library and library.is_editable),
        "obstacle": library.obstacle if library else "",
        "given": bool(library and library.has_given_captions),
        "left_out": library.image_set.left_out if library and library.image_set else 0,
    }
    return JsonResponse(answer)


@router.get("/images")
async def images(
    request: Request,
    offset: Annotated[int, Query(ge=0, le=1 << 31)] = 0,
    limit: Annotated[int, Query(ge=1, le=_MAX_ROWS)] = 200,
    text: Annotated[str, Query(max_length=1_000)] = "",
    without: Annotated[str, Query(max_length=1_000, alias="not")] = "",
    state: Shown = "",
    sort: Sort = "path",
) -> JsonResponse:
    """A part of the folder's images, filtered and sorted."""
    library = library_of(service_of(request))

    def read() -> JsonDict:
        chosen = library.select(Listing(text=text, without=without, state=state, sort=sort))
        rows = [library.row(entry) for entry in chosen[offset : offset + limit]]
        videos = sum(entry.is_video for entry in chosen)
        return {"total": len(chosen), "videos": videos, "offset": offset, "images": rows}

    return JsonResponse(await asyncio.to_thread(read))


@router.get(
    "/images/{image_id}", response_class=Response, responses=_image_answers(*_MEDIA.values(), _OTHER_MEDIA)
)
async def image(request: Request, image_id: str) -> Response:
    """The file of an image, or of a video, of which parts may be asked for (Range)."""
    service = service_of(request)
    entry = await asyncio.to_thread(library_of(service).entry, image_id)
    if entry.is_video:
        file = await service.images.video(entry.path)
        media = mimetypes.guess_type(file.name)[0] or _OTHER_MEDIA
        return FileResponse(file, media_type=media, headers={"Cache-Control": "private, no-cache"})
    data = await service.images.path(entry.path, "id")
    media = _MEDIA.get(image_format(data), _OTHER_MEDIA)
    return Response(data, media_type=media, headers={"Cache-Control": "private, no-cache"})


@router.get("/images/{image_id}/thumb", response_class=Response, responses=_image_answers("image/jpeg"))
async def thumb(
    request: Request, image_id: str, size: int = 256, at: Annotated[float, Query(ge=0, le=1e6)] = 0.0
) -> Response:
    """A small JPEG of an image, or of a video at a second; size: 96, 256 or 640."""
    if size not in SIZES:
        raise ApiError(400, f"size: one of {', '.join(map(str, SIZES))}", param="size")
    service = service_of(request)
    library = library_of(service)
    entry = await asyncio.to_thread(library.entry, image_id)
    modified = await asyncio.to_thread(_modified, library, entry)
    name = f"{image_id}-{at:g}" if entry.is_video else image_id
    headers = {"Cache-Control": "private, max-age=60", "ETag": f'"{name}-{size}-{modified:x}"'}
    if request.headers.get("if-none-match") == headers["ETag"]:
        return Response(status_code=304, headers=headers)
    key = (name, size, modified)
    data = service.thumbnails.cached(key)
    if data is None:
        try:
            data = await service.thumbnails.make(await _encoded(service, entry, at), key)
        except ImageError as error:
            raise ApiError(400, f"the image cannot be read: {error.reason}", code="invalid_image") from None
    return Response(data, media_type="image/jpeg", headers=headers)


async def _encoded(service: Service, entry: LibraryImage, at: float) -> bytes:
    """An encoded image, of a video its frame at a second. Raises ApiError, and ImageError for a video."""
    if not entry.is_video:
        return await service.images.path(entry.path, "id")
    file = await service.images.video(entry.path)
    return await asyncio.to_thread(video_frame, str(file), at)


@router.get("/images/{image_id}/info")
async def image_info(request: Request, image_id: str) -> JsonResponse:
    """All that is known about an image, or a video: of that also its length in seconds."""
    service = service_of(request)
    library = library_of(service)
    entry = await asyncio.to_thread(library.entry, image_id)
    facts = await _facts(service, entry)

    def read() -> JsonDict:
        row = library.row(entry) | facts
        history = library.review.history(entry.path) if library.is_editable else ()
        return row | {
            "history": [
                {
                    "number": edit.number,
                    "before": edit.before,
                    "after": edit.after,
                    "origin": edit.origin,
                    "time": edit.time,
                }
                for edit in history
            ]
        }

    return JsonResponse(await asyncio.to_thread(read))


async def _facts(service: Service, entry: LibraryImage) -> JsonDict:
    """Size of an image, and duration of a video; None where the file cannot be read, whose captions can be shown."""
    try:
        if entry.is_video:
            file = await service.images.video(entry.path)
            return await asyncio.to_thread(_video_facts, file)
        data = await service.images.path(entry.path, "id")
        height, width = await asyncio.to_thread(upright_size, data)
    except (ApiError, ImageError, OSError):
        return {"width": None, "height": None, "size": None, "duration": None}
    return {"width": width, "height": height, "size": len(data), "duration": None}


def _video_facts(file: Path) -> JsonDict:
    return _measured(str(file), file.stat().st_mtime_ns)


@lru_cache(maxsize=16_384)
def _measured(path: str, modified: int) -> JsonDict:
    """Size and duration of a video; asked again when its file has changed."""
    try:
        info = video_info(path, warn=lambda _: None)
    except (ImageError, UnsupportedError):
        return {"width": None, "height": None, "size": None, "duration": None}
    height, width = info.size
    return {"width": width, "height": height, "size": None, "duration": round(info.duration, 3)}


@router.put("/images/{image_id}/caption")
async def edit(
    request: Request, image_id: str, body: EditRequest, if_match: Annotated[str | None, Header()] = None
) -> JsonResponse:
    """Writes a caption if the file still has the ETag of If-Match; else 412, with what the file says now."""
    if if_match is None or not (match := re.fullmatch(r'(?:W/)?"?([\w-]{1,64})"?', if_match.strip())):
        raise ApiError(
            428, "If-Match: give the ETag of the caption that the edit was made from", code="etag_needed"
        )
    if body.text is None and body.origin != "undone":
        raise ApiError(400, "text: give a caption", param="text")
    library = library_of(service_of(request))

    def write() -> JsonDict:
        entry = library.entry(image_id)
        if library.is_archived(entry) and library.is_editable:
            raise ApiError(
                403, "the image is inside an archive: its caption cannot be edited", code="read_only"
            )
        written = library.review.edit(entry.path, body.text, match[1], body.origin)
        library.note_edit(entry, written)
        return {"caption": {"text": written.text, "etag": written.etag}, "state": library.state(entry)}

    try:
        return JsonResponse(await asyncio.to_thread(write))
    except EditConflict as conflict:
        return _conflict(conflict)


@router.post("/images/{image_id}/reject")
async def reject(request: Request, image_id: str, body: RejectRequest) -> JsonResponse:
    """Rejects the latest proposal, or the caption on disk, which leaves the image out of trainings; no file changes."""
    library = library_of(service_of(request))

    def write() -> JsonDict:
        entry = library.entry(image_id)
        if body.caption is None:
            library.review.reject(entry.path)
        else:
            library.review.refuse(entry.path, body.caption, body.rejected)
        library.caption(entry)
        return {"state": library.state(entry), "rejected": library.is_rejected(entry)}

    try:
        return JsonResponse(await asyncio.to_thread(write))
    except EditConflict as conflict:
        return _conflict(conflict)


@router.post("/captions/replace")
async def replace(request: Request, body: ReplaceRequest) -> JsonResponse:
    """Finds and replaces in the captions of a listing: the changes, or what was done."""
    library = library_of(service_of(request))
    return JsonResponse(await asyncio.to_thread(_preview if body.preview else _apply, library, body))


@router.post("/captions/undo")
async def undo(request: Request, body: UndoRequest) -> JsonResponse:
    """Takes a replacement back, but for captions that were changed since."""
    library = library_of(service_of(request))

    def write() -> JsonDict:
        undone, changed = library.review.undo(body.batch)
        entries = [library.by_path(path) for path in changed]
        return {"undone": undone, "changed_since": [entry.id for entry in entries if entry]}

    return JsonResponse(await asyncio.to_thread(write))


def _captioned(library: Library) -> int:
    """Images with a caption, on disk or in the dataset."""
    if library.has_given_captions:
        return len(library.captioned())
    return sum(entry.sidecar is not None for entry in library.entries())


def _conflict(conflict: EditConflict) -> JsonResponse:
    """The refusal of an edit of a text that is not on disk any more, with what is."""
    message = "the caption was changed meanwhile: look at it, then save again"
    current = {"text": conflict.current.text, "etag": conflict.current.etag}
    return JsonResponse({**error_body(412, message, None, "changed"), "current": current}, 412)


def _modified(library: Library, entry: LibraryImage) -> int:
    try:
        if library.image_set is not None and library.is_archived(entry):
            return library.image_set.modified(entry.path)
        return os.stat(library.folder / entry.path).st_mtime_ns
    except OSError:
        raise ApiError(404, "the folder has no such image", code="image_not_found") from None


def _changes(library: Library, body: ReplaceRequest) -> Sequence[tuple[LibraryImage, str, str, str]]:
    """(image, caption, new caption, ETag) of every caption that a replacement changes."""
    pattern = re.escape(body.find)
    if body.whole_words:
        pattern = rf"(?<!\w){pattern}(?!\w)"
    regex = re.compile(pattern, re.IGNORECASE if body.ignore_case else 0)
    shown = Listing(text=body.filter.text, without=body.filter.without, state=body.filter.state)
    changes: list[tuple[LibraryImage, str, str, str]] = []
    for entry in library.select(shown):
        caption = library.caption(entry)
        if caption.text is not None and not library.is_archived(entry):
            after = regex.sub(lambda _: body.replace, caption.text)
            if after != caption.text:
                changes.append((entry, caption.text, after, caption.etag))
    return changes


def _preview(library: Library, body: ReplaceRequest) -> JsonDict:
    changes = _changes(library, body)
    shown = [
        {"id": entry.id, "path": entry.path, "before": before, "after": after, "etag": etag}
        for entry, before, after, etag in changes[:_SHOWN_CHANGES]
    ]
    return {"changes": shown, "total": len(changes)}


def _apply(library: Library, body: ReplaceRequest) -> JsonDict:
    batch = secrets.token_hex(8)
    changed, conflicts, expected = 0, list[str](), body.expect or {}
    for entry, _, after, etag in _changes(library, body):
        if expected.get(entry.id, etag) != etag:
            conflicts.append(entry.id)
            continue
        try:
            written = library.review.edit(entry.path, after, etag, "replaced", batch)
            library.note_edit(entry, written)
            changed += 1
        except (EditConflict, SightloopError):
            conflicts.append(entry.id)
    return {"batch": batch, "changed": changed, "conflicts": conflicts}
