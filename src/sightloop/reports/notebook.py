"""Progress of a long call, shown in a notebook's output; nothing elsewhere."""

from __future__ import annotations

import sys
import time
from typing import Any

from sightloop.reports import html

_SECONDS = 0.3  # between two updates


class NotebookProgress:
    """Line of a notebook's output that counts what is done, and how fast.

    Args:
        activity: what is counted: "indexing".
        unit: in plural: "images".
    """

    def __init__(self, activity: str, unit: str) -> None:
        self._activity, self._unit = activity, unit
        self._display = _display()
        self._handle: Any = None  # IPython's, which has no type hints
        self._start = self._shown = time.monotonic()
        self.done = 0

    def add(self, count: int = 1, total: int | None = None) -> None:
        """Counts some, and shows the line anew if the last time was a while ago."""
        self.done += count
        now = time.monotonic()
        if self._display is not None and now - self._shown >= _SECONDS:
            self._show(total)
            self._shown = now

    def end(self) -> None:
        """Shows the final count, if a line was shown before."""
        if self._handle is not None:
            self._show(self.done)

    def _show(self, total: int | None) -> None:
        rate = self.done / max(time.monotonic() - self._start, 1e-9)
        of = f" of {total:,}" if total else ""
        bar = html.element("progress", max=str(total), value=str(self.done)) if total else html.Html("")
        words = f" {self._activity}: {self.done:,}{of} {self._unit}, {rate:,.1f}/s"
        page = {"text/plain": words.strip(), "text/html": str(html.element("div", bar, words))}
        if self._handle is None:
            self._handle = self._display(page, raw=True, display_id=True)
        else:
            self._handle.update(page, raw=True)


def _display() -> Any:
    """IPython's `display` in a notebook; None elsewhere. IPython is not imported for it."""
    ipython: Any = sys.modules.get("IPython")
    shell = None if ipython is None else ipython.get_ipython()
    if shell is None or not hasattr(shell, "kernel"):
        return None
    return getattr(sys.modules.get("IPython.display"), "display", None)
