"""EXIF: when and where a photograph was taken."""

from __future__ import annotations

import io
import math
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime

from PIL import ExifTags, Image

from sightloop.data.images import headers

_TIME = re.compile(r"(\d{4})[:/-](\d{2})[:/-](\d{2})[ T](\d{2}):(\d{2}):(\d{2})")
_EPOCH = datetime(1970, 1, 1)
_MAX_BYTES = 512 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class Exif:
    """Time and place of a photograph; None where the file does not say.

    Args:
        time: seconds since 1970 of the camera's own clock, whatever its time zone.
        latitude: degrees north, -90 to 90.
        longitude: degrees east, -180 to 180.
    """

    time: int | None = None
    latitude: float | None = None
    longitude: float | None = None


def read_exif(data: bytes) -> Exif:
    """Time and place of an encoded image; damaged fields count as absent."""
    try:
        headers.check_header(data, _MAX_BYTES)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(data)) as image:
                exif = image.getexif()
                details, place = exif.get_ifd(ExifTags.IFD.Exif), exif.get_ifd(ExifTags.IFD.GPSInfo)
                taken = details.get(ExifTags.Base.DateTimeOriginal) or details.get(
                    ExifTags.Base.DateTimeDigitized, exif.get(ExifTags.Base.DateTime)
                )
    except Exception:  # Pillow raises many types on damaged EXIF
        return Exif()
    latitude = _degrees(place, ExifTags.GPS.GPSLatitude, ExifTags.GPS.GPSLatitudeRef, "S", 90)
    longitude = _degrees(place, ExifTags.GPS.GPSLongitude, ExifTags.GPS.GPSLongitudeRef, "W", 180)
    if latitude is None or longitude is None:
        latitude = longitude = None
    return Exif(_seconds(taken), latitude, longitude)


def _seconds(text: object) -> int | None:
    """Seconds since 1970 of "2024:05:17 12:30:00"."""
    match = _TIME.match(text) if isinstance(text, str) else None
    if match is None:
        return None
    year, month, day, hour, minute, second = map(int, match.groups())
    try:
        return int((datetime(year, month, day, hour, minute, second) - _EPOCH).total_seconds())
    except (ValueError, OverflowError):  # 0000:00:00 of cameras whose clock was never set
        return None


def _degrees(place: Mapping[int, object], field: int, side: int, negative: str, limit: int) -> float | None:
    """Degrees of (degrees, minutes, seconds)."""
    parts = place.get(field)
    try:
        numbers = [float(part) for part in parts]  # pyright: ignore
        value = sum(number / 60**i for i, number in enumerate(numbers[:3]))
    except (TypeError, ValueError, ZeroDivisionError, OverflowError):
        return None
    if not (math.isfinite(value) and 0 <= value <= limit):
        return None
    return -value if str(place.get(side, "")).strip("\0 ").upper() == negative else value
