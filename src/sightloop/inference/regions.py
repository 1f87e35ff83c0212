"""Verbs that find things in images: a prompt for each image and phrase, and the regions in what is written.

A network says in `finds` for each of its jobs what it writes, as a key of `tasks.region_parser.PARSERS`, and in
`prompts` how it is asked (`inference.prompting`): "detect" without words, "describe" for descriptions in place of
names; "find" for all things of one name; "locate" for the phrases of a text; "segment" for the outline of what a
phrase refers to, "outline" for that of what a box holds; "read" for the texts in an image; "category" for the name of
what a box holds, "words" for the text in it. In its prompts alone: "detailed" and "long" captions, and "region" for
that of a box. A network that looks for several names at once says in `joint` what stands between them; what it writes
has their labels.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Sequence
from dataclasses import replace
from itertools import chain, groupby
from typing import Any, TypeAlias, cast

from sightloop.checkpoints.mask_decoder import MASK_DECODER_FILE
from sightloop.data.text.tokenizer import Tokenizer
from sightloop.errors import UnsupportedError, UsageError
from sightloop.inference import prompting
from sightloop.inference.arguments import ImageInput, TextInput, as_images, as_strings
from sightloop.inference.masks import decode_masks
from sightloop.models.paligemma import MaskDecoder
from sightloop.tasks.generate import Decoding
from sightloop.tasks.region_parser import PARSERS, Span, box_tokens, confidence
from sightloop.tasks.region_parser import parse_phrases as grounded
from sightloop.types import Box, ImageSource, JsonDict, Region, Size

RegionQuery: TypeAlias = "str | Box"  # a phrase, or a box in pixels
Regions: TypeAlias = list[Region]

MAX_NEW_TOKENS = 1024  # tokens that a text of regions may have where nobody says
_JOBS = {"short": "caption", "detailed": "detailed", "long": "long"}


def detect(
    model: Any,
    images: ImageInput,
    phrases: TextInput | None,
    *,
    describe: bool,
    region: Box | None,
    **decoding: Any,
) -> list[Regions]:
    """All things of each image; with phrases, one after the other, those that each phrase names, under its name;
    with a region, what lies in that box."""
    pictures, options = list(as_images(images)), _options(model, decoding)
    if (phrases is not None) + describe + (region is not None) > 1:
        raise UsageError("phrases, describe and region exclude each other; give one")
    if phrases is None:
        job = "category" if region is not None else "describe" if describe else "detect"
        return find(model, job, pictures, [_whole(region)] * len(pictures), options)
    names = as_strings(phrases, "phrases")
    if joint := getattr(model.network, "phrase_separator", ""):
        return find(model, "find", pictures, [joint.join(names)] * len(pictures), options)
    asked: list[RegionQuery | None] = [name for _ in pictures for name in names]
    every = find(model, "find", [picture for picture in pictures for _ in names], asked, options)
    named = [
        [replace(one, label=name) for one in found]
        for name, found in zip(cast("list[str]", asked), every, strict=True)
    ]
    return [list(chain(*named[i : i + len(names)])) for i in range(0, len(named), len(names))]


def find_each(
    model: Any, job: str, images: ImageInput, phrases: RegionQuery | Sequence[RegionQuery], **decoding: Any
) -> list[Regions]:
    """Locates or segments: pairs of an image and what is asked of it, or one of either with all of the other."""
    pictures, asked = list(as_images(images)), _asked(phrases)
    if len(pictures) == 1 or len(asked) == 1:
        pictures, asked = pictures * len(asked), asked * len(pictures)
    if len(pictures) != len(asked):
        raise UsageError(f"{len(pictures)} images and {len(asked)} phrases: give as many, or one of either")
    boxed = [isinstance(one, tuple) for one in asked]
    if any(boxed) and (job != "segment" or not all(boxed)):
        raise UsageError("phrases: give texts; only segment takes boxes, and then boxes alone")
    return find(model, "outline" if any(boxed) else job, pictures, asked, _options(model, decoding))


def read_text(model: Any, images: ImageInput, region: Box | None, **decoding: Any) -> list[Regions]:
    """The texts written in each image, or the text in a box of it."""
    pictures = list(as_images(images))
    job = "read" if region is None else "words"
    return find(model, job, pictures, [_whole(region)] * len(pictures), _options(model, decoding))


def caption(
    model: Any, images: ImageInput, prompt: object, length: str | None, region: Box | None, **decoding: Any
) -> list[str]:
    """Captions of some length, or of what lies in a box. Raises UnsupportedError where the model knows no such."""
    if (prompt is not None) + (length is not None) + (region is not None) > 1:
        raise UsageError("prompt, length and region exclude each other; give one")
    if length is not None and length not in _JOBS:
        raise UsageError(f"length={length!r}: must be one of {', '.join(_JOBS)}")
    job = "region" if length is None else _JOBS[length]
    if job not in getattr(model.network, "prompts", {}):
        raise UnsupportedError(f"{model.name} was not trained for captions of a length or of a region")
    pictures, options, box = list(as_images(images)), model.options(decoding), _whole(region)
    out: list[list[str]] = [[] for _ in pictures]
    for rows, seen in prompting.batches_by_image(model, pictures):
        prompts = [_prompt(model, job, box, one) for one in seen]
        keys = prompting.sampling_keys(seen, prompts)
        found = prompting.generate_texts(model, [[one] for one in seen], prompts, options, keys)
        for i, mine in zip(rows, found, strict=True):
            out[i] = mine
    return list(chain(*out))


def find(
    model: Any,
    job: str,
    pictures: Sequence[ImageSource],
    asked: Sequence[RegionQuery | None],
    options: Decoding,
) -> list[Regions]:
    """What is found for each pair of an image and what is asked of it, in the order in which it is written.

    Each distinct image is read and encoded once. A region without a label of its own gets the phrase's, what is said
    about a box gets the box. Raises UnsupportedError for a job that the network is not prompted for.
    """
    finds, joint = (
        getattr(model.network, "region_formats", {}),
        getattr(model.network, "phrase_separator", ""),
    )
    if job not in finds:
        raise UnsupportedError(
            f"{model.name} was not trained for {job!r}; it finds: {', '.join(finds) or 'nothing'}"
        )
    kind, ignored_phrases = finds[job], getattr(model.network.config, "ignored_phrases", None)
    if kind == "segments" and model.masks is None:
        raise UnsupportedError(
            f"{model.name} writes masks as words, whose decoder is a file of its own. Put the published "
            f"{MASK_DECODER_FILE} beside the checkpoint's files, or name it: load(..., masks=PATH)"
        )
    if options.num_return != 1:
        raise UsageError(f"num_return={options.num_return}: of regions there is one answer")
    out: list[Regions] = [[] for _ in asked]
    for rows, seen in prompting.batches_by_image(model, pictures):
        prompts = [_prompt(model, job, asked[i], one) for i, one in zip(rows, seen, strict=True)]
        keys = prompting.sampling_keys(seen, prompts)
        written = prompting.generate_scored(model, [[one] for one in seen], prompts, options, keys)
        for i, one, (ids, log_p) in zip(rows, seen, written, strict=True):
            words, size = asked[i], one.pixels.size
            usual = words if isinstance(words, str) and not (joint and joint in words) else ""
            found = regions_of(model.tokenizer, kind, ids, log_p, size, usual, model.masks, ignored_phrases)
            if kind == "said" and isinstance(words, tuple):
                found = [replace(region, box=words) for region in found]
            out[i] = found
    return out


def regions_of(
    tokenizer: Tokenizer,
    kind: str,
    ids: Sequence[int],
    log_p: Sequence[float],
    size: Size,
    usual: str,
    decoder: MaskDecoder | None = None,
    ignored_phrases: Sequence[str] | None = None,
) -> Regions:
    """The regions in what was written. kind: of PARSERS. usual: the label of those that have none. decoder: of segment
    words. ignored_phrases: phrases that are left out, None for the usual ones."""
    text, tokens = spelled(tokenizer, ids)
    if kind == "phrases" and ignored_phrases is not None:
        found = grounded(text, size, frozenset(ignored_phrases))
    else:
        found = PARSERS[kind](text, size)
    masks = (
        decode_masks(decoder, found, size)
        if decoder is not None and kind == "segments"
        else [None] * len(found)
    )
    return [
        Region(one.label or usual, one.box, one.polygons, confidence(one.spans, tokens, log_p), mask)
        for one, mask in zip(found, masks, strict=True)
    ]


def spelled(tokenizer: Tokenizer, ids: Sequence[int]) -> tuple[str, list[Span]]:
    """The text of ids with the words of places and other special ones in it, less those that begin, end and fill a
    text; and where each id stands in it. Ordinary tokens that follow each other share one span, as letters may be
    spread over several."""
    added = {index: token.content for index, token in tokenizer.backend.get_added_tokens_decoder().items()}
    text, spans = "", list[Span]()
    for special, run in groupby(ids, key=lambda index: index in added):
        group = list(run)
        for piece in [added[i] for i in group] if special else [tokenizer.backend.decode(group)]:
            piece = "" if piece in ("<s>", "</s>", "<pad>") else piece
            spans += [(len(text), len(text) + len(piece))] * (1 if special else len(group))
            text += piece
    return text, spans


def _prompt(model: Any, job: str, asked: RegionQuery | None, seen: prompting.EncodedImage) -> str:
    text = box_tokens(asked, seen.pixels.size) if isinstance(asked, tuple) else asked
    return prompting.format_prompt(model, job, text)


def _options(model: Any, decoding: JsonDict) -> Decoding:
    room = min(MAX_NEW_TOKENS, model.network.config.text.positions or MAX_NEW_TOKENS)
    return model.options(decoding, {"max_new_tokens": room})


def _asked(phrases: RegionQuery | Sequence[RegionQuery]) -> list[RegionQuery]:
    if isinstance(phrases, str) or _is_box(phrases):
        phrases = [cast(RegionQuery, phrases)]
    out: list[RegionQuery] = []
    for one in cast("Sequence[RegionQuery]", phrases):
        if not isinstance(one, str) and not _is_box(one):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise UsageError(f"phrases: {one!r} is neither a text nor a box (left, top, right, bottom)")
        out.append(one if isinstance(one, str) else cast(Box, _whole(one)))
    if not out:
        raise UsageError("phrases: none were given")
    return out


def _is_box(value: object) -> bool:
    return (
        isinstance(value, tuple)
        and len(cast("tuple[object, ...]", value)) == 4
        and all(isinstance(edge, numbers.Real) for edge in cast("tuple[object, ...]", value))
    )


def _whole(box: Box | None) -> Box | None:
    """The box in plain numbers. Raises UsageError for one that has no inside."""
    if box is None:
        return None
    left, top, right, bottom = map(float, box) if _is_box(box) else (math.nan,) * 4
    if not (left < right and top < bottom and all(map(math.isfinite, (left, top, right, bottom)))):
        raise UsageError(f"box {box!r}: must be (left, top, right, bottom) in pixels, with something in it")
    return left, top, right, bottom
