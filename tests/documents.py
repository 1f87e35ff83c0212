"""Markdown as tests see it: blocks, commands, links and anchors; and a page run top to bottom, as a reader would.

A page runs in one fresh folder: a small random checkpoint stands under the name of every model, and a small image under
the name of every image, that a line mentions. Nothing is fetched. A block after the comment `<!-- not run: REASON -->`
is parsed and not run.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from sightloop.checkpoints.catalog import CATALOG, CatalogEntry
from tests.rules import PACKAGE, REPOSITORY

IMAGES = re.compile(r"(?<![\w/])((?:[\w.-]+/)*[\w-]+\.(?:jpe?g|png|webp|gif|bmp|tiff?))(?![\w/])")
FOLDERS = re.compile(r"(?<![\w./-])([\w-]+(?:/[\w-]+)*)/(?=[\s\"')]|$)")
SHELLS = ("bash", "sh", "shell", "console")
NOT_RUN = re.compile(r"<!-- not run: .+ -->\s*$")
# Modules that pages start and the repository does not have.
MODULES = {"build", "http", "pip", "pytest", "ruff", "sightloop", "venv"}
TIMEOUT = 900


@dataclass(frozen=True)
class Block:
    """A fenced block: the word behind the fence, the text, and whether it is only parsed."""

    language: str
    text: str
    runs: bool = True


def blocks(markdown: str) -> list[Block]:
    found = re.finditer(r"^```[ \t]*([\w+-]*)[^\n]*\n(.*?)^```[ \t]*$", markdown, re.MULTILINE | re.DOTALL)
    return [Block(match[1], match[2], runs=not NOT_RUN.search(markdown[: match.start()])) for match in found]


def lines_of(block: Block) -> list[str]:
    """The commands of a bash block, or those behind `$` of a console block; continued lines joined, comments gone."""
    if block.language not in SHELLS:
        return []
    lines = re.sub(r"\\\n\s*", " ", block.text).splitlines()
    if block.language == "console":
        lines = [line[2:] for line in lines if line.startswith("$ ")]
    return [line.strip() for line in lines if words(line)]


def command_lines(markdown: str) -> list[str]:
    return [line for block in blocks(markdown) for line in lines_of(block)]


def words(line: str) -> list[str]:
    """A command's words, without its comment."""
    return shlex.split(line, comments=True)


def commands(markdown: str, program: str) -> list[str]:
    return [line for line in command_lines(markdown) if words(line)[0] == program]


def sightloop_arguments(markdown: str) -> Iterator[list[str]]:
    """The words behind `sightloop` of every command that starts it, also under `torchrun` and `python -m`."""
    for line in command_lines(markdown):
        parts = words(line)
        if parts[0] == "sightloop":
            yield parts[1:]
        elif "-m" in parts and parts[parts.index("-m") + 1] == "sightloop":
            yield parts[parts.index("-m") + 2 :]


def steps(markdown: str) -> list[tuple[str, str]]:
    """("sightloop", line) and ("python", text) of the blocks that run, in their order."""
    found: list[tuple[str, str]] = []
    for block in blocks(markdown):
        if block.runs and block.language in ("python", "py"):
            found.append(("python", block.text))
        elif block.runs:
            found += [("sightloop", line) for line in lines_of(block) if words(line)[0] == "sightloop"]
    return found


# Programs and files that pages name.


def make_targets(makefile: str) -> set[str]:
    return set(re.findall(r"^([\w-]+):(?!=)", makefile, re.MULTILINE))


def strange_targets(markdown: str, makefile: str) -> list[str]:
    known = make_targets(makefile)
    asked = [word for line in commands(markdown, "make") for word in words(line)[1:] if "=" not in word]
    return [word for word in asked if not word.startswith("-") and word not in known]


def strange_extras(markdown: str, extras: set[str]) -> list[str]:
    named = re.findall(r"sightloop\[([\w,\s-]+)\]", markdown)
    return [extra for names in named for extra in re.split(r"\s*,\s*", names) if extra not in extras]


def strange_scripts(markdown: str, root: Path) -> list[str]:
    """Scripts and modules behind `python` that the repository does not have."""
    missing: list[str] = []
    for line in commands(markdown, "python"):
        first, *rest = [*words(line)[1:], ""]
        name = rest[0] if first == "-m" else first
        path = root / (name.replace(".", "/") + ".py") if first == "-m" else root / name
        module = name.partition(".")[0] if first == "-m" else ""
        if not path.exists() and module not in MODULES:
            missing.append(name)
    return missing


# Links and anchors.


def prose(markdown: str) -> str:
    """A page without its fenced blocks, those inside lists and notes too."""
    return re.sub(r"^([ \t]*)```.*?^\1```[ \t]*$", "", markdown, flags=re.MULTILINE | re.DOTALL)


