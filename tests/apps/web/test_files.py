"""The page: vendored libraries as they were fetched, imports that resolve, texts that exist, no outside request."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

import pytest

from sightloop.apps.web.files import ROOT

MODULES = sorted(path for path in ROOT.rglob("*.js") if "vendor" not in path.parts)
SOURCES = [*MODULES, ROOT / "index.html", ROOT / "style.css"]


def test_vendored_libraries_are_those_of_the_checksums() -> None:
    vendor = ROOT / "vendor"
    listed = dict(
        reversed(line.split(maxsplit=1)) for line in (vendor / "checksums.txt").read_text().splitlines()
    )
    found = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in vendor.glob("*.js")}
    assert found == listed


@pytest.mark.parametrize("path", sorted(ROOT.rglob("*.js")), ids=lambda path: path.name)
def test_imports_lead_to_files_of_the_page(path: Path) -> None:
    for name in re.findall(r'\b(?:from|import)\s*\(?"([^"]+)"', path.read_text("utf-8")):
        assert name.startswith("."), f"{name}: a bare module name needs a build or an import map"
        target = (path.parent / name).resolve()
        assert target.is_file()
        assert ROOT in target.parents


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.name)
def test_nothing_is_asked_of_another_server(path: Path) -> None:
    addresses = re.findall(r"\b(?:https?:)?//[\w.-]+\.\w+", path.read_text("utf-8"))
    assert not [address for address in addresses if "www.w3.org" not in address]


def test_every_text_is_in_the_strings_file_and_used() -> None:
    strings = set(re.findall(r'^  "([\w.-]+)":', (ROOT / "strings.js").read_text("utf-8"), re.MULTILINE))
    code = "".join(path.read_text("utf-8") for path in MODULES if path.name != "strings.js")
    used = set(re.findall(r'"([a-z]+(?:\.[\w-]+)+)"', code)) & {
        *strings,
        *re.findall(r'text\("([^"]+)"', code),
    }
    prefixes = tuple(re.findall(r"text\(`([\w.]+)\$\{", code))
    assert used <= strings
    assert [key for key in strings - used if not key.startswith(prefixes)] == []


def test_the_page_has_no_inline_script_or_style() -> None:
    page = (ROOT / "index.html").read_text("utf-8")
    assert not re.search(r"<style|\bstyle=|\bon\w+=|<script(?![^>]*\bsrc=)", page)
