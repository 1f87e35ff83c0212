"""Conversations about pictures: the network's own prompt form, the answer in pieces as it is written."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from sightread.data.tokens import Tokenizer
from sightread.errors import UsageError
from sightread.pipelines import prompted
from sightread.pipelines.arguments import digest
from sightread.tasks.generate import Decoding
from sightread.types import Message

# An answer may be long; it ends where the model ends it.
_USUAL = {"max_new_tokens": 512}


def reply(model: prompted.Prompter, messages: Sequence[Message], given: dict[str, Any]) -> Iterator[str]:
    """The answer to the last message, piece by piece: whole characters, together without space around them.

    Everything is checked and all pictures are read before the first piece is asked for: UsageError, ImageError.
    """
    options = Decoding.of({**_USUAL, **given})
    if options.num_return > 1:
        raise UsageError(f"num_return={options.num_return}: a conversation goes on from one answer")
    for message in messages:
        if not isinstance(message, Message):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise UsageError(f"messages: {message!r} is no sightread.Message")
    prompt = model.network.dialogue(messages)
    pictures = prompted.prepared(model, [image for message in messages for image in message.images])
    key = digest(
        b"".join(picture.values.tobytes() for picture in pictures) + prompt.encode("utf-8", "replace")
    )
    return _pieces(model.tokenizer, prompted.stream(model, pictures, prompt, options, key))


def _pieces(tokenizer: Tokenizer, runs: Iterator[list[int]]) -> Iterator[str]:
    said, text = "", ""
    for ids in runs:
        text = tokenizer.decode([ids])[0].strip()
        # What is not whole yet shows as U+FFFD: a character of several tokens.
        if len(text) > len(said) and text.startswith(said) and not text.endswith("\ufffd"):
            yield text[len(said) :]
            said = text
    if len(text) > len(said):
        yield text[len(said) :]
