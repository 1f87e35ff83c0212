"""Matching pairs against slow loops."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from sightloop.objectives.contrastive import Candidates, clip_loss, itc_loss, siglip_loss
from sightloop.objectives.matching import IGNORED, hard_negatives
from sightloop.objectives.positives import NO_CAPTION, NO_TEXT, Positives

# Samples with the captions of each; pairs draw a sample and one of its captions.
samples = st.lists(st.sets(st.integers(0, 6), min_size=1, max_size=3), min_size=1, max_size=5)


@st.composite
def batches(draw: st.DrawFn) -> tuple[Positives, torch.Tensor, bool]:
    """Positives of up to 8 pairs, the expected matrix of images and texts, and whether samples share captions."""
    captions = draw(samples)
    owners = draw(st.lists(st.integers(0, len(captions) - 1), min_size=2, max_size=8))
    texts = [draw(st.sampled_from(sorted(captions[owner]))) for owner in owners]
    padded = [[*captions[o], *[NO_CAPTION] * (3 - len(captions[o]))] for o in owners]
    positives = Positives.from_texts(torch.tensor(owners), torch.tensor(texts), torch.tensor(padded))
    expected = torch.tensor([[t in captions[o] for t in texts] for o in owners])
    return (
        positives,
        expected,
        not torch.equal(expected, torch.tensor(owners)[:, None] == torch.tensor(owners)),
    )


@given(batches())
def test_a_pair_matches_if_the_text_is_a_caption_of_the_sample(batch) -> None:
    positives, expected, _ = batch
    rows = torch.arange(len(expected))
    same = positives.ids[:, None] == positives.ids  # captions of one sample that were not listed
    assert torch.equal(positives.of_images(rows), expected | same)
    assert torch.equal(positives.of_texts(rows), (expected | same).T)
    assert torch.equal(positives.of_images(rows, slice(1, 2)), (expected | same)[:, 1:2])


@given(batches(), st.integers(0, 3))
def test_no_positive_is_drawn_as_a_negative(batch, seed: int) -> None:
    positives, expected, _ = batch
    rows = torch.arange(len(expected))
    matches = positives.of_images(rows)
    drawn = hard_negatives(
        torch.randn(matches.shape), offset=0, seed=seed, step=0, ids=positives.ids, positive=matches
    )
    for row, column in enumerate(drawn.tolist()):
        assert bool(matches[row].all()) if column == IGNORED else not matches[row, column]


@given(batches())
def test_losses_count_every_positive(batch) -> None:
    positives, _, _ = batch
    count = len(positives.ids)
    rows = torch.arange(count)
    image, text = torch.nn.functional.normalize(torch.randn(2, count, 4), dim=-1)
    matches, logits = positives.of_images(rows), 5 * image @ text.T
    to_text = -(logits.log_softmax(1) * matches).sum(1) / matches.sum(1)
    to_image = -(logits.T.log_softmax(1) * matches.T).sum(1) / matches.T.sum(1)
    expected = (to_text.mean() + to_image.mean()) / 2
    scale = torch.tensor(5.0)
    assert torch.allclose(clip_loss(image, text, scale, ids=positives).value, expected, atol=1e-5)
    candidates = Candidates(image, text, count, 0, positives)
    assert torch.allclose(itc_loss(image, text, candidates, 1 / scale, alpha=0.0).value, expected, atol=1e-5)
    pairs = torch.nn.functional.logsigmoid(logits * (2 * matches.float() - 1)).sum() / count
    for chunk in (2, 1024):
        loss = siglip_loss(image, text, scale, torch.zeros(()), ids=positives, chunk=chunk)
        assert torch.allclose(loss.value, -pairs, atol=1e-4)


def test_unknown_texts_match_nothing() -> None:
    """A queue that is not full yet holds no texts."""
    ids, texts = torch.tensor([0, 1, -1, -1]), torch.tensor([4, 4, NO_TEXT, NO_TEXT])
    captions = torch.tensor([[4, NO_CAPTION], [4, 9], [NO_TEXT, NO_CAPTION], [NO_TEXT, NO_CAPTION]])
    positives = Positives.from_texts(ids, texts, captions)
    expected = torch.block_diag(torch.ones(2, 2), torch.ones(2, 2)).bool()
    assert torch.equal(positives.of_images(torch.arange(4)), expected)
