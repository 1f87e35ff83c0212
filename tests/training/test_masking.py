from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sightloop.errors import UsageError
from sightloop.training.masking import mask_patches, mask_words

MASK, VOCAB = 3, 1000
shares = st.floats(0, 1)


def texts(lengths: list[int], width: int) -> np.ndarray:
    """[CLS] 1, words from 100 on, [SEP] 2, padding 0."""
    ids = np.zeros((len(lengths), width), np.int64)
    for row, length in zip(ids, lengths, strict=True):
        row[:length] = [1, *range(100, 98 + length), 2][:length]
    return ids


@given(st.lists(st.integers(2, 30), min_size=1, max_size=6), shares, st.integers(0, 9), st.integers(0, 9))
def test_words_are_chosen_between_the_special_ones(
    lengths: list[int], share: float, seed: int, step: int
) -> None:
    ids, rows = texts(lengths, 32), np.arange(len(lengths)) * 7
    before = ids.copy()
    hidden = mask_words(
        ids, np.array(lengths), mask_id=MASK, vocab=VOCAB, share=share, seed=seed, step=step, rows=rows
    )
    assert (ids == before).all()
    assert hidden.ids.dtype == np.int64
    assert (hidden.ids[~hidden.masked] == ids[~hidden.masked]).all()
    for chosen, length in zip(hidden.masked, lengths, strict=True):
        words = length - 2
        assert chosen.sum() == (min(words, max(1, round(share * words))) if share else 0)
        assert not chosen[0]
        assert not chosen[length - 1 :].any()
    alone = [
        mask_words(
            texts([length], length),
            np.array([length]),
            mask_id=MASK,
            vocab=VOCAB,
            share=share,
            seed=seed,
            step=step,
            rows=[int(row)],
        )
        for length, row in zip(lengths, rows, strict=True)
    ]
    for i, one in enumerate(alone):  # whatever the batch and the padding
        assert (one.ids[0] == hidden.ids[i, : lengths[i]]).all()


def test_eight_of_ten_become_the_mask_and_one_another_word() -> None:
    lengths = np.full(400, 102)
    ids = texts([102] * 400, 102)
    hidden = mask_words(ids, lengths, mask_id=MASK, vocab=VOCAB, seed=1, step=2, rows=np.arange(400))
    read, stood = hidden.ids[hidden.masked], ids[hidden.masked]
    assert len(read) == 400 * 15
    assert np.mean(read == MASK) == pytest.approx(0.8, abs=0.02)
    assert np.mean(read == stood) == pytest.approx(0.1, abs=0.015)
    assert len(set(read[(read != MASK) & (read != stood)].tolist())) > 300
    # every word is chosen as often
    assert np.abs(hidden.masked[:, 1:-1].mean(0) - 0.15).max() < 0.1


def test_steps_rows_and_texts_of_a_row_differ() -> None:
    def chosen(rows: list[int], step: int = 0, seed: int = 0) -> np.ndarray:
        lengths = np.array([40, 40])
        return mask_words(
            texts([40, 40], 40), lengths, mask_id=MASK, vocab=VOCAB, seed=seed, step=step, rows=rows
        ).masked

    two_of_one, two_rows = chosen([5]), chosen([5, 6])
    assert (two_of_one[0] == two_rows[0]).all()
    assert (two_of_one[0] != two_of_one[1]).any()
    assert (two_rows[0] != two_rows[1]).any()
    assert (chosen([5, 6], step=1) != two_rows).any()
    assert (chosen([5, 6], seed=1) != two_rows).any()
    with pytest.raises(UsageError, match="2 texts for 3 rows"):
        chosen([1, 2, 3])


@given(
    st.tuples(st.integers(1, 16), st.integers(1, 16)),
    shares,
    st.integers(1, 5),
    st.booleans(),
    st.integers(0, 99),
)
def test_the_share_of_patches_is_exact(
    grid: tuple[int, int], share: float, unit: int, blocks: bool, seed: int
) -> None:
    hidden = mask_patches(grid, share=share, seed=seed, step=1, rows=[4, 9], unit=unit, blocks=blocks)
    assert hidden.shape == (2, *grid)
    assert hidden.dtype == np.bool_
    assert hidden.sum((1, 2)).tolist() == [round(share * grid[0] * grid[1])] * 2
    alone = mask_patches(grid, share=share, seed=seed, step=1, rows=[9], unit=unit, blocks=blocks)
    assert (alone[0] == hidden[1]).all()


@given(st.integers(1, 4), st.integers(1, 4), st.integers(0, 99))
def test_units_are_hidden_whole_but_for_one(unit: int, count: int, seed: int) -> None:
    side = unit * count
    hidden = mask_patches((side, side), seed=seed, step=0, rows=[0], unit=unit)[0]
    of_units = hidden.reshape(count, unit, count, unit).mean((1, 3))
    assert np.sum((of_units > 0) & (of_units < 1)) <= 1


@pytest.mark.parametrize("blocks", [False, True])
def test_every_patch_is_hidden_now_and_then(blocks: bool) -> None:
    hidden = mask_patches((14, 14), seed=0, step=0, rows=range(300), blocks=blocks)
    often = hidden.mean(0)
    assert often.max() < 0.95
    if blocks:  # fewer blocks reach the corners
        assert often.min() > 0.03
    else:
        assert np.abs(often - 118 / 196).max() < 0.15
    assert (hidden[0] != mask_patches((14, 14), seed=0, step=1, rows=[0], blocks=blocks)[0]).any()


def borders(hidden: np.ndarray) -> int:
    """Neighbours of which one is hidden and the other is not."""
    return int(np.diff(hidden, axis=1).sum() + np.diff(hidden, axis=2).sum())


def test_blocks_hang_together_more_than_units() -> None:
    rows = range(50)
    single = mask_patches((14, 14), seed=0, step=0, rows=rows, unit=1)
    units = mask_patches((14, 14), seed=0, step=0, rows=rows)
    blocks = mask_patches((14, 14), seed=0, step=0, rows=rows, blocks=True)
    assert borders(blocks) < 0.7 * borders(units) < 0.7 * 0.7 * borders(single)


def test_wrong_arguments_are_refused() -> None:
    with pytest.raises(UsageError, match="share"):
        mask_patches((2, 2), share=1.5, seed=0, step=0, rows=[0])
    with pytest.raises(UsageError, match="unit"):
        mask_patches((2, 2), unit=0, seed=0, step=0, rows=[0])
    with pytest.raises(UsageError, match="share"):
        mask_words(texts([4], 4), np.array([4]), mask_id=1, vocab=9, share=-0.1, seed=0, step=0, rows=[0])
