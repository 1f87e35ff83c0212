"""The page in headless Chromium, for tests that look at it."""

from __future__ import annotations

import shutil
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
needs_chromium = pytest.mark.skipif(
    CHROMIUM is None, reason="Chromium is not installed (apt install chromium)"
)


@contextmanager
def opened_page(address: str, **options: Any) -> Generator[Any]:
    """The page of a server in a new browser. Fails if it throws, or asks another server for something.

    Args:
        address: of the server.
        options: of playwright's `new_page`.
    """
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(**{"viewport": {"width": 1200, "height": 800}, **options})
        problems: list[str] = []
        page.on("pageerror", lambda error: problems.append(str(error)))
        own = (address, "data:", "blob:")
        page.on("request", lambda request: request.url.startswith(own) or problems.append(request.url))
        page.goto(address)
        page.wait_for_selector("main section")
        yield page
        browser.close()
        assert problems == []


def tab_to(page: Any, selector: str, limit: int = 60) -> None:
    """Presses Tab until an element has the focus, as somebody without a mouse does."""
    for _ in range(limit):
        if page.evaluate("selector => document.activeElement?.matches(selector) ?? false", selector):
            return
        page.keyboard.press("Tab")
    raise AssertionError(f"{selector} is not reached by Tab")
