"""`sightloop chat INDEX`: a conversation over the images of an index."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

from sightloop.apps.cli.checks import check_checkpoint
from sightloop.apps.cli.common import model_for
from sightloop.apps.cli.options import RuntimeOptions
from sightloop.apps.cli.output import print_error, print_message
from sightloop.dialogue.collection_chat import CollectionChat, GroundedAnswer
from sightloop.errors import SightloopError, UsageError

_HELP = "Ask for images, how many there are, or what one shows. An empty line or Ctrl-D exits."
_RERANK = 16  # best hits that ITM scores again


def is_index_name(name: str) -> bool:
    """Whether a name is that of an index: a folder, or the address of a server."""
    if not name.startswith("qdrant://") and not Path(name).is_dir():
        return False
    from sightloop.search.index import is_index

    if is_index(name):
        return True
    raise UsageError(
        f"{name}: is a folder without an index; make one with `sightloop index {name} --store {name}.index`"
    )


def chat_with_index(name: str, cut: float, runtime: RuntimeOptions) -> int:
    """Answers each line of standard input from the images of an index; the exit status."""
    if not 0 < cut < 1:
        raise UsageError(f"--cut {cut:g}: must be above 0 and below 1.")
    runtime.check()
    check_checkpoint(runtime.source)
    from sightloop.search.index import open_index

    index = open_index(name)
    capability = "answer" if runtime.model is None else "caption"
    model = model_for(capability, runtime)
    space = index.info.spaces[0]
    if space.model == model.name:
        index.use_model(model)
    if can_judge := "match" in model.capabilities:
        index.use_judge(model)
    chat = CollectionChat(index, model, cut=cut, rerank=_RERANK if can_judge else 0)
    status, lines = 0, 0
    if sys.stdin.isatty():
        print_message(f"{name}: {len(index):,} images. {_HELP}")
    for line in input_lines():
        lines += 1
        try:
            _print(line, chat.ask(line), as_json=runtime.json)
        except SightloopError as error:
            print_error("sightloop", error)
            status = 1
    if not lines and not sys.stdin.isatty():
        print_error("sightloop", "standard input has no message; write one on each line.")
        return 1
    return status


def _print(question: str, answer: GroundedAnswer, *, as_json: bool) -> None:
    if as_json:
        print(json.dumps({"question": question, **answer.as_json()}, ensure_ascii=False), flush=True)
        return
    print(answer.text, flush=True)
    if answer.note.startswith("no cut"):
        print_message(answer.note)
    for citation in answer.citations:
        print(f"  [{citation.number}] {_printable(citation.name)}", flush=True)


def _printable(name: str) -> str:
    """A file name without characters that a terminal obeys."""
    return "".join(letter if letter.isprintable() else "\ufffd" for letter in name)


def input_lines() -> Iterator[str]:
    """The lines of standard input that are not blank; on a terminal, with a prompt and up to a blank one."""
    if not sys.stdin.isatty():
        yield from filter(None, map(str.strip, sys.stdin))
        return
    while True:
        try:
            line = input("> ").strip()
        except EOFError:
            return
        if not line:
            return
        yield line
