"""Text from networks that read images among words: BLIP-2, Florence-2, PaliGemma, LLaVA.

A prompt in the family's own form, its images' tokens in place, padded in front, is what the network writes on from
(or what its encoder reads). Rows of different prompts and numbers of images go together; batches change nothing.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from itertools import chain
from typing import Any, NamedTuple, Protocol, cast

import torch
from torch import Tensor

from sightloop.data.text.tokenizer import Tokenizer
from sightloop.errors import ImageError, UsageError
from sightloop.inference.arguments import digest, duplicate_groups
from sightloop.tasks import generate
from sightloop.tasks.generate import Decoding
from sightloop.types import Encoded, ImageSource, JsonMapping, Pixels

IMAGE_PLACEHOLDER = "<image>"
_PLACE = re.compile(r"<(?:loc|seg)_?\d+>")
_NEVER_CUT = 1 << 20  # tokens: a prompt that is too long is an error, as what is cut off would be its end


class PromptedNetwork(Protocol):
    """What a network offers to be prompted.

    prompts: job -> the family's form: PICTURE where the image's tokens stand, "{}" for the caller's words; "prompt"
    is the form of free words. begin: image tokens of all rows in order `[K, D]`, ids `[R, L]` and where they are
    real `[R, L]` -> what `language` starts from. Its config has image_id (the id that stands for one image token),
    start_ids (what its texts start from, () for a prefix) and end_id.
    """

    config: Any
    prompts: Mapping[str, str]
    language: Any

    def begin(self, image_tokens: Tensor, ids: Tensor, real: Tensor) -> Encoded: ...


class Prompter(Protocol):
    """A loaded model: its network and tokenizer, images prepared, and through its image tower; how it writes."""

    network: Any
    tokenizer: Tokenizer
    device: torch.device
    batch_size: int

    def read(self, sources: Iterable[ImageSource], *, isolate: bool) -> Iterator[Pixels | ImageError]: ...

    def encode(self, batch: Sequence[Pixels]) -> Encoded: ...

    def options(self, given: JsonMapping, usual: JsonMapping | None = None) -> Decoding: ...


class EncodedImage(NamedTuple):
    """An image that was read, and what the network makes of it: tokens `[N, D]`."""

    pixels: Pixels
    tokens: Tensor


def format_prompt(model: Prompter, job: str, text: str | None = None) -> str:
    """The prompt of a job with the caller's text in it; without one, the job's own form.

    In place of the words of a caption, the name of another task as its authors write it ("<OD>") is the form of that.
    Raises UsageError for a text that holds a token of the model's own.
    """
    prompts = model.network.prompts
    if text is None or (job == "caption" and text[:1] == "<" and "{}" not in prompts.get(text, "{}")):
        return prompts[text or job]
    check_special_tokens(model.tokenizer, text)
    return prompts[job if "{}" in prompts.get(job, "") else "prompt"].replace("{}", text)


def check_special_tokens(tokenizer: Tokenizer, text: str) -> None:
    """Raises UsageError where a text holds a token that begins, ends or fills texts, or stands for an image: what a
    caller says must not become one. Words of places may stand in it; they are words."""
    if found := _controls(tokenizer).search(text):
        raise UsageError(
            f"{text[:60]!r}: {found[0]} is a token of the model's own and no word; leave it out, and give images "
            "as images"
        )


def escape_special_tokens(tokenizer: Tokenizer, text: str) -> str:
    """What a model wrote, to be read again: where its letters spell a token of its own, a space keeps them letters."""
    return _controls(tokenizer).sub(lambda found: f"{found[0][:1]} {found[0][1:]}", text)


@lru_cache(maxsize=8)
def _controls(tokenizer: Tokenizer) -> re.Pattern[str]:
    added = tokenizer.backend.get_added_tokens_decoder().values()
    names = {token.content for token in added if token.special and not _PLACE.fullmatch(token.content)}
    return re.compile("|".join(map(re.escape, sorted(names | {IMAGE_PLACEHOLDER}, key=len, reverse=True))))


def generate_answers(
    model: Prompter, pictures: Sequence[ImageSource], questions: Sequence[str], options: Decoding
) -> list[str]:
    """`options.num_return` answers for each pair of an image and a question; ImageError for what cannot be read."""
    forms = [format_prompt(model, "answer", text) for text in questions]
    out: list[list[str]] = [[] for _ in questions]
    for rows, seen in batches_by_image(model, pictures):
        keys = sampling_keys(seen, [questions[i] for i in rows])
        found = generate_texts(model, [[one] for one in seen], [forms[i] for i in rows], options, keys)
        for i, mine in zip(rows, found, strict=True):
            out[i] = mine
    return list(chain(*out))


def batches_by_image(
    model: Prompter, pictures: Sequence[ImageSource]
) -> Iterator[tuple[list[int], list[EncodedImage]]]:
    """`model.batch_size` rows at a time, those of one image after each other: their places in `images`, and what
    is seen there. Each distinct image is read and encoded once, and kept no longer than its rows need it."""
    places = duplicate_groups(pictures)
    order = list(chain(*places))
    owners = [own[0] for own in places for _ in own]
    kept: dict[int, EncodedImage] = {}
    for start in range(0, len(order), model.batch_size):
        part = slice(start, start + model.batch_size)
        kept = {owner: kept[owner] for owner in owners[part] if owner in kept}
        new = [owner for owner in dict.fromkeys(owners[part]) if owner not in kept]
        kept |= zip(new, encode_images(model, read_distinct(model, [pictures[i] for i in new])), strict=True)
        yield order[part], [kept[owner] for owner in owners[part]]


def sampling_keys(seen: Sequence[EncodedImage], asked: Sequence[str]) -> list[int]:
    """Numbers that name each image and what is asked of it, for sampling."""
    return [
        digest(one.pixels.values.tobytes() + text.encode("utf-8", "replace"))
        for one, text in zip(seen, asked, strict=True)
    ]


def read_distinct(model: Prompter, pictures: Sequence[ImageSource]) -> list[Pixels]:
    """Each image prepared, the same one once. Raises the ImageError of the first that cannot be read."""
    read: dict[int, Pixels] = {}
    places = duplicate_groups(pictures)
    found = model.read([pictures[own[0]] for own in places], isolate=False)
    for own, result in zip(places, found, strict=True):
        if isinstance(result, ImageError):
            raise result
        read |= dict.fromkeys(own, result)
    return [read[i] for i in range(len(pictures))]


def encode_images(model: Prompter, pictures: Sequence[Pixels]) -> list[EncodedImage]:
    """Prepared images through the image tower, the same object once."""
    if not pictures:
        return []
    distinct = {id(picture): picture for picture in pictures}
    encoded = model.encode(list(distinct.values()))
    tokens: dict[int, Tensor] = {}
    for place, name in enumerate(distinct):
        kept = encoded.tokens[place]
        tokens[name] = kept if encoded.mask is None else kept[encoded.mask[place]]
    return [EncodedImage(picture, tokens[id(picture)]) for picture in pictures]


def generate_texts(
    model: Prompter,
    pictures: Sequence[Sequence[EncodedImage]],
    prompts: Sequence[str],
    options: Decoding,
    keys: Sequence[int],
) -> list[list[str]]:
    """For each prompt in the family's own form its `options.num_return` texts; see `write`."""
    rows = generate_ids(model, pictures, prompts, options, keys)
    found = [text.strip() for text in model.tokenizer.decode(rows)]
    each = options.num_return
    return [found[i * each : (i + 1) * each] for i in range(len(prompts))]


