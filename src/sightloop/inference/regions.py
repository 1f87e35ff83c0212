"""Region finder of a loaded model: detection, grounding, segmentation and OCR by prompted networks.

A network's `prompts` and `region_formats` have these tasks: "detect" (all objects), "describe" (all objects, with
descriptions for names), "find" (all objects of a name), "locate" (the phrases of a text), "segment" (the outline of
what a phrase refers to), "outline" (of what a box holds), "read" (the texts in an image), "category" (the name of what
a box holds), "words" (the text in a box). In `prompts` alone: "detailed" and "long" captions, and "region" for the
caption of a box.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain, groupby
from typing import TypeAlias, TypeGuard

from sightloop.checkpoints.mask_decoder import MASK_DECODER_FILE
from sightloop.data.text.tokenizer import Tokenizer
from sightloop.errors import UnsupportedError, UsageError
from sightloop.inference.arguments import ImageInput, TextInput, VisualSource, as_images, as_list, as_strings
from sightloop.inference.image_encoding import EncodedImage, ImageEncoder
from sightloop.inference.masks import decode_masks
from sightloop.inference.text_generation import TextGenerator, WrittenText, flatten, sampling_keys
from sightloop.models.paligemma import MaskDecoder
from sightloop.protocols import PromptedNetwork, RegionNetwork
from sightloop.tasks.decoding_options import Decoding
from sightloop.tasks.generate import Generation
from sightloop.tasks.region_parser import PARSERS, Span, box_tokens, confidence, parse_phrases
from sightloop.types import Box, JsonMapping, Region, Size

RegionQuery: TypeAlias = "str | Box"  # a phrase, or a box in pixels

MAX_NEW_TOKENS = 1024  # of a text of regions, unless the caller says
_CAPTION_TASKS = {"short": "caption", "detailed": "detailed", "long": "long"}


@dataclass(frozen=True, eq=False)
class RegionFinder:
    """Finder of regions.

    Args:
        name: of the model, for messages.
        encoder: its image encoder.
        generator: its text generator.
        masks: decoder of segmentation tokens (PaliGemma), None without.
    """

    name: str
    encoder: ImageEncoder
    generator: TextGenerator
    masks: MaskDecoder | None

    def detect(
        self,
        images: ImageInput,
        phrases: TextInput | None,
        *,
        describe: bool,
        region: Box | None,
        decoding: JsonMapping,
    ) -> list[list[Region]]:
        """Objects of each image: all, those that the phrases name, or what a box holds; see `Model.detect`."""
        sources, options = list(as_images(images)), self._options(decoding)
        if (phrases is not None) + describe + (region is not None) > 1:
            raise UsageError("phrases, describe and region exclude each other; give one")
        if phrases is None:
            task = "category" if region is not None else "describe" if describe else "detect"
            return self.find(task, sources, [_checked_box(region)] * len(sources), options)
        # A single name may be a string; "cat,dog" would be searched as one name.
        is_one = isinstance(phrases, str) and "," not in phrases
        names = as_strings(phrases, "phrases") if is_one else as_list(phrases, "phrases")
        if separator := self._separator:
            return self.find("find", sources, [separator.join(names)] * len(sources), options)
        # One prompt for each image and name.
        queries = [name for _ in sources for name in names]
        regions = self.find("find", [image for image in sources for _ in names], queries, options)
        named = [
            [replace(region, label=name) for region in own]
            for name, own in zip(queries, regions, strict=True)
        ]
        return [list(chain(*named[i : i + len(names)])) for i in range(0, len(named), len(names))]

    def find_each(
        self,
        task: str,
        images: ImageInput,
        phrases: RegionQuery | Sequence[RegionQuery],
        decoding: JsonMapping,
    ) -> list[list[Region]]:
        """Locates or segments: pairs of an image and a query, or one of either with all of the other."""
        sources, queries = list(as_images(images)), _queries(phrases)
        if len(sources) == 1 or len(queries) == 1:
            sources, queries = sources * len(queries), queries * len(sources)
        if len(sources) != len(queries):
            raise UsageError(
                f"{len(sources)} images and {len(queries)} phrases: give as many, or one of either"
            )
        boxed = [not isinstance(query, str) for query in queries]
        if any(boxed) and (task != "segment" or not all(boxed)):
            raise UsageError("phrases: give texts; only segment takes boxes, and then boxes alone")
        return self.find("outline" if any(boxed) else task, sources, queries, self._options(decoding))

    def read_text(self, images: ImageInput, region: Box | None, decoding: JsonMapping) -> list[list[Region]]:
        """The texts in each image, or in a box of it."""
        sources = list(as_images(images))
        task = "read" if region is None else "words"
        return self.find(task, sources, [_checked_box(region)] * len(sources), self._options(decoding))

    def caption(
        self,
        images: ImageInput,
        *,
        length: str | None,
        region: Box | None,
        options: Decoding,
    ) -> list[str]:
        """Captions of a length, or of a box. Raises UnsupportedError if the network was not trained for them."""
        if length is not None and length not in _CAPTION_TASKS:
            raise UsageError(f"length={length!r}: must be one of {', '.join(_CAPTION_TASKS)}")
        task = "region" if length is None else _CAPTION_TASKS[length]
        network = self.generator.network
        if not isinstance(network, PromptedNetwork) or task not in network.prompts:
            raise UnsupportedError(f"{self.name} was not trained for captions of a length or of a region")
        sources, box = list(as_images(images)), _checked_box(region)
        captions: list[list[WrittenText]] = [[] for _ in sources]
        for rows, encoded in self.encoder.batches_by_image(sources):
            prompts = [self._prompt(task, box, image) for image in encoded]
            keys = sampling_keys(encoded, prompts)
            texts = self.generator.answer_prompts([[image] for image in encoded], prompts, options, keys)
            for i, own in zip(rows, texts, strict=True):
                captions[i] = own
        return flatten(captions)

    def find(
        self,
        task: str,
        images: Sequence[VisualSource],
        queries: Sequence[RegionQuery | None],
        options: Decoding,
    ) -> list[list[Region]]:
        """Regions for each pair of an image and a query, in the order in which they are written.

        Each distinct image is read and encoded once. A region without a label gets the phrase; what is said about a box
        gets the box.

        Raises:
            UnsupportedError: the network has no such task, or its mask decoder is missing.
        """
        network = self.generator.network
        formats = network.region_formats if isinstance(network, RegionNetwork) else {}
        if task not in formats:
            raise UnsupportedError(
                f"{self.name} was not trained for {task!r}; it finds: {', '.join(formats) or 'nothing'}"
            )
        kind = formats[task]
        if kind == "segments" and self.masks is None:
            raise UnsupportedError(
                f"{self.name} writes masks as tokens, whose decoder is a separate file. Put the published "
                f"{MASK_DECODER_FILE} beside the checkpoint's files, or name it: load(..., masks=PATH)"
            )
        if options.num_return != 1:
            raise UsageError(f"num_return={options.num_return}: regions have one answer")
        regions: list[list[Region]] = [[] for _ in queries]
        for rows, encoded in self.encoder.batches_by_image(images):
            prompts = [self._prompt(task, queries[i], image) for i, image in zip(rows, encoded, strict=True)]
            keys = sampling_keys(encoded, prompts)
            generations, start = self.generator.generate(
                [[image] for image in encoded], prompts, options, keys, scored=True
            )
            for i, image, text in zip(rows, encoded, generations, strict=True):
                answer = Generation(text.ids[start:], text.log_probs)
                regions[i] = self._regions(kind, answer, queries[i], image.pixels.size)
        return regions

    def _regions(self, kind: str, answer: Generation, query: RegionQuery | None, size: Size) -> list[Region]:
        """The regions of one answer."""
        separator = self._separator
        label = query if isinstance(query, str) and not (separator and separator in query) else ""
        network = self.generator.network
        ignored = network.ignored_phrases if isinstance(network, RegionNetwork) else None
        regions = regions_of(self.generator.tokenizer, kind, answer, size, label, self.masks, ignored)
        if kind == "said" and query is not None and not isinstance(query, str):
            return [replace(region, box=query) for region in regions]
        return regions

    @property
    def _separator(self) -> str:
        network = self.generator.network
        return network.phrase_separator if isinstance(network, RegionNetwork) else ""

    def _prompt(self, task: str, query: RegionQuery | None, image: EncodedImage) -> str:
        if query is None or isinstance(query, str):
            return self.generator.format_prompt(task, query)
        return self.generator.format_prompt(task, box_tokens(query, image.pixels.size))

    def _options(self, decoding: JsonMapping) -> Decoding:
        room = min(MAX_NEW_TOKENS, self.generator.network.config.text.positions or MAX_NEW_TOKENS)
        return self.generator.options(decoding, {"max_new_tokens": room})


def regions_of(
    tokenizer: Tokenizer,
    kind: str,
    answer: Generation,
    size: Size,
    label: str,
    masks: MaskDecoder | None = None,
    ignored_phrases: Sequence[str] | None = None,
) -> list[Region]:
    """The regions in a generated text.

    Args:
        tokenizer: of the network.
        kind: the text's format, a key of PARSERS.
        answer: ids and log-probabilities of the text, without a prompt.
        size: (height, width) of the image in pixels.
        label: of regions that have none.
        masks: decoder of segmentation tokens.
        ignored_phrases: phrases that are left out, None for the usual ones.
    """
    text, spans = text_with_spans(tokenizer, answer.ids)
    if kind == "phrases" and ignored_phrases is not None:
        parsed = parse_phrases(text, size, frozenset(ignored_phrases))
    else:
        parsed = PARSERS[kind](text, size)
    decoded = [None] * len(parsed)
    if masks is not None and kind == "segments":
        decoded = decode_masks(masks, parsed, size)
    return [
        Region(
            region.label or label,
            region.box,
            region.polygons,
            confidence(region.spans, spans, answer.log_probs),
            mask,
        )
        for region, mask in zip(parsed, decoded, strict=True)
    ]


def text_with_spans(tokenizer: Tokenizer, ids: Sequence[int]) -> tuple[str, list[Span]]:
    """The text of ids, location tokens included and BOS, EOS and padding not, and the span of each id in it.

    Ordinary tokens in a row share one span, as a character may be spread over several.
    """
    added = {index: token.content for index, token in tokenizer.backend.get_added_tokens_decoder().items()}
    text, spans = "", list[Span]()
    for special, run in groupby(ids, key=lambda index: index in added):
        group = list(run)
        for piece in [added[i] for i in group] if special else [tokenizer.backend.decode(group)]:
            piece = "" if piece in ("<s>", "</s>", "<pad>") else piece
            spans += [(len(text), len(text) + len(piece))] * (1 if special else len(group))
            text += piece
    return text, spans


def _queries(phrases: RegionQuery | Sequence[RegionQuery]) -> list[RegionQuery]:
    """One query, or many, as a list. Raises UsageError for what is neither a text nor a box."""
    many = [phrases] if isinstance(phrases, str) or _is_box(phrases) else phrases
    queries: list[RegionQuery] = []
    for query in many:
        if isinstance(query, str):
            queries.append(query)
        elif _is_box(query):
            queries.append(_checked_box(query) or query)
        else:
            raise UsageError(f"phrases: {query!r} is neither a text nor a box (left, top, right, bottom)")
    if not queries:
        raise UsageError("phrases: none were given")
    return queries


def _is_box(value: object) -> TypeGuard[Box]:
    return isinstance(value, tuple) and len(value) == 4 and all(isinstance(x, numbers.Real) for x in value)  # pyright: ignore[reportUnknownVariableType, reportUnknownArgumentType]


def _checked_box(box: Box | None) -> Box | None:
    """The box as floats. Raises UsageError if it has no area or is none."""
    if box is None:
        return None
    left, top, right, bottom = map(float, box) if _is_box(box) else (math.nan,) * 4
    if not (left < right and top < bottom and all(map(math.isfinite, (left, top, right, bottom)))):
        raise UsageError(f"box {box!r}: must be (left, top, right, bottom) in pixels, with something in it")
    return left, top, right, bottom
