"""Text generator of a loaded model: captions and answers from image tokens, whole or streamed."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from sightloop.data.text.tokenizer import Tokenizer
from sightloop.errors import UsageError
from sightloop.inference.arguments import digest
from sightloop.inference.generation_config import decoding_options
from sightloop.inference.image_encoding import EncodedImage
from sightloop.inference.prompting import format_prompt, prompt_ids
from sightloop.protocols import DecoderNetwork, Network, PromptedNetwork, require
from sightloop.tasks import generate
from sightloop.tasks.decoding_options import Decoding
from sightloop.tasks.generate import Generation
from sightloop.types import Encoded, JsonDict, JsonMapping, Pixels


class WrittenText(NamedTuple):
    """A text as a caller sees it.

    Attributes:
        text: without space around it.
        log_prob: mean log-probability of its tokens in nats, at most 0; NaN unless asked for.
    """

    text: str
    log_prob: float = math.nan


@dataclass(eq=False)
class TextGenerator:
    """Writer of a loaded model.

    Args:
        network: the model's network.
        tokenizer: its tokenizer.
        device: of the network.
        defaults: decoding options of the checkpoint (generation_config.json).
    """

    network: Network
    tokenizer: Tokenizer
    device: torch.device
    defaults: JsonMapping = field(default_factory=JsonDict)

    @property
    def is_prompted(self) -> bool:
        """Whether the network reads images among the words of a prompt."""
        return isinstance(self.network, PromptedNetwork)

    def options(self, options: JsonMapping, verb_defaults: JsonMapping | None = None) -> Decoding:
        """Decoding options: the caller's, else the verb's, else the checkpoint's. Raises UsageError."""
        return decoding_options(self.defaults, verb_defaults or {}, options)

    # Networks with their own decoder (BLIP).

    def continue_texts(
        self,
        memory: Encoded,
        prompts: Sequence[str] | None,
        keys: Sequence[int],
        options: Decoding,
        *,
        scored: bool = False,
    ) -> list[list[WrittenText]]:
        """Texts for B memories, each continuing its prompt.

        Prompts of one length go through the decoder together.

        Args:
            memory: image tokens, or a question's states, `[B, N, D]`.
            prompts: B texts, None to start from nothing.
            keys: B integers that name the rows for sampling.
            options: how text is chosen.
            scored: whether log-probabilities are wanted.

        Returns:
            For each memory `num_return` texts, prompt included.
        """
        network = require(self.network, DecoderNetwork)
        config = network.config
        if prompts is None:
            ids = torch.full((len(keys), 1), config.start_id, device=self.device)
            lengths = torch.ones(len(keys), dtype=torch.long)
        else:
            tokens = self.tokenizer.encode(list(prompts))
            ids, lengths = torch.from_numpy(tokens.ids).to(self.device), torch.from_numpy(tokens.lengths)
            ids[:, 0] = config.start_id
            lengths = lengths - 1  # without EOS
        _check_room(options, config.text.positions - int(lengths.max()))
        texts: list[list[WrittenText]] = [[] for _ in keys]
        for length in sorted(set(lengths.tolist())):
            rows = (lengths == length).nonzero().squeeze(1)
            generations = generate.generate(
                network.decoder,
                memory if len(rows) == len(keys) else select_rows(memory, rows.to(self.device)),
                ids[rows.to(self.device), :length],
                options,
                end_id=config.end_id,
                keys=[keys[row] for row in rows.tolist()],
                scored=scored,
            )
            decoded = self._decode(generations, options.num_return)
            for row, own in zip(rows.tolist(), decoded, strict=True):
                texts[row] = own
        return texts

    # Networks that are prompted.

    def format_prompt(self, task: str, text: str | None = None) -> str:
        """The network's prompt of a task, with the caller's text; see `prompting.format_prompt`."""
        return format_prompt(require(self.network, PromptedNetwork).prompts, self.tokenizer, task, text)

    def answer_prompts(
        self,
        images: Sequence[Sequence[EncodedImage]],
        prompts: Sequence[str],
        options: Decoding,
        keys: Sequence[int],
        *,
        scored: bool = False,
    ) -> list[list[WrittenText]]:
        """`num_return` texts for each of R prompts with their images; see `generate`."""
        generations, start = self.generate(images, prompts, options, keys, scored=scored)
        without = [Generation(text.ids[start:], text.log_probs) for text in generations]
        return self._decode(without, options.num_return)

    @torch.inference_mode()
    def generate(
        self,
        images: Sequence[Sequence[EncodedImage]],
        prompts: Sequence[str],
        options: Decoding,
        keys: Sequence[int],
        *,
        scored: bool = False,
    ) -> tuple[list[Generation], int]:
        """Token ids that continue (or answer) R prompts.

        Args:
            images: the images of each prompt, in the order of their places.
            prompts: in the network's own form.
            options: how text is chosen.
            keys: R integers that name the rows for sampling.
            scored: whether log-probabilities are wanted.

        Returns:
            R * num_return generations, and how many of their first ids the decoder started from.
        """
        network = require(self.network, PromptedNetwork)
        prefix, start = self._start(images, prompts, options)
        generations = generate.generate(
            network.language,
            prefix,
            start,
            options,
            end_id=network.config.end_id,
            keys=keys,
            prefix_length=start.shape[1] - len(network.config.start_ids),
            scored=scored,
        )
        return generations, start.shape[1]

    def stream(
        self, images: Sequence[EncodedImage], prompt: str, options: Decoding, key: int
    ) -> Iterator[list[int]]:
        """Ids of one text after every new token, without those that the decoder started from.

        The prompt is checked and read at once, not with the first token.
        """
        network = require(self.network, PromptedNetwork)
        prefix, start = self._start([images], [prompt], options)
        texts = generate.stream(
            network.language,
            prefix,
            start,
            options,
            end_id=network.config.end_id,
            key=key,
            prefix_length=start.shape[1] - len(network.config.start_ids),
        )
        return (ids[start.shape[1] :] for ids in texts)

    @torch.inference_mode()
    def build_prefix(
        self, images: Sequence[Sequence[EncodedImage]], prompts: Sequence[str]
    ) -> tuple[Encoded, Tensor]:
        """What the language model starts from, tokens `[R, L, D]`, and the prompts' ids `[R, L]`, padded in front."""
        network = require(self.network, PromptedNetwork)
        lengths = [[len(image.tokens) for image in row] for row in images]
        ids, valid_mask = prompt_ids(self.tokenizer, network.config, prompts, lengths)
        tokens = [image.tokens for row in images for image in row]
        image_tokens = torch.cat(tokens) if tokens else torch.zeros(0, 1, device=self.device)
        ids = ids.to(self.device)
        return network.build_prefix(image_tokens, ids, valid_mask.to(self.device)), ids

    @torch.inference_mode()
    def _start(
        self, images: Sequence[Sequence[EncodedImage]], prompts: Sequence[str], options: Decoding
    ) -> tuple[Encoded, Tensor]:
        """The prefix or memory, and the ids `[R, L]` that the decoder's texts start with. Raises UsageError."""
        config = require(self.network, PromptedNetwork).config
        prefix, ids = self.build_prefix(images, prompts)
        limit, length = config.text.positions, ids.shape[1]
        if limit:
            _check_room(options, limit if config.start_ids else limit - length)
        start = torch.tensor([config.start_ids] * len(prompts), dtype=torch.long, device=self.device)
        if not config.start_ids and (options.repetition_penalty != 1.0 or options.no_repeat_ngram):
            # Penalties see the prompt too; its first token takes the place of padding.
            assert prefix.mask is not None
            first = ids.gather(1, prefix.mask.long().argmax(dim=1, keepdim=True))
            start = torch.where(prefix.mask, ids, first).clamp(max=config.text.vocab - 1)
        return prefix, start

    def _decode(self, generations: Sequence[Generation], each: int) -> list[list[WrittenText]]:
        """Texts of generations, `each` of them a row."""
        decoded = self.tokenizer.decode([text.ids for text in generations])
        texts = [
            WrittenText(text.strip(), sum(one.log_probs) / len(one.log_probs) if one.log_probs else math.nan)
            for text, one in zip(decoded, generations, strict=True)
        ]
        return [texts[i : i + each] for i in range(0, len(texts), each)]


def select_rows(encoded: Encoded, rows: slice | Tensor) -> Encoded:
    """Some rows of a tower's output: tokens `[B, N, D]` -> `[b, N, D]`."""
    pooled = None if encoded.pooled is None else encoded.pooled[rows]
    return Encoded(encoded.tokens[rows], pooled, None if encoded.mask is None else encoded.mask[rows])


def sampling_keys(images: Sequence[EncodedImage], texts: Sequence[str]) -> list[int]:
    """Integers that name pairs of an image and a text for sampling, whatever their place in a batch."""
    return [sampling_key(image.pixels, text) for image, text in zip(images, texts, strict=True)]


def sampling_key(pixels: Pixels, text: str = "") -> int:
    """Integer that names an image and what is asked about it."""
    return digest(pixels.values.tobytes() + text.encode("utf-8", "replace"))


def flatten(rows: Sequence[Sequence[WrittenText]]) -> list[str]:
    """The texts of all rows in one list."""
    return [one.text for row in rows for one in row]


def _check_room(options: Decoding, room: int) -> None:
    if options.max_new_tokens > room:
        raise UsageError(
            f"max_new_tokens={options.max_new_tokens}: this model has room for {room} after the prompt"
        )
