"""Record of which model wrote which caption file: `.sightloop-captions.jsonl` in a folder of images.

A line for each caption: the image's name, a digest of the text, and the identity of the model. A caption that a person
edits has another digest, so it counts as theirs. Without the record
nothing is known of the writer.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from contextlib import suppress
from functools import lru_cache
from pathlib import Path

RECORD_NAME = ".sightloop-captions.jsonl"


def record_caption(image: str, caption: str, writer: str) -> None:
    """Appends a caption to the record of its image's folder; a record that cannot be written is left.

    Args:
        image: Path of the image.
        caption: Text as it is in the caption file.
        writer: Identity of the model.
    """
    folder, name = os.path.split(image)
    line = json.dumps({"image": name, "caption": _digest(caption), "writer": writer}) + "\n"
    # One write to a file opened for appending: lines of two runs do not mix.
    with suppress(OSError), open(os.path.join(folder, RECORD_NAME), "ab", buffering=0) as file:
        file.write(line.encode())


def caption_writer(image: Path, caption: str) -> str:
    """Identity of the model that wrote a caption of an image; "" if a person wrote or edited it, or it is not known."""
    return _read_record(image.parent).get((image.name, _digest(caption)), "")


@lru_cache(maxsize=64)
def _read_record(folder: Path) -> Mapping[tuple[str, str], str]:
    """(image, digest of the caption) -> writer; damaged lines are left out."""
    writers: dict[tuple[str, str], str] = {}
    with suppress(OSError), (folder / RECORD_NAME).open("rb") as file:
        for line in file:
            with suppress(ValueError, TypeError, KeyError):
                entry = json.loads(line)
                writers[str(entry["image"]), str(entry["caption"])] = str(entry["writer"])
    return writers


def _digest(caption: str) -> str:
    words = " ".join(caption.split()).encode("utf-8", "backslashreplace")
    return hashlib.sha256(words).hexdigest()[:16]
