"""The published decoder of PaliGemma's masks, read and written."""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from sightloop.checkpoints.key_map import KeyMap, export_state_dict, load_weights
from sightloop.errors import CheckpointError
from sightloop.models.paligemma import MaskDecoder

MASK_DECODER_FILE = "vae-oid.npz"  # as it was published


def load_mask_decoder(path: Path) -> MaskDecoder:
    """From `vae-oid.npz`; nothing in it is run. Raises CheckpointError where it is absent, damaged or another file."""
    try:
        with path.open("rb") as raw, np.load(raw, allow_pickle=False) as file:
            tensors = {name: torch.from_numpy(np.ascontiguousarray(file[name], np.float32)) for name in file}
    except (OSError, ValueError, TypeError, EOFError, zipfile.BadZipFile) as error:
        raise CheckpointError(
            f"{path}: the weights of the mask decoder cannot be read ({error}). Put the published {MASK_DECODER_FILE} "
            "beside the checkpoint's files."
        ) from error
    return build_mask_decoder(tensors, str(path))


def save_mask_decoder(decoder: MaskDecoder, path: Path) -> None:
    """A file that `load_mask_decoder` reads back bit for bit."""
    tensors = {name: value.numpy() for name, value in export_state_dict(decoder, KEYS).items()}
    np.savez(path, allow_pickle=False, **tensors)


KEYS: KeyMap = {
    "words.weight": "_vq_vae._embedding",
    "decoder.{}": "decoder.{}",
    "decoder.{}.net.{}": "decoder.{}.net.{}",
}


IGNORED = (r"^encoder\.", r"^_vq_vae\.")


def build_mask_decoder(tensors: Mapping[str, Tensor], source: str) -> MaskDecoder:
    """The decoder with its weights. Raises CheckpointError that names what does not fit."""
    try:
        words, code = tensors["_vq_vae._embedding"].shape
        width = tensors["decoder.0.bias"].shape[0]
    except (KeyError, ValueError, IndexError) as error:
        raise CheckpointError(
            f"{source}: is not the weights of the mask decoder (vae-oid.npz): {error!r}"
        ) from error
    with torch.device("meta"):
        net = MaskDecoder(words, code, width)
    load_weights(net, tensors, KEYS, ignore=IGNORED, source=source)
    return net.eval()
