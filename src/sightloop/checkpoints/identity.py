"""Short identity of a checkpoint's weights, fast for files of any size and without torch."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from pathlib import Path

from sightloop.checkpoints import hub
from sightloop.errors import SightloopError

_BLOCK, _BLOCKS = 4096, 256


def weights_identity(source: str, lora: Path | None = None) -> str:
    """Name and digest of a model: "nano@0123456789ab"; the name alone if its files cannot be found.

    The digest is that of sizes and of 256 evenly spaced blocks of 4 KiB, so that a fine-tuned model differs from its
    start. It is not proof against forgery, as `inference.fingerprint` is.

    Args:
        source: Folder, weights file or hub id.
        lora: Folder of a LoRA adapter that is merged in.
    """
    name = Path(source).name if os.path.exists(os.path.expanduser(source)) else source
    try:
        digest = _digest(
            [*hub.locate(source).weights, *sorted((lora or Path()).glob("*.safetensors") if lora else ())]
        )
    except (SightloopError, OSError):
        return name
    return f"{name}@{digest}"


def is_same_model(first: str, second: str) -> bool:
    """Whether two identities are of the same weights: by their digests, or by their names if one has none."""
    (name, _, digest), (other_name, _, other_digest) = first.rpartition("@"), second.rpartition("@")
    if name and other_name:
        return digest == other_digest
    return first.partition("@")[0] == second.partition("@")[0]


def _digest(files: Iterable[Path]) -> str:
    digest = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            digest.update(f"{size} ".encode())
            step = max(_BLOCK, size // _BLOCKS)
            for start in range(0, size, step):
                file.seek(start)
                digest.update(file.read(_BLOCK))
    return digest.hexdigest()[:12]
