"""What every test stands on: no network, and the images that lie beside the checkout where there are any."""

from __future__ import annotations

import gc
import os
from pathlib import Path

import pytest
from hypothesis import settings

from tests.slow_tests import LONGEST_FILES, SLOW_FILES

os.environ["HF_HUB_OFFLINE"] = "1"  # before anything reads it
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # there is a test process on each core already
os.environ["SIGHTLOOP_KERNELS"] = (
    "packed"  # the same numbers in each run, and nothing in this account's cache folder
)

# No test may fail by the clock: machines are slow and busy.
settings.register_profile("sightloop", deadline=None)
settings.load_profile("sightloop")

TESTS = Path(__file__).resolve().parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks the tests of slow files, which `make quick` leaves out, and begins with the longest files."""
    for item in items:
        if name_of(item) in SLOW_FILES:
            item.add_marker(pytest.mark.slow)
    first = {name: place for place, name in enumerate(LONGEST_FILES)}
    items.sort(key=lambda item: first.get(name_of(item), len(first)))


def name_of(item: pytest.Item) -> str:
    """A test's file, relative to tests/."""
    return item.path.relative_to(TESTS).as_posix() if item.path.is_relative_to(TESTS) else ""


def pytest_collection_finish() -> None:
    """Leaves what the imports made (torch, transformers: a million objects) out of every later garbage collection."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real images and vocabularies, `../shared/data` from the repository; skips where it is absent."""
    folder = Path(__file__).resolve().parents[2] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"needs real images, and there is no {folder}")
    return folder
