"""Masks of segment words, against a decoder written out in NumPy, and where they land."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from sightloop.checkpoints.mask_decoder import load_mask_decoder, save_mask_decoder
from sightloop.errors import CheckpointError
from sightloop.inference.masks import decode_masks
from sightloop.tasks.region_parser import ParsedRegion, parse_location_tokens

Weights = dict[str, NDArray[np.float32]]


def weights(seed: int = 0, words: int = 128, code: int = 12, width: int = 16) -> Weights:
    """Of the published file's names, for a small width; its encoder's too, which nobody reads."""
    draw = np.random.default_rng(seed)
    shapes: dict[str, tuple[int, ...]] = {
        "_vq_vae._embedding": (words, code),
        "encoder.0.weight": (4, 1, 4, 4),
    }
    convolutions = {"decoder.0": (width, code, 1, 1), "decoder.12": (1, width // 8, 1, 1)}
    for block in (2, 3):
        for place, size in ((0, 3), (2, 3), (4, 1)):
            convolutions[f"decoder.{block}.net.{place}"] = (width, width, size, size)
    widths = [width, width, width // 2, width // 4, width // 8]
    for i in range(4):
        convolutions[f"decoder.{4 + 2 * i}"] = (widths[i], widths[i + 1], 4, 4)  # transposed: in, out
    for name, shape in convolutions.items():
        shapes[f"{name}.weight"] = shape
        shapes[f"{name}.bias"] = (shape[1] if int(name.split(".")[1]) in (4, 6, 8, 10) else shape[0],)
    return {name: (draw.standard_normal(shape) * 0.3).astype(np.float32) for name, shape in shapes.items()}


def conv(x: NDArray[np.float64], w: NDArray[np.float32], b: NDArray[np.float32]) -> NDArray[np.float64]:
    pad = w.shape[2] // 2
    around = np.pad(x, ((0, 0), (pad, pad), (pad, pad)))
    out = np.zeros((w.shape[0], *x.shape[1:])) + b[:, None, None]
    for i in range(w.shape[2]):
        for j in range(w.shape[3]):
            out += np.einsum("oc,chw->ohw", w[:, :, i, j], around[:, i : i + x.shape[1], j : j + x.shape[2]])
    return out


def up(x: NDArray[np.float64], w: NDArray[np.float32], b: NDArray[np.float32]) -> NDArray[np.float64]:
    """Each pixel paints 4 x 4, two apart; the rim of one is cut off."""
    height, width = x.shape[1:]
    out = np.zeros((w.shape[1], 2 * height + 2, 2 * width + 2))
    for y in range(height):
        for z in range(width):
            out[:, 2 * y : 2 * y + 4, 2 * z : 2 * z + 4] += np.einsum("c,cohw->ohw", x[:, y, z], w)
    return out[:, 1:-1, 1:-1] + b[:, None, None]


def by_hand(given: Weights, segments: list[int]) -> NDArray[np.float64]:
    def of(name: str) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        return given[f"{name}.weight"], given[f"{name}.bias"]

    def relu(x: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.maximum(x, 0)

    x = given["_vq_vae._embedding"][segments].reshape(4, 4, -1).transpose(2, 0, 1).astype(np.float64)
    x = relu(conv(x, *of("decoder.0")))
    for block in ("decoder.2.net", "decoder.3.net"):
        inner = relu(conv(relu(conv(x, *of(f"{block}.0"))), *of(f"{block}.2")))
        x = x + conv(inner, *of(f"{block}.4"))
    for name in ("decoder.4", "decoder.6", "decoder.8", "decoder.10"):
        x = relu(up(x, *of(name)))
    return np.clip(conv(x, *of("decoder.12"))[0] * 0.5 + 0.5, 0, 1)


def stored(folder: Path, given: Weights) -> Path:
    np.savez(folder / "vae-oid.npz", **given)  # pyright: ignore[reportArgumentType]
    return folder / "vae-oid.npz"


def test_the_decoder(tmp_path: Path) -> None:
    given = weights()
    decoder = load_mask_decoder(stored(tmp_path, given))
    rows = np.random.default_rng(1).integers(0, 128, (3, 16))
    with torch.inference_mode():
        found = decoder(torch.from_numpy(rows)).numpy()
    assert found.shape == (3, 64, 64)
    for row, mask in zip(rows.tolist(), found, strict=True):
        wanted = by_hand(given, row)
        assert ((wanted > 0) & (wanted < 1)).mean() > 0.05
        assert np.abs(mask - wanted).max() < 1e-4


def test_masks_fill_their_boxes(tmp_path: Path) -> None:
    given = weights()
    given["decoder.12.weight"][:] = 0
    given["decoder.12.bias"][:] = 1  # everywhere the thing's
    decoder = load_mask_decoder(stored(tmp_path, given))
    segments = "".join(f"<seg{i:03d}>" for i in range(16))
    text = f"<loc0256><loc0128><loc0512><loc0999>{segments} cat ; <loc0000><loc0000><loc0010><loc0010> dog"
    found = parse_location_tokens(text, (100, 200))
    far = ParsedRegion("far", (0.0, 0.0, 9.0, 9.0), segments=(*range(15), 999))
    empty = ParsedRegion("empty", (5.0, 5.0, 5.2, 90.0), segments=tuple(range(16)))
    first, second, third, fourth = decode_masks(decoder, [*found, far, empty], (100, 200))
    wanted = np.zeros((100, 200), bool)
    wanted[25:50, 25:195] = True
    assert first is not None
    assert np.array_equal(first, wanted)
    assert second is None
    assert third is None
    assert fourth is not None
    assert not fourth.any()
    assert decode_masks(decoder, [], (1, 1)) == []


def test_it_is_saved_as_it_was_published(tmp_path: Path) -> None:
    decoder = load_mask_decoder(stored(tmp_path, weights()))
    save_mask_decoder(decoder, tmp_path / "again.npz")
    again = load_mask_decoder(tmp_path / "again.npz").state_dict()
    assert all(torch.equal(value, again[name]) for name, value in decoder.state_dict().items())


@pytest.mark.parametrize("kind", ["absent", "no archive", "cut", "pickled", "another", "misshapen"])
def test_other_files_are_refused(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "vae-oid.npz"
    given = weights()
    if kind == "another":
        del given["decoder.0.bias"]
    if kind == "misshapen":
        given["decoder.6.weight"] = given["decoder.6.weight"][:, :3]
    if kind == "pickled":
        given["decoder.0.bias"] = np.array([{}], dtype=object)  # pyright: ignore[reportArgumentType]
    if kind not in ("absent", "no archive"):
        stored(tmp_path, given)
    if kind == "cut":
        path.write_bytes(path.read_bytes()[:900])
    if kind == "no archive":
        path.write_bytes(b"nothing")
    with pytest.raises(CheckpointError, match="vae-oid"):
        load_mask_decoder(path)
