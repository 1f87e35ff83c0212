"""The page for people without a mouse, without good eyes, and on small screens: axe over every room, keys alone."""

from __future__ import annotations

import json
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest

from sightloop.apps.server.caption_review import CaptionReview, Proposal
from tests.apps.fake_model import FakeModel
from tests.apps.server.running import Running, jpeg, running, wait_for
from tests.apps.web.browser import needs_chromium, opened_page, tab_to

pytestmark = needs_chromium
axe_module = pytest.importorskip("axe_playwright_python.sync_playwright")
RUN = "run-20260102-030405"


def fill(folder: Path) -> None:
    """Images in every state of review, and a finished training that was compared."""
    for number in range(8):
        (folder / f"{number}.jpg").write_bytes(jpeg(number, (64, 48)))
        if number > 2:
            (folder / f"{number}.txt").write_text(f"a gray cat {number}\n")
    review = CaptionReview(folder)
    names = [f"{number}.jpg" for number in range(8)]
    review.propose({name: Proposal(f"a dog {name}", "fake", 1.0, 0.5) for name in names[:6]})
    review.reject(names[1])
    review.edit(names[4], "a black cat", review.read(names[4]).etag)
    review.refuse(names[7], review.read(names[7]).etag, True)
    review.set_fits(
        [(name, review.read(name).etag, fit) for name, fit in zip(names[3:], (0.1, 0.4, 0.9), strict=False)]
    )
    review.close()
    place = folder / ".sightloop" / "runs" / RUN
    (place / "run" / "model").mkdir(parents=True)
    (place / "run.json").write_text(
        json.dumps({"name": RUN, "model": "fake", "steps": 9, "images": 5, "held_out": 3})
    )
    row = {
        "name": "CIDEr",
        "before": 0.2,
        "after": 0.4,
        "difference": 0.2,
        "low": 0.1,
        "high": 0.3,
        "p": 0.01,
    }
    rows = [row | {"verdict": verdict} for verdict in ("better", "worse", "unclear", "")]
    (place / "comparison.json").write_text(json.dumps(rows))


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Generator[Running]:
    folder = tmp_path_factory.mktemp("photos")
    fill(folder)
    with running(lambda _source: FakeModel(), models={"fake": "fake"}, folder=folder) as one:
        yield one


def answer_search(page: Any, server: Running) -> None:
    """Answers of an index, which this server has none of."""
    rows = server.http.get("/api/images").json()["images"]
    hits = [row | {"scores": {"itc": 0.31, "itm": None, "keyword_rank": 1}, "why": "cat"} for row in rows]
    info = server.http.get("/api/info").json() | {"index": {"rows": len(rows), "model": "fake"}}
    clusters = [
        {"kind": "copy", "members": rows[:3], "evidence": ["pHash 2 of 64 bits"], "keep": rows[0]["id"]}
    ]
    job = {
        "id": "job-1",
        "kind": "train",
        "title": "Fine-tune fake",
        "command": "sightloop train",
        "state": "failed",
    }
    job |= {
        "done": 2,
        "total": 9,
        "message": "disk full",
        "failures": [{"name": "0.jpg", "reason": "cut off"}],
    }
    job |= {"curves": [{"name": "loss", "points": [[1, 3.0], [2, 2.5]]}], "result": {"name": RUN}}
    running_job = job | {"id": "job-2", "kind": "caption", "state": "running", "failures": [], "curves": []}
    answers = {
        "search": {"hits": hits, "note": "nothing here shows that, at most 5 % wrong", "searched": 8},
        "info": info,
        "duplicates": {"clusters": clusters, "summary": ""},
        "jobs": [job, running_job],
        "answer": {"model": "fake", "answers": ["a cat"]},
    }
    for name, answer in answers.items():
        page.route(f"**/api/{name}", fulfill(answer))


