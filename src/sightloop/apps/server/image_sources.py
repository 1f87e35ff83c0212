"""Images of requests as bytes: data URLs, base64, files of the server's folder, and, where allowed, remote images."""

from __future__ import annotations

import asyncio
import base64
import binascii
import os
import stat
from pathlib import Path, PurePosixPath

from sightloop.apps.server.errors import ApiError
from sightloop.apps.server.image_sets import ImageSet
from sightloop.apps.server.limits import IMAGE_LIMITS
from sightloop.apps.server.remote_images import RemoteImages
from sightloop.data.image_names import is_image_name, is_video_name
from sightloop.data.images.decode import read_file
from sightloop.errors import ImageError

_URLSAFE = bytes.maketrans(b"-_", b"+/")


class ImageSources:
    """Reader of the images that requests name.

    Args:
        folder: where images may be named by their path; None for nowhere.
        image_set: the only images of the folder that may be read; None for all.
        remote: fetches remote images; None if they are refused.
    """

    def __init__(
        self, folder: Path | None, remote: RemoteImages | None, image_set: ImageSet | None = None
    ) -> None:
        self._folder = None if folder is None else Path(os.path.realpath(folder))
        self._image_set = image_set
        self._remote = remote

    async def text(self, source: str, param: str) -> bytes:
        """The bytes of a data URL, of base64, or of a remote image.

        Args:
            source: what the client sent.
            param: name of the field, for messages.

        Raises:
            ApiError: it is none of these.
        """
        head = source[:16].lstrip().lower()
        if head.startswith("data:"):
            return _data_url(source.lstrip(), param)
        if head.startswith(("http://", "https://")):
            if self._remote is None:
                message = "remote images are off: send a data URL, or start the server with --allow-urls"
                raise ApiError(400, message, param=param, code="urls_refused")
            return await self._remote.fetch(source.strip(), param)
        if ":" in head:
            raise ApiError(400, "an image is a data URL or base64", param=param, code="invalid_image")
        return _base64(source, param)

    async def path(self, name: str, param: str) -> bytes:
        """The bytes of an image of the folder.

        Args:
            name: path within the folder, with slashes.
            param: name of the field, for messages.

        Raises:
            ApiError: there is no such image, or it is outside.
        """
        if self._folder is None:
            raise ApiError(400, "the server has no folder of images: send the image itself", param=param)
        if self._image_set is not None:
            return await asyncio.to_thread(_read_member, self._image_set, name, param)
        return await asyncio.to_thread(_read_inside, self._folder, name, param)

    async def video(self, name: str) -> Path:
        """The file of a video of the folder.

        Args:
            name: path within the folder, with slashes.

        Raises:
            ApiError: there is no such video, or it is outside (404).
        """
        folder, images = self._folder, self._image_set
        if folder is None or not is_video_name(name):
            raise ApiError(404, "the folder has no such video", code="image_not_found")
        if images is None:
            return Path(await asyncio.to_thread(_path_inside, folder, name, "id"))
        try:
            return await asyncio.to_thread(images.file, name)
        except (KeyError, OSError):
            raise ApiError(404, "there is no such video here", code="image_not_found") from None


def _data_url(source: str, param: str) -> bytes:
    head, comma, data = source.partition(",")
    if not comma or not head.lower().endswith(";base64"):
        message = "a data URL has the form data:image/jpeg;base64,..."
        raise ApiError(400, message, param=param, code="invalid_image")
    return _base64(data, param)


def _base64(text: str, param: str) -> bytes:
    try:
        data = text.encode("ascii").translate(_URLSAFE, b" \t\r\n")
        decoded = binascii.a2b_base64(data + b"=" * (-len(data) % 4), strict_mode=True)
    except (UnicodeEncodeError, binascii.Error):
        raise ApiError(400, "the image is no valid base64", param=param, code="invalid_image") from None
    if not decoded:
        raise ApiError(400, "the image is empty", param=param, code="invalid_image")
    return decoded


def to_base64(data: bytes) -> str:
    """Bytes as base64."""
    return base64.b64encode(data).decode("ascii")


def _read_member(image_set: ImageSet, name: str, param: str) -> bytes:
    """An image of an index or a dataset."""
    try:
        return image_set.read(name, lambda path: read_file(path, IMAGE_LIMITS))
    except (KeyError, OSError):
        raise ApiError(404, "there is no such image here", param=param, code="image_not_found") from None
    except ImageError as error:
        raise ApiError(400, f"the image cannot be read: {error.reason}", param=param) from None


def _read_inside(folder: Path, name: str, param: str) -> bytes:
    if not is_image_name(name):
        raise ApiError(404, "the folder has no such image", param=param, code="image_not_found")
    path = _path_inside(folder, name, param)
    try:
        return read_file(path, IMAGE_LIMITS)
    except OSError:
        raise ApiError(404, "the folder has no such image", param=param, code="image_not_found") from None
    except ImageError as error:
        raise ApiError(400, f"the image cannot be read: {error.reason}", param=param) from None


def _path_inside(folder: Path, name: str, param: str) -> str:
    """The path of a file, if no part of it leads out of the folder, symbolic links followed."""
    missing = ApiError(404, "the folder has no such image", param=param, code="image_not_found")
    parts = PurePosixPath(name).parts
    if not parts or name.startswith("/") or ".." in parts or "\0" in name or "\\" in name:
        raise missing
    try:
        real = os.path.realpath(folder.joinpath(*parts), strict=True)
        if not Path(real).is_relative_to(folder) or not stat.S_ISREG(os.lstat(real).st_mode):
            raise missing
        return real
    except (OSError, ValueError):
        raise missing from None
