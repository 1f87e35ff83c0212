"""Masks from PaliGemma's segment words, in the place of their box on the picture."""

from __future__ import annotations

import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from sightread.errors import CheckpointError
from sightread.models.segments import KEYS, MaskDecoder, mask_decoder
from sightread.models.weights import export
from sightread.tasks.regions import Box, Found

FILE = "vae-oid.npz"  # as it was published


def load_mask_decoder(path: Path) -> MaskDecoder:
    """From `vae-oid.npz`; nothing in it is run. Raises CheckpointError where it is absent, damaged or another file."""
    try:
        with path.open("rb") as raw, np.load(raw, allow_pickle=False) as file:
            tensors = {name: torch.from_numpy(np.ascontiguousarray(file[name], np.float32)) for name in file}
    except (OSError, ValueError, TypeError, EOFError, zipfile.BadZipFile) as error:
        raise CheckpointError(
            f"{path}: the weights of the mask decoder cannot be read ({error}). Put the published {FILE} "
            "beside the checkpoint's files."
        ) from error
    return mask_decoder(tensors, str(path))


def save_mask_decoder(decoder: MaskDecoder, path: Path) -> None:
    """A file that `load_mask_decoder` reads back bit for bit."""
    tensors = {name: value.numpy() for name, value in export(decoder, KEYS).items()}
    np.savez(path, allow_pickle=False, **tensors)


@torch.inference_mode()
def masks_of(
    decoder: MaskDecoder, found: Sequence[Found], size: tuple[int, int]
) -> list[NDArray[np.bool_] | None]:
    """For each region its mask, bool `[H, W]` of a picture of (height, width); None where it has no segment words, or
    words beyond the codebook."""
    words = decoder.words.num_embeddings
    known = [i for i, one in enumerate(found) if one.segments and max(one.segments) < words]
    out: list[NDArray[np.bool_] | None] = [None] * len(found)
    if known:
        decoded = decoder(torch.tensor([found[i].segments for i in known])).numpy()
        for i, shares in zip(known, decoded, strict=True):
            out[i] = _placed(shares, found[i].box, size)
    return out


def _placed(shares: NDArray[np.float32], box: Box, size: tuple[int, int]) -> NDArray[np.bool_]:
    """The mask made as large as its box, in whole pixels, and true where more than half is the thing's."""
    mask = np.zeros(size, np.bool_)
    left, top, right, bottom = map(round, box)
    if right > left and bottom > top:
        gray = Image.fromarray((shares * 255).astype(np.uint8))
        resized = gray.resize((right - left, bottom - top), Image.Resampling.BICUBIC)
        mask[top:bottom, left:right] = np.asarray(resized) > 127
    return mask
