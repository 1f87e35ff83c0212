"""Conversations about images: the chat template's prompt, the answer streamed as it is generated."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from sightloop.data.text.tokenizer import Tokenizer
from sightloop.errors import UsageError
from sightloop.inference.arguments import digest
from sightloop.inference.image_encoding import ImageEncoder
from sightloop.inference.prompting import check_special_tokens, escape_special_tokens
from sightloop.inference.text_generation import TextGenerator
from sightloop.protocols import ChatNetwork, require
from sightloop.types import JsonMapping, Message, Pixels

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
        decoding: options of `Decoding`; 512 new tokens unless said.

    Yields:
        Pieces of whole characters; joined they are the answer without space around it.

    Raises:
        UsageError: the messages are out of order, or have special tokens.
        ImageError: an image cannot be read.
    """
    options = generator.options(decoding, CHAT_DEFAULTS)
    if options.num_return > 1:
        raise UsageError(f"num_return={options.num_return}: a conversation continues from one answer")
    prompt, pixels, key = reply_parts(encoder, generator, messages)
    texts = generator.stream(encoder.encode_each(pixels), prompt, options, key)
    return _pieces(generator.tokenizer, texts)


def reply_parts(
    encoder: ImageEncoder, generator: TextGenerator, messages: Sequence[Message]
) -> tuple[str, list[Pixels], int]:
    """The prompt of a conversation, its images, and the integer that names it for sampling.

    Raises:
        UsageError: the messages are out of order, or have special tokens.
        ImageError: an image cannot be read.
    """
    for i, message in enumerate(messages):
        if not isinstance(message, Message):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise UsageError(f"messages: {message!r} is no sightloop.Message")
        if not isinstance(message.images, (tuple, list)):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise UsageError(f"messages[{i}]: images must be a tuple of images, even of one")
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
