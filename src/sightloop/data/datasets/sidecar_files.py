"""Sidecars of image files: which file belongs to which image. One rule, for readers and writers.

    caption   photo.jpg.txt, photo.txt, photo.jpg.caption, photo.caption     the first one that exists
    fields    photo.jpg.json, photo.json
    boxes     photo.jpg.xml, photo.xml                                       of Pascal VOC

The case of the ending does not matter (photo.TXT), nor does the Unicode form of the name (NFC, NFD). `photo.txt` is the
caption of `photo.jpg` and of `photo.png` if both are there; one's own is `photo.jpg.txt`.
"""

from __future__ import annotations

import errno
import os
import re
import stat
import unicodedata
from collections.abc import Container, Iterable, Mapping

from sightloop.data.datasets.foreign_fields import list_of, own_fields
from sightloop.data.datasets.schema import CAPTION_FIELDS, json_object, split_captions
from sightloop.data.datasets.voc import HEAD_BYTES, is_voc, voc_fields
from sightloop.data.image_names import is_image_name
from sightloop.types import JsonDict

SIDECAR_EXTENSIONS = (".txt", ".json")  # that are written
CAPTION_EXTENSIONS = (".txt", ".caption")  # that are read, in this order
FIELD_EXTENSIONS = (".json",)
BOX_EXTENSIONS = (".xml",)
MAX_SIDECAR_BYTES = 16 * 1024 * 1024
_MAX_LABELME_BYTES = 256 * 1024 * 1024  # with the image inside
_IMAGE_DATA = re.compile(rb'("imageData"\s*:\s*)"[A-Za-z0-9+/=\\rn\s]*+"')


def sidecar_alias(path: str) -> str | None:
    """The name under which `find_sidecar` looks for a file: "a.TXT" -> "a.txt"; None if it is no sidecar."""
    stem, extension = os.path.splitext(path)
    if extension.lower() not in (*CAPTION_EXTENSIONS, *FIELD_EXTENSIONS, *BOX_EXTENSIONS):
        return None
    return unicodedata.normalize("NFC", stem + extension.lower())


def unusual_sidecars(paths: Iterable[str]) -> dict[str, str]:
    """Path by alias of those sidecars that `find_sidecar` would not find by their usual name."""
    aliases = ((path, sidecar_alias(path)) for path in paths)
    return {
        alias: path
        for path, alias in aliases
        if alias is not None and not (alias == path and path.isascii() and path.endswith(SIDECAR_EXTENSIONS))
    }


def find_sidecar(
    image: str, extensions: Iterable[str], unusual: Mapping[str, str], listed: Container[str] | None = None
) -> str | None:
    """Path of the sidecar of an image, or None.

    Args:
        image: path of the image.
        extensions: `CAPTION_EXTENSIONS`, `FIELD_EXTENSIONS` or `BOX_EXTENSIONS`.
        unusual: `unusual_sidecars` of the folder, with paths that begin as that of the image does.
        listed: paths of all files of the folder, which are then taken for those that exist; None: looks on the disk.
    """
    stem = os.path.splitext(image)[0]
    # The stem of a.jpg.png is another image: a.jpg.txt is the caption of that one.
    is_other_image = is_image_name(stem) and (os.path.isfile(stem) if listed is None else stem in listed)
    for extension in extensions:
        for prefix in (image,) if is_other_image else (image, stem):
            name = prefix + extension
            if name.endswith(SIDECAR_EXTENSIONS) and (_exists(name) if listed is None else name in listed):
                return name
            if unusual:
                path = unusual.get(name if name.isascii() else unicodedata.normalize("NFC", name))
                if path is not None and (listed is not None or _exists(path)):
                    return path
    return None


def sidecars_beside(image: str) -> tuple[str | None, str | None, str | None]:
    """Paths of the caption file, the .json file and the .xml file of one image, without a look at its folder."""
    boxes = [name for name in (f"{image}.xml", f"{os.path.splitext(image)[0]}.xml") if _is_voc_file(name)]
    kinds = (CAPTION_EXTENSIONS, {}), (FIELD_EXTENSIONS, {}), (BOX_EXTENSIONS, unusual_sidecars(boxes))
    text, fields, box = (find_sidecar(image, extensions, unusual) for extensions, unusual in kinds)
    return text, fields, box


def fields_of_sidecars(text_name: str | None, json_name: str | None, box_name: str | None = None) -> JsonDict:
    """Fields of an image's .json file, with the captions of its caption file if that has any, and further regions.

    Args:
        text_name: path of the caption file, None without one.
        json_name: path of the .json file, None without one.
        box_name: path of the .xml file, None without one.

    Raises:
        ValueError: a file cannot be read; the message is the reason.
    """
    fields: JsonDict = {}
    if json_name is not None:
        fields = read_fields(json_name)
    if box_name is not None:
        regions = voc_fields(read_plain_file(box_name), os.path.basename(box_name))["regions"]
        fields = own_fields(fields)
        fields["regions"] = [*list_of(fields, "regions"), *regions]
    captions: tuple[str, ...] = ()
    if text_name is not None:
        captions = split_captions(read_plain_file(text_name), os.path.basename(text_name))
    if captions:
        fields = {k: v for k, v in fields.items() if k.lower() not in CAPTION_FIELDS}
        fields["captions"] = captions
    return fields


def read_fields(path: str) -> JsonDict:
    """The object of a .json file, without the image that LabelMe writes into it. Raises ValueError."""
    name = os.path.basename(path)
    data = read_plain_file(path, _MAX_LABELME_BYTES)
    if len(data) > MAX_SIDECAR_BYTES:
        data = _IMAGE_DATA.sub(rb"\1null", data)
    if len(data) > MAX_SIDECAR_BYTES:
        raise ValueError(f"{name} is larger than {MAX_SIDECAR_BYTES:,} bytes")
    return json_object(data, name)


def read_plain_file(path: str, max_bytes: int = MAX_SIDECAR_BYTES) -> bytes:
    """Content of a file. Raises ValueError, with the name, if it cannot be read, is no plain file, or is too large."""
    name = os.path.basename(path)
    try:
        # O_NONBLOCK: opening a named pipe returns at once.
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
        with open(descriptor, "rb") as file:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise ValueError(f"{name} is not a plain file")
            data = file.read(max_bytes + 1)
    except IsADirectoryError:
        raise ValueError(f"{name} is a folder, not a file") from None
    except OSError as error:
        raise ValueError(f"{name}: {(error.strerror or str(error)).lower()}") from error
    if len(data) > max_bytes:
        raise ValueError(f"{name} is larger than {max_bytes:,} bytes")
    return data


def _is_voc_file(path: str) -> bool:
    if not os.path.isfile(path):
        return False
    with open(path, "rb") as file:
        return is_voc(file.read(HEAD_BYTES))


def _exists(path: str) -> bool:
    """Whether a path leads to something. What cannot be seen for another reason than its absence exists."""
    try:
        os.stat(path)
    except OSError as error:
        return error.errno not in (errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG)
    return True
