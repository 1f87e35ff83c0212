"""One server for the tests of a session that only ask it."""

from __future__ import annotations

from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest

from sightloop.checkpoints.hub import BUNDLED_FOLDER
from tests.apps.server.running import Running, jpeg, running


@pytest.fixture(scope="session")
def nano() -> Any:
    """The bundled model, loaded once."""
    if not BUNDLED_FOLDER.is_dir():
        pytest.skip("this source tree has no bundled model")
    import sightloop

    return sightloop.load(device="cpu")


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with three images, one of them in a folder, a text, and a link that leads out of it."""
    folder = tmp_path_factory.mktemp("photos")
    (folder / "inner").mkdir()
    for i, name in enumerate(("a.jpg", "b.jpg", "inner/c.jpg")):
        (folder / name).write_bytes(jpeg(i))
    (folder / "notes.txt").write_text("private")
    outside = tmp_path_factory.mktemp("outside")
    (outside / "secret.jpg").write_bytes(jpeg(9))
    (folder / "link.jpg").symlink_to(outside / "secret.jpg")
    (folder / "way").symlink_to(outside)
    (folder / "loop.jpg").symlink_to(folder / "loop.jpg")
    return folder


@pytest.fixture(scope="package")
def server(nano: Any, photos: Path) -> Generator[Running]:
    """A server of nano on this machine's own address, without a key."""
    with running(lambda _source: nano, folder=photos) as one:
        yield one
