"""Text from networks that read pictures among words: BLIP-2, Florence-2, PaliGemma, LLaVA.

A prompt in the family's own form, its pictures' tokens in place, padded in front, is what the network writes on from
(or what its encoder reads). Rows of different prompts and numbers of pictures go together; batches change nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from sightread.data.tokens import Tokenizer
from sightread.errors import ImageError, UsageError
from sightread.pipelines.arguments import digest
from sightread.tasks import describe
from sightread.tasks.generate import Decoding
from sightread.types import Encoded, ImageSource, Pixels

PICTURE = "<image>"


class Network(Protocol):
    """What a network offers to be prompted.

    prompts: job -> the family's form: PICTURE where the picture's tokens stand, "{}" for the caller's words; "prompt"
    is the form of free words. begin: picture tokens of all rows in order `[K, D]`, ids `[R, L]` and where they are
    real `[R, L]` -> what `language` starts from. Its config has image_id (the id that stands for one picture token),
    start_ids (what its texts start from, () for a prefix) and end_id.
    """

    config: Any
    prompts: Mapping[str, str]
    language: Any

    def begin(self, image_tokens: Tensor, ids: Tensor, real: Tensor) -> Encoded: ...


class Prompter(Protocol):
    """A loaded model: its network and tokenizer, pictures prepared, and through its image tower."""

    network: Any
    tokenizer: Tokenizer
    device: torch.device
    batch_size: int

    def read(self, sources: Iterable[ImageSource], *, isolate: bool) -> Iterator[Pixels | ImageError]: ...

    def encode(self, batch: Sequence[Pixels]) -> Encoded: ...


def form(network: Network, job: str, text: str | None = None) -> str:
    """The prompt of a job with the caller's text in it; without one, the job's own form. A text may also be the name
    of another of the network's prompts."""
    if text is None or text in network.prompts:
        return network.prompts[text or job]
    template = network.prompts[job if "{}" in network.prompts.get(job, "") else "prompt"]
    return template.replace("{}", text)


def answers(
    model: Prompter, pictures: Sequence[ImageSource], questions: Sequence[str], options: Decoding
) -> list[str]:
    """`options.num_return` answers for each pair of a picture and a question; ImageError for what cannot be read."""
    out: list[str] = []
    for start in range(0, len(questions), model.batch_size):
        part = slice(start, start + model.batch_size)
        read, asked = prepared(model, pictures[part]), questions[part]
        keys = [
            digest(picture.values.tobytes() + text.encode("utf-8", "replace"))
            for picture, text in zip(read, asked, strict=True)
        ]
        prompts = [form(model.network, "answer", text) for text in asked]
        for found in texts(model, [[picture] for picture in read], prompts, options, keys):
            out.extend(found)
    return out


def prepared(model: Prompter, pictures: Sequence[ImageSource]) -> list[Pixels]:
    """Each picture prepared, the same object once. Raises the ImageError of the first that cannot be read."""
    distinct = {id(picture): picture for picture in pictures}
    read: dict[int, Pixels] = {}
    for name, result in zip(distinct, model.read(distinct.values(), isolate=False), strict=True):
        if isinstance(result, ImageError):
            raise result
        read[name] = result
    return [read[id(picture)] for picture in pictures]


def texts(
    model: Prompter,
    pictures: Sequence[Sequence[Pixels]],
    prompts: Sequence[str],
    options: Decoding,
    keys: Sequence[int],
) -> list[list[str]]:
    """For each prompt in the family's own form its `options.num_return` texts; see `write`."""
    rows = write(model, pictures, prompts, options, keys)
    found = [text.strip() for text in model.tokenizer.decode(rows)]
    each = options.num_return
    return [found[i * each : (i + 1) * each] for i in range(len(prompts))]


