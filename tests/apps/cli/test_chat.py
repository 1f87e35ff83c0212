"""sightloop chat, around a model of a few lines."""

from __future__ import annotations

import io
import json
from dataclasses import dataclass, field
from typing import Any

import pytest

from sightloop.apps.cli import common, main
from sightloop.errors import ImageError
from sightloop.types import Message


@dataclass
class Talker:
    """Answers with how many words and images it was shown, in two pieces."""

    name: str = "talker"
    capabilities: frozenset[str] = frozenset({"chat"})
    batch_size: int = 1
    heard: list[list[Message]] = field(default_factory=list)

    def chat(self, messages: list[Message], *, stream: bool, **_: Any) -> Any:
        assert stream
        images = [image for message in messages for image in message.images]
        if "broken.jpg" in images:
            raise ImageError("broken.jpg", "cannot be read")
        self.heard.append(messages)
        return iter([f"{len(messages)} said, ", f"{len(images)} shown"])


def talk(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], lines: str, *arguments: str
) -> tuple[int, str, str, Talker]:
    talker = Talker()
    monkeypatch.setattr(common, "load", lambda source, **_: talker)
    monkeypatch.setattr("sys.stdin", io.StringIO(lines))
    status = main.main(["chat", *arguments, "-m", "M"])
    out, err = capsys.readouterr()
    return status, out, err, talker


def test_a_conversation(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    lines = "what?\nand\n/image b.jpg\nnow?\n/new\nagain\n\nnever read\n"
    status, out, err, talker = talk(monkeypatch, capsys, lines, "a.jpg", "--system", "be short")
    assert status == 0
    assert err == ""
    assert out.splitlines() == ["2 said, 1 shown", "4 said, 1 shown", "6 said, 2 shown", "2 said, 1 shown"]
    assert talker.heard[2] == [
        Message("system", "be short"),
        Message("user", "what?", ("a.jpg",)),
        Message("assistant", "2 said, 1 shown"),
        Message("user", "and"),
        Message("assistant", "4 said, 1 shown"),
        Message("user", "now?", ("b.jpg",)),
    ]


def test_json_and_what_goes_wrong(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = "/image broken.jpg\nwhat?\n/dance\nwhat now?"
    status, out, err, talker = talk(monkeypatch, capsys, lines, "a.jpg", "--json")
    assert status == 1
    assert [json.loads(line) for line in out.splitlines()] == [
        {"question": "what now?", "answer": "1 said, 1 shown"}
    ]
    assert "broken.jpg" in err
    assert "/dance" in err
    assert talker.heard == [[Message("user", "what now?", ("a.jpg",))]]


def test_a_model_that_cannot(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(common, "load", lambda source, **_: Talker(capabilities=frozenset({"embed"})))
    status = main.main(["chat", "-m", "M"])
    err = capsys.readouterr().err
    assert status == 2
    assert "cannot chat" in err


def test_an_answer_is_cut_short_on_a_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    class Interrupted(Talker):
        def chat(self, messages: list[Message], *, stream: bool, **_: Any) -> Any:
            self.heard.append(messages)
            yield "a long"
            if len(self.heard) == 1:
                raise KeyboardInterrupt
            yield " answer"

    talker, lines = Interrupted(), iter(["what?", "and?", ""])
    monkeypatch.setattr(common, "load", lambda source, **_: talker)
    monkeypatch.setattr("sys.stdin", Terminal())
    monkeypatch.setattr("builtins.input", lambda _: next(lines))
    assert main.main(["chat", "a.jpg", "-m", "M"]) == 0
    assert capsys.readouterr().out.splitlines() == ["a long", "a long answer"]
    assert talker.heard[1][1:] == [Message("assistant", "a long"), Message("user", "and?")]
