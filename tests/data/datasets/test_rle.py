"""Masks in COCO's run-length encoding, compared with COCO's own code (as faster-coco-eval compiles it)."""

from __future__ import annotations

import time

import numpy as np
import pytest
from faster_coco_eval.core import mask as coco
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray

from sightloop.data.datasets.rle import decode_rle, encode_rle, mask_area, mask_box

masks = hnp.arrays(bool, hnp.array_shapes(min_dims=2, max_dims=2, max_side=70))


@given(masks)
def test_encoding_equals_the_reference(mask: NDArray[np.bool_]) -> None:
    reference = coco.encode(np.asfortranarray(mask, dtype=np.uint8))  # counts as bytes
    rle = encode_rle(mask)
    assert rle == {"size": reference["size"], "counts": reference["counts"].decode()}
    assert (np.asarray(decode_rle(rle)) == mask).all()


def test_long_runs_and_uncompressed_counts() -> None:
    mask = np.zeros((900, 700), bool)
    mask[13:601, 5:640] = True
    assert (np.asarray(decode_rle(encode_rle(mask))) == mask).all()
    assert np.asarray(decode_rle({"size": [2, 2], "counts": [1, 2, 1]})).tolist() == [
        [False, True],
        [True, False],
    ]


@given(
    st.text(max_size=12) | st.lists(st.integers(-5, 40), max_size=4), st.integers(-2, 5), st.integers(-2, 5)
)
def test_invalid_counts_are_refused(counts: str | list[int], height: int, width: int) -> None:
    try:
        mask = decode_rle({"size": [height, width], "counts": counts})
    except ValueError:
        return
    assert mask.shape == (height, width)


def test_a_huge_mask_is_refused() -> None:
    with pytest.raises(ValueError, match="limits"):
        decode_rle({"size": [10**6, 10**6], "counts": [10**12]})
    with pytest.raises(ValueError, match="too large"):
        decode_rle({"size": [10**5, 10**5], "counts": [10**8] * 100})


@given(masks)
def test_area_and_box_of_run_lengths(mask: NDArray[np.bool_]) -> None:
    runs = decode_rle(encode_rle(mask))
    assert encode_rle(runs) == encode_rle(mask)
    assert mask_area(runs) == mask_area(mask) == mask.sum()
    if mask.any():
        rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        left, top, right, bottom = mask_box(runs)
        assert (left, right) == (columns[0], columns[-1] + 1)
        assert top <= rows[0]
        assert bottom >= rows[-1] + 1


def test_runs_take_no_memory_for_pixels_and_no_time_for_digits() -> None:
    runs = decode_rle({"size": [11585, 11585], "counts": [11585**2]})
    assert runs.counts.nbytes == 8
    started = time.process_time()
    with pytest.raises(ValueError, match="larger than any image"):
        decode_rle({"size": [4, 4], "counts": "o" * 1_000_000 + "0"})
    with pytest.raises(ValueError, match="cut short"):
        decode_rle({"size": [4, 4], "counts": "o" * 1_000_000})
    assert time.process_time() - started < 2


@pytest.mark.parametrize("size", [None, 4, [4], [4, "4"], [4, 4.5], [float("inf"), 1], [True, 16], [-4, -4]])
def test_a_size_of_another_type_is_refused(size: object) -> None:
    with pytest.raises(ValueError):
        decode_rle({"size": size, "counts": [16]})


@pytest.mark.parametrize("counts", [None, 16, {}, [None], ["16"], [1e400], [10**400], [[16]], [True] * 16])
def test_counts_of_another_type_are_refused(counts: object) -> None:
    with pytest.raises(ValueError):
        decode_rle({"size": [4, 4], "counts": counts})