@torch.inference_mode()
def write(
    model: Prompter,
    pictures: Sequence[Sequence[Pixels]],
    prompts: Sequence[str],
    options: Decoding,
    keys: Sequence[int],
) -> list[list[int]]:
    """For each prompt, `options.num_return` rows of ids, without what the decoder starts from.

    pictures: of each prompt, in the order of its PICTURE places; the same `Pixels` object is encoded once.
    keys: a number that names each row for sampling.
    """
    given, start = _begun(model, pictures, prompts, options)
    end_id = model.network.config.end_id
    rows = describe.write(model.network.language, given, start, options, end_id=end_id, keys=keys)
    return [row[start.shape[1] :] for row in rows]


def stream(
    model: Prompter, pictures: Sequence[Pixels], prompt: str, options: Decoding, key: int
) -> Iterator[list[int]]:
    """`write` for one prompt: its ids after every token."""
    given, start = _begun(model, [pictures], [prompt], options)
    network = model.network
    end_id = network.config.end_id
    for row in describe.stream(network.language, given, start, options, end_id=end_id, keys=[key]):
        yield row[start.shape[1] :]


@torch.inference_mode()
def write_scored(
    model: Prompter,
    pictures: Sequence[Sequence[Pixels]],
    prompts: Sequence[str],
    options: Decoding,
    keys: Sequence[int],
) -> list[tuple[list[int], list[float]]]:
    """`write`, and the log-probability of each id."""
    given, start = _begun(model, pictures, prompts, options)
    end_id = model.network.config.end_id
    rows = describe.write_scored(model.network.language, given, start, options, end_id=end_id, keys=keys)
    return [(row[start.shape[1] :], log_p) for row, log_p in rows]


@torch.inference_mode()
def _begun(
    model: Prompter, pictures: Sequence[Sequence[Pixels]], prompts: Sequence[str], options: Decoding
) -> tuple[Encoded, Tensor]:
    """What the language model starts from, and the ids that its texts start with. Raises UsageError without room."""
    config = model.network.config
    given, length = prefix(model, pictures, prompts)
    most = config.text.positions
    room = most if config.start_ids else most - length  # after a prompt of its own, or after the prefix
    if most and options.max_new_tokens > room:
        raise UsageError(
            f"max_new_tokens={options.max_new_tokens}: this model has room for {room} after the prompt"
        )
    start = torch.tensor([config.start_ids] * len(prompts), dtype=torch.long, device=model.device)
    return given, start


def prefix(
    model: Prompter, pictures: Sequence[Sequence[Pixels]], prompts: Sequence[str]
) -> tuple[Encoded, int]:
    """What the language model starts from, and how many tokens the longest prompt has."""
    image_id = model.network.config.image_id
    distinct = {id(picture): picture for row in pictures for picture in row}
    tokens: dict[int, Tensor] = {}
    if distinct:
        encoded = model.encode(list(distinct.values()))
        for place, name in enumerate(distinct):
            kept = encoded.tokens[place]
            tokens[name] = kept if encoded.mask is None else kept[encoded.mask[place]]
    rows: list[list[int]] = []
    encoded_texts = model.tokenizer.encode(list(prompts))
    for row, (prompt, mine) in enumerate(zip(prompts, pictures, strict=True)):
        ids = encoded_texts.ids[row, : encoded_texts.lengths[row]].tolist()
        if ids.count(image_id) != len(mine):
            raise UsageError(
                f"{prompt!r}: has {ids.count(image_id)} places for pictures, and {len(mine)} are given"
            )
        sizes = iter([tokens[id(picture)].shape[0] for picture in mine])
        rows.append([one for i in ids for one in ([i] * next(sizes) if i == image_id else [i])])
    length, most = max(map(len, rows)), model.network.config.text.positions
    if most and length > most:
        raise UsageError(
            f"a prompt of {length} tokens, its pictures' included: this model reads {most} at most"
        )
    ids = torch.tensor([[model.tokenizer.pad_id] * (length - len(row)) + row for row in rows])
    lengths = torch.tensor([len(row) for row in rows])
    real = torch.arange(length) >= length - lengths[:, None]
    flat = [tokens[id(picture)] for row in pictures for picture in row]
    joined = torch.cat(flat) if flat else torch.zeros(0, 1, device=model.device)
    return model.network.begin(joined, ids.to(model.device), real.to(model.device)), length
