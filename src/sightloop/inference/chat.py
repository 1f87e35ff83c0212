"""Conversations about images: the network's own prompt form, the answer in pieces as it is written."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from sightloop.data.text.tokenizer import Tokenizer
from sightloop.errors import UsageError
from sightloop.inference import prompting
from sightloop.inference.arguments import digest
from sightloop.types import JsonDict, Message

# An answer may be long; it ends where the model ends it.
_USUAL = {"max_new_tokens": 512}


def chat_stream(model: prompting.Prompter, messages: Sequence[Message], given: JsonDict) -> Iterator[str]:
    """The answer to the last message, piece by piece: whole characters, together without space around them.

    Everything is checked and all images are read before the first piece is asked for: UsageError, ImageError.
    """
    options = model.options(given, _USUAL)
    if options.num_return > 1:
        raise UsageError(f"num_return={options.num_return}: a conversation goes on from one answer")
    for place, message in enumerate(messages):
        if not isinstance(message, Message):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise UsageError(f"messages: {message!r} is no sightloop.Message")
        if not isinstance(message.images, (tuple, list)):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise UsageError(f"messages[{place}]: images must be a tuple of images, even of one")
    messages = [
        replace(one, text=prompting.escape_special_tokens(model.tokenizer, one.text))
        if one.role == "assistant"
        else one
        for one in messages
    ]
    prompt = model.network.render_chat(messages)
    for message in messages:
        prompting.check_special_tokens(model.tokenizer, message.text)
    pictures = prompting.read_distinct(model, [image for message in messages for image in message.images])
    key = digest(
        b"".join(picture.values.tobytes() for picture in pictures) + prompt.encode("utf-8", "replace")
    )
    seen = prompting.encode_images(model, pictures)
    return _pieces(model.tokenizer, prompting.generate_stream(model, seen, prompt, options, key))


def _pieces(tokenizer: Tokenizer, runs: Iterator[list[int]]) -> Iterator[str]:
    tidied = tokenizer.settings.get("clean_up_tokenization_spaces")
    said, text = "", ""
    for ids in runs:
        text = tokenizer.decode([ids])[0].strip()
        # Where spaces before marks are taken out, the last word may still move: " n" becomes "n't".
        sure = text.rpartition(" ")[0] if tidied else text
        # What is not whole yet shows as U+FFFD: a character of several tokens.
        if len(sure) > len(said) and sure.startswith(said) and not sure.endswith("\ufffd"):
            yield sure[len(said) :]
            said = sure
    if len(text) > len(said):
        yield text[len(said) :]