def slug(heading: str) -> str:
    """The anchor of a heading, as Python-Markdown's toc makes it."""
    text = re.sub(r"\[([^\]]*)\]\([^)]*\)|[`*]", r"\1", heading)
    text = re.sub(r"[^\w\s-]", "", text.encode("ascii", "ignore").decode()).strip().lower()
    return re.sub(r"[-\s]+", "-", text)


def anchors(markdown: str) -> set[str]:
    """Anchors of a page: its headings (a repeated one is numbered) and the names that mkdocstrings puts there."""
    found: set[str] = set()
    for heading in re.findall(r"^#{1,6} (.+?)#*$", prose(markdown), re.MULTILINE):
        name, number = slug(heading), 0
        while (anchor := f"{name}_{number}" if number else name) in found:
            number += 1
        found.add(anchor)
    return found | set(re.findall(r"^::: ([\w.]+)$", markdown, re.MULTILINE))


def links(markdown: str) -> list[str]:
    """Targets of the links and images of a page that are in the repository."""
    found = re.findall(r"\]\(([^)\s]+)[^)]*\)|(?:src|href)=\"([^\"]+)\"", prose(markdown))
    return [a or b for a, b in found if "://" not in (a or b) and not (a or b).startswith("mailto:")]


def dead_links(path: Path, pages: Mapping[Path, str]) -> list[str]:
    """Links of the page `path` to files or anchors that are not there. pages: path -> text as the build makes it."""
    dead: list[str] = []
    for link in links(pages[path]):
        name, _, anchor = link.partition("#")
        target = (path.parent / name).resolve() if name else path
        text = pages.get(target)
        if not target.exists() or (anchor and (text is None or anchor not in anchors(text))):
            dead.append(link)
    return dead


# A page run.


def furnish(folder: Path, text: str, models: Path) -> None:
    """Put a checkpoint, an image or a folder of images where `text` names one. models: checkpoints that are there."""
    for entry in CATALOG:
        if not re.search(rf"(?<![\w/-]){re.escape(entry.name)}(?![\w-])", text) or "/" not in entry.name:
            continue
        if not (models / entry.name).is_dir():
            write_model(models / entry.name, entry)
        if (models / entry.name).is_dir():
            shutil.copytree(models / entry.name, folder / entry.name)
    for name in set(IMAGES.findall(text)):
        draw(folder / name)
    for name in set(FOLDERS.findall(text)):
        for i in range(2):
            draw(folder / name / f"{i}.jpg")


def write_model(place: Path, entry: CatalogEntry) -> None:
    """A small random checkpoint of an entry's family and layout, where there is a writer of one."""
    from tests.tiny_checkpoints.clip_and_blip import write_blip, write_clip
    from tests.tiny_checkpoints.florence import write_florence
    from tests.tiny_checkpoints.llava import LLAVA_15, write_llava

    if entry.family == "clip":
        write_clip(place)
    elif entry.family == "stable_diffusion":
        from tests.tiny_checkpoints.stable_diffusion import (
            write_stable_diffusion,  # imports diffusers: slow
        )

        write_stable_diffusion(place, "turbo" if "turbo" in entry.name else "1")
    elif entry.family == "florence":
        write_florence(place)
    elif entry.family == "llava":
        write_llava(place, tiled=False, template=LLAVA_15)
    elif entry.family == "blip" and entry.layout != "original":
        head = next(head for head in ("answer", "match", "caption") if head in entry.capabilities)
        write_blip(place, head=head)


def draw(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.effect_noise((48, 36), 80).convert("RGB").save(path)


def run_pages(pages: Mapping[str, str], folder: Path) -> dict[str, list[str]]:
    """Runs each page in a folder of its own, all in one process: page -> what failed, with its traceback."""
    plan: list[tuple[str, str, Sequence[tuple[str, str]]]] = []
    for name, markdown in pages.items():
        place = folder / re.sub(r"\W", "-", name)
        place.mkdir()
        todo = steps(markdown)
        furnish(place, "\n".join(text for _, text in todo), folder / "models")
        plan.append((name, str(place), todo))
    report = folder / "report.json"
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(PACKAGE.parent), str(REPOSITORY)]),
        "HF_HUB_OFFLINE": "1",
        "COLUMNS": "100",
    }
    done = subprocess.run(
        [sys.executable, "-m", "tests.page_runner", str(report)],
        input=json.dumps(plan),
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
    )
    if done.returncode or not report.is_file():
        raise AssertionError(f"the runner of the pages ended with {done.returncode}:\n{done.stderr[-4000:]}")
    return json.loads(report.read_text("utf-8"))
