"""Conversations about images: by the chat template's prompt, the answer streamed as it is generated, or by turns.

A network without a template answers the last question about the last image. One that was trained for dialogues (BLIP,
section 5.5) reads caption and earlier rounds as it learned to; another one reads the question alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch

from sightloop.data.text.tokenizer import Tokenizer
from sightloop.errors import UsageError
from sightloop.inference.answering import ANSWER_DEFAULTS, answer_questions
from sightloop.inference.arguments import digest
from sightloop.inference.dialogue import caption_memory, room_for
from sightloop.inference.image_encoding import ImageEncoder
from sightloop.inference.matching import TokenizedTexts
from sightloop.inference.prompting import check_special_tokens, escape_special_tokens
from sightloop.inference.text_generation import TextGenerator, WrittenText, sampling_key
from sightloop.protocols import ChatNetwork, DecoderNetwork, require
from sightloop.ranking.dialogue_network import DialogueNetwork, judges_dialogues
from sightloop.ranking.dialogue_text import dialogue_of, fitting_context
from sightloop.tasks.decoding_options import Decoding
from sightloop.types import Dialogue, ImageSource, JsonMapping, Message, Pixels

# An answer may be long; it ends where the model ends it.
CHAT_DEFAULTS = {"max_new_tokens": 512}


def chat_stream(
    encoder: ImageEncoder, generator: TextGenerator, messages: Sequence[Message], decoding: JsonMapping
) -> Iterator[str]:
    """The answer to the last message, piece by piece.

    Everything is checked and all images are read before the first piece is asked for.

    Args:
        encoder: of the model.
        generator: of the model.
        messages: the conversation; the last one is the user's.
        decoding: options of `Decoding`; with a template 512 new tokens unless said.

    Yields:
        Pieces of whole characters; joined they are the answer without space around it.

    Raises:
        UsageError: the messages are out of order, or have special tokens.
        ImageError: an image cannot be read.
    """
    options = chat_options(generator, decoding)
    if options.num_return > 1:
        raise UsageError(f"num_return={options.num_return}: a conversation continues from one answer")
    if not isinstance(generator.network, ChatNetwork):
        turn, pixels, _ = turn_parts(encoder, generator, messages)
        return iter([write_turn(encoder, generator, pixels, turn, options)[0].text])
    prompt, pixels, key = reply_parts(encoder, generator, messages)
    texts = generator.stream(encoder.encode_each(pixels), prompt, options, key)
    return _pieces(generator.tokenizer, texts)


def chat_options(generator: TextGenerator, decoding: JsonMapping) -> Decoding:
    """Decoding options of an answer in a conversation."""
    has_template = isinstance(generator.network, ChatNetwork)
    return generator.options(decoding, CHAT_DEFAULTS if has_template else ANSWER_DEFAULTS)


def turn_parts(
    encoder: ImageEncoder, generator: TextGenerator, messages: Sequence[Message]
) -> tuple[Dialogue, Pixels, ImageSource]:
    """A conversation with a network without a chat template: the dialogue, and its last image, read and as it came.

    Raises:
        UsageError: the messages are out of order, have no image, or give a caption to a network that reads none.
        ImageError: the image cannot be read.
    """
    _check_types(messages)
    if not messages or messages[-1].role != "user" or not messages[-1].text.strip():
        raise UsageError("messages: the last one must be the user's question, for the model to answer")
    caption = ""
    for place, message in enumerate(messages):
        if message.role not in ("system", "user", "assistant") or (message.role == "system" and place):
            raise UsageError(
                f"messages[{place}]: role {message.role!r}; there are user and assistant, and system as the first"
            )
        if message.images and message.role != "user":
            raise UsageError(f"messages[{place}]: only the user's messages have images")
    if messages[0].role == "system":
        caption = messages[0].text
        if not judges_dialogues(generator.network):
            raise UsageError("system: this model follows no instructions; leave the system message out")
    images = [image for message in messages for image in message.images]
    if not images:
        raise UsageError("messages: no image; this model answers questions about one")
    (pixels,) = encoder.preprocessor.read_distinct(images[-1:])
    return replace(dialogue_of(messages), caption=caption), pixels, images[-1]


def write_turn(
    encoder: ImageEncoder,
    generator: TextGenerator,
    pixels: Pixels,
    turn: Dialogue,
    options: Decoding,
    *,
    scored: bool = False,
) -> list[WrittenText]:
    """`num_return` answers to the last question of a dialogue about an image, by a network without a chat template.

    Args:
        encoder: of the model.
        generator: of the model.
        pixels: the image.
        turn: the dialogue; what of its caption and its rounds is read, see the module.
        options: how text is chosen.
        scored: whether log-probabilities are wanted.
    """
    network, tokenizer = generator.network, generator.tokenizer
    if not judges_dialogues(network):
        asked = [turn.rounds[-1].question]
        return answer_questions(encoder, generator, [pixels], asked, None, options, top=1, scored=scored)[0]
    image, reader = encoder.encode([pixels]), require(network, DialogueNetwork)
    memory = caption_memory(reader, tokenizer, image, [turn.caption])
    text = fitting_context(room_for(tokenizer), turn, len(turn.rounds) - 1, "")
    tokens = TokenizedTexts(tokenizer, [text], generator.device)
    with torch.inference_mode():
        states = require(network, DecoderNetwork).encode_text(memory, tokens.ids, tokens.device_lengths)
    key = sampling_key(pixels, f"{turn.caption}\n{text}")
    return generator.continue_texts(states, None, [key], options, scored=scored)[0]


def reply_parts(
    encoder: ImageEncoder, generator: TextGenerator, messages: Sequence[Message]
) -> tuple[str, list[Pixels], int]:
    """The prompt of a conversation, its images, and the integer that names it for sampling.

    Raises:
        UsageError: the messages are out of order, or have special tokens.
        ImageError: an image cannot be read.
    """
    _check_types(messages)
    tokenizer = generator.tokenizer
    messages = [
        replace(message, text=escape_special_tokens(tokenizer, message.text))
        if message.role == "assistant"
        else message
        for message in messages
    ]
    prompt = require(generator.network, ChatNetwork).render_chat(messages)
    for message in messages:
        check_special_tokens(tokenizer, message.text)
    images = [image for message in messages for image in message.images]
    pixels = encoder.preprocessor.read_distinct(images)
    key = digest(b"".join(one.values.tobytes() for one in pixels) + prompt.encode("utf-8", "replace"))
    return prompt, pixels, key


def _check_types(messages: Sequence[Message]) -> None:
    for i, message in enumerate(messages):
        if not isinstance(message, Message):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise UsageError(f"messages: {message!r} is no sightloop.Message")
        if not isinstance(message.images, (tuple, list)):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise UsageError(f"messages[{i}]: images must be a tuple of images, even of one")


def _pieces(tokenizer: Tokenizer, texts: Iterator[list[int]]) -> Iterator[str]:
    """What each longer text adds to the last, held back while it may still change."""
    tidies = tokenizer.settings.get("clean_up_tokenization_spaces")
    shown, text = "", ""
    for ids in texts:
        text = tokenizer.decode([ids])[0].strip()
        # Where spaces before punctuation are removed, the last word may still move: " n" becomes "n't".
        final = text.rpartition(" ")[0] if tidies else text
        # An incomplete character of several tokens shows as U+FFFD.
        if len(final) > len(shown) and final.startswith(shown) and not final.endswith("\ufffd"):
            yield final[len(shown) :]
            shown = final
    if len(text) > len(shown):
        yield text[len(shown) :]
