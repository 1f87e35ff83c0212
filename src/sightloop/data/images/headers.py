"""Image file headers, read without decoding: format, JPEG size and orientation, defense against header bombs.

Decoders walk headers one small block at a time, and some of them join blocks in quadratic time, so a few megabytes of
crafted metadata can keep one busy for minutes. `check_header` walks the same blocks first, within a budget.
"""

from __future__ import annotations

import re
import struct
from dataclasses import dataclass

MAX_BLOCKS = 20_000  # JPEG segments or GIF sub-blocks before the first pixel; real files have under 1,000
MAX_CHUNKS = 200_000  # PNG chunks: 8 kB ones, which common encoders write, in a 1.6 GB file
MAX_JUNK = 1 << 16  # bytes between two JPEG segments that belong to neither
MAX_EXIF = 1 << 22  # bytes; a segment holds 64 kB, most files have one, and Pillow joins several one by one
MAX_TAGS = (
    4_096  # of a TIFF directory; real files have under 100, and a decoder may format a warning for each
)
MAX_SCANS = 64  # of a progressive JPEG; real files have about 10, and each scan decodes all pixels once more

_SIGNATURES: tuple[tuple[bytes, str], ...] = (
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
_OTHER_SIGNATURES: tuple[tuple[bytes, str], ...] = (
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
# A marker inside a scan: FF and a byte other than 00 (an escaped FF), FF (fill) and D0..D7 (restart markers).
_SCAN_END_MARKER = re.compile(rb"\xff[^\x00\xff\xd0-\xd7]")


class HeaderError(ValueError):
    """A header that no encoder writes; the message is the reason, in one line."""


@dataclass(frozen=True, slots=True)
class JpegHeader:
    """Header of a JPEG.

    Args:
        height: In pixels, before EXIF rotation.
        width: In pixels, before EXIF rotation.
        components: 1 (gray), 3 (YCbCr or RGB) or 4 (CMYK).
        is_standard: 8 bits per component, Huffman coded, baseline or progressive.
        orientation: EXIF orientation, 1 to 8; None where only a full EXIF or XMP reader can tell.
    """

    height: int
    width: int
    components: int
    is_standard: bool
    orientation: int | None


def image_format(data: bytes) -> str:
    """Image format by the signature in the first bytes: "JPEG", "PNG", ...; "" for formats that are not read."""
    for signature, name in _SIGNATURES:
        if data.startswith(signature):
            return name
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "WEBP"
    if data[4:8] == b"ftyp":
        brand = data[8:12]
        return "AVIF" if brand in (b"avif", b"avis") else "HEIF" if brand in _HEIF_BRANDS else ""
    return ""


def unknown_format_reason(data: bytes) -> str:
    """Error reason for bytes without a known image signature, such as "not an image: it starts like HTML"."""
    for signature, name in _OTHER_SIGNATURES:
        if data.startswith(signature):
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


def is_truncated(data: bytes) -> bool:
    """Whether a WebP container states more bytes than the file has; its decoder does not report that."""
    return data[:4] == b"RIFF" and len(data) >= 8 and struct.unpack_from("<I", data, 4)[0] + 8 > len(data)


def check_header(data: bytes, max_pixels: int) -> JpegHeader | None:
    """Check a header against the budgets above.

    Args:
        data: The whole file.
        max_pixels: Limit of an image; the scans of a JPEG may pass over 16 times as many pixels in total.

    Returns:
        Header of a JPEG; None for other formats.

    Raises:
        HeaderError: The header would keep a decoder busy, or a JPEG has no image data.
    """
    match image_format(data):
        case "JPEG":
            return _check_jpeg(data, max_pixels)
        case "PNG":
            _check_png(data)
        case "GIF":
            _check_gif(data)
        case "TIFF":
            _check_tiff(data)
        case _:
            pass
    return None


def _check_jpeg(data: bytes, max_pixels: int) -> JpegHeader:
    """Walk the segments up to the first scan.

    A JPEG is a list of segments: FF, marker, 2 bytes of length (which count themselves), body. Example:

        FFD8                     SOI, start of image, no body
        FFE1 001C "Exif" ...     APP1, EXIF or XMP
        FFC0 0011 08 hhhh wwww   SOF0, frame header: bits, height, width, components
        FFDA 000C ...            SOS, start of scan; entropy-coded data follows
    """
    position, exif, has_xmp_orientation, frame = 2, b"", False, None
    for _ in range(MAX_BLOCKS):
        start = data.find(b"\xff", position)
        if start < 0:
            break
        if start - position > MAX_JUNK:
            raise HeaderError(f"damaged: {start - position} stray bytes in the JPEG header")
        while data[start : start + 2] == b"\xff\xff":  # fill bytes: the last FF of the run begins the marker
            run = re.compile(rb"\xff+").match(data, start)
            start = run.end() - 1 if run else start
        marker = data[start + 1 : start + 2]
        position = start + 2
        # Escaped FF, TEM, SOI, EOI and RST0..RST7 have no length and no body.
        if marker in (b"", b"\0", b"\x01", b"\xd8", b"\xd9") or b"\xd0" <= marker <= b"\xd7":
            continue
        if len(data) < position + 3:
            break
        end = position + max(2, int.from_bytes(data[position : position + 2], "big"))
        body = data[position + 2 : end]
        if marker == b"\xda":  # SOS
            if frame is None:
                raise HeaderError("damaged: a JPEG without a frame header")
            return _jpeg_header(data, position, frame, exif, has_xmp_orientation, max_pixels)
        # SOF0..SOF15 without DHT (C4), JPG (C8) and DAC (CC).
        if b"\xc0" <= marker <= b"\xcf" and marker not in (b"\xc4", b"\xc8", b"\xcc") and len(body) >= 6:
            frame = (marker, body)
        elif marker == b"\xe1" and body.startswith(b"Exif\0\0"):
            exif = exif + body[6:] if exif else body
            if len(exif) > MAX_EXIF:
                raise HeaderError(f"damaged: more than {MAX_EXIF >> 20} MB of EXIF data")
        elif marker == b"\xe1":
            has_xmp_orientation = has_xmp_orientation or b"Orientation" in body
        position = end
    else:
        raise HeaderError(f"damaged: more than {MAX_BLOCKS} segments in the JPEG header")
    raise HeaderError("cut short: the file ends before the image does")


def _jpeg_header(
    data: bytes,
    scan: int,
    frame: tuple[bytes, bytes],
    exif: bytes,
    has_xmp_orientation: bool,
    max_pixels: int,
) -> JpegHeader:
    """Header from the parts that `_check_jpeg` collected, after a check of the number of scans.

    Args:
        data: The whole file.
        scan: Position after the first SOS marker.
        frame: Marker and body of the frame header. Body: bits (1 byte), height (2), width (2), components (1), ...
        exif: "Exif" and two zero bytes, then TIFF data; empty without EXIF.
        has_xmp_orientation: Whether an XMP segment mentions an orientation.
        max_pixels: As in `check_header`.
    """
    marker, body = frame
    height, width = struct.unpack_from(">HH", body, 1)
    # C0: baseline, C1: extended sequential, C2: progressive; all Huffman coded.
    is_standard = body[0] == 8 and marker in (b"\xc0", b"\xc1", b"\xc2") and height > 0 and width > 0
    # A sequential scan that has all components is the only one: decoders look for no other.
    single_scan = marker != b"\xc2" and data[scan + 2] == body[5]
    # The count of SOS markers is an upper bound: data after the image may contain these bytes by chance.
    if not single_scan and data.count(b"\xff\xda", scan) >= 16:
        scans = _count_scans(data, scan)
        if scans > MAX_SCANS or scans * height * width > 16 * max_pixels:
            raise HeaderError(f"refused: {scans} or more scans, a JPEG made to take forever to decode")
    orientation = exif_orientation(exif[6:]) if exif else 0
    if orientation == 0:
        orientation = None if has_xmp_orientation else 1
    return JpegHeader(height, width, body[5], is_standard, orientation)


def _count_scans(data: bytes, position: int) -> int:
    """Number of scans from the first SOS to the end of the image; stops just above `MAX_SCANS`."""
    scans = 1
    position += int.from_bytes(data[position : position + 2], "big")
    for _ in range(MAX_BLOCKS):
        marker = _SCAN_END_MARKER.search(data, position)
        if marker is None or marker.group() == b"\xff\xd9" or scans > MAX_SCANS:  # FFD9: EOI
            break
        scans += marker.group() == b"\xff\xda"
        position = marker.end()
        position += int.from_bytes(data[position : position + 2], "big")
    return scans


def exif_orientation(tiff: bytes) -> int | None:
    """EXIF orientation (1 to 8) from TIFF data; 0 where it has none, None where the data is irregular.

    TIFF data: byte order and 42 (4 bytes), offset of the first directory (4); there: number of entries (2), then
    12 bytes per entry: tag (2), type (2), count (4), value (4). Orientation is tag 0x0112 of type 3 (16-bit).
    """
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(tiff[:4])
    if order is None or len(tiff) < 10:
        return None
    (offset,) = struct.unpack_from(order + "I", tiff, 4)
    if not 8 <= offset <= len(tiff) - 2:
        return None
    (entries,) = struct.unpack_from(order + "H", tiff, offset)
    if offset + 2 + 12 * entries > len(tiff):
        return None
    for entry in range(offset + 2, offset + 2 + 12 * entries, 12):
        tag, data_type, count, value = struct.unpack_from(order + "HHIH", tiff, entry)
        if tag == 0x0112:
            return value if data_type == 3 and count == 1 and 1 <= value <= 8 else None
    return 0


def _check_png(data: bytes) -> None:
    """Count the chunks: 4 bytes of length, 4 of type, body, 4 of checksum, after the signature of 8 bytes."""
    position = 8
    for _ in range(MAX_CHUNKS):
        if position + 8 > len(data):
            return
        position += 12 + int.from_bytes(data[position : position + 4], "big")
    raise HeaderError(f"damaged: more than {MAX_CHUNKS} PNG chunks")


def _check_gif(data: bytes) -> None:
    """Count the sub-blocks of the extensions before the first frame."""
    # A header of 13 bytes, then a palette of 3 * 2 ** (n + 1) bytes, n in the low bits of byte 10, if bit 7 is set.
    position = 13 + (3 << (data[10] & 7) + 1 if len(data) > 10 and data[10] & 0x80 else 0)
    blocks = 0
    while data[position : position + 1] == b"!":  # an extension: "!", label, sub-blocks
        position += 2
        while (
            position < len(data) and data[position]
        ):  # a sub-block: length, body; length 0 ends the extension
            position += 1 + data[position]
            blocks += 1
            if blocks > MAX_BLOCKS:
                raise HeaderError(f"damaged: more than {MAX_BLOCKS} blocks before the first GIF frame")
        position += 1


def _check_tiff(data: bytes) -> None:
    """Bound the number of tags in the first directory, where the file is a TIFF with 32-bit or 64-bit offsets."""
    order = "little" if data.startswith(b"II") else "big"
    # Bytes 2 and 3 are 42, or 43 for offsets of 8 bytes, which are at byte 8.
    width, at, count_width = (8, 8, 8) if b"+" in data[2:4] else (4, 4, 2)
    start = int.from_bytes(data[at : at + width], order)
    tags = int.from_bytes(data[start : start + count_width], order)
    if tags > MAX_TAGS:
        raise HeaderError(f"damaged: {tags} tags in the TIFF header")