def fulfill(answer: Any) -> Any:
    return lambda route: route.fulfill(json=answer)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing_serious(server: Running, scheme: str) -> None:
    axe = axe_module.Axe()
    found: list[str] = []

    def check(page: Any, place: str) -> None:
        for violation in axe.run(page).response["violations"]:
            if violation["impact"] in ("serious", "critical"):
                nodes = [node["html"][:120] for node in violation["nodes"][:3]]
                found.append(f"{scheme} {page.viewport_size['width']} {place}: {violation['id']} {nodes}")

    with opened_page(server.address, color_scheme=scheme) as page:
        check(page, "library without an index")
        answer_search(page, server)
        page.reload()
        page.wait_for_selector("#search-text")
        for width in (1200, 420):
            page.set_viewport_size({"width": width, "height": 800})
            for place, act in rooms(page):
                act()
                check(page, place)
    assert found == []


def rooms(page: Any) -> Generator[tuple[str, Any]]:
    """(room, way into it) with something to see in each."""

    def go(key: str, selector: str) -> None:
        page.keyboard.press("Escape")
        page.evaluate("document.activeElement?.blur()")
        page.keyboard.press(key)
        page.wait_for_selector(selector)

    def search() -> None:
        go("1", "#search-text")
        page.keyboard.press("/")
        page.keyboard.type("a cat")
        page.keyboard.press("Enter")
        page.wait_for_selector(".score")
        page.click(".search button[aria-expanded=false]")
        page.click(".cell >> nth=1", modifiers=["Control"])

    def image() -> None:
        page.click(".search button[aria-expanded=true]")
        page.click(".cell >> nth=0")
        page.wait_for_selector(".frame img")

    def judge() -> None:
        page.click(".tabs >> text=Judge")
        page.fill(".tools textarea", "a cat\na dog")
        page.click(".tools .primary")
        page.wait_for_selector(".scores")

    def captions() -> None:
        go("2", ".editor")

    def replace() -> None:
        if not page.is_visible(".replace input >> nth=0"):
            page.click("summary >> text=Find and replace")
        page.fill(".replace input >> nth=0", "gray")
        page.fill(".replace input >> nth=1", "white")
        page.keyboard.press("Enter")
        page.wait_for_selector(".replace td")

    yield "search", search
    yield "image", image
    yield "judge", judge
    yield "captions", captions
    yield "replace", replace
    yield "improve", lambda: go("3", ".comparison")
    yield "duplicates", lambda: go("4", ".pair img")
    yield "jobs", lambda: go("5", ".job")
    yield "keys", lambda: go("?", "dialog[open]")


def test_every_room_by_keyboard_alone(server: Running) -> None:
    """The main path of each room; captions and the loop have their own tests."""
    with opened_page(server.address) as page:
        answer_search(page, server)
        page.reload()
        page.wait_for_selector("#search-text")
        press, kind = page.keyboard.press, page.keyboard.type

        # Library: search, look at a hit, the next one, back to the same place.
        press("/")
        kind("a cat")
        press("Enter")
        page.wait_for_selector(".score")
        tab_to(page, ".grid")
        press("ArrowRight")
        press("Enter")
        page.wait_for_selector(".frame img")
        assert page.inner_text("h1") == "1.jpg"
        press("ArrowRight")
        wait_for(lambda: page.inner_text("h1") == "2.jpg", 10)

        # Image: ask.
        tab_to(page, ".tools input")
        kind("what is it?")
        press("Enter")
        page.wait_for_selector(".turns li")
        press("Escape")
        press("Escape")
        page.wait_for_selector(".grid")
        tab_to(page, ".grid")
        assert page.get_attribute(".grid", "aria-activedescendant") == "cell-2"

        # Duplicates: open one; Jobs: cancel.
        press("4")
        page.wait_for_selector(".pair a")
        tab_to(page, ".pair a")
        press("Enter")
        page.wait_for_selector(".frame img")
        press("5")
        page.wait_for_selector(".job")
        page.route("**/api/jobs/*/cancel", fulfill({}))
        tab_to(page, ".job button:last-of-type")
        with page.expect_request("**/api/jobs/job-2/cancel"):
            press("Enter")

        # Help opens and closes.
        press("?")
        page.wait_for_selector("dialog[open]")
        press("Escape")
        page.wait_for_selector("dialog[open]", state="detached")
