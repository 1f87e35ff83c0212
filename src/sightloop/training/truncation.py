"""Warnings about training texts that are longer than `data.max_tokens`."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence

from sightloop.data.datasets.dataset import Dataset
from sightloop.data.text.tokenizer import Tokenizer
from sightloop.errors import ImageError
from sightloop.training.config import Recipe

_SAMPLES = 1000  # evenly spaced samples whose texts are counted
_NO_LIMIT = 1 << 20  # tokens


def truncation_warnings(recipe: Recipe, dataset: Dataset, tokenizer: Tokenizer) -> Iterator[str]:
    """A warning for each kind of text of which some are truncated, with their share and the remedy.

    Args:
        recipe: its terms say which texts are read.
        dataset: training data, of which evenly spaced samples are counted.
        tokenizer: of the texts.
    """
    trained = {term for term, weight in recipe.terms.items() if weight > 0}
    limit, prompted = recipe.data.max_tokens, "prompted" in trained
    if prompted:  # the limit is that of the answers, EOS included
        limit += (tokenizer.bos_id is not None) + (tokenizer.eos_id is not None) - 1
    for kind, texts in _texts(dataset).items():
        if kind == "captions" and not trained - {"vqa", "classes", "mim"}:
            continue
        if kind != "captions" and not (trained & {"vqa", "prompted"}):
            continue
        if kind == "questions" and prompted:
            continue  # part of the prompt
        if kind == "captions" and recipe.data.prompt and not prompted:
            texts = [f"{recipe.data.prompt} {text}" for text in texts]
        if count := _count_cut(tokenizer, texts, limit):
            longest = _longest(tokenizer, texts)
            yield (
                f"data.max_tokens={recipe.data.max_tokens}: {count:,} of {len(texts):,} {kind} "
                f"({count / len(texts):.1%}) are longer and are cut"
                + (f", the longest has {longest:,} tokens" if longest > limit else "")
                + f"; set data.max_tokens up to {tokenizer.max_length:,}, or shorten them"
            )


def _texts(dataset: Dataset) -> dict[str, list[str]]:
    texts: dict[str, list[str]] = {"captions": [], "questions": [], "answers": []}
    for index in range(0, len(dataset), max(1, len(dataset) // _SAMPLES)):
        try:
            sample = dataset[index]
        except ImageError:
            continue  # reported when a batch needs it
        texts["captions"] += [text for text in sample.captions if text.strip()]
        texts["questions"] += [question.question for question in sample.questions]
        texts["answers"] += [answer for question in sample.questions for answer in question.answers]
    return texts


def _count_cut(tokenizer: Tokenizer, texts: Sequence[str], limit: int) -> int:
    """Texts of more than `limit` tokens: those of which the tokenizer warns."""
    if not texts or not _is_cut(tokenizer, texts, limit):
        return 0
    return sum(_is_cut(tokenizer, [text], limit) for text in texts)


def _is_cut(tokenizer: Tokenizer, texts: Sequence[str], limit: int) -> bool:
    with warnings.catch_warnings(record=True) as raised:
        warnings.simplefilter("always")
        tokenizer.encode(texts, max_length=limit)
    return bool(raised)


def _longest(tokenizer: Tokenizer, texts: Sequence[str]) -> int:
    """Tokens of the longest text; the tokenizer's own limit if it fills all rows to it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return int(tokenizer.encode(texts, max_length=_NO_LIMIT).lengths.max())
