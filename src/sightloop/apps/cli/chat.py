"""The command `sightloop chat`: a conversation about images, on the terminal or from the lines of a file."""

from __future__ import annotations

import json
import os
import sys
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from sightloop.apps.cli.chat_index import chat_with_index, input_lines, is_index_name, without_messages
from sightloop.apps.cli.common import check_model, model_for
from sightloop.apps.cli.options import RuntimeOptions
from sightloop.apps.cli.output import print_error, print_message
from sightloop.apps.cli.ranking_options import WritingOptions
from sightloop.errors import SightloopError, UsageError
from sightloop.types import JsonMapping, Message

if TYPE_CHECKING:
    from sightloop.inference.model import Model

_EPILOGUE = (
    "Examples:\n"
    "  sightloop chat photo.jpg\n"
    "  sightloop chat photo.jpg -m llava-hf/llava-1.5-7b-hf --quantize int4 --dtype bfloat16\n"
    "  sightloop chat before.jpg after.jpg -m M --system 'Answer in one sentence.'\n"
    "  sightloop chat photos.index\n"
    "  printf 'what is this?\\nwhat color is it?\\n' | sightloop chat photo.jpg -m M --json"
)
_DECODING, _RUNTIME = WritingOptions(), RuntimeOptions()
_HELP = (
    "Ask about the images. /image FILE adds an image, /new starts a new conversation, //TEXT sends /TEXT, Ctrl-C stops "
    "an answer, an empty line or Ctrl-D exits."
)


def chat(
    *images: Annotated[str, Parameter(name="IMAGES")],
    system: str | None = None,
    cut: float = 0.1,
    decoding: WritingOptions = _DECODING,
    runtime: RuntimeOptions = _RUNTIME,
) -> int:
    """Chat with a model about images, or with an index about its images.

    Each line of standard input is a message; its answer is printed while it is generated. A model with a chat template,
    or trained for dialogues, reads all earlier messages; for another one, such as nano, each is a question about the
    last image. /image FILE adds an image to the next message, /new starts a new conversation about the images of the
    command line, //TEXT sends a message that starts with a slash. In a file or a pipe, blank lines are ignored.

    In place of images, an index of `sightloop index`: its images are searched, looked at and cited ("find a red car",
    "how many photos show a dog?", "what color is it?"), and what none of them shows is declined.

    Args:
        images: Images of the first message, none for a conversation about text; or one index.
        system: System message: instructions at the start of the conversation; the image's caption for a model that was
            trained for dialogues. Default: none.
        cut: With an index: promised rate of finds that are none, above 0 and below 1; smaller declines more.
    """
    if len(images) == 1 and is_index_name(images[0]):
        return chat_with_index(images[0], cut, runtime)
    options = decoding.as_kwargs()
    check_model("chat", runtime)
    images = tuple(map(_check_image, images))
    model = model_for("chat", runtime)
    system_messages = [] if system is None else [Message("system", system)]
    history, new_images, status, lines = list(system_messages), list(images), 0, 0
    if sys.stdin.isatty():
        print_message(_HELP)
    for line in input_lines():
        lines += 1
        if line == "/new":
            history, new_images = list(system_messages), list(images)
        elif line == "/image" or line.startswith("/image "):
            try:
                new_images.append(_check_image(line.removeprefix("/image").strip()))
            except UsageError as error:
                print_error("sightloop", error)
                status = 1
        elif line.startswith("/") and not line.startswith("//"):
            print_error("sightloop", f"{line.split()[0]}: no such command, so this line is not sent. {_HELP}")
            status = 1
        else:
            messages = [*history, Message("user", line.removeprefix("/"), tuple(new_images))]
            try:
                answer = _print_answer(model, messages, options, as_json=runtime.json)
            except (SightloopError, OSError) as error:
                if isinstance(error, UsageError) and not sys.stdin.isatty():
                    raise
                print_error("sightloop", error)
                # The message is not sent again, nor are its images; a first message keeps those of the command line.
                status, new_images = 1, [] if history != system_messages else list(images)
                continue
            history = [*messages, Message("assistant", answer)]
            new_images = []
    return status if lines else without_messages()


def _check_image(image: str) -> str:
    """The path of an image. Raises `UsageError` if there is no such file."""
    if "://" in image:
        raise UsageError(f"{image}: a URL is not read; download the image first, and name the file.")
    if not os.path.isfile(image):
        raise UsageError(f"{image or '/image'}: no such image file.")
    return image


def _print_answer(model: Model, messages: list[Message], options: JsonMapping, *, as_json: bool) -> str:
    """Generates, prints and returns the answer to the last message."""
    pieces: list[str] = []
    try:
        for piece in model.chat(messages, stream=True, **options):
            pieces.append(piece)
            if not as_json:
                print(piece, end="", flush=True)
    except KeyboardInterrupt:
        if not sys.stdin.isatty():
            raise
        # On a terminal, Ctrl-C ends the answer only; what was printed stays in the conversation.
    answer = "".join(pieces)
    row = {"question": messages[-1].text, "answer": answer}
    print(json.dumps(row, ensure_ascii=False) if as_json else "", flush=True)
    return answer


COMMANDS = {chat: _EPILOGUE}
