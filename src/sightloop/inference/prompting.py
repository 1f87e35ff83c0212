"""Prompts of networks that read images among words: forms of tasks, special tokens, ids with places for images."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import lru_cache

import torch
from torch import Tensor

from sightloop.data.text.tokenizer import Tokenizer
from sightloop.errors import UsageError
from sightloop.protocols import PromptedConfig
from sightloop.types import IMAGE_PLACEHOLDER

_LOCATION = re.compile(r"<(?:loc|seg)_?\d+>")
_NEVER_CUT = 1 << 20  # tokens: a prompt that is too long is an error, as what is cut off would be its end


def format_prompt(
    prompts: Mapping[str, str], tokenizer: Tokenizer, task: str, text: str | None = None
) -> str:
    """The prompt of a task with the caller's text in it; without one, the task's own prompt.

    Args:
        prompts: of the network: task -> prompt, "{}" for the text.
        tokenizer: knows the special tokens.
        task: a key of `prompts`.
        text: the caller's words. For captions also a task's name as its authors write it ("<OD>"), whose prompt it then
            is.

    Raises:
        UsageError: the text has a special token.
    """
    if text is None or (task == "caption" and text[:1] == "<" and "{}" not in prompts.get(text, "{}")):
        return prompts[text or task]
    check_special_tokens(tokenizer, text)
    return prompts[task if "{}" in prompts.get(task, "") else "prompt"].replace("{}", text)


def check_special_tokens(tokenizer: Tokenizer, text: str) -> None:
    """Raises UsageError if a text has a special token (BOS, EOS, padding, image); location tokens are allowed."""
    if match := _special_tokens(tokenizer).search(text):
        raise UsageError(
            f"{text[:60]!r}: {match[0]} is a token of the model's own and no word; leave it out, and give images "
            "as images"
        )


def escape_special_tokens(tokenizer: Tokenizer, text: str) -> str:
    """Generated text that goes into a prompt: a space keeps special-token strings ordinary text, "</s>" -> "< /s>"."""
    return _special_tokens(tokenizer).sub(lambda match: f"{match[0][:1]} {match[0][1:]}", text)


@lru_cache(maxsize=8)
def _special_tokens(tokenizer: Tokenizer) -> re.Pattern[str]:
    added = tokenizer.backend.get_added_tokens_decoder().values()
    names = {token.content for token in added if token.special and not _LOCATION.fullmatch(token.content)}
    longest_first = sorted(names | {IMAGE_PLACEHOLDER}, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)))


def prompt_ids(
    tokenizer: Tokenizer,
    config: PromptedConfig,
    prompts: Sequence[str],
    image_lengths: Sequence[Sequence[int]],
) -> tuple[Tensor, Tensor]:
    """Token ids of prompts, the image's id repeated for each of its tokens, padded in front.

    A prompt "<image>a" with an image of 3 tokens, beside a longer one: [pad, pad, img, img, img, a].

    Args:
        tokenizer: encodes the prompts.
        config: of the network: `image_id`, and the greatest length.
        prompts: R prompts.
        image_lengths: for each prompt the number of tokens of each of its images.

    Returns:
        ids int64 `[R, L]`, and valid_mask bool `[R, L]`, False for padding.

    Raises:
        UsageError: a prompt has another number of images than places for them, or is too long.
    """
    rows: list[list[int]] = []
    encoded = tokenizer.encode(list(prompts), max_length=_NEVER_CUT)
    for row, (prompt, lengths) in enumerate(zip(prompts, image_lengths, strict=True)):
        ids = encoded.ids[row, : encoded.lengths[row]].tolist()
        if ids.count(config.image_id) != len(lengths):
            raise UsageError(
                f"{prompt!r}: has {ids.count(config.image_id)} places for images, and {len(lengths)} are given"
            )
        counts = iter(lengths)
        rows.append([i for i in ids for i in ([i] * next(counts) if i == config.image_id else [i])])
    length, limit = max(map(len, rows)), config.text.positions
    if limit and length > limit:
        raise UsageError(
            f"a prompt of {length} tokens, its images' included: this model reads {limit} at most"
        )
    ids = torch.tensor([[tokenizer.pad_id] * (length - len(row)) + row for row in rows])
    lengths = torch.tensor([len(row) for row in rows])
    return ids, torch.arange(length) >= length - lengths[:, None]
