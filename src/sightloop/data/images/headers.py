"""What the first bytes of an image file say, read without decoding anything: kind, JPEG facts, and header bombs.

Decoders walk headers one small block at a time and some of them join blocks in quadratic time, so a few megabytes of
crafted metadata can keep one busy for minutes. `check` walks the same blocks first, with a budget.
"""

from __future__ import annotations

import re
import struct
from dataclasses import dataclass

MAX_BLOCKS = (
    20_000  # JPEG segments or GIF sub-blocks before the first pixel; real files have fewer than 1,000
)
MAX_CHUNKS = 200_000  # PNG chunks: 8 kB ones, which common encoders write, in a 1.6 GB file
MAX_JUNK = 1 << 16  # bytes between two JPEG segments that belong to nothing
MAX_EXIF = 1 << 22  # a JPEG segment holds 64 kB and one is the rule; more of them are joined one by one
MAX_SCANS = 64  # progressive JPEGs have about 10; each scan passes over all pixels once more

_STARTS: tuple[tuple[bytes, str], ...] = (
    (b"\xff\xd8\xff", "JPEG"),
    (b"\x89PNG\r\n\x1a\n", "PNG"),
    (b"GIF87a", "GIF"),
    (b"GIF89a", "GIF"),
    (b"BM", "BMP"),
    (b"II*\0", "TIFF"),
    (b"MM\0*", "TIFF"),
    (b"II+\0", "TIFF"),
    (b"MM\0+", "TIFF"),
)
_OTHERS: tuple[tuple[bytes, str], ...] = (
    (b"%PDF", "a PDF document"),
    (b"%!PS", "a PostScript document"),
    (b"\xc5\xd0\xd3\xc6", "a PostScript document"),
    (b"8BPS", "a Photoshop document"),
    (b"PK\x03\x04", "a ZIP archive"),
    (b"PK\x05\x06", "a ZIP archive"),
    (b"\x1f\x8b", "a gzip archive"),
    (b"7z\xbc\xaf", "a 7z archive"),
    (b"Rar!", "a RAR archive"),
    (b"\x7fELF", "a program"),
    (b"MZ", "a program"),
    (b"\x1aE\xdf\xa3", "a Matroska or WebM video"),
    (b"OggS", "an Ogg recording"),
    (b"ID3", "an MP3 recording"),
    (b"\xff\x0a", "JPEG XL, which cannot be read"),
    (b"\0\0\0\x0cJXL ", "JPEG XL, which cannot be read"),
    (b"\0\0\0\x0cjP  ", "JPEG 2000, which cannot be read"),
    (b"\0\0\x01\0", "an icon file, which cannot be read"),
    (b"qoif", "QOI, which cannot be read"),
    (b"version https://git-lfs", "a Git LFS pointer: fetch the real file"),
)
_HEIF_BRANDS = frozenset((b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1"))
_REAL_MARKER = re.compile(rb"\xff[^\x00\xff\xd0-\xd7]")


class HeaderError(ValueError):
    """A header that no honest encoder writes; the message is the reason, in one line."""


@dataclass(frozen=True, slots=True)
class Jpeg:
    """Facts from a JPEG's header. `orientation` is None where only a full EXIF/XMP reader can tell."""

    height: int
    width: int
    components: int
    plain: bool  # 8 bits, Huffman coded, baseline or progressive
    orientation: int | None


def kind(data: bytes) -> str:
    """The image format that `data` starts like ("JPEG", "PNG", ...), or "" if it starts like none of ours."""
    for start, name in _STARTS:
        if data.startswith(start):
            return name
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "WEBP"
    if data[4:8] == b"ftyp":
        brand = data[8:12]
        return "AVIF" if brand in (b"avif", b"avis") else "HEIF" if brand in _HEIF_BRANDS else ""
    return ""


def describe_unknown(data: bytes) -> str:
    """A phrase for bytes that are no image of ours: "not an image: it starts like HTML", ..."""
    for start, name in _OTHERS:
        if data.startswith(start):
            return f"not an image that can be read: it starts like {name}"
    head = data[:512].lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if head.startswith((b"<!doctype html", b"<html", b"<head", b"<body")):
        return "not an image: it starts like HTML (was an error page saved under this name?)"
    if b"<svg" in head:
        return "not an image that can be read: it starts like SVG"
    if head.startswith(b"<"):
        return "not an image: it starts like XML"
    if data[4:8] == b"ftyp":
        return "not an image: it starts like an MP4 or QuickTime video"
    if data.count(0) == len(data):
        return "not an image: it holds nothing but zeros"
    if head and all(32 <= byte < 127 or byte in b"\t\r\n" for byte in head):
        return "not an image: it starts like text"
    return "unknown image format"


def cut_short(data: bytes) -> bool:
    """True if a WebP container states more bytes than there are (its decoder does not say so)."""
    return data[:4] == b"RIFF" and len(data) >= 8 and struct.unpack_from("<I", data, 4)[0] + 8 > len(data)


def check(data: bytes, max_pixels: int) -> Jpeg | None:
    """Refuses headers made to keep a decoder busy; returns a JPEG's facts, None for other formats.

    Raises HeaderError.
    """
    match kind(data):
        case "JPEG":
            return _check_jpeg(data, max_pixels)
        case "PNG":
            _check_png(data)
        case "GIF":
            _check_gif(data)
        case _:
            pass
    return None


def _check_jpeg(data: bytes, max_pixels: int) -> Jpeg:
    position, exif, xmp_turns, frame = 2, b"", False, None
    for _ in range(MAX_BLOCKS):
        start = data.find(b"\xff", position)
        if start < 0:
            break
        if start - position > MAX_JUNK:
            raise HeaderError(f"damaged: {start - position} stray bytes in the JPEG header")
        while data[start : start + 2] == b"\xff\xff":  # fill bytes
            run = re.compile(rb"\xff+").match(data, start)
            start = run.end() - 1 if run else start
        marker = data[start + 1 : start + 2]
        position = start + 2
        if marker in (b"", b"\0", b"\x01", b"\xd8", b"\xd9") or b"\xd0" <= marker <= b"\xd7":
            continue  # no segment follows
        if len(data) < position + 3:
            break
        end = position + max(2, int.from_bytes(data[position : position + 2], "big"))
        body = data[position + 2 : end]
        if marker == b"\xda":
            if frame is None:
                raise HeaderError("damaged: a JPEG without a frame header")
            return _finish_jpeg(data, position, frame, exif, xmp_turns, max_pixels)
        if b"\xc0" <= marker <= b"\xcf" and marker not in (b"\xc4", b"\xc8", b"\xcc") and len(body) >= 6:
            frame = (marker, body)
        elif marker == b"\xe1" and body.startswith(b"Exif\0\0"):
            exif = exif + body[6:] if exif else body
            if len(exif) > MAX_EXIF:
                raise HeaderError(f"damaged: more than {MAX_EXIF >> 20} MB of EXIF data")
        elif marker == b"\xe1":
            xmp_turns = xmp_turns or b"Orientation" in body
        position = end
    else:
        raise HeaderError(f"damaged: more than {MAX_BLOCKS} segments in the JPEG header")
    raise HeaderError("cut short: the file ends before the image does")


def _finish_jpeg(
    data: bytes, scan: int, frame: tuple[bytes, bytes], exif: bytes, xmp_turns: bool, max_pixels: int
) -> Jpeg:
    marker, body = frame
    height, width = struct.unpack_from(">HH", body, 1)
    plain = body[0] == 8 and marker in (b"\xc0", b"\xc1", b"\xc2") and height > 0 and width > 0
    whole = marker != b"\xc2" and data[scan + 2] == body[5]  # one scan holds all: no decoder looks for more
    # The count is an upper bound: trailing data may hold these bytes by chance.
    if not whole and data.count(b"\xff\xda", scan) >= 16:
        scans = _count_scans(data, scan)
        if scans > MAX_SCANS or scans * height * width > 16 * max_pixels:
            raise HeaderError(f"refused: {scans} or more scans, a JPEG made to take forever to decode")
    orientation = exif_orientation(exif[6:]) if exif else 0
    if orientation == 0:
        orientation = None if xmp_turns else 1
    return Jpeg(height, width, body[5], plain, orientation)


def _count_scans(data: bytes, position: int) -> int:
    """Scans of the first image from the first SOS on; stops at its end or just beyond `MAX_SCANS`."""
    scans = 1
    position += int.from_bytes(data[position : position + 2], "big")
    for _ in range(MAX_BLOCKS):
        found = _REAL_MARKER.search(data, position)
        if found is None or found.group() == b"\xff\xd9" or scans > MAX_SCANS:
            break
        scans += found.group() == b"\xff\xda"
        position = found.end()
        position += int.from_bytes(data[position : position + 2], "big")
    return scans


def exif_orientation(tiff: bytes) -> int | None:
    """The orientation (1..8) in a TIFF-formed EXIF block, 0 if it states none, None if it is not plainly formed."""
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(tiff[:4])
    if order is None or len(tiff) < 10:
        return None
    (offset,) = struct.unpack_from(order + "I", tiff, 4)
    if not 8 <= offset <= len(tiff) - 2:
        return None
    (entries,) = struct.unpack_from(order + "H", tiff, offset)
    if offset + 2 + 12 * entries > len(tiff):
        return None
    for at in range(offset + 2, offset + 2 + 12 * entries, 12):
        tag, form, count, value = struct.unpack_from(order + "HHIH", tiff, at)
        if tag == 0x0112:
            return value if form == 3 and count == 1 and 1 <= value <= 8 else None
    return 0


def _check_png(data: bytes) -> None:
    position = 8
    for _ in range(MAX_CHUNKS):
        if position + 8 > len(data):
            return
        position += 12 + int.from_bytes(data[position : position + 4], "big")
    raise HeaderError(f"damaged: more than {MAX_CHUNKS} PNG chunks")


def _check_gif(data: bytes) -> None:
    position = 13 + (3 << (data[10] & 7) + 1 if len(data) > 10 and data[10] & 0x80 else 0)
    blocks = 0
    while data[position : position + 1] == b"!":  # extensions before the first image
        position += 2
        while position < len(data) and data[position]:
            position += 1 + data[position]
            blocks += 1
            if blocks > MAX_BLOCKS:
                raise HeaderError(f"damaged: more than {MAX_BLOCKS} blocks before the first GIF frame")
        position += 1
