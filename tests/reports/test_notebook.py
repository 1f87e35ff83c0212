"""Progress in notebooks: one line that is updated in place; nothing elsewhere."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from sightloop.reports import notebook
from sightloop.reports.notebook import NotebookProgress


class Handle:
    def __init__(self, shown: list[str]) -> None:
        self.shown = shown

    def update(self, page: dict[str, str], raw: bool) -> None:
        self.shown.append(page["text/plain"])


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What a fake notebook shows."""
    lines: list[str] = []

    def display(page: dict[str, str], raw: bool, display_id: bool) -> Handle:
        lines.append(page["text/plain"])
        return Handle(lines)

    ipython: Any = ModuleType("IPython")
    ipython.get_ipython = lambda: SimpleNamespace(kernel=None)
    module: Any = ModuleType("IPython.display")
    module.display = display
    monkeypatch.setitem(sys.modules, "IPython", ipython)
    monkeypatch.setitem(sys.modules, "IPython.display", module)
    return lines


def test_a_line_counts_in_place(shown: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([0.0, 0.1, 1.0, 1.0, 1.1, 2.0, 2.0, 2.0])
    monkeypatch.setattr(notebook.time, "monotonic", lambda: next(times))
    progress = NotebookProgress("indexing", "images")
    progress.add()  # too early
    progress.add(9, total=40)
    progress.add()  # too early again
    progress.add(29)
    progress.end()
    assert shown == [
        "indexing: 10 of 40 images, 10.0/s",
        "indexing: 40 images, 20.0/s",
        "indexing: 40 of 40 images, 20.0/s",
    ]


@pytest.mark.parametrize("shell", [None, SimpleNamespace()])
def test_nothing_is_shown_elsewhere(shown: list[str], shell: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["IPython"], "get_ipython", lambda: shell)
    monkeypatch.setattr(notebook, "_SECONDS", 0)
    progress = NotebookProgress("indexing", "images")
    progress.add()
    progress.end()
    assert not shown
