"""How texts and memories go through a network together: which rows at once, and texts written from memories."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from sightloop.errors import UsageError
from sightloop.tasks.generate import Decoding, write
from sightloop.types import Encoded

TEXTS_AT_ONCE = 64


def groups(rows_of: Sequence[NDArray[np.int64]]) -> Iterator[tuple[slice, NDArray[np.int64]]]:
    """How texts go to the network: images with one text together, the texts of one image together.

    Yields a slice of the images and the rows of their texts, the texts of one image consecutive.
    """
    start = 0
    for single, group in groupby(rows_of, key=lambda rows: len(rows) == 1):
        members = list(group)
        if single:
            yield slice(start, start + len(members)), np.concatenate(members)
        else:
            for b, rows in enumerate(members, start):
                for part in np.split(rows, range(TEXTS_AT_ONCE, len(rows), TEXTS_AT_ONCE)):
                    yield slice(b, b + 1), part
        start += len(members)


def part_of(encoded: Encoded, rows: slice | torch.Tensor) -> Encoded:
    """Some rows of what a tower returned."""
    return Encoded(
        encoded.tokens[rows],
        None if encoded.pooled is None else encoded.pooled[rows],
        None if encoded.mask is None else encoded.mask[rows],
    )


def continued(
    model: Any, memory: Encoded, prompts: list[str] | None, keys: list[int], options: Decoding
) -> list[list[str]]:
    """For each memory its texts, after its prompt. Prompts of one length go through the decoder together."""
    config, device = model.network.config, model.device
    if prompts is None:
        ids = torch.full((len(keys), 1), config.start_id, device=device)
        lengths = torch.ones(len(keys), dtype=torch.long)
    else:
        tokens = model.tokenizer.encode(prompts)
        ids, lengths = torch.from_numpy(tokens.ids).to(device), torch.from_numpy(tokens.lengths)
        ids[:, 0] = config.start_id
        lengths = lengths - 1  # without the end token
    room = config.text.positions - int(lengths.max())
    if options.max_new_tokens > room:
        raise UsageError(
            f"max_new_tokens={options.max_new_tokens}: this model has room for {room} after the prompt"
        )
    out: list[list[str]] = [[] for _ in keys]
    for length in sorted(set(lengths.tolist())):
        rows = (lengths == length).nonzero().squeeze(1)
        found = write(
            model.network.decoder,
            memory if len(rows) == len(keys) else part_of(memory, rows.to(device)),
            ids[rows.to(device), :length],
            options,
            end_id=config.end_id,
            keys=[keys[row] for row in rows.tolist()],
        )
        texts = [text.strip() for text in model.tokenizer.decode(found)]
        for i, row in enumerate(rows.tolist()):
            out[row] = texts[i * options.num_return : (i + 1) * options.num_return]
    return out
