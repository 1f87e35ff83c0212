"""The README runs, and stays short. What it names and links to is checked with the documentation (test_docs)."""

from __future__ import annotations

from pathlib import Path

import pytest

from sightloop.checkpoints.hub import BUNDLED_FOLDER
from tests.documents import run_pages
from tests.rules import REPOSITORY

README = (REPOSITORY / "README.md").read_text("utf-8")
LINES = 180


@pytest.mark.slow
def test_what_the_readme_says_to_type_runs(tmp_path: Path) -> None:
    if not BUNDLED_FOLDER.is_dir():
        pytest.skip("this source tree has no bundled model")
    assert run_pages({"README.md": README}, tmp_path) == {"README.md": []}


def test_it_is_short() -> None:
    assert README.count("\n") <= LINES
