"""The command chat on a fake model: conversation, images, errors, interrupts."""

from __future__ import annotations

import io
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from sightloop.apps.cli import common, main
from sightloop.errors import ImageError
from sightloop.types import Message


@dataclass
class FakeChatModel:
    """Answers, in two pieces, with the number of messages and images it has seen; records them in `conversations`."""

    name: str = "model"
    capabilities: frozenset[str] = frozenset({"chat"})
    batch_size: int = 1
    conversations: list[list[Message]] = field(default_factory=list)

    def chat(self, messages: list[Message], *, stream: bool, **_: Any) -> Any:
        assert stream
        images = [image for message in messages for image in message.images]
        if "broken.jpg" in images:
            raise ImageError("broken.jpg", "cannot be read")
        self.conversations.append(messages)
        return iter([f"{len(messages)} messages, ", f"{len(images)} images"])


@pytest.fixture(autouse=True)
def images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a.jpg", "b.jpg", "broken.jpg"):
        (tmp_path / name).write_bytes(b"")
    monkeypatch.chdir(tmp_path)


def talk(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], lines: str, *arguments: str
) -> tuple[int, str, str, FakeChatModel]:
    model = FakeChatModel()
    monkeypatch.setattr(common, "load", lambda source, **_: model)
    monkeypatch.setattr("sys.stdin", io.StringIO(lines))
    status = main.main(["chat", *arguments, "-m", "M"])
    out, err = capsys.readouterr()
    return status, out, err, model


def test_a_conversation(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    lines = "what?\nand\n/image b.jpg\n\n  \nnow?\n/new\nagain\n\n//help me\n"
    status, out, err, model = talk(monkeypatch, capsys, lines, "a.jpg", "--system", "be short")
    assert status == 0
    assert err == ""
    assert out.splitlines() == [
        "2 messages, 1 images",
        "4 messages, 1 images",
        "6 messages, 2 images",
        "2 messages, 1 images",
        "4 messages, 1 images",
    ]
    assert model.conversations[-1][-1] == Message("user", "/help me")
    assert model.conversations[2] == [
        Message("system", "be short"),
        Message("user", "what?", ("a.jpg",)),
        Message("assistant", "2 messages, 1 images"),
        Message("user", "and"),
        Message("assistant", "4 messages, 1 images"),
        Message("user", "now?", ("b.jpg",)),
    ]


def test_json_rows_and_errors(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    lines = "/image broken.jpg\nwhat?\n/dance\nwhat now?"
    status, out, err, model = talk(monkeypatch, capsys, lines, "a.jpg", "--json")
    assert status == 1
    assert [json.loads(line) for line in out.splitlines()] == [
        {"question": "what now?", "answer": "1 messages, 1 images"}
    ]
    assert "broken.jpg" in err
    assert "/dance" in err
    assert model.conversations == [[Message("user", "what now?", ("a.jpg",))]]


def test_a_model_without_chat(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(common, "load", lambda source, **_: FakeChatModel(capabilities=frozenset({"embed"})))
    status = main.main(["chat", "-m", "M"])
    err = capsys.readouterr().err
    assert status == 2
    assert "cannot chat" in err


def test_ctrl_c_stops_an_answer_on_a_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    class Interrupted(FakeChatModel):
        def chat(self, messages: list[Message], *, stream: bool, **_: Any) -> Any:
            self.conversations.append(messages)
            yield "a long"
            if len(self.conversations) == 1:
                raise KeyboardInterrupt
            yield " answer"

    model, lines = Interrupted(), iter(["what?", "and?", ""])
    monkeypatch.setattr(common, "load", lambda source, **_: model)
    monkeypatch.setattr("sys.stdin", Terminal())
    monkeypatch.setattr("builtins.input", lambda _: next(lines))
    assert main.main(["chat", "a.jpg", "-m", "M"]) == 0
    assert capsys.readouterr().out.splitlines() == ["a long", "a long answer"]
    assert model.conversations[1][1:] == [Message("assistant", "a long"), Message("user", "and?")]


@pytest.mark.parametrize(
    ("lines", "status", "message", "answers"),
    [
        ("what?\n\n\n   \nand?", 0, "", 2),  # blank lines of a file do not end it
        ("/dance\nwhat?", 1, "/dance: no such command", 1),
        ("/imagination\nwhat?", 1, "/imagination: no such command", 1),
        ("/image\nwhat?", 1, "no such image file", 1),
        ("/image gone.jpg\nwhat?", 1, "gone.jpg: no such image file", 1),
        ("/image https://a.b/c.jpg\nwhat?", 1, "download", 1),
        ("//dance", 0, "", 1),
        ("", 1, "no message", 0),
        ("\n\n", 1, "no message", 0),
    ],
)
def test_no_line_of_a_file_is_dropped_silently(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    lines: str,
    status: int,
    message: str,
    answers: int,
) -> None:
    result, out, err, _ = talk(monkeypatch, capsys, lines, "a.jpg", "--json")
    assert (result, len(out.splitlines())) == (status, answers)
    assert message in err


def test_an_image_that_does_not_exist_is_reported_before_loading(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    status, _, err, model = talk(monkeypatch, capsys, "what?", "gone.jpg")
    assert status == 2
    assert "gone.jpg" in err
    assert model.conversations == []