@torch.inference_mode()
def generate_ids(
    model: Prompter,
    pictures: Sequence[Sequence[EncodedImage]],
    prompts: Sequence[str],
    options: Decoding,
    keys: Sequence[int],
) -> list[list[int]]:
    """For each prompt, `options.num_return` rows of ids, without what the decoder starts from.

    images: of each prompt, in the order of its PICTURE places. keys: a number that names each row for sampling.
    """
    given, start, about = _begun(model, pictures, prompts, options)
    rows = generate.write(model.network.language, given, start, options, keys=keys, **about)
    return [row[start.shape[1] :] for row in rows]


def generate_stream(
    model: Prompter, pictures: Sequence[EncodedImage], prompt: str, options: Decoding, key: int
) -> Iterator[list[int]]:
    """`write` for one prompt: its ids after every token. What is wrong is said at once, and not with the first."""
    given, start, about = _begun(model, [pictures], [prompt], options)
    rows = generate.stream(model.network.language, given, start, options, keys=[key], **about)
    return (row[start.shape[1] :] for row in rows)


@torch.inference_mode()
def generate_scored(
    model: Prompter,
    pictures: Sequence[Sequence[EncodedImage]],
    prompts: Sequence[str],
    options: Decoding,
    keys: Sequence[int],
) -> list[tuple[list[int], list[float]]]:
    """`write`, and the log-probability of each id."""
    given, start, about = _begun(model, pictures, prompts, options)
    rows = generate.write_scored(model.network.language, given, start, options, keys=keys, **about)
    return [(row[start.shape[1] :], log_p) for row, log_p in rows]


