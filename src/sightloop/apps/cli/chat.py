"""The command `sightloop chat`: a conversation about images on the terminal, or from lines of a file."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from sightloop.apps.cli.common import model_for
from sightloop.apps.cli.options import DecodingOptions, MachineOptions
from sightloop.apps.cli.output import complain, say
from sightloop.errors import SightloopError, UsageError
from sightloop.types import Message

if TYPE_CHECKING:
    from sightloop.inference.load import Model

_EPILOGUE = (
    "Examples:\n"
    "  sightloop chat photo.jpg -m llava-hf/llava-1.5-7b-hf --quantize int4 --dtype bfloat16\n"
    "  sightloop chat before.jpg after.jpg -m M --system 'Answer in one sentence.'\n"
    "  printf 'what is this?\\nwhat colour is it?\\n' | sightloop chat photo.jpg -m M --json"
)
_DECODING, _MACHINE = DecodingOptions(), MachineOptions()
_HELP = (
    "Ask about the images. /image FILE shows one more, /new starts again, Ctrl-C cuts an answer short, an empty "
    "line or Ctrl-D ends."
)


def chat(
    *images: Annotated[str, Parameter(name="IMAGES")],
    system: str | None = None,
    decoding: DecodingOptions = _DECODING,
    machine: MachineOptions = _MACHINE,
) -> int:
    """Talk with a model about images: every line that you write is answered as it is made.

    The conversation so far is part of every question. Lines may also come
    from a file or a pipe. /image FILE shows one more image with the next
    question, /new forgets all but the images of the command.

    Parameters
    ----------
    images
        The images that the first question is about; none for a conversation without.
    system
        How the model is to behave, said before the conversation.
    """
    machine.check()
    options = decoding.given()
    model = model_for("chat", machine)
    opening = [] if system is None else [Message("system", system)]
    said, shown, failed = list(opening), list(images), 0
    if sys.stdin.isatty():
        say(_HELP)
    for line in _lines():
        if line == "/new":
            said, shown = list(opening), list(images)
        elif line.startswith("/image "):
            shown.append(line.removeprefix("/image ").strip())
        elif line.startswith("/"):
            complain("sightloop", f"{line.split()[0]}: no such command. {_HELP}")
        else:
            asked = [*said, Message("user", line, tuple(shown))]
            try:
                answer = _answer(model, asked, options, as_json=machine.json)
            except (SightloopError, OSError) as error:
                if isinstance(error, UsageError) and not sys.stdin.isatty():
                    raise
                complain("sightloop", error)
                failed, shown = 1, [] if said != opening else list(images)
                continue
            said = [*asked, Message("assistant", answer)]
            shown = []
    return failed


def _answer(model: Model, asked: list[Message], options: dict[str, object], *, as_json: bool) -> str:
    pieces: list[str] = []
    try:
        for piece in model.chat(asked, stream=True, **options):
            pieces.append(piece)
            if not as_json:
                print(piece, end="", flush=True)
    except KeyboardInterrupt:
        if not sys.stdin.isatty():
            raise
        # On a terminal it cuts the answer short; what was shown stays said.
    answer = "".join(pieces)
    print(
        json.dumps({"question": asked[-1].text, "answer": answer}, ensure_ascii=False) if as_json else "",
        flush=True,
    )
    return answer


def _lines() -> Iterator[str]:
    """What the user writes, line by line, until an empty line or the end; on a terminal after a mark."""
    while True:
        try:
            line = input("> ") if sys.stdin.isatty() else sys.stdin.readline()
        except EOFError:
            return
        if not line.strip():
            return
        yield line.strip()


COMMANDS = {chat: _EPILOGUE}
