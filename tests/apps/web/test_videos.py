"""Videos on the page: badges with lengths and times, the counter, and an address that keeps the time of a hit."""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

import numpy as np
import pytest

pytest.importorskip("av")

from sightloop.data.video.writing import write_video
from tests.apps.fake_model import FakeModel
from tests.apps.server.running import Running, jpeg, running, wait_for
from tests.apps.web.browser import needs_chromium, opened_page

pytestmark = needs_chromium
SECONDS = {"a.mp4": 62, "b.mp4": 5}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Generator[Running]:
    folder = tmp_path_factory.mktemp("clips")
    for number in range(3):
        (folder / f"{number}.jpg").write_bytes(jpeg(number, (64, 48)))
    for name, seconds in SECONDS.items():
        shades = np.linspace(0, 255, seconds).astype(np.uint8)
        write_video(folder / name, [np.full((32, 48, 3), shade, np.uint8) for shade in shades], rate=1)
    (folder / "a.txt").write_text("a wall gets brighter\n")
    (folder / "broken.mp4").write_bytes(b"nothing")
    with running(lambda _source: FakeModel(), models={"fake": "fake"}, folder=folder) as one:
        yield one


def name_of(page: Any, number: int) -> str:
    return page.get_attribute(f"#cell-{number}", "aria-label")


def test_tiles_have_the_length_and_the_counter_counts_both(server: Running) -> None:
    with opened_page(server.address) as page:
        page.wait_for_selector("text=3 images, 3 videos")
        wait_for(lambda: page.locator(".badge >> text=/\\d/").count() == 2, 20)
        paths = [name_of(page, number).split(". ")[0] for number in range(6)]
        assert paths == ["0.jpg", "1.jpg", "2.jpg", "a.mp4", "b.mp4", "broken.mp4"]
        assert [page.locator(f"#cell-{number} .badge").count() for number in range(6)] == [0, 0, 0, 1, 1, 1]
        assert page.inner_text("#cell-3 .badge") == "1:02"
        assert name_of(page, 3) == "a.mp4. Video, 1:02 long. a wall gets brighter"
        assert page.inner_text("#cell-4 .badge") == "0:05"
        assert name_of(page, 5) == "broken.mp4. Video. "
        page.fill(".filter input >> nth=0", "brighter")
        page.wait_for_selector(".count >> text=/^1 video$/")
        page.fill(".filter input >> nth=0", "")
        page.fill(".filter input >> nth=1", "brighter")
        page.wait_for_selector("text=3 images, 2 videos")


def test_a_hit_keeps_its_time_in_the_address(server: Running) -> None:
    rows = {row["path"]: row for row in server.http.get("/api/images").json()["images"]}
    scenes = [(12.0, 20.0), (20.0, 40.0), (40.0, 62.0)]
    hits = [
        rows["a.mp4"] | {"start": start, "end": end, "scores": {"itc": 0.3}, "why": ""}
        for start, end in scenes
    ]
    info = server.http.get("/api/info").json() | {"index": {"rows": 9, "model": "fake"}}
    with opened_page(server.address) as page:
        page.route(
            "**/api/search", lambda route: route.fulfill(json={"hits": hits, "note": "", "searched": 9})
        )
        page.route("**/api/info", lambda route: route.fulfill(json=info))
        page.reload()
        page.fill("#search-text", "a bright wall")
        page.keyboard.press("Enter")
        page.wait_for_selector("text=The best 3 of 9 hits")
        wait_for(lambda: page.inner_text("#cell-0 .badge") == "0:12 / 1:02", 20)
        assert name_of(page, 0) == "a.mp4. Video, 1:02 long. Scene from 0:12 to 0:20. a wall gets brighter"
        page.click("#cell-0")
        wait_for(lambda: position(page) == 12, 20)
        assert "1:02" in page.inner_text(".image-room .note")
        page.keyboard.press("ArrowRight")  # another scene of the same video
        wait_for(lambda: position(page) == 20, 20)
        address = page.url
        page.reload()
        wait_for(lambda: position(page) == 20, 20)
        page.goto("about:blank")
        page.goto(address)
        wait_for(lambda: position(page) == 20, 20)


def position(page: Any) -> float | None:
    """Second at which the video on the page is; None before it knows."""
    return page.evaluate(
        "(v => v && v.readyState > 1 && !v.seeking ? v.currentTime : null)(document.querySelector('video'))"
    )
