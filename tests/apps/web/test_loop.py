"""The whole loop on the page, by keyboard alone: rank by fit, mend or reject, fine-tune, compare, use.

SIGHTLOOP_LOOP=FOLDER runs it on photographs with captions (FOLDER/NAME.jpg, NAME.txt), of which some are swapped first;
without it, small drawings are used, which `nano` cannot be expected to judge well: then only the way is tested.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, ImageDraw

from tests.apps.server.running import running, wait_for
from tests.apps.web.browser import needs_chromium, opened_page, tab_to

pytestmark = needs_chromium
PHOTOS = os.environ.get("SIGHTLOOP_LOOP", "")
STEPS, SPOILT = (60, 30) if PHOTOS else (2, 6)


def draw_images(folder: Path) -> None:
    for number in range(24):
        color = ("red", "green", "blue")[number % 3]
        shape = ("square", "circle")[number % 2]
        image = Image.new("RGB", (64, 64), (230, 230, 210 + number))
        pen = ImageDraw.Draw(image)
        (pen.rectangle if shape == "square" else pen.ellipse)((16, 16, 48, 48), fill=color)
        image.save(folder / f"{number:02d}.jpg")
        (folder / f"{number:02d}.txt").write_text(f"a {color} {shape}\n")


def spoil(folder: Path) -> dict[str, str]:
    """Moves captions on to the next of some images. Returns the true ones by name."""
    names = sorted(path.stem for path in folder.glob("*.txt"))
    chosen = random.Random(0).sample(names, SPOILT)
    true = {name: (folder / f"{name}.txt").read_text() for name in chosen}
    for name, other in zip(chosen, [*chosen[1:], chosen[0]], strict=True):
        (folder / f"{name}.txt").write_text(true[other] if true[other] != true[name] else "a yellow boat\n")
    return true


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    place = tmp_path / "photos"
    place.mkdir()
    if not PHOTOS:
        draw_images(place)
    for path in sorted(Path(PHOTOS or place).glob("*.txt")) if PHOTOS else ():
        shutil.copy(path, place)
        shutil.copy(path.with_suffix(".jpg"), place)
    return place


def test_the_loop(folder: Path) -> None:
    import sightloop

    true = spoil(folder)
    with (
        running(lambda source: sightloop.load(source, device="cpu"), folder=folder) as server,
        opened_page(server.address) as page,
    ):
        ended = job_watcher(server.http)
        start = time.monotonic()
        page.keyboard.press("2")
        tab_to(page, "button[name=rank]")
        page.keyboard.press("Enter")
        ended("rank")
        rows = server.http.get("/api/images", params={"sort": "fit", "limit": 500}).json()["images"]
        fits = [row["fit"] for row in rows]
        assert fits == sorted(fits)
        order = [Path(row["path"]).stem in true for row in rows]
        wait_for(lambda: page.inner_text(".editor h2") == rows[0]["path"], 20)

        mended, rejected, looked_at = review(page, [row["path"] for row in rows], true)
        for name in mended:
            wait_for(lambda name=name: (folder / f"{name}.txt").read_text() == true[name], 10)
        wait_for(lambda: server.http.get("/api/info").json()["rejected"] == len(rejected), 10)
        assert len(mended) + len(rejected) == SPOILT

        page.keyboard.press("3")
        tab_to(page, ".improve input[type=number]")
        page.keyboard.press("Control+A")
        page.keyboard.type(str(STEPS))
        page.keyboard.press("Enter")
        trained = ended("train")["result"]
        run = folder / ".sightloop" / "runs" / trained["name"]
        lines = "".join((run / f"{part}.jsonl").read_text() for part in ("train", "held-out")).splitlines()
        used = [json.loads(line) for line in lines]
        learned = {Path(row["image"]).stem: row["captions"] for row in used}
        assert trained["images"] + trained["held_out"] == len(rows) - len(rejected) == len(learned)
        assert not set(rejected) & set(learned)
        assert all(learned[name] == [true[name].strip()] for name in mended)

        page.wait_for_selector(".run")
        tab_to(page, "button[name=compare]")
        page.keyboard.press("Enter")
        metrics = ended("compare")["result"]["metrics"]
        page.wait_for_selector(".run table.comparison")
        assert metrics
        assert all(row["low"] <= row["difference"] <= row["high"] for row in metrics)

        tab_to(page, "button[name=use]")
        page.keyboard.press("Enter")
        ended("use")
        page.wait_for_selector(".run .tag.done")
        image = {"path": rows[0]["path"]}
        answer = server.post("/api/caption", {"model": trained["name"], "images": image}).json()
        assert answer["captions"][0]

        print(
            f"\n{SPOILT} of {len(rows)} captions spoilt; among the first 30 of the ranking {sum(order[:30])}, ",
            end="",
        )
        print(f"60: {sum(order[:60])}, 100: {sum(order[:100])}")
        print(
            f"looked at {looked_at}, mended {len(mended)}, rejected {len(rejected)}; {STEPS} steps on ",
            end="",
        )
        print(f"{trained['images']} images, {trained['held_out']} held out; {time.monotonic() - start:.0f} s")
        for row in metrics:
            print(f"{row['name']:<12} {row['before']:.3f} -> {row['after']:.3f}  ", end="")
            print(f"{row['difference']:+.3f} [{row['low']:+.3f}, {row['high']:+.3f}]")


def review(page: Any, paths: list[str], true: dict[str, str]) -> tuple[list[str], list[str], int]:
    """Goes down the ranking: types the true caption of every second spoilt image, rejects the others' captions."""
    mended: list[str] = []
    rejected: list[str] = []
    looked_at = 0
    for looked_at, path in enumerate(paths, 1):  # noqa: B007
        name = Path(path).stem
        wait_for(lambda path=path: page.inner_text(".editor h2") == path, 10)
        if name not in true:
            page.keyboard.press("j")
        elif len(rejected) < len(mended):
            page.keyboard.press("r")  # goes on by itself
            rejected.append(name)
        else:
            page.keyboard.press("e")
            page.keyboard.press("Control+A")
            page.keyboard.type(true[name].strip())
            page.keyboard.press("Control+Enter")
            page.wait_for_function(
                "text => document.querySelector('.editor .disk').innerText === text", arg=true[name].strip()
            )
            page.keyboard.press("j")
            mended.append(name)
        if len(mended) + len(rejected) == len(true):
            break
    return mended, rejected, looked_at


def job_watcher(http: Any) -> Callable[[str], dict[str, Any]]:
    """Waits for the last job of a kind to end well, and returns it."""

    def ended(kind: str) -> dict[str, Any]:
        def last() -> dict[str, Any]:
            of_kind = [job for job in http.get("/api/jobs").json() if job["kind"] == kind]
            return of_kind[-1] if of_kind else {"state": "queued"}

        wait_for(lambda: last()["state"] not in ("queued", "running"), 900)
        assert last()["state"] == "done", last()["message"]
        return last()

    return ended
