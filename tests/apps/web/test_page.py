"""The page in headless Chromium, on a real server: rooms by keyboard, edits, conflicts, search without an index."""

from __future__ import annotations

import shutil
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest

from sightloop.apps.server.caption_review import Proposal
from tests.apps.server.running import Running, jpeg, running, wait_for

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed (apt install chromium)")
IMAGES = 30


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Generator[Running]:
    folder = tmp_path_factory.mktemp("photos")
    for number in range(IMAGES):
        (folder / f"{number:02d}.jpg").write_bytes(jpeg(number, (64, 48)))
        if number % 2:
            (folder / f"{number:02d}.txt").write_text(f"a gray cat {number}\n")
    import sightloop

    with running(lambda _source: sightloop.load(device="cpu"), folder=folder) as one:
        library = one.service.image_library
        assert library is not None
        library.review.propose({"00.jpg": Proposal("a proposed dog", "nano", 1.0, 0.5)})
        yield one


@pytest.fixture(scope="module")
def browser() -> Generator[Any]:
    """Chromium, started once: each test has a page without what others left (cookies, storage)."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        one = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield one
        one.close()


@pytest.fixture
def page(browser: Any, server: Running) -> Generator[Any]:
    tab = browser.new_page(viewport={"width": 1200, "height": 800})
    problems: list[str] = []
    tab.on("pageerror", lambda error: problems.append(str(error)))
    own = (server.address, "data:")
    tab.on("request", lambda request: request.url.startswith(own) or problems.append(request.url))
    tab.goto(server.address)
    tab.wait_for_selector(".cell img")
    yield tab
    tab.close()
    assert problems == []


def folder_of(server: Running) -> Path:
    folder = server.service.settings.folder
    assert folder is not None
    return folder


def test_the_grid_moves_selects_and_opens_by_keyboard(page: Any) -> None:
    assert f"{IMAGES} images" in page.inner_text(".count")
    page.focus(".grid")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("Space")
    assert page.get_attribute("#cell-1", "aria-selected") == "true"
    page.keyboard.press("End")
    assert page.get_attribute(".grid", "aria-activedescendant") == f"cell-{IMAGES - 1}"
    page.keyboard.press("Enter")
    page.wait_for_selector(".frame img")
    assert page.inner_text("h1") == f"{IMAGES - 1:02d}.jpg"


def test_captions_are_accepted_edited_and_undone_by_keyboard(page: Any, server: Running) -> None:
    folder = folder_of(server)
    page.keyboard.press("2")
    page.wait_for_selector(".editor")
    page.keyboard.press("a")
    wait_for(lambda: (folder / "00.txt").exists(), 10)
    assert (folder / "00.txt").read_text() == "a proposed dog\n"

    wait_for(lambda: page.inner_text(".editor h2") != "00.jpg", 10)
    page.keyboard.press("e")
    page.keyboard.press("Control+A")
    page.keyboard.type("typed by hand")
    name = page.inner_text(".editor h2")
    page.keyboard.press("Control+Enter")
    sidecar = folder / name.replace(".jpg", ".txt")
    wait_for(lambda: sidecar.exists() and sidecar.read_text() == "typed by hand\n", 10)

    wait_for(lambda: page.inner_text(".editor .disk") == "typed by hand", 10)
    page.keyboard.press("u")
    wait_for(lambda: not sidecar.exists() or sidecar.read_text() != "typed by hand\n", 10)


def test_a_change_on_disk_is_shown_and_not_overwritten(page: Any, server: Running) -> None:
    folder = folder_of(server)
    page.keyboard.press("2")
    page.wait_for_selector(".entry")
    page.click(".entry >> text=05.jpg")
    wait_for(lambda: page.inner_text(".editor h2") == "05.jpg", 10)
    (folder / "05.txt").write_text("changed by a shell\n")

    page.fill(".editor textarea", "mine")
    page.focus(".editor textarea")
    page.keyboard.press("Control+Enter")
    page.wait_for_selector("text=changed by a shell")

    assert (folder / "05.txt").read_text() == "changed by a shell\n"
    assert page.input_value(".editor textarea") == "mine"


def test_find_and_replace_previews_and_undoes(page: Any, server: Running) -> None:
    folder = folder_of(server)
    page.keyboard.press("2")
    page.click("summary >> text=Find and replace")
    page.fill(".replace input >> nth=0", "gray cat 7")
    page.fill(".replace input >> nth=1", "black cat")
    page.keyboard.press("Enter")
    page.wait_for_selector(".replace td >> text=black cat")
    assert (folder / "07.txt").read_text() == "a gray cat 7\n"
    page.click("button >> text=Replace in 1")
    wait_for(lambda: (folder / "07.txt").read_text() == "a black cat\n", 10)
    page.click("button >> text=Undo the replacement")
    wait_for(lambda: (folder / "07.txt").read_text() == "a gray cat 7\n", 10)


@pytest.mark.parametrize("width", [1200, 420])
def test_rooms_fit_the_screen(page: Any, width: int) -> None:
    page.set_viewport_size({"width": width, "height": 800})
    for key, heading in zip("12345", ("Library", "Captions", "Improve", "Duplicates", "Jobs"), strict=True):
        page.focus("body")
        page.keyboard.press(key)
        page.wait_for_selector(f"nav a[aria-current] >> text={heading}")
        assert page.evaluate("document.documentElement.scrollWidth") <= width
