"""Image files that annotation files name, as other programs and systems write paths."""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Iterable, Iterator
from pathlib import Path
from urllib.parse import unquote


def find_image(name: str, folders: Iterable[Path]) -> Path | None:
    """The file that a path names, or None.

    Args:
        name: tried as it is written, then with "/" for "\\\\", with its Unicode composed (NFC) and decomposed (NFD),
            and with %20 and the like decoded.
        folders: that the path may be relative to; the first ones count first.
    """
    folders = list(folders)
    for spelling in _spellings(name):
        for folder in folders:
            path = folder / spelling
            if os.path.isfile(path):
                return path
    return None


def _spellings(name: str) -> Iterator[str]:
    yield name
    spellings = [name]
    if "\\" in name:
        spellings.append(name.replace("\\", "/"))
    if "%" in name or name.startswith("file:"):
        spellings += [unquote(spelling.removeprefix("file://")) for spelling in spellings]
    for spelling in spellings:
        forms = [spelling]
        if not spelling.isascii():
            forms += [unicodedata.normalize(form, spelling) for form in ("NFC", "NFD")]
        yield from (form for form in forms if form != name)