@torch.inference_mode()
def _begun(
    model: Prompter, pictures: Sequence[Sequence[EncodedImage]], prompts: Sequence[str], options: Decoding
) -> tuple[Encoded, Tensor, dict[str, int]]:
    """What the language model starts from, the ids that its texts start with, and what `describe.write` must know of
    them. Raises UsageError without room."""
    config = model.network.config
    given, ids = build_prefix(model, pictures, prompts)
    most, length = config.text.positions, ids.shape[1]
    room = most if config.start_ids else most - length  # after a prompt of its own, or after the prefix
    if most and options.max_new_tokens > room:
        raise UsageError(
            f"max_new_tokens={options.max_new_tokens}: this model has room for {room} after the prompt"
        )
    start = torch.tensor([config.start_ids] * len(prompts), dtype=torch.long, device=model.device)
    if not config.start_ids and (options.repetition_penalty != 1.0 or options.no_repeat_ngram):
        # Rules about what was said know the prompt too; in place of padding its first token stands again.
        real = cast(Tensor, given.mask)
        first = ids.gather(1, real.long().argmax(dim=1, keepdim=True))
        start = torch.where(real, ids, first).clamp(max=config.text.vocab - 1)
    return given, start, {"end_id": config.end_id, "held": start.shape[1] - len(config.start_ids)}


def build_prefix(
    model: Prompter, pictures: Sequence[Sequence[EncodedImage]], prompts: Sequence[str]
) -> tuple[Encoded, Tensor]:
    """What the language model starts from, and the prompts' ids `[R, L]`, padded in front."""
    image_id = model.network.config.image_id
    rows: list[list[int]] = []
    encoded_texts = model.tokenizer.encode(list(prompts), max_length=_NEVER_CUT)
    for row, (prompt, mine) in enumerate(zip(prompts, pictures, strict=True)):
        ids = encoded_texts.ids[row, : encoded_texts.lengths[row]].tolist()
        if ids.count(image_id) != len(mine):
            raise UsageError(
                f"{prompt!r}: has {ids.count(image_id)} places for images, and {len(mine)} are given"
            )
        sizes = iter([one.tokens.shape[0] for one in mine])
        rows.append([one for i in ids for one in ([i] * next(sizes) if i == image_id else [i])])
    length, most = max(map(len, rows)), model.network.config.text.positions
    if most and length > most:
        raise UsageError(
            f"a prompt of {length} tokens, its images' included: this model reads {most} at most"
        )
    ids = torch.tensor([[model.tokenizer.pad_id] * (length - len(row)) + row for row in rows])
    lengths = torch.tensor([len(row) for row in rows])
    real = torch.arange(length) >= length - lengths[:, None]
    flat = [one.tokens for row in pictures for one in row]
    joined = torch.cat(flat) if flat else torch.zeros(0, 1, device=model.device)
    ids = ids.to(model.device)
    return model.network.build_prefix(joined, ids, real.to(model.device)), ids
