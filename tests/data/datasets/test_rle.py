"""Masks in COCO's run-length encoding, compared with COCO's own code (as faster-coco-eval compiles it)."""

from __future__ import annotations

import numpy as np
import pytest
from faster_coco_eval.core import mask as coco
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray

from sightloop.data.datasets.rle import decode_rle, encode_rle

masks = hnp.arrays(bool, hnp.array_shapes(min_dims=2, max_dims=2, max_side=70))


@given(masks)
def test_encoding_equals_the_reference(mask: NDArray[np.bool_]) -> None:
    reference = coco.encode(np.asfortranarray(mask, dtype=np.uint8))  # counts as bytes
    rle = encode_rle(mask)
    assert rle == {"size": reference["size"], "counts": reference["counts"].decode()}
    assert (decode_rle(rle) == mask).all()


def test_long_runs_and_uncompressed_counts() -> None:
    mask = np.zeros((900, 700), bool)
    mask[13:601, 5:640] = True
    assert (decode_rle(encode_rle(mask)) == mask).all()
    assert decode_rle({"size": [2, 2], "counts": [1, 2, 1]}).tolist() == [[False, True], [True, False]]


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
    with pytest.raises(ValueError, match="too large"):
        decode_rle({"size": [10**6, 10**6], "counts": [10**12]})
