"""Masks as run lengths: the reference reads what we write, and we read what it writes."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray

from sightloop.data.datasets.rle import decode_rle, encode_rle

masks = hnp.arrays(bool, hnp.array_shapes(min_dims=2, max_dims=2, max_side=70))


@given(masks)
def test_as_pycocotools_has_it(mask: NDArray[np.bool_]) -> None:
    coco = pytest.importorskip("pycocotools.mask")
    theirs = coco.encode(np.asfortranarray(mask, dtype=np.uint8))
    ours = encode_rle(mask)
    assert ours == {"size": theirs["size"], "counts": theirs["counts"].decode()}
    assert (decode_rle(ours) == mask).all()


def test_long_runs_and_plain_numbers() -> None:
    mask = np.zeros((900, 700), bool)
    mask[13:601, 5:640] = True
    assert (decode_rle(encode_rle(mask)) == mask).all()
    assert decode_rle({"size": [2, 2], "counts": [1, 2, 1]}).tolist() == [[False, True], [True, False]]


@given(
    st.text(max_size=12) | st.lists(st.integers(-5, 40), max_size=4), st.integers(-2, 5), st.integers(-2, 5)
)
def test_what_is_no_mask_is_refused(counts: str | list[int], height: int, width: int) -> None:
    try:
        mask = decode_rle({"size": [height, width], "counts": counts})
    except ValueError:
        return
    assert mask.shape == (height, width)


def test_a_mask_without_end_is_refused() -> None:
    with pytest.raises(ValueError, match="too large"):
        decode_rle({"size": [10**6, 10**6], "counts": [10**12]})
